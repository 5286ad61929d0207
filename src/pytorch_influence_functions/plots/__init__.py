"""Figures of scores. Each function returns a matplotlib `Figure`, opens no window and changes no setting."""

from .bars import plot_bars
from .inputs import plot_input_influence
from .query import plot_agreement, plot_damping_curve, plot_influences
from .summaries import plot_class_matrix, plot_convergence, plot_self_influence

__all__ = [
    "plot_agreement",
    "plot_bars",
    "plot_class_matrix",
    "plot_convergence",
    "plot_damping_curve",
    "plot_influences",
    "plot_input_influence",
    "plot_self_influence",
]


def __dir__() -> list[str]:
    return __all__
