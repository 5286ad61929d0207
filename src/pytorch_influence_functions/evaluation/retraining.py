"""Train on each subset with each seed and measure the queries: the ground truth of data attribution."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core.errors import InvalidInput, NonFinite
from ..core.fingerprint import Fingerprint, Probe
from ..core.progress import Meter
from ..core.threads import one_thread
from ..core.validate import whole_number
from ..influence.question import resolve_measure
from ..objectives.base import AbstractObjective
from ..objectives.convert import as_objective
from ..objectives.measures import FromFunction
from ..objectives.tokens import TokenCrossEntropy
from ..problem.data import Source
from ..problem.infer_loss import infer_objective
from ..problem.ingredients import describe_model, digest_data
from ..problem.model_state import plain_autograd
from ..problem.problem import Problem
from ..problem.random_state import same_rng
from ..trajectory.recorder import Recorder
from . import training, user_training
from .cache import RetrainingCache, job_key
from .recipe import Recipe, TrainFunction, name_callable
from .subsets import Subsets
from .training import Examples, Job, Stack, TrainingMode
from .truth import Truth


@plain_autograd()
def retrain(
    recipe: Any,
    subsets: Any,
    seeds: int | Sequence[int] = 5,
    *,
    train: Any,
    queries: Any,
    measure: Any = None,
    folder: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> Truth:
    """Train on each subset with each seed, and on everything with each seed; measure every query each time.

    The same request gives the same numbers, in any order and with any number of workers. With `folder` every finished
    training is kept there under a fingerprint of everything it depends on (the code of model, loss, measure and
    training function, what the model computes, settings, data, queries, version): an interrupted run goes on where it
    stopped, further subsets or seeds add to what is there, and nothing made from anything else is used. The
    fingerprint reads the data and the queries once.

    Args:
        recipe: a `Recipe`, or your own function `(dataset, seed) -> trained model`; the dataset it gets holds what
            is kept (with labels changed where asked), and has `.indices` into the whole. Random generators start from
            the seed.
        subsets: `Subsets`, or a bool matrix [S, N], True where kept.
        seeds: how many (0, 1, ...), or which.
        train, queries: data, as `ptif.attribute` takes them.
        measure: what is measured on a query; `None`: the training loss.
        folder: where finished work is kept.
        workers: a `Recipe` trains in so many threads (`None`: torch's number of threads), a function of your own in so
            many processes (`None`: in this one; more need a function defined in a module).

    Returns:
        `Truth` with `measured` [S, R, Q] and `baseline` [R, Q].

    Raises:
        InvalidInput, NonFinite: one sentence each.

    >>> x = torch.arange(12.0).reshape(6, 2).sin()
    >>> recipe = Recipe(lambda: torch.nn.Linear(2, 1), epochs=2, batch_size=3, loss=torch.nn.MSELoss())
    >>> truth = retrain(recipe, Subsets.leave_one_out(6), seeds=2, train=(x, x[:, :1]), queries=(x[:1], x[:1, :1]))
    >>> truth.measured.shape
    torch.Size([6, 2, 1])
    """
    began = time.perf_counter()
    source = Source.of(train)
    query_source = source.read_alike(queries)
    subsets = Subsets.of(subsets)
    if subsets.n != len(source):
        raise InvalidInput(
            f"The subsets are of {subsets.n} examples and the training data hold {len(source)}; make them fit."
        )
    seed_list = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(s) for s in seeds)
    if not seed_list or len(set(seed_list)) < len(seed_list):
        raise InvalidInput(f"seeds must be a number of at least 1, or different whole numbers; got {seeds!r}.")
    if not isinstance(recipe, Recipe) and not callable(recipe):
        raise InvalidInput(
            f"recipe must be a Recipe or a function (dataset, seed) -> trained model, got {type(recipe).__name__}."
        )
    if workers is not None:
        whole_number("workers", workers)
    retraining = _Retraining.of(recipe, source, query_source, measure, seed_list[0], workers)
    everything = torch.ones(subsets.n, dtype=torch.bool)
    jobs = [Job(everything, {}, r) for r in seed_list]
    jobs += [Job(row, subsets.change(s), r) for s, row in enumerate(subsets.kept) for r in seed_list]
    cache = RetrainingCache.of(folder, retraining.fingerprint)
    values, earlier_seconds = retraining.results(jobs, cache)
    table = torch.stack(values).reshape(1 + len(subsets), len(seed_list), -1)
    return Truth(
        subsets=subsets,
        measured=table[1:],
        baseline=table[0],
        seeds=seed_list,
        lower_is_better=retraining.measure.lower_is_better,
        recipe=retraining.description,
        measure=repr(retraining.measure),
        how="; ".join((retraining.how, *cache.notes)),
        fingerprint=retraining.fingerprint.key,
        seconds=earlier_seconds + time.perf_counter() - began,
    )


def train_model(
    recipe: Recipe,
    data: Any,
    seed: int = 0,
    record: str | os.PathLike[str] | None = None,
    at: Sequence[float] | None = None,
) -> nn.Module:
    """Train a model on everything by the recipe, as `retrain` does with the same seed; it is returned in eval mode.

    Args:
        recipe: how the model is trained.
        data: the training data, as `ptif.attribute` takes it.
        seed: of weights and order.
        record: a folder in which the run is recorded, for `ptif.methods.along`; an earlier one there is replaced.
            `None`: it is not recorded.
        at: the shares of the run at which it is recorded; `None`: those of `Recorder`.

    Raises:
        NonFinite: the training diverged.

    >>> x = torch.arange(12.0).reshape(6, 2).sin()
    >>> train_model(Recipe(lambda: nn.Linear(2, 1), loss=nn.MSELoss()), (x, x[:, :1])).training
    False
    """
    source = Source.of(data)
    problem, objective = _training_loss(recipe, source, seed)
    examples = Examples.of(source, problem.model)
    job = Job(torch.ones(len(source), dtype=torch.bool), {}, seed)

    def recording(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Recorder:
        assert record is not None, "asked for below"
        return Recorder(model, optimizer, record, at, steps, batch_size=recipe.batch_size, overwrite=True)

    hook = None if record is None else recording
    steps = recipe.steps(len(source))
    if training.LastBatch.of(recipe, objective, examples, job, problem.model) is not training.LastBatch.KEPT:
        steps -= recipe.epochs
    with _seeded(seed), Meter(steps, "training", "step") as meter:
        model = training.train_alone(recipe, objective, examples, job, meter.advance, hook)
    diverged = next((name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())), None)
    if diverged is not None:
        raise NonFinite(
            f"The model trained with seed {seed} has NaN or infinity in {diverged!r}, so its training diverged; lower "
            "the learning rate of the recipe."
        )
    return model


def _training_loss(recipe: Recipe, source: Source, seed: int) -> tuple[Problem, AbstractObjective]:
    """The training loss, inferred if it is not given, with its reduction known."""
    model = recipe.fresh(seed)
    objective = recipe.objective() or infer_objective(model, source)
    if recipe.loss is None and isinstance(objective, TokenCrossEntropy):
        # A step of training is one of a mean over tokens: a sum would make every step as many times longer.
        objective = replace(objective, average=True)
    problem = Problem(model, objective, source)
    return problem, resolve_measure(problem, problem.objective, problem.objective, source)


@final
@dataclass(frozen=True, eq=False)
class _Retraining:
    """The recipe, its data, and how its jobs are carried out."""

    recipe: Recipe | TrainFunction
    objective: AbstractObjective
    measure: AbstractObjective
    source: Source
    queries: Source
    examples: Examples | None
    mode: TrainingMode
    workers: int
    description: str
    how: str
    fingerprint: Fingerprint

    @staticmethod
    def of(
        recipe: Recipe | TrainFunction, source: Source, queries: Source, measure: Any, seed: int, workers: int | None
    ) -> _Retraining:
        if not isinstance(recipe, Recipe):
            return _Retraining._of_function(recipe, source, queries, measure, seed, workers or 1)
        problem, objective = _training_loss(recipe, source, seed)
        examples = Examples.of(source, problem.model)
        mode = TrainingMode.of(recipe, objective, examples, seed)
        threads = 1 if mode.draws else workers or torch.get_num_threads()
        measured = resolve_measure(problem, objective, measure, queries)
        batch_loss = recipe.batch_loss(objective)
        how = f"{mode.description}; {threads} thread{'s' * (threads != 1)}"
        how += f"; {batch_loss.words}" if batch_loss.differs else ""
        parts = (recipe, objective, measured, source, queries, examples, mode, threads, repr(recipe), how)
        settings = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in ("model", "loss")}
        # Always of the same seed, so that other seeds find what was made before.
        model, probes = describe_model(Problem(recipe.fresh(0), objective, source))
        model |= {"model function": recipe.model, "loss": objective, "batch loss": batch_loss, "recipe": settings}
        if source.drops_last and training.has_batch_norm(problem.model):
            model |= {"a last batch of one": "left out"}
        return _Retraining(*parts, _fingerprint(model, probes, source, queries, measured))

    @staticmethod
    def _of_function(
        recipe: TrainFunction, source: Source, queries: Source, measure: Any, seed: int, workers: int
    ) -> _Retraining:
        if measure is None:
            raise InvalidInput(
                "What to measure on a query cannot be told from a training function; pass measure=, e.g. "
                "torch.nn.CrossEntropyLoss()."
            )
        measured = as_objective(measure)
        if isinstance(measured, FromFunction):  # a trained model shows how the function averages over examples
            work = user_training.Work(recipe, source, queries, measured)
            first = work.train(Job(torch.ones(len(source), dtype=torch.bool), {}, seed))
            measured = resolve_measure(Problem(first, measured, queries), measured, measured, queries)
        place = "in this process" if workers == 1 else f"in {workers} processes"
        mode, how = TrainingMode(1, ""), f"one by one {place}"
        parts = (recipe, measured, measured, source, queries, None, mode, workers, name_callable(recipe), how)
        return _Retraining(*parts, _fingerprint({"training function": recipe}, {}, source, queries, measured))

    def results(self, jobs: Sequence[Job], cache: RetrainingCache) -> tuple[list[Tensor], float]:
        """The measurements of every job, read or made now, and the seconds that those read had taken."""
        names = [job_key(job) for job in jobs]
        stored, earlier_seconds = cache.read()
        measurements = {name: value for name, value in stored.items() if name in set(names)}
        missing = {name: job for name, job in zip(names, jobs, strict=True) if name not in measurements}
        with Meter(len(set(names)), "retraining", "model") as meter:
            meter.advance(len(measurements))
            for keys, values, seconds in self._run(missing):
                cache.write(keys, values, seconds)
                measurements |= dict(zip(keys, values, strict=True))
                meter.advance(len(keys))
        return [measurements[name] for name in names], earlier_seconds

    def _run(self, jobs: dict[str, Job]) -> Iterator[tuple[list[str], Tensor, float]]:
        names = list(jobs)
        if self.examples is None:
            assert not isinstance(self.recipe, Recipe)
            work = user_training.Work(self.recipe, self.source, self.queries, self.measure)
            last = time.perf_counter()
            for position, values in user_training.run_jobs(work, list(jobs.values()), self.workers):
                now = time.perf_counter()
                yield [names[position]], values[None], now - last
                last = now
            return
        yield from self._run_in_threads([[(n, jobs[n]) for n in chunk] for chunk in self._chunks(jobs)])

    def _chunks(self, jobs: dict[str, Job]) -> list[list[str]]:
        """Groups of jobs that are trained as one stack: they go through batches of the same number and sizes."""
        alike: dict[int, list[str]] = defaultdict(list)
        assert isinstance(self.recipe, Recipe)
        for name, job in jobs.items():
            alike[0 if self.recipe.hold_batches else int(job.kept.sum())].append(name)
        chunks = []
        for group in alike.values():
            # Chunks are small enough to leave work for every thread.
            size = max(1, min(self.mode.stack_size, -(-len(group) // self.workers)))
            chunks += [group[start : start + size] for start in range(0, len(group), size)]
        return chunks

    def _run_in_threads(self, chunks: list[list[tuple[str, Job]]]) -> Iterator[tuple[list[str], Tensor, float]]:
        given_up = threading.Event()

        def one(chunk: list[tuple[str, Job]]) -> tuple[list[str], Tensor, float]:
            torch.set_num_threads(1)  # the setting belongs to the thread that makes it
            began = time.perf_counter()
            values = self._train([job for _, job in chunk], given_up)
            return [name for name, _ in chunk], values, time.perf_counter() - began

        with one_thread(), ThreadPoolExecutor(self.workers) as pool:
            try:
                for future in as_completed([pool.submit(one, chunk) for chunk in chunks]):
                    keys, values, seconds = future.result()
                    yield keys, values, seconds / self.workers
            finally:
                given_up.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _train(self, jobs: list[Job], given_up: threading.Event) -> Tensor:
        assert isinstance(self.recipe, Recipe) and self.examples is not None

        def check_given_up() -> None:
            if given_up.is_set():
                raise InterruptedError("given up: another training failed or the run was interrupted")

        model: nn.Module | Stack
        if self.mode.stack_size > 1:
            model = training.train_together(self.recipe, self.objective, self.examples, jobs, check_given_up)
        else:
            with _seeded(jobs[0].seed) if self.mode.draws else nullcontext():
                model = training.train_alone(self.recipe, self.objective, self.examples, jobs[0], check_given_up)
        return training.measure_queries(model, self.measure, self.queries, [job.seed for job in jobs])


def _fingerprint(
    ingredients: dict[str, Any],
    probes: dict[str, Probe],
    source: Source,
    queries: Source,
    measured: AbstractObjective,
) -> Fingerprint:
    """What measurements depend on beside the subset and the seed; reads the data and the queries once."""
    data = {"training data": digest_data(source), "queries": digest_data(queries, label="reading the queries")}
    return Fingerprint.of(ingredients | data | {"measure": measured}, probes)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, dropout and the like draw from the seed; afterwards the global random state is as before."""
    with same_rng():
        torch.manual_seed(seed)
        yield
