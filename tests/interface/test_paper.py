"""The paper's figures again: the quick ones in their small form, and the parts that judge and write all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from examples.paper import data, figure_6, run, study, training
from examples.paper.study import Band, Finding


@pytest.mark.parametrize(("value", "passed"), [(0.5, True), (0.2, False), (0.9, False), (math.nan, False)])
def test_a_band_holds_what_lies_strictly_inside(value: float, passed: bool) -> None:
    assert Band("r", value, 0.2, 0.9).passed is passed


def found(tmp_path: Path, value: float, figure: str = "1") -> Finding:
    picture = tmp_path / f"figure_{figure}.png"
    picture.write_bytes(b"")
    return Finding(figure, "a title", "some data", "0.9", (Band("r", value, low=0.5),), picture, ("a note",))


def test_a_number_outside_its_band_is_an_error_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.finish([found(tmp_path, 0.6)]) == 0
    assert study.finish([found(tmp_path, 0.6), found(tmp_path, 0.4, "2a")]) == 1
    assert "Figure 2a is outside its band: FAIL r: 0.4 (above 0.5)" in capsys.readouterr().err


def test_a_finding_is_kept_beside_its_picture(tmp_path: Path) -> None:
    kept = study.timed(lambda _: found(tmp_path, 0.6), study.Study(small=True, figures=tmp_path))
    assert study.read(tmp_path / "figure_1.json") == kept
    assert kept.small and json.loads((tmp_path / "figure_1.json").read_text())["bands"][0]["value"] == 0.6


def test_the_page_is_not_written_from_part_of_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.timed(lambda _: found(tmp_path, 0.6), study.Study(small=False, figures=tmp_path))
    assert run.main(["--only", "", "--figures", str(tmp_path), "--write-docs"]) == 2
    assert "Figure 2a has not been run in its full form" in capsys.readouterr().err


def test_an_unknown_figure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "2d"]) == 2
    assert "There is no figure '2d'; known are 1, 2a" in capsys.readouterr().err


def test_the_page_holds_what_was_found() -> None:
    """Every figure's headline, and no number outside its band, in the page that is kept."""
    page = (data.ROOT / "docs" / "paper.md").read_text()
    for name, module in run.FIGURES.items():
        picture = f"paper/{module}.png"
        assert f"]({picture})" in page and (data.ROOT / "docs" / picture).stat().st_size < 150_000, name
    assert "**no**" not in page and "{{" not in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "3", "section_5_3"])
def test_the_quick_figures_lie_in_their_bands(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CI runs these and figures 2a, 2b and 6 by `make paper`; 2a alone would be one of the longest tests here."""
    assert run.main(["--small", "--only", name, "--figures", str(tmp_path)]) == 0
    assert "in the paper:" in capsys.readouterr().out
    assert (tmp_path / f"{run.FIGURES[name]}.png").read_bytes()[:4] == b"\x89PNG"


def test_self_influence_finds_most_planted_flips_of_spambase() -> None:
    split = data.spambase()
    mails = figure_6.Mails.of(training.with_constant(split.x), split.y, training.with_constant(split.qx), split.qy)
    shares, accuracies = figure_6.once(mails, seed=0).unbind(1)
    influence, loss, chance = shares[:, 2]  # in the first tenth
    assert influence > 0.5 > 0.2 > chance and loss > 0.5
    assert accuracies[0, -1] > accuracies[0, 0]


def test_refitting_without_an_example_is_training_without_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, dtype=torch.float64, generator=generator), torch.arange(20)[:, None] % 2
    model = training.newton(x, y[:, 0], decay=0.05)
    objective = training.penalised(training.losses_of(model, training.binary_losses, x, y.double()), 0.05)
    p = (x @ model.weight.detach()[0]).sigmoid()
    curvature = (x * (p * (1 - p))[:, None]).T @ x / 20 + 0.05 * torch.eye(4)
    weights = training.left_out(torch.tensor([3, 7]), 20)
    got = training.refit(objective, model.weight.detach()[0], weights, training.by_cholesky(curvature))
    for row, i in zip(got, (3, 7), strict=True):
        kept = torch.arange(20) != i
        alone = training.newton(x[kept], y[kept, 0], decay=0.05).weight.detach()[0]
        torch.testing.assert_close(row, alone, rtol=1e-6, atol=1e-7)


def test_the_small_form_names_what_it_leaves_out() -> None:
    assert "2c" not in run.chosen(None, small=True) and run.chosen(None, small=False) == list(run.FIGURES)
