"""`ptif self-influence`, `report`, `classic`, `doctor`: what they write is what the library computes."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pytorch_influence_functions as ptif
from pytorch_influence_functions.cli import doctor, self_influence_table
from pytorch_influence_functions.cli.report import predict
from pytorch_influence_functions.cli.task import load_task
from tests.interface.cli_cases import N, Ran, task_file

# --------------------------------------------------------------------------- self-influence


def test_self_influence_is_the_librarys_worst_first(tmp_path: Path) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    found = Ran("self-influence", task, "--method", "exact", "--top", 3, "--out", out, "--json").found
    expected = ptif.exact().fit(load_task(task).problem).self_influence()
    assert torch.allclose(load_file(out / "self_influence.safetensors")["values"], expected)
    order = expected.argsort(descending=True).tolist()
    assert [one["index"] for one in found["worst"]] == order[:3]
    rows = list(csv.DictReader((out / "self_influence.csv").read_text().splitlines()))
    assert [int(row["index"]) for row in rows] == order and [row["rank"] for row in rows[:2]] == ["1", "2"]
    assert [float(row["self_influence"]) for row in rows] == pytest.approx(expected[order].tolist())
    labels = load_task(task).problem.data.dataset.y
    assert [row["label"] for row in rows] == [["low", "high"][labels[i]] for i in order]


def test_self_influence_on_a_screen_and_again_from_the_folder(tmp_path: Path) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    first = Ran("self-influence", task, "--out", out)
    assert first.code == 0 and max(map(len, first.stdout.splitlines())) <= 80
    assert "Most suspicious 20" in first.stdout and "self_influence.csv" in first.stdout
    stamp = (out / "self_influence.csv").stat().st_mtime_ns
    assert Ran("self-influence", task, "--out", out).stdout == first.stdout
    assert (out / "self_influence.csv").stat().st_mtime_ns == stamp
    other = Ran("self-influence", task, "--out", out, "--method", "dual")
    assert other.code == 2 and "differs in method" in other.sentence


def test_self_influence_forecasts(tmp_path: Path) -> None:
    found = Ran("self-influence", task_file(tmp_path), "--method", "ekfac", "--dry-run", "--json").found
    assert found["status"] == "forecast" and found["n_train"] == N and found["passes"] > 0


def test_a_label_in_the_table_is_no_formula(tmp_path: Path) -> None:
    self_influence_table.write_files(tmp_path, torch.tensor([2.0, 1.0]), ["=1+1", "-3"], "m", "f")
    rows = list(csv.reader((tmp_path / "self_influence.csv").read_text().splitlines()))
    assert rows[1:] == [["1", "0", "'=1+1", "2.0"], ["2", "1", "-3", "1.0"]]


def test_a_regression_has_numbers_for_labels_and_a_number_for_an_answer(tmp_path: Path) -> None:
    extra = (
        "\nfrom torch.utils.data import TensorDataset\ndef get_dataloaders():\n"
        "    x = torch.arange(20.0).reshape(5, 4) / 20\n    return [DataLoader(TensorDataset(x, x.sum(1)))] * 2\n"
        "def get_model():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Flatten(0))\n"
    )
    found = load_task(task_file(tmp_path, extra))
    assert self_influence_table.label_names(found.problem) == ["0.3", "1.1", "1.9", "2.7", "3.5"]
    answers = predict(found, found.query_source, [1, 4])
    x = torch.stack([found.query_source.dataset[i][0] for i in (1, 4)])
    assert answers is not None and torch.allclose(answers.float(), found.problem.model(x))


# --------------------------------------------------------------------------- report


def test_the_page_is_written_with_the_run_and_later_with_or_without_the_task(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    task, out = task_file(tmp_path), tmp_path / "r"
    Ran("self-influence", task, "--out", out, "--quiet")
    ran = Ran("attribute", task, "--out", out, "--queries", "2:5", "--report", "--json")
    page = out / "report.html"
    assert ran.found["files"]["report"] == str(page)
    with_data = page.read_text(encoding="utf-8")
    page.unlink()
    told = Ran("report", out)
    assert told.code == 0 and "report.html" in told.stdout
    assert len(page.read_bytes()) < len(with_data.encode())  # no examples to look at
    assert Ran("report", out, "--task", task, "--quiet").code == 0
    assert len(page.read_text(encoding="utf-8")) == pytest.approx(len(with_data), rel=0.02)


def test_a_page_of_other_data_is_refused(tmp_path: Path) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    assert Ran("attribute", task, "--out", out, "--quiet").code == 0
    for change, words in (
        (("Points(12, 1)", "Points(12, 2)"), "The queries of other.py are not those of the run"),
        (("Points(12, 1)", "Points(3, 1)"), "other.py has 3 queries and the scores reach to query 11"),
        (("Points(40, 0), batch", "Points(40, 9), batch"), "The training data of other.py are not those"),
    ):
        (tmp_path / "other.py").write_text(task.read_text().replace(*change))
        ran = Ran("report", out, "--task", tmp_path / "other.py")
        assert ran.code == 2 and words in ran.sentence
    assert not (out / "report.html").exists()


def test_self_influence_of_another_model_does_not_slip_into_a_page(tmp_path: Path) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    assert Ran("attribute", task, "--out", out, "--quiet").code == 0
    task.write_text(task.read_text().replace("200", "201"))
    assert Ran("self-influence", task, "--out", out, "--quiet").code == 0
    ran = Ran("report", out)
    assert ran.code == 2 and "is of other weights than the scores" in ran.sentence


def test_an_unfinished_run_has_no_page_yet(tmp_path: Path) -> None:
    assert "holds no run (run.json is missing)" in Ran("report", tmp_path).sentence
    record = {"format": 2, "fingerprint": {"digests": {}, "probes": {}}, "status": "running"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    ran = Ran("report", tmp_path)
    assert ran.code == 2 and "is not finished" in ran.sentence


def test_answers_are_the_models_probabilities(tmp_path: Path) -> None:
    found = load_task(task_file(tmp_path))
    answers = predict(found, found.query_source, [3, 0])
    x = torch.stack([found.query_source.dataset[i][0] for i in (3, 0)])
    assert answers is not None and torch.allclose(answers.float(), found.problem.model(x).softmax(1))


# --------------------------------------------------------------------------- classic


def classic_config(folder: Path, **settings: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"task": "task.py", "outdir": str(folder / "outdir"), "recursion_depth": 50} | settings))
    return path


def test_classic_writes_what_calc_img_wise_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task_file(tmp_path)
    found = Ran("classic", classic_config(tmp_path, test_sample_num=2), "--json").found
    written = json.loads(Path(found["files"]["results"]).read_text())
    task = load_task(tmp_path / "task.py")
    config = {"recursion_depth": 50, "test_sample_num": 2, "outdir": str(tmp_path / "other"), "progress": False}
    expected = ptif.calc_img_wise(config, task.problem.model, task.problem.data, task.query_source)
    assert list(written) == list(expected.influences) and len(written) == 4
    key = next(iter(written))
    assert written[key]["influence"] == pytest.approx(expected.influences[key]["influence"], rel=1e-4, abs=1e-9)
    assert found["helpful"] == expected.helpful[:10]


def test_classic_takes_the_tasks_weight_decay_unless_the_config_has_one(tmp_path: Path) -> None:
    def influence(extra: str, **settings: object) -> list[float]:
        task_file(tmp_path, extra)
        found = Ran("classic", classic_config(tmp_path, test_sample_num=1, solver="auto", **settings), "--json").found
        return next(iter(ptif.classic.InfluenceResult.load(found["files"]["results"]).values()))["influence"]  # type: ignore[no-any-return]

    given = "\ndef get_options():\n    return {'weight_decay': 0.5}\n"
    without, taken, stated = influence(""), influence(given), influence("", weight_decay=0.5)
    assert taken == pytest.approx(stated) and taken != pytest.approx(without)
    assert influence(given, weight_decay=0.0) == pytest.approx(without)


@pytest.mark.parametrize(
    ("settings", "extra", "words"),
    [
        ({"recursion_dept": 3}, "", "The config has no key 'recursion_dept'. Did you mean 'recursion_depth'?"),
        ({"task": None}, "", "names no task file; add the setting task to it, or give --task task.py."),
        ({"train_loader": 1}, "", "holds train_loader, which a file cannot"),
        ({}, "def get_options(): return {'measure': torch.nn.CrossEntropyLoss()}", "gives measure, which ptif classic"),
        ({}, "def get_options(): return {'weight_decay': {'bias': 0.1}}", "knows one number; write weight_decay into"),
        ({"outdir": "task.py/x"}, "", "outdir"),
    ],
)
def test_classic_refuses(tmp_path: Path, settings: dict[str, object], extra: str, words: str) -> None:
    task = task_file(tmp_path, f"\n{extra}\n")
    if "outdir" in settings:
        settings = {"outdir": str(task / "x")}
        words = "cannot be made (Not a directory); give another."
    ran = Ran("classic", classic_config(tmp_path, **settings))
    assert ran.code == 2 and words in ran.sentence


# --------------------------------------------------------------------------- doctor


def test_doctor_tells_what_is_there() -> None:
    found = Ran("doctor", "--json").found
    assert found["versions"]["torch"] == metadata.version("torch") and found["versions"]["ptif"] == ptif.__version__
    assert found["threads"]["torch threads"] == torch.get_num_threads()
    assert {"plot", "frame", "cli"} <= set(found["extras"]) and not {"all", "test", "dev"} & set(found["extras"])
    assert found["extras"]["cli"] == []
    told = Ran("doctor")
    assert told.code == 0 and sys.executable.rsplit("/", 1)[-1] in told.stdout.replace("\n", "").replace(" ", "")
    assert max(map(len, told.stdout.splitlines())) <= 80


def test_doctor_names_missing_extras_and_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_is_installed", lambda library: library not in ("matplotlib", "pandas"))
    told = Ran("doctor").stdout
    assert "missing: matplotlib" in told and "pip install 'pytorch-influence-functions[" in told
    assert [name for name, lacks in doctor.missing_libraries().items() if lacks] == sorted(
        name for name, lacks in doctor.missing_libraries().items() if set(lacks) & {"matplotlib", "pandas"}
    )


def test_doctor_works_in_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGE", "not-installed-anywhere")
    told = Ran("doctor")
    assert told.code == 0 and "not-installed-anywhere is not installed, only on the" in told.stdout
    assert "pip install -e ." in told.stdout and doctor.missing_libraries() == {}


def test_a_requirement_for_an_older_python_is_no_missing_one() -> None:
    assert not doctor._applies_here("extra == 'cli' and python_version < '3.9'")
    assert doctor._applies_here("python_version < '9.0' and extra == 'cli'") and doctor._applies_here("extra == 'cli'")


@pytest.mark.parametrize("module", ["pytorch_influence_functions", "pytorch_influence_functions.cli"])
def test_the_package_runs_as_the_command(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python -m` does; in a process of its own it runs in the tests of interruptions."""
    monkeypatch.setattr(sys, "argv", [module, "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not ended.value.code and ptif.__version__ in capsys.readouterr().out
