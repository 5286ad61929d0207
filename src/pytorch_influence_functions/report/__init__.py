"""Showing results: pictures, and a page to look through. Nothing here computes an influence."""

from __future__ import annotations

from .bars import plot_bars
from .page import Report, write_report
from .plots import plot_agreement, plot_damping_curve, plot_influences
from .summaries import plot_class_matrix, plot_convergence, plot_self_influence

__all__ = [
    "Report",
    "plot_agreement",
    "plot_bars",
    "plot_class_matrix",
    "plot_convergence",
    "plot_damping_curve",
    "plot_influences",
    "plot_self_influence",
    "write_report",
]
