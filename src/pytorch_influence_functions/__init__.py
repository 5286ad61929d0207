"""Influence functions for PyTorch: which training examples made my model do this, and how sure are you?

One formula: `score[q, i] = (1/N) <(C + lambda)^-1 grad m(q), grad loss(i)>`, the predicted change of the measure `m(q)`
when training example i is removed and the model retrained. Shape (queries, training examples); indices are positions in
the training *dataset*. For a loss, positive means helpful.

    scores = ptif.attribute(model, train, queries)
    scores.helpful(0, k=10)

What is typed daily stands here; the rest stands in one module per part of the formula: `ptif.methods`,
`ptif.curvature`, `ptif.solvers`, `ptif.damping`, `ptif.scaling`, `ptif.objectives`, `ptif.gradients`,
`ptif.trajectory`, `ptif.store`, `ptif.plots`, `ptif.evaluation`, `ptif.actions`, `ptif.hf` (Hugging Face),
`ptif.errors`, `ptif.classic`.
"""

from typing import TYPE_CHECKING

# Three are old submodules by their old names: `ptif.calc_influence_function.calc_s_test(...)` keeps working.
from . import (
    actions,
    calc_influence_function,
    classic,
    curvature,
    damping,
    errors,
    evaluation,
    gradients,
    hf,
    influence_function,
    methods,
    objectives,
    plots,
    scaling,
    solvers,
    store,
    trajectory,
    utils,
)
from ._version import __version__
from .actions.label_issues import find_label_issues
from .actions.what_if import what_if
from .attribute import attribute, forecast
from .classic import (
    calc_all_grad_then_test,
    calc_img_wise,
    calc_influences,
    calc_s_test_single,
    display_progress,
    get_default_config,
    influential_loader,
    init_logging,
)
from .core.distributed import distributed
from .core.errors import InfluenceError
from .core.progress import progress
from .core.renames import moved_names as _moved_names
from .evaluation.table import evaluate
from .influence.attribution import Attribution, Influence
from .methods.papers import dual, ekfac, exact, gauss_newton, tracin, trak
from .objectives.bernoulli import Bernoulli
from .objectives.likelihoods import CrossEntropy, SquaredError
from .objectives.margins import Logit, Margin
from .objectives.measures import FromFunction
from .objectives.tokens import TokenCrossEntropy
from .problem.problem import Problem
from .problem.weight_decay import WeightDecay
from .scores.diagnostics import Diagnostics
from .scores.parts import PartScores
from .scores.scores import Scores
from .store.gradient_index import Index
from .trajectory.recorder import Recorder
from .trajectory.recording import Recording
from .trajectory.source import source

__all__ = [
    "Attribution",
    "Bernoulli",
    "CrossEntropy",
    "Diagnostics",
    "FromFunction",
    "Index",
    "Influence",
    "InfluenceError",
    "Logit",
    "Margin",
    "PartScores",
    "Problem",
    "Recorder",
    "Recording",
    "Scores",
    "SquaredError",
    "TokenCrossEntropy",
    "WeightDecay",
    "__version__",
    "actions",
    "attribute",
    "calc_all_grad_then_test",
    "calc_img_wise",
    "calc_influence_function",
    "calc_influences",
    "calc_s_test_single",
    "classic",
    "curvature",
    "damping",
    "display_progress",
    "distributed",
    "dual",
    "ekfac",
    "errors",
    "evaluate",
    "evaluation",
    "exact",
    "find_label_issues",
    "forecast",
    "gauss_newton",
    "get_default_config",
    "gradients",
    "hf",
    "influence_function",
    "influential_loader",
    "init_logging",
    "methods",
    "objectives",
    "plots",
    "progress",
    "scaling",
    "solvers",
    "source",
    "store",
    "tracin",
    "trajectory",
    "trak",
    "utils",
    "what_if",
]

# Where the names went that stood at this level in the previews of version 1.0.
_PLACES = {
    "curvature": (
        "Arnoldi Budget Diagonal EKFAC EmpiricalFisher Fisher GGN Hessian Identity KFAC Nystrom Shampoo "
        "Sharing Spectrum Subsample"
    ),
    "solvers": "Auto BlockGroup Blockwise CG Cholesky DataInf Factored Forecast Neumann Spectral Truncation Woodbury",
    "damping": "Absolute FromTraining Relative",
    "scaling": "Cosine Leverage Raw RelatIF",
    "gradients": "Gaussian Route",
    "trajectory": "AdamState SOURCE Segment",
    "methods": (
        "EmbeddingSimilarity Random RepresenterPoints TrainingLoss arnoldi astra blockwise datainf diagonal "
        "grad_cos grad_dot kfac koh_liang lissa nystrom one_step_newton relatif shampoo"
    ),
    "errors": "InvalidInput MissingExtra NonFinite NotLikelihood SolveFailed TooLarge TrainingDataWarning UnknownName",
    "plots": "plot_agreement plot_class_matrix plot_convergence plot_self_influence",
    "classic": "Config InfluenceResult plot_influences plot_loo_scatter",
}
_MOVED = {name: f"{place}.{name}" for place, names in _PLACES.items() for name in names.split()}
_MOVED |= {
    "DampingPath": "damping.DampingCurve",
    "FromPath": "damping.FromCurve",
    "plot_damping_path": "plots.plot_damping_curve",
}

if not TYPE_CHECKING:  # a type checker shall see only the names that are there
    __getattr__ = _moved_names(__name__, _MOVED, __all__)


def __dir__() -> list[str]:
    return sorted(__all__)
