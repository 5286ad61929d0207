"""Showing results: pictures now, pages later. Nothing here computes an influence."""

from __future__ import annotations

from .plots import plot_agreement, plot_damping_path, plot_influences

__all__ = ["plot_agreement", "plot_damping_path", "plot_influences"]
