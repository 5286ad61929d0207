"""Bad input to `ptif`: one sentence on stderr, exit code 2, and nothing on disk is harmed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytorch_influence_functions as ptif
from tests.interface.cli_cases import Ran, task_file


def refused(*arguments: object) -> str:
    ran = Ran(*arguments)
    assert ran.code == 2 and ran.stdout == ""
    return ran.sentence


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method", "ekfak"), r"^There is no method 'ekfak'\. Did you mean 'ekfac'\? The names are auto, "),
        (("--queries", "0:20"), r"^--queries 0:20 asks for query 19, and there are 12 \(0 to 11\)\.$"),
        (("--queries", "12"), r"asks for query 12, and there are 12"),
        (("--queries", "5:3"), r"picks no query; the first number must be below the second"),
        (("--queries", "1,0:3"), r"names a query twice"),
        (("--queries", "some"), r"is no range of positions; write 0:20"),
        (("--queries", "0:9:0"), r"has a step of 0"),
        (("--top", "0"), r"^--top is 0; it must be a whole number of at least 1\.$"),
        (("--block", "-3"), r"^--block is -3; it must be"),
        (("--batch-size", "0"), r"^--batch-size is 0; it must be"),
        (("--weight-decay", "-1"), r"^--weight-decay is -1.0; it must be a number of at least 0\.$"),
        (("--damping", "much"), r"^'much' is no damping; write a number such as 0.01"),
        (("--damping", "relative:0"), r"Relative\(share=0.0\) must be a finite number above 0"),
        (("--damping", "training:0.1:x"), r"is no damping"),
        (("--device", "gpu7"), r"^The model cannot be moved to --device gpu7 \("),
    ],
)
def test_flags(tmp_path: Path, flags: tuple[str, str], words: str) -> None:
    out = tmp_path / "r"
    assert re.search(words, refused("attribute", task_file(tmp_path), *flags, "--out", out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", r"^task.py does not define get_model\(\)\. Define get_model\(\) and get_dataloaders\(\), or problem"),
        ("def get_modle(): pass", r"does not define get_model\(\)\. Did you mean 'get_modle'\?"),
        ("def get_model(): return 3", r"does not define get_dataloaders\(\)\. Define get_model\(\) and get_data"),
        ("get_model = 3", r"^get_model in task.py is int; make it a function\.$"),
        ("def get_model(:", r"^task.py is not Python: invalid syntax in line 1; correct it\.$"),
        ("x = 1\nimport nowhere_at_all", r"^task.py, line 2: Running it failed with ModuleNotFoundError: No module"),
        ("raise SystemExit(3)", r"line 1: Running it failed with SystemExit: 3"),
        (
            "def get_model():\n    return 1 / 0",
            r"^task.py, line 2: get_model\(\) failed with ZeroDivisionError: division",
        ),
        ("problem = 3", r"^problem in task.py is int; make it a ptif.Problem"),
        ("problem = 3\ndef get_model(): pass", r"defines both problem and get_model; keep one"),
    ],
)
def test_a_task_file_that_says_too_little(tmp_path: Path, text: str, words: str) -> None:
    task = tmp_path / "task.py"
    task.write_text(text)
    assert re.search(words, refused("attribute", task, "--out", tmp_path / "r"))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("def get_dataloaders(): return 7", r"get_dataloaders\(\) of task.py returns int; return two, \(train, test\)"),
        ("def get_dataloaders(): return [], 1, 2", r"returns 3 things; return two"),
        ("def get_dataloaders(): return Points(4, 0), None", r"^task.py gives no queries; let get_dataloaders"),
        ("def get_options(): return 3", r"^get_options\(\) of task.py returns int; return a dictionary"),
        ("def get_options(): return {'wieght_decay': 1}", r"holds 'wieght_decay'\. Did you mean 'weight_decay'\?"),
        (
            "def get_options(): return {'method': 'ekfak'}",
            r"^In get_options\(\) of task.py: There is .*'ekfac'",
        ),
        ("def get_options(): return {'loss': 3}", r"^The loss is 3 of type int"),
        ("def get_model(): return 5", r"^The model must be a torch.nn.Module, got int"),
    ],
)
def test_a_task_file_that_says_something_wrong(tmp_path: Path, extra: str, words: str) -> None:
    task = task_file(tmp_path, f"\n{extra}\n")
    assert re.search(words, refused("attribute", task, "--out", tmp_path / "r"))


def test_no_task_file(tmp_path: Path) -> None:
    assert refused("attribute", tmp_path / "nope.py").startswith(
        f"The task file '{tmp_path / 'nope.py'}' does not exist;"
    )
    assert "is a folder; give a Python file" in refused("attribute", tmp_path)
    assert refused("attribute").startswith("There is no task file; write ptif COMMAND task.py")


def test_a_method_without_damping_or_forecast_says_so(tmp_path: Path) -> None:
    task = task_file(
        tmp_path,
        "\nimport pytorch_influence_functions as ptif\ndef get_options(): return {'method': ptif.methods.Random()}\n",
    )
    assert "takes no damping=" in refused("attribute", task, "--damping", "0.1", "--out", tmp_path / "r")
    assert "Random has no forecast of its cost" in refused("attribute", task, "--dry-run")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.toml", b"top = [", r"cannot be read \(.+\); correct it\.$"),
        ("c.json", b"{", r"cannot be read \(Expecting"),
        ("c.json", b"\xff\xfe", r"cannot be read \('utf-8' codec"),
        ("c.json", b"[1]", r"holds a list; it must be one table of settings"),
        ("c.yaml", b"a: 1", r"must end in \.toml or \.json"),
        ("c.toml", b"qeuries = '0:3'", r"^c.toml has no setting 'qeuries'\. Did you mean 'queries'\?"),
        ("c.toml", b"top = 'many'", r"^top in c.toml is 'many'; it must be a whole number of at least 1\.$"),
        ("c.toml", b"report = 1", r"^report in c.toml is 1; it must be true or false\.$"),
        ("c.toml", b"weight_decay = nan", r"^weight_decay in c.toml is nan; it must be"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(words, refused("attribute", task_file(tmp_path), "--config", tmp_path / name))


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist; give the path of a TOML or JSON file" in refused(
        "attribute", "--config", tmp_path / "no.toml"
    )
    (tmp_path / "folder.json").mkdir()
    assert "cannot be read" in refused("attribute", "--config", tmp_path / "folder.json")


def test_an_out_that_cannot_be_written_to(tmp_path: Path) -> None:
    task = task_file(tmp_path)
    words = refused("attribute", task, "--out", task / "below")
    assert words.startswith(f"'{task / 'below'}' cannot be written to (Not a directory); give another place")
    assert "cannot be written to" in refused("self-influence", task, "--out", task)


@pytest.mark.parametrize("inside", ["", "/x/y"])
def test_the_demo_looks_at_its_out_before_any_work(
    tmp_path: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_influence_functions.demo import run

    monkeypatch.setattr(run, "run_demo", lambda *_: pytest.fail("the demo began"))
    (tmp_path / "notes.txt").write_text("mine")
    ran = Ran("demo", "--out", f"{tmp_path}/notes.txt{inside}")
    assert ran.code == 2 and ran.stdout == ""
    assert ran.sentence.endswith("notes.txt' is a file, and --out names a folder to write to; give another name.")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_out_that_holds_something_else(tmp_path: Path) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    out.mkdir()
    (out / "scores.safetensors").write_bytes(b"mine")
    assert "without its run.json; give another --out, or --overwrite" in refused("attribute", task, "--out", out)
    for content in ("{", "[]", '{"format": 99, "fingerprint": {}}', '{"format": 2}'):
        (out / "run.json").write_text(content)
        assert "give another --out" in refused("attribute", task, "--out", out)
    assert (out / "scores.safetensors").read_bytes() == b"mine"


def test_with_json_an_error_is_an_object_on_stdout_and_still_a_sentence_on_stderr(tmp_path: Path) -> None:
    ran = Ran("attribute", task_file(tmp_path), "--method", "ekfak", "--json")
    assert ran.code == 2 and ran.found["error"] == "UnknownName" and ran.found["exit_code"] == 2
    assert ran.found["status"] == "failed" and ran.found["message"] == ran.sentence


def test_a_run_that_fails_is_1_and_input_that_is_wrong_is_2(tmp_path: Path) -> None:
    nan = task_file(
        tmp_path,
        "\nmade = get_model\ndef get_model():\n    net = made()\n    net.bias.data[0] = float('nan')\n    return net\n",
    )
    ran = Ran("attribute", nan, "--out", tmp_path / "r", "--loss")
    assert ran.code == 2 and "No such option" in ran.stderr
    ran = Ran("attribute", nan, "--out", tmp_path / "r")
    assert ran.code == 1 and "weights hold NaN or infinity in 'bias'" in ran.sentence


def test_an_error_nobody_foresaw_shows_the_whole_trace_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr(ptif.Influence, "fit", broken)
    ran = Ran("attribute", task_file(tmp_path), "--out", tmp_path / "r", "--json")
    assert ran.code == 1 and "Traceback" in ran.stderr
    assert ran.stderr.rstrip().endswith("ptif: The run failed with RuntimeError: a bug")
    assert ran.found["message"] == "The run failed with RuntimeError: a bug"


def test_a_results_folder_never_makes_a_program_run(tmp_path: Path) -> None:
    out = tmp_path / "r"
    out.mkdir()
    (out / "task.py").write_text("open('was_here', 'w')")
    (out / "run.json").write_text(
        json.dumps(
            {
                "format": 2,
                "fingerprint": {"digests": {}, "probes": {}},
                "status": "complete",
                "task": "task.py",
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytorch_influence_functions.cli", "report", "."],
        cwd=out,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and "scores.safetensors" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "was_here").exists()


def test_scores_are_never_unpickled(tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "sprung",)

    task, out = task_file(tmp_path), tmp_path / "r"
    assert Ran("attribute", task, "--out", out, "--quiet").code == 0
    (out / "scores.safetensors").write_bytes(pickle.dumps(Trap()))
    assert "is not a file of saved scores, or is damaged" in refused("report", out)
    assert not (tmp_path / "sprung").exists()


def test_a_command_among_processes_of_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "4", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    ran = Ran("attribute", task_file(tmp_path), "--out", tmp_path / "r")
    assert ran.code == 2 and not (tmp_path / "r").exists()
    assert ran.sentence.startswith(
        "A command of ptif is one process, and torchrun started 4; start it without torchrun"
    )
