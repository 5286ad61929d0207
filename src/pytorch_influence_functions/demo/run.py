"""The demo, part by part: train, explain, suspect, check, write. Every number is computed in the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ..core.progress import progress
from ..core.threads import one_thread
from ..evaluation.recipe import Recipe
from ..evaluation.retraining import retrain, train_model
from ..evaluation.subsets import Subsets
from ..influence.attribution import Attribution
from ..methods.papers import dual
from ..objectives.likelihoods import CrossEntropy
from ..problem.problem import Problem
from ..scores.scores import Scores
from . import show, write
from .data import DemoData, DemoDatasets, datasets, load
from .model import WEIGHT_DECAY, make_recipe, training_damping
from .screen import Screen
from .story import Comparison, Extent, Story, Suspects, TrainedModel

RemovedGroup: TypeAlias = tuple[str, list[int], int | None]
"""A name, the training images removed together, and the test image whose loss is measured (`None`: the mean of all)."""


def run_demo(
    screen: Screen,
    out: Path,
    seed: int = 0,
    recipe: Recipe | None = None,
    extent: Extent | None = None,
    data: DemoData | None = None,
) -> Story:
    """Run the demo and write its results into `out`.

    `data` (by default the bundled images) is a parameter for tests, which use fewer images.
    """
    began = time.perf_counter()
    recipe, extent = recipe or make_recipe(), extent or Extent()
    data = load() if data is None else data
    sets = datasets(data)

    show.show_setting(screen, data, recipe)
    trained = _train(screen, sets, recipe, seed)
    show.show_model(screen, trained)

    attribution, scores = _attribute(screen, trained, sets, recipe)
    queries = pick_queries(trained, sets.test.tensors[1], extent)
    show.show_scores(screen, data, trained, scores, queries, extent)

    suspects = find_suspects(attribution.self_influence(), trained.train_losses, data.planted, extent.suspects, seed)
    show.show_suspects(screen, data, trained, suspects)

    removed = [*_groups(scores, suspects, extent, seed), *_singles(scores, queries[: extent.wrong])]
    comparisons = _retrain(screen, sets, recipe, seed, scores, removed)
    groups = tuple(c for c in comparisons if c.query is None)
    singles = tuple(c for c in comparisons if c.query is not None)
    show.show_comparisons(screen, groups, singles)

    seconds = time.perf_counter() - began
    story = Story(data, recipe, seed, trained, scores, queries, suspects, groups, singles, seconds)
    files = write.write_files(story, out)
    show.show_files(screen, story, out, files, time.perf_counter() - began)
    return story


def _train(screen: Screen, sets: DemoDatasets, recipe: Recipe, seed: int) -> TrainedModel:
    with one_thread(), screen.bars() as report, progress(report):
        model = train_model(recipe, sets.train, seed)
    train_losses, train_probabilities = _predict(model, *sets.train.tensors)
    test_losses, test_probabilities = _predict(model, *sets.test.tensors)
    return TrainedModel(
        model=model,
        train_losses=train_losses,
        train_probabilities=train_probabilities,
        train_accuracy=_share(train_probabilities.argmax(1) == sets.train.tensors[1]),
        test_losses=test_losses,
        test_probabilities=test_probabilities,
        test_accuracy=_share(test_probabilities.argmax(1) == sets.test.tensors[1]),
    )


@torch.no_grad()
def _predict(
    model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n classes"]]:
    """The loss and the class probabilities of every image."""
    outputs = model(images)
    return functional.cross_entropy(outputs, labels, reduction="none"), outputs.softmax(1)


def _share(right: Bool[Tensor, " n"]) -> float:
    return float(right.double().mean())


def _attribute(screen: Screen, trained: TrainedModel, sets: DemoDatasets, recipe: Recipe) -> tuple[Attribution, Scores]:
    """Score all test images at once: for the dual, five hundred queries cost little more than one."""
    problem = Problem(trained.model, CrossEntropy(), sets.train, weight_decay=WEIGHT_DECAY)
    with one_thread(), screen.bars() as report, progress(report):
        attribution = dual(damping=training_damping(recipe, len(sets.train))).fit(problem, n_queries=len(sets.test))
        scores = attribution.score(sets.test)
    classes = trained.test_probabilities.argmax(1).tolist()
    names = [f"test #{i}, called {sets.test.classes[c]}" for i, c in enumerate(classes)]
    return attribution, replace(scores, query_names=names)


def pick_queries(trained: TrainedModel, labels: Int[Tensor, " m"], extent: Extent) -> tuple[int, ...]:
    """The first misclassified test images of different classes, then the first correct ones of yet other classes."""
    right = trained.test_probabilities.argmax(1) == labels
    picked: list[int] = []
    classes: set[int] = set()
    for count, candidates in ((extent.wrong, ~right), (extent.right, right)):
        fresh: list[int] = []
        for i in candidates.nonzero()[:, 0].tolist():
            if int(labels[i]) not in classes and len(fresh) < count:
                fresh.append(i)
                classes.add(int(labels[i]))
        picked += fresh
    return tuple(picked)


def find_suspects(
    self_influence: Float[Tensor, " n"],
    losses: Float[Tensor, " n"],
    planted: Bool[np.ndarray, " n"],
    count: int,
    seed: int,
) -> Suspects:
    r"""Rank by the predicted loss of each image for a model that was never trained on it.

    That is its loss now + the predicted change of its own loss when it is removed: `loss_i + s_i / (1 - s_i)` with the
    self-influence `s_i = (1/N) g_i^T (C + D)^-1 g_i`. Under the empirical Fisher, `s_i` is also the example's leverage;
    dividing by `1 - s_i` takes its own gradient out of the curvature (Sherman-Morrison). A model can memorise a wrong
    label, which lowers its loss, but then depends on that label alone, which raises the second term.
    """
    suspicion = losses.double() + self_influence / (1.0 - self_influence).clamp_min(1e-9)
    wrong = torch.from_numpy(planted)
    order = suspicion.argsort(descending=True, stable=True)
    by_loss = losses.argsort(descending=True, stable=True)
    at_random = torch.randperm(len(losses), generator=torch.Generator().manual_seed(seed))
    hits = [int(wrong[ranked[:count]].sum()) for ranked in (order, by_loss, at_random)]
    return Suspects(self_influence, suspicion, order, min(count, len(losses)), *hits)


def _retrain(
    screen: Screen,
    sets: DemoDatasets,
    recipe: Recipe,
    seed: int,
    scores: Scores,
    removed: Sequence[RemovedGroup],
) -> tuple[Comparison, ...]:
    """Retrain without each group, and put the measured change beside the predicted one."""
    subsets = Subsets.groups(len(sets.train), [ids for _, ids, _ in removed])
    with screen.bars() as report, progress(report):
        truth = retrain(recipe, subsets, [seed], train=sets.train, queries=sets.test)
    # Both [queries, groups]. The first-order prediction for a group is the sum of its members' scores.
    predicted, actual = truth.predicted(scores.values), truth.changes()[:, 0].T
    comparisons = []
    for column, (name, ids, query) in enumerate(removed):
        changes = (change[:, column] for change in (predicted, actual))
        sizes = (float(change.mean() if query is None else change[query]) for change in changes)
        comparisons.append(Comparison(name, tuple(ids), query, *sizes))
    return tuple(comparisons)


def _groups(scores: Scores, suspects: Suspects, extent: Extent, seed: int) -> list[RemovedGroup]:
    """Groups from both ends of the mean effect on the test set, the first suspects, and random ones."""
    size = extent.group
    groups: list[RemovedGroup] = []
    for kind, order in (("helpful", scores.helpful_order()), ("harmful", scores.harmful_order())):
        for j in range(extent.groups):
            name = f"{'most' if j == 0 else 'next'} {kind} {size}"
            groups.append((name, order[j * size : (j + 1) * size].tolist(), None))
    groups.append((f"most suspected {size}", suspects.order[:size].tolist(), None))
    shuffled = torch.randperm(scores.n_train, generator=torch.Generator().manual_seed(seed + 1))
    for j in range(extent.groups):
        groups.append((f"random {size}", shuffled[j * size : (j + 1) * size].tolist(), None))
    return groups


def _singles(scores: Scores, queries: Sequence[int]) -> list[RemovedGroup]:
    """For each query the single image that helps it most, and the one that harms it most."""
    return [
        (f"#{i}, {effect} test #{q}", [i], q)
        for q in queries
        for effect, ((i, _),) in (("helps", scores.helpful(q, 1)), ("harms", scores.harmful(q, 1)))
    ]
