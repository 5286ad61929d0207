"""Ways to solve with the exact Gauss-Newton matrix, at equal cost: `python benchmarks/solvers.py`.

Cost is counted in passes: products of the whole curvature with one vector per query. Judged by the scores: their mean
rank correlation with those of a solve to a residual of 1e-6, and the distance of the solutions in the norm of C + D.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nets import mlp
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, GGN
from pytorch_influence_functions.damping import Relative
from pytorch_influence_functions.demo.data import datasets
from pytorch_influence_functions.evaluation import Recipe, train_model
from pytorch_influence_functions.influence.fitted_member import FittedMember
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.solvers import CG, Neumann

DECAY, QUERIES, PASSES, BATCH = 1e-3, 20, (1, 3, 10, 30), 200


def methods(n: int) -> dict[str, tuple[Callable[[int], Any], Any]]:
    """Name -> (passes -> solver, preconditioner)."""
    steps = n // BATCH

    def astra(passes: int) -> Any:
        return Neumann(
            steps=passes * steps,
            batch_size=BATCH,
            start="solved",
            momentum=0.9,
            halve_every=max(1, passes * steps // 4),
        )

    return {
        "CG": (lambda k: CG(max_steps=k), None),
        "CG, guided by EK-FAC": (lambda k: CG(max_steps=k), EKFAC()),
        "ASTRA (random batches, EK-FAC)": (astra, EKFAC()),
        "LiSSA (random batches)": (lambda k: Neumann(steps=k * steps, batch_size=BATCH), None),
    }


def solved(
    problem: ptif.Problem, share: float, solver: Any, guide: Any, queries: Any
) -> tuple[FittedMember, Rows, Rows, float]:
    """The fitted member, right-hand sides, what the solver has when its passes are spent, and seconds of solving."""
    method = ptif.Influence(GGN(), solver, Relative(share), preconditioner=guide)
    member = method.fit(problem).members[0]
    (slab,) = member.derivatives.stream(Source.of(queries, QUERIES))
    start = time.perf_counter()
    value = member.solve(slab.rows).value  # a row that is not done is no error here
    return member, slab.rows, value.dense(), time.perf_counter() - start


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = [v.argsort(1).argsort(1).double() for v in (a, b)]
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]).mean())


def main() -> None:
    train, test = (d.tensors for d in datasets())
    x, y = train[0].flatten(1).double(), train[1]
    queries = (test[0][:QUERIES].flatten(1).double(), test[1][:QUERIES])
    recipe = Recipe(
        lambda: mlp(784, 64, 10).double(),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=DECAY),
        epochs=30,
    )
    problem = ptif.Problem(train_model(recipe, (x, y), seed=0), ptif.CrossEntropy(), (x, y), weight_decay=DECAY)
    for share in (0.1, 1.0):
        member, asked, exact, seconds = solved(problem, share, CG(rtol=1e-6, max_steps=2000), EKFAC(), queries)
        rows = Rows.cat([s.rows for s in member.derivatives.stream()])
        truth = exact.inner(rows)
        whole = (exact.flat() * asked.flat()).sum(1)  # |x|^2 in the norm of C + D
        print(f"\ndamping share {share} (the exact solve took {seconds:.0f} s)")
        print(f"{'':<34}" + "".join(f"{f'{k} passes':>20}" for k in PASSES))
        for name, (solver, guide) in methods(len(x)).items():
            line = []
            for k in PASSES:
                _, _, found, _ = solved(problem, share, solver(k), guide, queries)
                gap = member.operator.apply(member.derivatives.space.rows(found.flat() - exact.flat()))
                lost = found.flat() - exact.flat()
                error = ((gap.flat() + member.shift.apply(member.derivatives.space.rows(lost)).flat()) * lost).sum(1)
                line.append(f"{spearman(found.inner(rows), truth):.3f} ({float((error / whole).sqrt().mean()):.2f})")
            print(f"{name:<34}" + "".join(f"{cell:>20}" for cell in line))
        print("rank correlation with the exact scores (relative error of the solution)")


if __name__ == "__main__":
    main()
