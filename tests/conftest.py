"""What every test starts from: one thread, one seed, the default dtype untouched."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests import shapes

shapes.check("pytorch_influence_functions")

# One thread: the arrays are tiny, and `make test` runs one process a core. Programs that a test starts get one as well.
# `make test-portable` asks for more, because sums then come out in another order.
THREADS = int(os.environ.get("PTIF_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)

# No deadline: the first example of a property pays for imports and caches. Derandomised: a failure seen once
# is seen again.
settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state, whatever ran before it, and leaves the default dtype."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed, for tests that pass one on."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors and modules are float64 within the test: the precision of the oracles."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def pytest_report_header() -> str:
    """What the last digits of a result depend on, for the report of a failure seen on one machine only."""
    order = os.environ.get("MKL_CBWR", "unset")
    return f"torch {torch.__version__}: {torch.backends.cpu.get_cpu_capability()}, {THREADS} threads, MKL_CBWR {order}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))
