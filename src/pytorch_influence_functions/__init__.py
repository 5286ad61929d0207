"""Influence functions for PyTorch: which training examples made my model do this, and how sure are you?

One formula: `score[q, i] = (1/N) <(C + lambda)^-1 grad m(q), grad loss(i)>`, the predicted change of the measure `m(q)`
when training example i is removed and the model retrained. Shape (queries, training examples); indices are positions in
the training *dataset*. For a loss, positive means helpful.

    scores = ptif.attribute(model, train, queries)
    scores.helpful(0, k=10)
"""

# The old submodules by their old names: `ptif.calc_influence_function.calc_s_test` and the like keep working.
from . import calc_influence_function as calc_influence_function
from . import evaluation as evaluation
from . import influence_function as influence_function
from . import utils as utils
from ._version import __version__ as __version__
from .attribute import attribute as attribute
from .classic.calc import calc_all_grad_then_test as calc_all_grad_then_test
from .classic.calc import calc_img_wise as calc_img_wise
from .classic.calc import calc_influences as calc_influences
from .classic.calc import calc_s_test_single as calc_s_test_single
from .classic.config import Config as Config
from .classic.config import get_default_config as get_default_config
from .classic.console import display_progress as display_progress
from .classic.console import init_logging as init_logging
from .classic.helpers import influential_loader as influential_loader
from .classic.helpers import plot_influences as plot_influences
from .classic.helpers import plot_loo_scatter as plot_loo_scatter
from .classic.results import InfluenceResult as InfluenceResult
from .core.errors import InfluenceError as InfluenceError
from .core.errors import InvalidInput as InvalidInput
from .core.errors import MissingExtra as MissingExtra
from .core.errors import NonFinite as NonFinite
from .core.errors import NotLikelihood as NotLikelihood
from .core.errors import SolveFailed as SolveFailed
from .core.errors import TooLarge as TooLarge
from .core.errors import TrainingDataWarning as TrainingDataWarning
from .core.errors import UnknownName as UnknownName
from .core.progress import progress as progress
from .curvature.base import Budget as Budget
from .curvature.damping import Absolute as Absolute
from .curvature.damping import FromTraining as FromTraining
from .curvature.damping import Relative as Relative
from .curvature.diagonal import Diagonal as Diagonal
from .curvature.exact import GGN as GGN
from .curvature.exact import EmpiricalFisher as EmpiricalFisher
from .curvature.exact import Fisher as Fisher
from .curvature.exact import Hessian as Hessian
from .curvature.exact import Identity as Identity
from .curvature.kronecker.moments import Sharing as Sharing
from .curvature.kronecker.records import EKFAC as EKFAC
from .curvature.kronecker.records import KFAC as KFAC
from .curvature.kronecker.records import Shampoo as Shampoo
from .curvature.low_rank import Arnoldi as Arnoldi
from .curvature.low_rank import Nystrom as Nystrom
from .curvature.subsample import Subsample as Subsample
from .evaluation.table import evaluate as evaluate
from .gradients.projections import Gaussian as Gaussian
from .influence.attribution import Attribution as Attribution
from .influence.attribution import Influence as Influence
from .influence.damping_curve import DampingCurve as DampingCurve
from .influence.damping_curve import FromCurve as FromCurve
from .influence.scaling import Cosine as Cosine
from .influence.scaling import Leverage as Leverage
from .influence.scaling import Raw as Raw
from .influence.scaling import RelatIF as RelatIF
from .influence.spectrum import Spectrum as Spectrum
from .influence.truncation import Truncation as Truncation
from .linalg.rows import Route as Route
from .methods.baselines import EmbeddingSimilarity as EmbeddingSimilarity
from .methods.baselines import Random as Random
from .methods.baselines import RepresenterPoints as RepresenterPoints
from .methods.baselines import TrainingLoss as TrainingLoss
from .methods.papers import arnoldi as arnoldi
from .methods.papers import astra as astra
from .methods.papers import blockwise as blockwise
from .methods.papers import datainf as datainf
from .methods.papers import diagonal as diagonal
from .methods.papers import dual as dual
from .methods.papers import ekfac as ekfac
from .methods.papers import exact as exact
from .methods.papers import gauss_newton as gauss_newton
from .methods.papers import grad_cos as grad_cos
from .methods.papers import grad_dot as grad_dot
from .methods.papers import kfac as kfac
from .methods.papers import koh_liang as koh_liang
from .methods.papers import lissa as lissa
from .methods.papers import nystrom as nystrom
from .methods.papers import one_step_newton as one_step_newton
from .methods.papers import relatif as relatif
from .methods.papers import shampoo as shampoo
from .methods.papers import tracin as tracin
from .methods.papers import trak as trak
from .objectives.bernoulli import Bernoulli as Bernoulli
from .objectives.likelihoods import CrossEntropy as CrossEntropy
from .objectives.likelihoods import SquaredError as SquaredError
from .objectives.likelihoods import TokenCrossEntropy as TokenCrossEntropy
from .objectives.measures import FromFunction as FromFunction
from .objectives.measures import Logit as Logit
from .objectives.measures import Margin as Margin
from .problem.problem import Problem as Problem
from .problem.weight_decay import WeightDecay as WeightDecay
from .report.plots import plot_agreement as plot_agreement
from .report.plots import plot_damping_curve as plot_damping_curve
from .report.summaries import plot_class_matrix as plot_class_matrix
from .report.summaries import plot_convergence as plot_convergence
from .report.summaries import plot_self_influence as plot_self_influence
from .scores.diagnostics import Diagnostics as Diagnostics
from .scores.scores import Scores as Scores
from .solvers.auto import Auto as Auto
from .solvers.auto import Forecast as Forecast
from .solvers.blockwise import BlockGroup as BlockGroup
from .solvers.blockwise import Blockwise as Blockwise
from .solvers.cg import CG as CG
from .solvers.datainf import DataInf as DataInf
from .solvers.direct import Cholesky as Cholesky
from .solvers.direct import Spectral as Spectral
from .solvers.dual import Woodbury as Woodbury
from .solvers.factored import Factored as Factored
from .solvers.neumann import Neumann as Neumann
from .trajectory.segments import AdamState as AdamState
from .trajectory.segments import Segment as Segment
from .trajectory.source import SOURCE as SOURCE
from .trajectory.source import source as source

__all__ = [
    "CG",
    "EKFAC",
    "GGN",
    "KFAC",
    "SOURCE",
    "Absolute",
    "AdamState",
    "Arnoldi",
    "Attribution",
    "Auto",
    "Bernoulli",
    "BlockGroup",
    "Blockwise",
    "Budget",
    "Cholesky",
    "Config",
    "Cosine",
    "CrossEntropy",
    "DampingCurve",
    "DataInf",
    "Diagnostics",
    "Diagonal",
    "EmbeddingSimilarity",
    "EmpiricalFisher",
    "Factored",
    "Fisher",
    "Forecast",
    "FromCurve",
    "FromFunction",
    "FromTraining",
    "Gaussian",
    "Hessian",
    "Identity",
    "Influence",
    "InfluenceError",
    "InfluenceResult",
    "InvalidInput",
    "Leverage",
    "Logit",
    "Margin",
    "MissingExtra",
    "Neumann",
    "NonFinite",
    "NotLikelihood",
    "Nystrom",
    "Problem",
    "Random",
    "Raw",
    "RelatIF",
    "Relative",
    "RepresenterPoints",
    "Route",
    "Scores",
    "Segment",
    "Shampoo",
    "Sharing",
    "SolveFailed",
    "Spectral",
    "Spectrum",
    "SquaredError",
    "Subsample",
    "TokenCrossEntropy",
    "TooLarge",
    "TrainingDataWarning",
    "TrainingLoss",
    "Truncation",
    "UnknownName",
    "WeightDecay",
    "Woodbury",
    "__version__",
    "arnoldi",
    "astra",
    "attribute",
    "blockwise",
    "calc_all_grad_then_test",
    "calc_img_wise",
    "calc_influence_function",
    "calc_influences",
    "calc_s_test_single",
    "datainf",
    "diagonal",
    "display_progress",
    "dual",
    "ekfac",
    "evaluate",
    "evaluation",
    "exact",
    "gauss_newton",
    "get_default_config",
    "grad_cos",
    "grad_dot",
    "influence_function",
    "influential_loader",
    "init_logging",
    "kfac",
    "koh_liang",
    "lissa",
    "nystrom",
    "one_step_newton",
    "plot_agreement",
    "plot_class_matrix",
    "plot_convergence",
    "plot_damping_curve",
    "plot_influences",
    "plot_loo_scatter",
    "plot_self_influence",
    "progress",
    "relatif",
    "shampoo",
    "source",
    "tracin",
    "trak",
    "utils",
]
