"""Pictures: what is on them, for any kind of data, without touching the user's matplotlib."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pytorch_influence_functions.core.errors import InvalidInput, MissingExtra, NonFinite
from pytorch_influence_functions.plots.bars import plot_bars
from pytorch_influence_functions.plots.examples import ExampleView, example_target, share_scale, view_example, wrap_text
from pytorch_influence_functions.plots.inputs import plot_input_influence
from pytorch_influence_functions.plots.query import plot_agreement, plot_damping_curve, plot_influences
from pytorch_influence_functions.plots.style import format_power, format_signed, power_of_ten, shorten
from pytorch_influence_functions.plots.summaries import plot_class_matrix, plot_self_influence
from pytorch_influence_functions.scores.scores import Scores

matplotlib = pytest.importorskip("matplotlib")


def texts(figure: Any) -> list[str]:
    found = [t.get_text() for t in figure.texts]
    return found + [t.get_text() for axes in figure.axes for t in axes.texts]


def images(n: int = 12, *shape: int) -> Tensor:
    return torch.rand(n, *(shape or (1, 8, 8)))


def example(n: int = 12, **options: Any) -> Scores:
    x, y = images(n), torch.arange(n) % 3
    values = torch.linspace(-1, 1, n).repeat(2, 1) * 1e-3
    names = ["cat", "dog_$1$", "owl"]
    return Scores(values, train_labels=y, query_labels=y[:2], class_names=names, train_source=(x, y),
                  query_source=(x[:2], y[:2]), **options)  # fmt: skip


def overlaps(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes meet, and texts that leave the page."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in figure.texts if t.get_text()]
    width, height = figure.canvas.get_width_height()
    found = [(a, b) for i, (a, p) in enumerate(boxes) for b, q in boxes[:i] if p.overlaps(q)]
    return found + [(a, "page") for a, p in boxes if p.x0 < 0 or p.y0 < 0 or p.x1 > width or p.y1 > height]


# --------------------------------------------------------------------------- the seed's picture


def test_it_shows_signs_labels_and_indices_in_order() -> None:
    figure = example().plot(1, k=3)
    words = texts(figure)
    for part in ("Query 1", "label: dog_$1$", "Most helpful", "Most harmful", "#11", "#10", "#9", "#0", "#1", "#2"):
        assert part in words
    assert words.index("+0.00100") < words.index("+0.000818") < words.index("−0.00100")
    assert words.index("#11") < words.index("#10") < words.index("#0")
    assert len(figure.axes) == 7
    shown = [axes.images[0].get_array() for axes in figure.axes]
    train = example().train_source[0]
    assert shown[0].shape == (8, 8) and len(train) == 12


def test_the_right_pictures_stand_under_the_numbers() -> None:
    s = example()
    x = s.train_source[0]
    figure = s.plot(0, k=2)
    for axes, index in zip(figure.axes[1:], (11, 10, 0, 1), strict=True):
        assert np.allclose(axes.images[0].get_array(), x[index, 0].numpy())


def test_helpful_follows_the_measure_and_the_foot_says_which() -> None:
    figure = example(lower_is_better=False).plot(0, k=2)
    words = texts(figure)
    assert words.index("#0") < words.index("#11")
    assert any("query's measure when the example is removed" in w for w in words)
    assert any("query's loss when the example is removed" in w for w in texts(example().plot()))


@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 18), (3, 24, 6)])
def test_nothing_overlaps_and_nothing_leaves_the_page(k: int, shape: tuple[int, ...]) -> None:
    x, y = images(30, *shape) * 2 - 1, torch.arange(30) % 2
    s = Scores(torch.randn(1, 30) * 1e-5, train_labels=y, query_labels=y[:1], class_names=["W" * 40, "a b " * 9],
               train_names=["M" * 60] * 30, query_names=["Q" * 80], train_source=(x, y),
               query_source=(x[:1], y[:1]))  # fmt: skip
    assert overlaps(s.plot(0, k=k)) == []


def test_few_examples_and_top_scores_work() -> None:
    s = example(n=3)
    assert len(s.plot(0, k=9).axes) == 1 + 3 + 3
    assert len(example().top(2).plot(1, k=2).axes) == 5
    assert "Query 1" in texts(example()[1].plot(0, k=1))


def test_text_becomes_cards_and_dollars_stay_dollars(tmp_path: Path) -> None:
    data = [(f"costs $5 and $6, a_b^c {{x}} \\alpha number {i} " * 9, i % 2) for i in range(6)]
    s = Scores(torch.randn(1, 6), train_source=data, query_source=data[:1])
    figure = s.plot(0, k=2, path=tmp_path / "t.png")
    cards = [t for axes in figure.axes for t in axes.texts]
    assert len(cards) == 5 and not any(t.get_parse_math() for t in cards + figure.texts)
    assert "$5 and $6" in cards[0].get_text() and cards[1].get_text().endswith("…")
    figure.canvas.draw()
    for axes, card in zip(figure.axes, cards, strict=True):
        inside, frame = card.get_window_extent(), axes.get_window_extent()
        assert inside.x1 <= frame.x1 and inside.y0 >= frame.y0


def test_table_rows_become_cards() -> None:
    s = Scores(torch.randn(1, 6), train_source=(torch.randn(6, 40), torch.randn(6)),
               query_source=(torch.randn(1, 40), torch.randn(1)))  # fmt: skip
    card = s.plot(0, k=1).axes[1].texts[0].get_text()
    assert card.startswith("x0 = ") and card.splitlines()[-1].endswith("more")


@pytest.mark.parametrize("shape", [(60,), (2, 60), (60, 3)])
def test_series_become_lines_on_one_scale(shape: tuple[int, ...], tmp_path: Path) -> None:
    time = torch.linspace(0, 6, 60)
    wave = torch.stack([(i + 1) * torch.sin(time + i) for i in range(8)])
    x = wave if len(shape) == 1 else torch.stack([wave] * min(shape), 1 if shape[0] < 60 else 2)
    s = Scores(torch.randn(1, 8), train_source=(x, torch.arange(8) % 2), query_source=(x[:1], torch.zeros(1)))
    figure = s.plot(0, 3, path=tmp_path / "series.png")
    assert {len(axes.lines) for axes in figure.axes} == {1 if len(shape) == 1 else min(shape)}
    assert len({axes.get_ylim() for axes in figure.axes}) == 1 and figure.axes[0].get_xlim() == (0, 59)
    assert np.allclose(figure.axes[0].lines[0].get_ydata(), wave[0].numpy())
    assert texts(figure).count("Most helpful") == 1 and not overlaps(figure)


def test_files_are_written_whole_in_the_format_of_their_ending_and_equal(tmp_path: Path) -> None:
    s = example()
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        s.plot(0, k=1, path=tmp_path / name)
        once = (tmp_path / name).read_bytes()
        assert once.startswith(start)
        s.plot(0, k=1, path=tmp_path / name)
        assert (tmp_path / name).read_bytes() == once


def test_the_users_matplotlib_is_left_alone() -> None:
    with matplotlib.rc_context():
        matplotlib.rcParams["text.color"] = "white"
        matplotlib.rcParams["axes.facecolor"] = "black"
        before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
        figure = example().plot()
        plot_agreement([0, 1, 2], [0, 1, 3])
        assert dict(matplotlib.rcParams) == before
        assert ("matplotlib.pyplot" in sys.modules) is loaded
        assert figure.texts[0].get_color() == "#1A1A1A"


def test_an_absent_matplotlib_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pytorch-influence-functions\[plot\]"):
        example().plot()


def test_a_row_of_several_queries_is_a_card_with_its_name() -> None:
    scores = replace(example().mean(), query_names=["the worst class"], query_source=None)
    words = [text.get_text() for text in scores.plot().findobj(matplotlib.text.Text)]
    assert "the worst class" in words and "Asked together" in words


REFUSED: dict[str, tuple[Any, str]] = {
    "no data": (lambda: Scores(torch.zeros(1, 2)).plot(), "do not remember the data.*pass train="),
    "other length": (lambda: plot_influences(example(), train=(images(5),)), "train= has 5 examples and .* of 12"),
    "too few queries": (lambda: plot_influences(example(), 1, queries=images(1)), "queries= has 1 examples"),
    "mean": (lambda: example().mean().plot(tokens={}), "several queries has no text of its own"),
    "channels": (
        lambda: example().plot(denormalize=([0.5] * 3, [0.2])),
        "mean of 3 numbers and the pictures have 1 channels",
    ),
    "lengths": (lambda: plot_agreement([1, 2], [1]), "2 predicted and 1 actual"),
    "nan": (lambda: plot_agreement([1, float("nan")], [1, 2]), "predicted holds NaN or infinity at position 1"),
    "one lambda": (lambda: plot_damping_curve({1.0: example()}), "at least two positive values of lambda"),
    "lambda 0": (lambda: plot_damping_curve({0.0: example(), 1.0: example()}), "at least two positive"),
    "top": (lambda: plot_damping_curve({1.0: example().top(1), 2.0: example()}), "score without top="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(name: str) -> None:
    make, match = REFUSED[name]
    with pytest.raises(InvalidInput, match=match):
        make()


# --------------------------------------------------------------------------- what an example looks like

LAYOUTS = [
    (torch.rand(8, 9), (8, 9)),
    (torch.rand(1, 8, 9), (8, 9)),
    (torch.rand(3, 8, 9), (8, 9, 3)),
    (torch.rand(4, 8, 9), (8, 9, 4)),
    (torch.rand(8, 9, 3), (8, 9, 3)),
    (torch.rand(1, 3, 8, 9), (8, 9, 3)),
    (torch.rand(7, 20, 21), (20, 21)),
    (torch.rand(8, 9, dtype=torch.bfloat16), (8, 9)),
    (np.zeros((8, 9, 3), np.uint8), (8, 9, 3)),
    (np.zeros((8, 9), bool), (8, 9)),
    (torch.zeros(3, 8, 9, dtype=torch.uint8), (8, 9, 3)),
]


@pytest.mark.parametrize(("picture", "shape"), LAYOUTS)
def test_any_layout_of_picture_is_found(picture: Any, shape: tuple[int, ...]) -> None:
    for item in (picture, (picture, 3), {"image": picture, "label": 1}):
        pixels = view_example(item, 0).pixels
        assert pixels is not None and pixels.shape == shape


def test_channels_first_keeps_rows_and_columns() -> None:
    picture = torch.rand(3, 8, 9)
    pixels = view_example(picture, 0).pixels
    assert pixels is not None and pixels[2, 5, 1] == picture[1, 2, 5]


@pytest.mark.parametrize("item", ["a text", torch.rand(64), torch.rand(3, 2), {"text": "words", "label": 1}, 3.5])
def test_what_is_no_picture_is_words(item: Any) -> None:
    shown = view_example((item, 0), 0)
    assert shown.pixels is None and shown.card


@pytest.mark.parametrize(
    ("pixels", "want", "note"),
    [
        (np.array([[0.0, 0.5, 1.0]]), [[0.0, 0.5, 1.0]], ""),
        (np.array([[0, 51, 255]], np.uint8), [[0.0, 0.2, 1.0]], ""),
        (np.array([[0, 51, 102]], np.uint8), [[0.0, 0.2, 0.4]], ""),
        (np.array([[0.0, 51.0, 255.0]]), [[0.0, 0.2, 1.0]], ""),
        (np.array([[0.0, 8.0, 16.0]]), [[0.0, 0.5, 1.0]], "0 to 16 stretched"),
        (np.array([[-1.0, 0.0, 3.0]]), [[0.0, 0.25, 1.0]], "-1 to 3 stretched"),
        (np.array([[5.0, 5.0, 5.0]]), [[0.0, 0.0, 0.0]], "stretched"),
    ],
)
def test_exposure(pixels: Any, want: Any, note: str) -> None:
    (shown,), found = share_scale([ExampleView(pixels=pixels)])
    assert np.allclose(shown.pixels, want) and (note in found if note else found == "")


def test_all_pictures_share_one_exposure() -> None:
    dark, light = ExampleView(pixels=np.full((1, 1), -1.0)), ExampleView(pixels=np.full((1, 1), 3.0))
    found, _ = share_scale([dark, light, ExampleView(card="x")])
    assert found[0].pixels == 0 and found[1].pixels == 1 and found[2].card == "x"


def test_denormalize_undoes_a_normalisation() -> None:
    picture = torch.rand(3, 8, 9)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    normal = (picture - mean[:, None, None]) / std[:, None, None]
    by_numbers = view_example(normal, 0, (mean.tolist(), std.tolist())).pixels
    by_function = view_example(normal, 0, lambda x: x * std[:, None, None] + mean[:, None, None]).pixels
    assert by_numbers is not None and np.allclose(by_numbers, picture.permute(1, 2, 0), atol=1e-6)
    assert by_function is not None and np.allclose(by_function, by_numbers, atol=1e-6)
    flat = view_example(torch.rand(64), 0, lambda x: x.view(8, 8)).pixels
    assert flat is not None and flat.shape == (8, 8)


def test_a_nan_pixel_is_named() -> None:
    with pytest.raises(NonFinite, match="picture of example 17 holds NaN"):
        view_example(torch.full((8, 8), float("nan")), 17)


def test_targets_and_words() -> None:
    assert example_target(("x", 3)) == 3 and example_target({"labels": 2}) == 2 and example_target("x") is None
    assert wrap_text("a\nb\nc", 9, 2) == "a\n… 2 more"
    assert shorten("a  b\nc", 9) == "a b c"
    assert [format_signed(v) for v in (0.0, 1.0, -0.00312, 0.99999, 31250.0, -2e-7, 999.6)] == [
        "0", "+1.00", "−0.00312", "+1.00", "+31250", "−2.00e-07", "+1000"]  # fmt: skip
    assert power_of_ten(0.0) == 0 and format_power(power_of_ten(2.5e-12)) == " (×10⁻¹²)" and format_power(0) == ""


# --------------------------------------------------------------------------- agreement and damping


def test_agreement_states_r_and_slope() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]) * 1e-4
    figure = plot_agreement(x, 1.5 * x, names=list("abcde"))
    assert "n = 5, r = 1.000, slope = 1.5" in texts(figure)
    axes = figure.axes[0]
    assert axes.get_xlim() == axes.get_ylim() and "×10⁻⁴" in axes.get_xlabel()
    dots = axes.collections[0].get_offsets()
    assert np.allclose(dots[:, 1], 1.5 * dots[:, 0]) and overlaps(figure) == []
    assert "n = 5, r = −1.000, slope = −2" in texts(plot_agreement(x, -2 * x))
    assert "n = 2, r undefined: one side is constant" in texts(plot_agreement([0, 0], [1, 2]))


@pytest.mark.parametrize("crowd", ["three beside each other", "one place", "on the diagonal"])
def test_names_of_points_hide_neither_each_other_nor_points(crowd: str) -> None:
    x, y = {
        "three beside each other": ([0.1608, -0.0812, 0.1863, -0.26, 0.1661], [0.109, -0.0424, 0.0889, -0.25, 0.0831]),
        "one place": ([0.5, 0.5, 0.501, 0.1], [0.2, 0.2, 0.2, 0.6]),
        "on the diagonal": ([0.1, 0.11, 0.9], [0.1, 0.11, 0.9]),
    }[crowd]  # fmt: skip
    figure = plot_agreement(x, y, names=[f"#{1000 + i}" for i in range(len(x))])
    figure.canvas.draw()
    axes = figure.axes[0]
    boxes = [t.get_window_extent() for t in axes.texts]
    assert len(boxes) == len(x)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    dots = axes.transData.transform(np.column_stack([x, y]))
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    frame = axes.get_window_extent().padded(1)
    assert all(frame.contains(b.x0, b.y0) and frame.contains(b.x1, b.y1) for b in boxes)


def test_damping_path_shows_shares_and_rank_agreement(tmp_path: Path) -> None:
    a, b = torch.randn(2, 1, 30).double()
    path = {lam: Scores(a / (1 + lam) + b * lam / (1 + lam)) for lam in (0.01, 1.0, 100.0)}
    figure = plot_damping_curve(path, k=2, path=tmp_path / "p.png")
    left, right = figure.axes
    assert left.get_xscale() == "log" and overlaps(figure) == []
    best = path[1.0].helpful(0, 1)[0][0]
    line = left.lines[0].get_ydata()
    assert line[1] == pytest.approx(float(path[1.0].values[0, best] / path[1.0].values.abs().max()))
    from scipy.stats import spearmanr

    want = [spearmanr(path[lam].values[0], path[1.0].values[0]).statistic for lam in path]
    assert right.lines[0].get_ydata() == pytest.approx(want)
    assert (tmp_path / "p.png").exists()


def test_labels_that_no_font_can_hold_are_drawn_with_a_question_mark(tmp_path: Path) -> None:
    half = chr(0xD800)
    assert shorten(f"a{half}b", 9) == "a?b" and wrap_text(f"a{half}b", 9, 2) == "a?b"
    scores = replace(example(), class_names=[f"a{half}b", "c", "d"])
    plot_influences(scores, 0).savefig(tmp_path / "query.png")
    plot_class_matrix(scores).savefig(tmp_path / "classes.png")
    plot_self_influence(torch.rand(12), scores.train_labels, scores.class_names).savefig(tmp_path / "self.png")
    plot_bars({f"a{half}b": (0.5, 0.4, 0.6)}, "metric", title=half).savefig(tmp_path / "bars.png")


# --------------------------------------------------------------------------- slopes in the inputs


def test_heat_maps_are_the_slopes_on_one_scale() -> None:
    x, y = images(5, 3, 6, 6), torch.arange(5)
    slopes = torch.zeros(2, 3, 6, 6)
    slopes[0, :, 1, 2] = torch.tensor([1.0, 2.0, 1.0])  # channels add up to the largest of all
    slopes[1, 0, 4, 3] = -1.0
    figure = plot_input_influence(slopes, (x, y), [3, 1], class_names=["a", "b", "c", "d", "e"])
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title(loc="center") for axes in above] == ["d #3", "b #1"]
    for axes, index in zip(above, (3, 1), strict=True):
        assert np.allclose(axes.images[0].get_array(), x[index].permute(1, 2, 0).numpy())
    strong, weak = (axes.images[1].get_array() for axes in below)
    assert strong[1, 2, 3] == pytest.approx(1.0) and weak[4, 3, 3] == pytest.approx(0.5)  # the root of a quarter
    assert strong[1, 2, 0] > strong[1, 2, 2] and weak[4, 3, 0] < weak[4, 3, 2]  # orange and blue
    assert strong[..., 3].sum() == pytest.approx(1.0) and weak[..., 3].sum() == pytest.approx(0.5)
    flat = plot_input_influence(slopes[:, 0].flatten(1), (x[:, 0].flatten(1), y), [3, 1], lambda v: v.reshape(6, 6))
    assert flat.axes[3].images[1].get_array()[4, 3, 3] == pytest.approx(1.0)


def test_columns_stand_steepest_first_with_their_values(tmp_path: Path) -> None:
    x, y = torch.arange(12.0).reshape(4, 3), torch.arange(4) % 2
    figure = plot_input_influence(
        torch.tensor([[0.1, -0.5, 0.2]]), (x, y), [2], columns=["age", "dose_$1$", "rate"], k=2, path=tmp_path / "c.png"
    )
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["dose_$1$ = 7", "rate = 8"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([-0.5, 0.2])
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_slopes_that_do_not_fit_are_refused() -> None:
    x, y = torch.randn(5, 3), torch.arange(5)
    for slopes, ids, data, columns, words in (
        (torch.zeros(2, 3), [1], (x, y), None, r"slopes= has shape \(2, 3\) and 1 examples are named"),
        (torch.zeros(1, 4), [1], (x, y), None, r"Slopes in 4 columns do not fit rows of shape \(3,\)"),
        (torch.zeros(1, 3), [1], (x, y), ["a"], r"with 1 names; give one of each"),
        (torch.zeros(1, 5, 5), [1], (images(5, 1, 6, 6), y), None, r"do not fit a picture of 6 x 6"),
        (torch.zeros(1, 2, 3), [1], (torch.randn(5, 2, 3), y), None, r"neither pictures nor rows of a table"),
        (torch.zeros(1, 3), [7], (x, y), None, r"Index 7 is outside the dataset"),
        (torch.full((1, 3), torch.nan), [1], (x, y), None, r"slopes holds NaN or infinity"),
    ):
        with pytest.raises(InvalidInput, match=words):
            plot_input_influence(slopes, data, ids, columns=columns)
