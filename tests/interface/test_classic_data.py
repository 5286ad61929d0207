"""Data in the forms people have, other losses, the old names, the README, pictures and loaders."""

from __future__ import annotations

import importlib
import inspect
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions import classic
from pytorch_influence_functions.classic import (
    Config,
    InfluenceResult,
    calc_img_wise,
    display_progress,
    get_dataset_sample_ids,
    get_dataset_sample_ids_per_class,
    influential_loader,
    init_logging,
    plot_influences,
    plot_loo_scatter,
)
from pytorch_influence_functions.classic.selection import dataset_labels
from pytorch_influence_functions.core.errors import InvalidInput, TrainingDataWarning
from tests.interface.classic_cases import Images, ImagesWithTargets, Toy, fit, image_model, images, quick, toy
from tests.tolerance import gap, rounding


def short(folder: Path, **changes: Any) -> Config:
    given = {"outdir": str(folder), "progress": False, "recursion_depth": 6, "scale": 60, "test_sample_num": 1}
    return Config(given | changes)


# --------------------------------------------------------------------------- the README


README = """
import pytorch_influence_functions as ptif

# Supplied by the user:
model = get_my_model()
trainloader, testloader = get_my_dataloaders()

config = ptif.get_default_config()

influences, harmful, helpful = ptif.calc_img_wise(config, model, trainloader, testloader)

# do someting with influences/harmful/helpful
"""


SUPPLIED = """
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)
x, y = torch.randn(12, 4), torch.arange(12) % 3
def get_my_model():
    return torch.nn.Linear(4, 3)
def get_my_dataloaders():
    return DataLoader(TensorDataset(x, y), batch_size=12, shuffle=True), DataLoader(TensorDataset(x[:1], y[:1]))
"""
ASKED = """
assert list(influences) == ["0"], influences.keys()
assert sorted(harmful) == sorted(helpful) == list(range(12))
"""


def test_the_readme_snippet_runs_verbatim(tmp_path: Path) -> None:
    """In a process and a folder of its own, as a person would; on the CPU, with nothing set."""
    made = subprocess.run(
        [sys.executable, "-c", SUPPLIED + README + ASKED], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == ""
    names = {p.name for p in (tmp_path / "outdir").iterdir()}
    assert names == {"influence_results_0_all.json", "influences_results_meta_0-all.json"}


SIGNATURES = {
    "calc_influence_function": {
        "calc_s_test": "model test_loader train_loader save gpu damp scale recursion_depth r start",
        "calc_s_test_single": "model z_test t_test train_loader gpu damp scale recursion_depth r",
        "calc_grad_z": "model train_loader save_pth gpu start",
        "load_s_test": "s_test_dir s_test_id r_sample_size train_dataset_size",
        "load_grad_z": "grad_z_dir train_dataset_size",
        "calc_influence_function": "train_dataset_size grad_z_vecs e_s_test",
        "calc_influence_single": "model train_loader test_loader test_id_num gpu recursion_depth r s_test_vec "
        "time_logging damp scale",
        "get_dataset_sample_ids_per_class": "class_id num_samples test_loader start_index",
        "get_dataset_sample_ids": "num_samples test_loader num_classes start_index",
        "calc_img_wise": "config model train_loader test_loader",
        "calc_all_grad_then_test": "config model train_loader test_loader",
    },
    "influence_function": {
        "s_test": "z_test t_test model z_loader gpu damp scale recursion_depth",
        "calc_loss": "y t",
        "grad_z": "z t model gpu",
        "hvp": "y w v",
    },
    "utils": {
        "save_json": "json_obj json_path append_if_exists overwrite_if_exists unique_fn_if_exists",
        "init_logging": "filename",
        "display_progress": "text current_step last_step enabled fix_zero_start",
        "get_default_config": "",
    },
}


@pytest.mark.parametrize("module", SIGNATURES)
def test_the_old_submodules_keep_working(module: str) -> None:
    found = importlib.import_module(f"pytorch_influence_functions.{module}")
    for name, words in SIGNATURES[module].items():
        function = getattr(found, name)
        assert function is getattr(classic, name)
        kinds = inspect.signature(function).parameters.values()
        positional = [p.name for p in kinds if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert positional == words.split()


def test_names_at_the_top() -> None:
    for name in ("get_default_config", "init_logging", "display_progress", "calc_img_wise", "calc_all_grad_then_test"):
        assert getattr(ptif, name) is getattr(classic, name)


# --------------------------------------------------------------------------- data


@pytest.mark.parametrize("form", ["tensors", "subset", "images", "targets", "concat"])
def test_every_kind_of_dataset(form: str, tmp_path: Path) -> None:
    """B26."""
    plain, known = images(Images), images(ImagesWithTargets)
    whole = TensorDataset(plain.pixels, torch.tensor(plain.labels_))
    data: Any = {
        "tensors": whole,
        "subset": Subset(known, list(range(12))),
        "images": plain,
        "targets": known,
        "concat": ConcatDataset([Subset(known, range(5)), Subset(whole, range(5, 12))]),
    }[form]
    loader = DataLoader(data, batch_size=4)
    result = calc_img_wise(short(tmp_path), image_model(), loader, loader)
    assert list(result.keys()) == ["0", "2", "1"]  # classes 0, 1, 2
    assert [v["label"] for v in result.values()] == [0, 1, 2]
    # A dataset alone has its own batch size; the loader's makes the mini-batches.
    config = short(tmp_path, batch_size=4)
    want = calc_img_wise(config, image_model(), whole, whole)
    assert torch.allclose(result.scores.values, want.scores.values, rtol=1e-4, atol=1e-7)


def test_labels_are_found_without_reading_every_image() -> None:
    data = images(ImagesWithTargets)
    assert dataset_labels(Subset(data, [3, 1])) == [0, 2] and data.reads == 1
    plain = images(Images)
    assert (
        dataset_labels(DataLoader(plain, batch_size=5)) == plain.labels_ and plain.reads == 13
    )  # the first twice: does it hold texts?


def test_attributes_that_disagree_with_the_items_are_not_believed() -> None:
    data = images(ImagesWithTargets)
    data.labels_ = list(data.labels_)
    wrong = ImagesWithTargets(data.pixels, data.labels_)
    type(wrong).target_transform = None  # type: ignore[attr-defined]

    class Shifted(ImagesWithTargets):
        @property
        def targets(self) -> list[int]:
            return [label + 1 for label in self.labels_]

    assert dataset_labels(Shifted(data.pixels, data.labels_)) == data.labels_


def test_target_transform_is_applied() -> None:
    class Doubled(ImagesWithTargets):
        target_transform = staticmethod(lambda label: 2 * label)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            picture, label = super().__getitem__(index)
            return picture, 2 * label

    data = images(Doubled)
    assert dataset_labels(data) == [2 * x for x in data.labels_] and data.reads == 1


def test_sample_ids_per_class(caplog: pytest.LogCaptureFixture) -> None:
    data = images(ImagesWithTargets)  # labels 0 2 1 0 2 1 …
    assert get_dataset_sample_ids_per_class(1, 2, data) == [2, 5]
    assert get_dataset_sample_ids_per_class(1, 2, data, 3) == [11]
    assert get_dataset_sample_ids(1, data) == ({"0": [0], "1": [2], "2": [1]}, [0, 2, 1])
    assert get_dataset_sample_ids(2, DataLoader(data), num_classes=2, start_index=1) == (
        {"0": [3, 6], "1": [5, 8]},
        [3, 6, 5, 8],
    )
    with caplog.at_level(logging.WARNING, "pytorch_influence_functions"):
        assert get_dataset_sample_ids(1, data, num_classes=4)[0]["3"] == []
    assert "Class 3 has 0 test items" in caplog.text
    with pytest.raises(InvalidInput, match=r"labels such as 0\.5 are not class numbers"):
        get_dataset_sample_ids(1, (torch.zeros(2, 1), torch.tensor([0.5, 1.5])))


def test_loaders_may_come_with_the_config(tmp_path: Path) -> None:
    t = toy(n=12, tests=3)
    config = short(tmp_path, train_loader=t.train, test_loader=t.test)
    assert len(calc_img_wise(config, t.model).influences) == 3
    with pytest.raises(InvalidInput, match=r"no test_loader; pass it, or set config\['test_loader'\]"):
        calc_img_wise(short(tmp_path), t.model, t.train)


def test_random_augmentation_is_noticed_and_can_be_kept_still(tmp_path: Path) -> None:
    data = images(Images, transform=lambda picture: picture + 0.1 * torch.rand(()))
    still = images(Images)
    with pytest.warns(TrainingDataWarning, match="read twice and came out different"):
        calc_img_wise(short(tmp_path), image_model(), data, still)
    with pytest.raises(InvalidInput, match="read twice"):
        calc_img_wise(short(tmp_path, deterministic="error"), image_model(), data, still)
    data.reads = 0
    calc_img_wise(short(tmp_path, deterministic=True), image_model(), DataLoader(data, batch_size=3), still)
    assert data.reads == 12


def test_regression_with_a_loss_of_its_own(tmp_path: Path) -> None:
    """B10, and labels that are lists."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=g, dtype=torch.float64)
    y = x @ torch.randn(3, 2, generator=g, dtype=torch.float64) + 0.1 * torch.randn(
        20, 2, generator=g, dtype=torch.float64
    )
    model = nn.Linear(3, 2).double()
    fit(model, x, y, nn.functional.mse_loss)
    made = [
        calc_img_wise(
            quick(tmp_path, test_sample_start_per_class=19, scale=10, damp=0.01, recursion_depth=30),
            model, (x, y), (x, y), loss_fn=loss,
        )
        for loss in (nn.MSELoss(), lambda f, u: (f - u).square().mean(), nn.functional.mse_loss)
    ]  # fmt: skip
    assert all(isinstance(v["label"], list) and len(v["label"]) == 2 for v in made[0].values())
    assert made[0]["19"]["influence"][19] > 0  # an example helps itself
    assert torch.allclose(made[0].scores.values, made[1].scores.values, rtol=1e-8)
    assert gap(made[0].scores.values, made[2].scores.values) < rounding(torch.float64)
    with pytest.raises(InvalidInput, match="not class numbers"):
        calc_img_wise(quick(tmp_path, test_sample_num=1), model, (x, y), (x, y), loss_fn=nn.MSELoss())


def test_dictionaries_as_batches(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3).double()

        def forward(self, features: Tensor) -> Tensor:
            return self.head(features)  # type: ignore[no-any-return]

    t = toy(n=12, tests=3)
    model = Named()
    model.head.load_state_dict(t.model.state_dict())
    data = {"features": t.x, "labels": t.y}
    result = calc_img_wise(short(tmp_path, batch_size=4), model, data, {"features": t.test_x, "labels": t.test_y})
    want = calc_img_wise(short(tmp_path, batch_size=4), t.model, (t.x, t.y), (t.test_x, t.test_y))
    assert torch.allclose(result.scores.values, want.scores.values, rtol=1e-10)


# --------------------------------------------------------------------------- output


def test_nothing_is_printed_when_progress_is_off(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("pytorch_influence_functions.core.progress")
    monkeypatch.setattr(module, "DELAY", 0.0)
    t = toy(n=12, tests=3)
    calc_img_wise(short(tmp_path), t.model, t.train, t.test)
    monkeypatch.setenv("PTIF_PROGRESS", "0")
    calc_img_wise(short(tmp_path, progress=True), t.model, t.train, t.test)
    display_progress("quiet", 0, 1)
    monkeypatch.delenv("PTIF_PROGRESS")
    assert capfd.readouterr() == ("", "")
    seen: list[tuple[str, int, int]] = []
    calc_img_wise(short(tmp_path, progress=lambda *now: seen.append(now)), t.model, t.train, t.test)
    assert capfd.readouterr() == ("", "") and ("test items", 3, 3) in seen
    calc_img_wise(short(tmp_path, progress=True), t.model, t.train, t.test)
    assert "test items" in capfd.readouterr().err


def test_display_progress_ends_its_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    """B29."""
    for step in range(3):
        display_progress("image", step, 3)
    assert capsys.readouterr().out == "\rimage 1/3\rimage 2/3\rimage 3/3\n"
    display_progress("image", 3, 3, fix_zero_start=False)
    display_progress("image", 1, 3, enabled=False)
    assert capsys.readouterr().out == "\rimage 3/3\n"


def test_init_logging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    level, before = root.level, list(root.handlers)
    log = init_logging(tmp_path / "a" / "b.log")
    try:
        init_logging(tmp_path / "a" / "b.log")
        log.info("hello")
        logging.getLogger("mine").info("from the caller")
        printed, written = capsys.readouterr().out, (tmp_path / "a" / "b.log").read_text()
        for line in ("hello", "from the caller"):
            assert printed.count(line) == written.count(line) == 1
        assert [h for h in root.handlers if h in before] == before and len(root.handlers) == len(before) + 2
        assert log.handlers == []
    finally:
        for handler in [h for h in root.handlers if h not in before]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        log.setLevel(logging.NOTSET)


# --------------------------------------------------------------------------- pictures and loaders


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, InfluenceResult]:
    t = toy(n=60, tests=9, flipped=12)
    return t, calc_img_wise(quick(tmp_path_factory.mktemp("fitted"), recursion_depth=30), t.model, t.train, t.test)


@pytest.mark.parametrize("which", ["helpful", "harmful"])
def test_influential_loader(fitted: tuple[Toy, InfluenceResult], which: str) -> None:
    t, result = fitted
    ranked = getattr(result, which)
    data = TensorDataset(t.x, t.y)
    loader = influential_loader(result, data, 7, which=which, shuffle=False, batch_size=3)
    assert list(loader.dataset.indices) == ranked[:7]  # type: ignore[attr-defined]
    got = torch.cat([x for x, _ in loader])
    assert torch.equal(got, t.x[ranked[:7]])
    rest = influential_loader(result, t.train, fraction=0.1, which=which, drop=True)
    assert rest.batch_size == 8
    assert sorted(rest.dataset.indices) == sorted(set(range(60)) - set(ranked[:6]))  # type: ignore[attr-defined]


def test_dropping_the_harmful_lowers_the_test_loss(fitted: tuple[Toy, InfluenceResult]) -> None:
    t, result = fitted

    def loss_after(loader: DataLoader[Any]) -> float:
        ids = loader.dataset.indices  # type: ignore[attr-defined]
        model = nn.Linear(4, 3).double()
        fit(model, t.x[ids], t.y[ids], nn.functional.cross_entropy)
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(t.test_x), t.test_y))

    data = TensorDataset(t.x, t.y)
    with torch.no_grad():
        before = float(nn.functional.cross_entropy(t.model(t.test_x), t.test_y))
    assert loss_after(influential_loader(result, data, 10, which="harmful", drop=True)) < before
    assert loss_after(influential_loader(result, data, 10, which="helpful", drop=True)) > before
    assert len(set(result.harmful[:10]) & set(range(12))) >= 6  # those with the wrong label


def test_influential_loader_of_scores() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    scores = ptif.attribute(nn.Linear(3, 2), (x, y), (x[:4], y[:4]), loss=nn.CrossEntropyLoss())
    data = torch.utils.data.TensorDataset(x, y)
    for which, order in (("helpful", scores.helpful_order()), ("harmful", scores.harmful_order())):
        loader = ptif.influential_loader(scores, data, 5, which=which, shuffle=False)
        assert torch.equal(torch.cat([batch[0] for batch in loader]), x[order[:5]])
    rest = ptif.influential_loader(scores, data, fraction=0.25, which="harmful", drop=True)
    assert len(rest.dataset) == 30  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either k or fraction"),
        ({"k": 1, "fraction": 0.5}, "either k or fraction"),
        ({"k": 61}, "61 of 60 training examples"),
        ({"k": 60, "drop": True}, "and dropped"),
        ({"fraction": 1.5}, "fraction=1.5 must be a number above 0 and of at most 1"),
        ({"k": 1, "which": "best"}, "'helpful' or 'harmful'"),
    ],
)
def test_influential_loader_refuses(fitted: tuple[Toy, InfluenceResult], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        influential_loader(fitted[1], TensorDataset(fitted[0].x, fitted[0].y), **arguments)
    with pytest.raises(InvalidInput, match="have 9 examples and the result is of 60"):
        influential_loader(fitted[1], TensorDataset(fitted[0].test_x, fitted[0].test_y), 1)


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = images(ImagesWithTargets)
    result = calc_img_wise(short(tmp_path), image_model(), data, data)
    figure = plot_influences(result, data, DataLoader(data), 2, k=3, path=tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000
    words = " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))
    assert "elpful" in words and "armful" in words and "+" in words
    again = plot_influences(InfluenceResult.load(result.path), data, data, 2, k=3)  # type: ignore[arg-type]
    assert again is not None
    with pytest.raises(InvalidInput, match="Test example 7 is not in this result, which has 0, 2, 1"):
        plot_influences(result, data, data, 7)
    plot_loo_scatter([0.1, -0.2, 0.3], [0.12, -0.25, 0.28], path=tmp_path / "loo.png")
    assert (tmp_path / "loo.png").stat().st_size > 1000
