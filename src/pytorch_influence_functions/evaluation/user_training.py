"""A user's own training function, called once per job: in this process or in several."""

from __future__ import annotations

import multiprocessing
import pickle
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..objectives.base import AbstractObjective
from ..problem.data import Source
from ..problem.edited import EditedExamples
from ..problem.random_state import same_rng
from .recipe import TrainFunction, name_callable
from .training import Job, measure_queries


@final
@dataclass(frozen=True, eq=False)
class Work:
    """Everything that a training needs. It is sent to other processes, so it must pickle."""

    function: TrainFunction
    data: Source
    queries: Source
    measure: AbstractObjective

    def run(self, job: Job) -> Tensor:
        """Train and measure, [Q]. Random generators start from the job's seed and are put back afterwards."""
        return measure_queries(self.train(job), self.measure, self.queries, [job.seed])[0]

    def train(self, job: Job) -> nn.Module:
        """Call the user's function; the model is returned in eval mode."""
        examples = EditedExamples(self.data.dataset, job.kept.nonzero().flatten().tolist(), job.change)
        with same_rng():
            random.seed(job.seed)
            np.random.seed(job.seed % 2**32)
            torch.manual_seed(job.seed)
            model = self.function(examples, job.seed)
        if not isinstance(model, nn.Module):
            raise InvalidInput(
                f"The training function {name_callable(self.function)} gave {type(model).__name__}, expected the "
                "trained torch.nn.Module; return it."
            )
        return model.eval()


# Set in each worker process when it starts.
_process_work: Work | None = None


def _start_process(work: Work) -> None:
    global _process_work
    torch.set_num_threads(1)
    _process_work = work


def _run_job(position: int, job: Job) -> tuple[int, Tensor]:
    assert _process_work is not None
    return position, _process_work.run(job)


def run_jobs(work: Work, jobs: Sequence[Job], processes: int) -> Iterator[tuple[int, Tensor]]:
    """Yield `(position of the job, measurements [Q])` as trainings finish.

    Raises:
        InvalidInput: the function or the data cannot be sent to another process.
    """
    if processes == 1:
        for position, job in enumerate(jobs):
            yield position, work.run(job)
        return
    try:
        pickle.dumps(work)
    except Exception as cause:
        raise InvalidInput(
            f"The training function {name_callable(work.function)} or its data cannot be sent to another process "
            f"({cause}); define it in a module, or use workers=1."
        ) from cause
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start_process, initargs=(work,)) as pool:
        try:
            for future in as_completed([pool.submit(_run_job, position, job) for position, job in enumerate(jobs)]):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
