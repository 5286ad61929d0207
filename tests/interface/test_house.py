"""The house rules that no linter knows."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytorch_influence_functions as ptif
from pytorch_influence_functions._version import __version__

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
OPTIONAL = ("matplotlib", "pandas", "jinja2", "PIL", "typer", "rich")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def kept_files() -> list[Path]:
    """Every file git keeps or would keep; where there is no git, the folders that hold text."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        folders = ("src", "tests", "scripts", "docs", "benchmarks", "examples")
        return [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# Written in pieces, or this file would find itself.
ABSOLUTE = re.compile(r"(?<![\w.:/~-])/" + r"(?:work|root|home|Users|opt|tmp)/\w")
HOSTS = re.compile("|".join((r"py" + r"pi\.org", r"python" + r"hosted\.", r"npm" + r"js\.", r"download\.py" + "torch")))


def test_no_machine_path_and_no_registry_host() -> None:
    found = []
    files = kept_files()
    assert len(files) > 20
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # the bundled images
        for number, line in enumerate(lines, 1):
            if ABSOLUTE.search(line) or HOSTS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize("text", ["see /wo" + "rk/main/x", "open('/ho" + "me/me/x')", "/op" + "t/wheels"])
def test_the_search_for_machine_paths_finds_them(text: str) -> None:
    assert ABSOLUTE.search(text)


@pytest.mark.parametrize("text", ["a/work/b", "unpacked/usr/share/x", "https://host/ho" + "me/x", "n/tmp/x"])
def test_the_search_for_machine_paths_finds_nothing_else(text: str) -> None:
    assert not ABSOLUTE.search(text)


def test_one_version() -> None:
    assert ptif.__version__ == __version__
    assert re.search(r"^version: (.+)$", read("CITATION.cff"), re.M)[1] == __version__  # type: ignore[index]
    first_release = re.search(r"^## \[(\d[^\]]*)\]", read("CHANGELOG.md"), re.M)
    assert first_release is not None and first_release[1] == __version__
    assert 'dynamic = ["version", "readme"]' in read("pyproject.toml")


def test_installed_version_is_this_one() -> None:
    from importlib.metadata import version

    assert version("pytorch-influence-functions") == __version__


def test_every_public_name_exists_and_says_what_it_is() -> None:
    assert len(set(ptif.__all__)) == len(ptif.__all__)
    bare = []
    for name in ptif.__all__:
        thing = getattr(ptif, name)
        if not (inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)):
            continue  # a constant such as __version__
        text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
        # A dataclass without a docstring gets its signature as one.
        if not text or text.startswith(f"{name}("):
            bare.append(name)
    assert bare == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_files_are_short_and_begin_with_a_word(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    assert text.startswith(('"""', 'r"""'))


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip()


def test_import_brings_no_optional_library_and_a_first_call_does_not_wait_for_the_compiler() -> None:
    """torch imports its compiler, a second and a half, for a dispatch mode that does not say it needs none."""
    code = (
        # torch may bring some of them by itself: that is not ours to answer for.
        f"import sys, torch; alone = [m for m in {OPTIONAL} if m in sys.modules]; "
        "import pytorch_influence_functions as ptif; "
        f"print(*[m for m in {OPTIONAL} if m in sys.modules and m not in alone]); "
        "x, y = torch.randn(60, 6), torch.randint(0, 3, (60,)); "
        "m = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3)); "
        "[ptif.attribute(m, (x, y), (x[:2], y[:2]), method=k) for k in (None, 'ekfac', 'dual', 'grad_dot')]; "
        "print('torch._dynamo' in sys.modules)"
    )
    assert run(code) == "False"  # after the empty line of the libraries


def test_import_works_without_any_optional_library() -> None:
    # None in sys.modules makes an import fail as if the library were not installed.
    absent = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); "
    assert run(absent + "import pytorch_influence_functions as p; print(p.__version__)") == __version__


def test_constraints_pin_everything_and_no_accelerator_stack() -> None:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert "torch==2.13.0" in lines
    assert all(re.match(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"3\.11\")?$", line) for line in lines)
    assert not [line for line in lines if re.match("nvidia|triton|cuda", line)]


def test_makefile_installs_the_pinned_torch() -> None:
    assert ") torch==2.13.0\n" in read("Makefile")


def test_ci_runs_only_what_the_makefile_has() -> None:
    steps = " ".join(re.findall(r"\bsteps ([a-z -]+)", read(".ci/run"))).split()
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    expected = {"test", "crosscheck", "lint", "types", "layers", "docs", "integrations", "test-oldest"}
    assert set(steps) == expected <= targets


def test_every_folder_has_its_layer() -> None:
    layers = re.search(r'name = "Folders".*?\nlayers = \[(.*?)\n\]', read("pyproject.toml"), re.S)
    assert layers is not None
    known = {"__init__", "__main__", "_version", *re.findall(r"\w+", layers[1])}
    for path in (ROOT / "src/pytorch_influence_functions").iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            assert path.stem in known
