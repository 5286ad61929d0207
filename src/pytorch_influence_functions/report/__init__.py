"""Showing results: pictures, and a page to look through. Nothing here computes an influence."""

from __future__ import annotations

from .page import Report, write_report
from .plots import plot_agreement, plot_damping_path, plot_influences

__all__ = ["Report", "plot_agreement", "plot_damping_path", "plot_influences", "write_report"]
