"""Is the result of a training a smooth function of the weights on its data? If not, its derivative says nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from .replay import Runner


@final
@dataclass(frozen=True, eq=False)
class Metasmoothness:
    r"""How far the change of the trained weights goes on in its own direction (Engstrom et al. 2025).

    With theta(z) the weights after training with weight z on every example's loss, and v random signs,

        d1 = theta(1 + h v) - theta(1),    d2 = theta(1 + 2 h v) - theta(1 + h v)
        metasmoothness = sum_p |d1_p| sign(d1_p) sign(d2_p) / sum_p |d1_p|

    1: the second step of h goes where the first went, as for a smooth function; 0: elsewhere, as by chance; -1: back.

    Args:
        value: between -1 and 1.
        step: h.
        signs: v, [N].
        perturbed: theta(1 + h v), [P].

    >>> print(Metasmoothness(0.11, 0.02, torch.ones(2), torch.zeros(3)))
    metasmoothness .11 (three trainings, weights on the data changed by .02)
    """

    value: float
    step: float
    signs: Float[Tensor, " n"]
    perturbed: Float[Tensor, " p"]

    def __str__(self) -> str:
        value = f"{self.value:.2f}".replace("0.", ".", 1)
        return f"metasmoothness {value} (three trainings, weights on the data changed by {self.step:.2g})".replace(
            " 0.", " ."
        )


def measure_metasmoothness(
    runner: Runner, end: Float[Tensor, " p"] | None = None, step: float | None = None, seed: int = 0
) -> Metasmoothness:
    """Train two or three times and compare.

    Args:
        runner: the run.
        end: the weights that the plain run ends at, [P]; `None`: it is trained too.
        step: h; `None`: 1 / sqrt(N), with which all changes together are as large as the removal of one example.
        seed: of the signs.
    """
    n = len(runner.problem)
    h = 1.0 / math.sqrt(n) if step is None else step
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    ends = [runner.train().theta if end is None else end]
    ends += [runner.train(1.0 + k * h * signs).theta for k in (1, 2)]
    first, second = (ends[1] - ends[0]).double(), (ends[2] - ends[1]).double()
    total = float(first.abs().sum())
    # Weights that do not move at all are as smooth as can be.
    value = float((first.abs() * first.sign() * second.sign()).sum()) / total if total > 0 else 1.0
    return Metasmoothness(value, h, signs, ends[1])
