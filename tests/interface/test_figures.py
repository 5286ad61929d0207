"""Figures about all examples at once, compared with pictures that were looked at; and bad input in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions import Diagnostics, Scores
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.plots.bars import plot_bars
from pytorch_influence_functions.plots.query import plot_agreement, plot_damping_curve
from pytorch_influence_functions.plots.summaries import plot_class_matrix, plot_convergence, plot_self_influence

pytest.importorskip("matplotlib")
from matplotlib.testing.compare import compare_images

PICTURES = Path(__file__).parent / "pictures"
NAMES = ["cat", "dog_$1$", "owl"]


def scores(**options: Any) -> Scores:
    values = torch.linspace(-1, 1, 36).reshape(3, 12).sin() * 1e-2
    given: dict[str, Any] = {
        "train_labels": torch.arange(12) % 3,
        "query_labels": torch.arange(3),
        "class_names": NAMES,
    }
    return Scores(values, **(given | options))


def solved() -> Scores:
    history = tuple(float(0.8**k) for k in range(40))
    return scores(diagnostics=Diagnostics(method="gauss_newton()", residual_history=history, residual_max=2e-4))


def own() -> Any:
    values = torch.linspace(3, -4, 200).exp()
    return plot_self_influence(values, torch.arange(200) % 3, NAMES, marked=torch.arange(0, 200, 7))


def seen(x: Any, **options: Any) -> Scores:
    """Scores of two queries that remember twelve inputs."""
    y = torch.arange(12) % 3
    return scores(train_source=(x, y), query_source=(x[:3], y[:3]), **options)


def ramps(*shape: int) -> Any:
    """Twelve smooth pictures or series, each another."""
    steps = torch.linspace(0, 3, 12 * int(np.prod(shape))).reshape(12, *shape)
    return (steps.sin() + 1) / 2


def text() -> Any:
    words = [f"word{i} $1$ <b>and</b> more" for i in range(12)]
    s = seen(torch.zeros(12, 2))
    data = [(w, i % 3) for i, w in enumerate(words)]
    tokens = {i: torch.linspace(-1, 1, 12).roll(i).reshape(3, 4) for i in range(12)}
    return s.plot(1, 2, train=data, queries=data[:3], tokens=tokens)


def path() -> Any:
    results = {10.0**k: Scores(torch.linspace(-1, 1, 12).add(0.1 * k).sin()[None]) for k in range(-3, 2)}
    return plot_damping_curve(results, k=2)


FIGURES: dict[str, Callable[[], Any]] = {
    "grid": lambda: seen(ramps(3, 8, 10)).plot(1, 3),
    "cards": lambda: seen(ramps(9)).plot(1, 3),
    "series": lambda: seen(ramps(2, 60)).plot(1, 3),
    "tokens": text,
    "agreement": lambda: plot_agreement(
        torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 9).sin(), names=list("abcdefghi")
    ),
    "damping_path": path,
    "self_influence": own,
    "class_matrix": lambda: plot_class_matrix(scores()),
    "convergence": lambda: plot_convergence(solved()),
    "bars": lambda: plot_bars(
        {"EK-FAC": (0.59, 0.57, 0.61), "dual": (0.5, 0.48, 0.52), "random": (-0.02, -0.04, 0.003)},
        "LDS",
        0.97,
        "halves",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_picture_is_the_one_that_was_looked_at(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.png"
    FIGURES[name]().savefig(path, dpi=60)
    expected = PICTURES / f"{name}.png"
    assert expected.exists(), "look at the new picture, then keep it there"
    assert compare_images(str(expected), str(path), tol=8) is None


def test_the_comparison_notices_another_picture(tmp_path: Path) -> None:
    path = tmp_path / "other.png"
    plot_class_matrix(
        Scores(-scores().values, train_labels=torch.arange(12) % 3, query_labels=torch.arange(3))
    ).savefig(path, dpi=60)
    assert compare_images(str(PICTURES / "class_matrix.png"), str(path), tol=8) is not None


def test_cells_are_what_removing_a_class_would_do() -> None:
    figure = plot_class_matrix(scores())
    table = figure.axes[0].images[0].get_array()
    held = scores().values.double()
    expected = [[float(held[q, c::3].sum()) for c in range(3)] for q in range(3)]
    assert np.allclose(table, expected, rtol=1e-6)
    turned = plot_class_matrix(scores(lower_is_better=False)).axes[0].images[0].get_array()
    assert np.allclose(turned, -np.asarray(expected), rtol=1e-6)


def test_residuals_of_a_real_solve() -> None:
    x, y = torch.randn(40, 4).double(), torch.arange(40) % 3
    problem = ptif.Problem(torch.nn.Linear(4, 3).double(), ptif.CrossEntropy(), (x, y))
    found = ptif.gauss_newton(damping=1e-3).fit(problem).score((x[:3], y[:3]))
    history = found.diagnostics.residual_history
    assert history[-1] <= 1e-3 < history[0]
    line = plot_convergence(found).axes[0].lines[0]
    assert line.get_ydata().tolist() == list(history)


def test_the_history_survives_the_disk(tmp_path: Path) -> None:
    solved().save(tmp_path / "s.safetensors")
    assert Scores.load(tmp_path / "s.safetensors").diagnostics.residual_history == solved().diagnostics.residual_history


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plot_self_influence([]), "one number per training example, got shape"),
        (lambda: plot_self_influence([1.0, float("nan")]), "The self-influence holds NaN or infinity at position 1"),
        (lambda: plot_self_influence([1.0, 2.0], labels=[1]), "2 values and 1 labels"),
        (lambda: plot_self_influence([1.0, 2.0], marked=[5]), "indices from 0 to 1"),
        (lambda: plot_class_matrix(Scores(torch.ones(2, 3))), "labels of queries and training examples are not"),
        (lambda: plot_class_matrix(scores().top(1)), "score without top="),
        (lambda: plot_class_matrix(scores(train_labels=torch.rand(12, 2))), "one per example"),
        (
            lambda: plot_class_matrix(Scores(torch.ones(2, 40), train_labels=range(40), query_labels=[0, 1])),
            "40 classes",
        ),
        (lambda: plot_convergence(scores()), "No residuals were recorded"),
    ],
)
def test_bad_input_in_one_sentence(call: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
