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
from .attribution import Attribution as Attribution
from .attribution import Influence as Influence
from .baselines import EmbeddingSimilarity as EmbeddingSimilarity
from .baselines import Random as Random
from .baselines import RepresenterPoints as RepresenterPoints
from .baselines import TrainingLoss as TrainingLoss
from .classic import Config as Config
from .classic import InfluenceResult as InfluenceResult
from .classic import calc_all_grad_then_test as calc_all_grad_then_test
from .classic import calc_img_wise as calc_img_wise
from .classic import calc_influences as calc_influences
from .classic import calc_s_test_single as calc_s_test_single
from .classic import display_progress as display_progress
from .classic import get_default_config as get_default_config
from .classic import influential_loader as influential_loader
from .classic import init_logging as init_logging
from .classic import plot_influences as plot_influences
from .classic import plot_loo_scatter as plot_loo_scatter
from .curvature import EKFAC as EKFAC
from .curvature import GGN as GGN
from .curvature import KFAC as KFAC
from .curvature import Arnoldi as Arnoldi
from .curvature import Budget as Budget
from .curvature import Diagonal as Diagonal
from .curvature import EmpiricalFisher as EmpiricalFisher
from .curvature import Fisher as Fisher
from .curvature import Hessian as Hessian
from .curvature import Identity as Identity
from .curvature import Nystrom as Nystrom
from .curvature import Shampoo as Shampoo
from .curvature import Sharing as Sharing
from .curvature import Subsample as Subsample
from .damping import Absolute as Absolute
from .damping import FromTraining as FromTraining
from .damping import Relative as Relative
from .damping_path import DampingPath as DampingPath
from .damping_path import FromPath as FromPath
from .diagnostics import Diagnostics as Diagnostics
from .errors import InfluenceError as InfluenceError
from .errors import InvalidInput as InvalidInput
from .errors import MissingExtra as MissingExtra
from .errors import NonFinite as NonFinite
from .errors import NotLikelihood as NotLikelihood
from .errors import SolveFailed as SolveFailed
from .errors import TooLarge as TooLarge
from .errors import TrainingDataWarning as TrainingDataWarning
from .errors import UnknownName as UnknownName
from .evaluation import evaluate as evaluate
from .methods import arnoldi as arnoldi
from .methods import astra as astra
from .methods import blockwise as blockwise
from .methods import datainf as datainf
from .methods import diagonal as diagonal
from .methods import dual as dual
from .methods import ekfac as ekfac
from .methods import exact as exact
from .methods import gauss_newton as gauss_newton
from .methods import grad_cos as grad_cos
from .methods import grad_dot as grad_dot
from .methods import kfac as kfac
from .methods import koh_liang as koh_liang
from .methods import lissa as lissa
from .methods import nystrom as nystrom
from .methods import one_step_newton as one_step_newton
from .methods import relatif as relatif
from .methods import shampoo as shampoo
from .methods import tracin as tracin
from .methods import trak as trak
from .objectives import Bernoulli as Bernoulli
from .objectives import CrossEntropy as CrossEntropy
from .objectives import FromFunction as FromFunction
from .objectives import Logit as Logit
from .objectives import Margin as Margin
from .objectives import SquaredError as SquaredError
from .objectives import TokenCrossEntropy as TokenCrossEntropy
from .problem import Problem as Problem
from .problem import WeightDecay as WeightDecay
from .progress import progress as progress
from .projections import Gaussian as Gaussian
from .report import plot_agreement as plot_agreement
from .report import plot_class_matrix as plot_class_matrix
from .report import plot_convergence as plot_convergence
from .report import plot_damping_path as plot_damping_path
from .report import plot_self_influence as plot_self_influence
from .rows import Route as Route
from .scaling import Cosine as Cosine
from .scaling import Leverage as Leverage
from .scaling import Raw as Raw
from .scaling import RelatIF as RelatIF
from .schedule import AdamState as AdamState
from .schedule import Segment as Segment
from .scores import Scores as Scores
from .solvers import CG as CG
from .solvers import Auto as Auto
from .solvers import BlockGroup as BlockGroup
from .solvers import Blockwise as Blockwise
from .solvers import Cholesky as Cholesky
from .solvers import DataInf as DataInf
from .solvers import Factored as Factored
from .solvers import Forecast as Forecast
from .solvers import Neumann as Neumann
from .solvers import Spectral as Spectral
from .solvers import Woodbury as Woodbury
from .spectrum import Spectrum as Spectrum
from .trajectory import SOURCE as SOURCE
from .trajectory import source as source
from .truncation import Truncation as Truncation

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
    "DampingPath",
    "DataInf",
    "Diagnostics",
    "Diagonal",
    "EmbeddingSimilarity",
    "EmpiricalFisher",
    "Factored",
    "Fisher",
    "Forecast",
    "FromFunction",
    "FromPath",
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
    "plot_damping_path",
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
