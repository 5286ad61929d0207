"""The environment of the library we are measured against: `.bench/`, made once from pinned requirements.

Separate from the package's own, whose dependencies must not bend to it. `PTIF_BENCH_PYTHON` names the Python of a
ready-made environment instead.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOME = HERE.parent / ".bench"
REQUIREMENTS = HERE / "requirements-peers.txt"

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


def _python(home: Path) -> Path:
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _repair(python: Path) -> None:
    """Make `import torchvision` work where its compiled operators do not load."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([str(python), "-c", ask], text=True).strip())
    (site / "declare_torchvision_operators.py").write_text(_DECLARE)
    (site / "declare_torchvision_operators.pth").write_text("import declare_torchvision_operators\n")


def ensure() -> str:
    """The Python of a working environment; made first where there is none."""
    given = os.environ.get("PTIF_BENCH_PYTHON")
    if given:
        return given
    python, stamp = _python(HOME), HOME / "installed"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + _DECLARE.encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        print("Installing kronfluence into .bench (once, a few minutes) ...", file=sys.stderr, flush=True)
        if not python.exists():
            venv.create(HOME, with_pip=True)
        torch = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch=="))
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, torch], check=True)
        subprocess.run([*install, "--requirement", str(REQUIREMENTS)], check=True)
        _repair(python)
        subprocess.run([str(python), "-c", "import kronfluence, torchvision"], check=True)
        stamp.write_text(wanted)
    return str(python)


if __name__ == "__main__":
    print(ensure())
