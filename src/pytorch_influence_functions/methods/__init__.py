"""Ready-made methods: the papers as compositions, and the baselines that any method has to beat."""

from ..trajectory.source import source
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
    "lissa",
    "nystrom",
    "one_step_newton",
    "relatif",
    "shampoo",
    "source",
    "tracin",
    "trak",
]


def __dir__() -> list[str]:
    return __all__
