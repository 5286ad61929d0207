"""The demo, part by part: train, explain, suspect, check, write. Every number is computed in the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.progress import progress
from ..influence.attribution import Attribution
from ..methods.papers import dual
from ..objectives.likelihoods import CrossEntropy
from ..problem.problem import Problem
from ..scores.scores import Scores
from . import show, write
from .data import DemoData, DemoDatasets, datasets, load
from .screen import Screen
from .story import Plan, Removal, Story, Suspects, Trained
from .train import Recipe, initial, look, one_thread, train, train_many


def run(
    screen: Screen,
    out: Path,
    recipe: Recipe | None = None,
    plan: Plan | None = None,
    data: DemoData | None = None,
) -> Story:
    """Run the demo and write its results into `out`.

    `data` (by default the bundled images) is a parameter for tests, which use fewer images.
    """
    began = time.perf_counter()
    recipe, plan = recipe or Recipe(), plan or Plan()
    data = load() if data is None else data
    sets = datasets(data)

    show.opening(screen, data, recipe)
    trained = _train(screen, sets, recipe)
    show.trained(screen, trained)

    fitted, scores = _attribute(screen, trained, sets, recipe)
    queries = pick_queries(trained, sets.test.tensors[1], plan)
    show.explained(screen, data, trained, scores, queries, plan)

    suspects = find_suspects(fitted.self_influence(), trained.train_losses, data.planted, plan.suspects, recipe.seed)
    show.suspected(screen, data, trained, suspects)

    groups, singles = _check(screen, sets, recipe, plan, trained, scores, queries, suspects)
    show.checked(screen, groups, singles)

    story = Story(data, recipe, trained, scores, queries, suspects, groups, singles, time.perf_counter() - began)
    files = write.everything(story, out)
    show.closing(screen, story, out, files, time.perf_counter() - began)
    return story


def _train(screen: Screen, sets: DemoDatasets, recipe: Recipe) -> Trained:
    images, labels = sets.train.tensors
    start = initial(recipe.seed, len(sets.train.classes))
    with one_thread(), screen.bar("training", recipe.epochs) as advance:
        model = train(images, labels, recipe, start, each_epoch=lambda: advance(1))
    losses, odds = look(model, images, labels)
    said = odds.argmax(1)
    test_losses, test_odds = look(model, *sets.test.tensors)
    return Trained(
        model=model,
        start=start,
        train_losses=losses,
        train_said=said,
        train_accuracy=_share(said == labels),
        test_losses=test_losses,
        test_odds=test_odds,
        test_accuracy=_share(test_odds.argmax(1) == sets.test.tensors[1]),
    )


def _share(right: Bool[Tensor, " n"]) -> float:
    return float(right.double().mean())


def _attribute(screen: Screen, trained: Trained, sets: DemoDatasets, recipe: Recipe) -> tuple[Attribution, Scores]:
    """All test images at once: the dual makes one query and five hundred cost nearly the same."""
    problem = Problem(trained.model, CrossEntropy(), sets.train, weight_decay=recipe.weight_decay)
    with one_thread(), screen.passes() as report, progress(report):
        fitted = dual(damping=recipe.damping(len(sets.train))).fit(problem, n_queries=len(sets.test))
        scores = fitted.score(sets.test)
    said = trained.test_odds.argmax(1).tolist()
    names = [f"test #{i}, called {sets.test.classes[c]}" for i, c in enumerate(said)]
    return fitted, replace(scores, query_names=names)


def pick_queries(trained: Trained, labels: Int[Tensor, " m"], plan: Plan) -> tuple[int, ...]:
    """The first misclassified test images of different classes, then the first correct ones of yet others."""
    right = trained.test_odds.argmax(1) == labels
    picked: list[int] = []
    seen: set[int] = set()
    for wanted, among in ((plan.wrong, ~right), (plan.right, right)):
        candidates = among.nonzero()[:, 0].tolist()
        fresh: list[int] = []
        for i in candidates:
            if int(labels[i]) not in seen and len(fresh) < wanted:
                fresh.append(i)
                seen.add(int(labels[i]))
        picked += fresh
    return tuple(picked)


def find_suspects(
    own: Float[Tensor, " n"],
    losses: Float[Tensor, " n"],
    planted: Bool[np.ndarray, " n"],
    count: int,
    seed: int,
) -> Suspects:
    r"""Rank by the predicted loss of each image for a model that never saw it.

    Loss today + predicted change of its own loss when it is removed: `loss_i + s_i / (1 - s_i)` with the
    self-influence `s_i = (1/N) g_i^T (C + D)^-1 g_i`. Under the empirical Fisher, `s_i` is also the example's leverage;
    dividing by `1 - s_i` takes its own gradient out of the curvature (Sherman-Morrison). A model can memorise a wrong
    label, which lowers its loss, but then depends on that label alone, which raises the second term.
    """
    suspicion = losses.double() + own / (1.0 - own).clamp_min(1e-9)
    wrong = torch.from_numpy(planted)
    order = suspicion.argsort(descending=True, stable=True)
    by_loss = losses.argsort(descending=True, stable=True)
    at_random = torch.randperm(len(losses), generator=torch.Generator().manual_seed(seed))
    hits = [int(wrong[ranked[:count]].sum()) for ranked in (order, by_loss, at_random)]
    return Suspects(own, suspicion, order, min(count, len(losses)), *hits)


def _check(
    screen: Screen,
    sets: DemoDatasets,
    recipe: Recipe,
    plan: Plan,
    trained: Trained,
    scores: Scores,
    queries: Sequence[int],
    suspects: Suspects,
) -> tuple[tuple[Removal, ...], tuple[Removal, ...]]:
    """Really remove, really retrain. The prediction was made before."""
    asked = [*_groups(scores, suspects, plan, recipe.seed), *_singles(scores, queries[: plan.wrong])]
    (train_images, train_labels), (images, labels) = sets.train.tensors, sets.test.tensors
    removals = [ids for _, ids, _ in asked]
    found = []
    with screen.bar(f"retraining {len(asked)} times", len(asked) * recipe.epochs) as advance:
        models = train_many(train_images, train_labels, recipe, trained.start, removals, lambda: advance(1))
        for (name, ids, query), model in zip(asked, models, strict=True):
            losses, _ = look(model, images, labels)
            changes = (losses - trained.test_losses).double()
            # First-order influence of a group is the sum over its members.
            predictions = scores.values[:, ids].double().sum(1)
            predicted, actual = (float(x.mean() if query is None else x[query]) for x in (predictions, changes))
            found.append(Removal(name, tuple(ids), query, predicted, actual))
    return tuple(r for r in found if r.query is None), tuple(r for r in found if r.query is not None)


def _groups(scores: Scores, suspects: Suspects, plan: Plan, seed: int) -> list[tuple[str, list[int], int | None]]:
    """Groups from both ends of the mean effect on the test set, the first suspects, and random ones."""
    size = plan.group
    found: list[tuple[str, list[int], int | None]] = []
    for word, order in (("helpful", scores.helpful_order()), ("harmful", scores.harmful_order())):
        for j in range(plan.groups):
            name = f"{'most' if j == 0 else 'next'} {word} {size}"
            found.append((name, order[j * size : (j + 1) * size].tolist(), None))
    found.append((f"most suspected {size}", suspects.order[:size].tolist(), None))
    shuffled = torch.randperm(scores.n_train, generator=torch.Generator().manual_seed(seed + 1))
    for j in range(plan.groups):
        found.append((f"random {size}", shuffled[j * size : (j + 1) * size].tolist(), None))
    return found


def _singles(scores: Scores, queries: Sequence[int]) -> list[tuple[str, list[int], int | None]]:
    """For each query the single image that helps it most, and the one that harms it most."""
    return [
        (f"#{i}, {word} test #{q}", [i], q)
        for q in queries
        for word, ((i, _),) in (("helps", scores.helpful(q, 1)), ("harms", scores.harmful(q, 1)))
    ]
