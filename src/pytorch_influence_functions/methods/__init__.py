"""Ready-made methods: the papers as compositions, and the baselines that any method has to beat."""

from ..trajectory.source import source
from ..trajectory.unrolled import unrolled
from .baselines import EmbeddingSimilarity, Random, RepresenterPoints, TrainingLoss
from .papers import (
    along,
    arnoldi,
    astra,
    blockwise,
    datainf,
    diagonal,
    dual,
    ekfac,
    exact,
    gauss_newton,
    grad_cos,
    grad_dot,
    kfac,
    koh_liang,
    lissa,
    nystrom,
    one_step_newton,
    relatif,
    shampoo,
    tracin,
    trak,
)
from .selection import less, trackstar

__all__ = [
    "EmbeddingSimilarity",
    "Random",
    "RepresenterPoints",
    "TrainingLoss",
    "along",
    "arnoldi",
    "astra",
    "blockwise",
    "datainf",
    "diagonal",
    "dual",
    "ekfac",
    "exact",
    "gauss_newton",
    "grad_cos",
    "grad_dot",
    "kfac",
    "koh_liang",
    "less",
    "lissa",
    "nystrom",
    "one_step_newton",
    "relatif",
    "shampoo",
    "source",
    "tracin",
    "trackstar",
    "trak",
    "unrolled",
]


def __dir__() -> list[str]:
    return __all__
