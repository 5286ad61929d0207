"""Law: a model handed over in training mode comes back bit for bit, and is judged as in eval mode.

A forward pass in training mode moves the running statistics of batch normalisation and draws dropout masks: the model
is changed for its owner, and the scores are those of another model. So no entry point may run one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import pytorch_influence_functions as ptif
from pytorch_influence_functions import methods
from pytorch_influence_functions.problem import problem as problem_module
from pytorch_influence_functions.problem.problem import first_batch

N, QUERIES = 24, 3


def perceptron() -> nn.Module:
    """With a layer that has no rule: its per-example gradients run the model once more."""
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.PReLU(5), nn.Dropout(0.5), nn.Linear(5, 3))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (4,)),
    "convolution": (convolution, (1, 3, 3)),
}


def case(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A float64 net whose running statistics are not those of the data, in training mode, but for one frozen layer."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    model.train()
    model[-1].eval()
    x, y = torch.randn(N + QUERIES, *shape).double(), torch.arange(N + QUERIES) % 3
    return model, (x[:N], y[:N]), (x[N:], y[N:])


Entry = Callable[[nn.Module, Any, Any, Path], Any]


def by_method(make: Callable[[nn.Module, Any], Any]) -> Entry:
    def run(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
        problem = ptif.Problem(model, nn.CrossEntropyLoss(), train, weight_decay=0.01)
        return make(model, problem).fit(problem, len(queries[0])).score(queries).values

    return run


def fitted(model: nn.Module, train: Any, spec: Any = None, loss: Any = None) -> Any:
    return (spec or ptif.exact()).fit(ptif.Problem(model, loss or nn.CrossEntropyLoss(), train, weight_decay=0.01))


def states(model: nn.Module) -> list[dict[str, Tensor]]:
    """Two checkpoints near the model's weights, the buffers as they are."""
    moved = {k for k, _ in model.named_parameters()}
    own = model.state_dict()
    return [{k: v * (1.0 + 0.01 * s) if k in moved else v.clone() for k, v in own.items()} for s in (1, 2)]


SETTINGS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "tracin": lambda model, problem: ptif.tracin([0.1]),
    "trak": lambda model, problem: ptif.trak(16),
    "source": lambda model, problem: ptif.source(states(model), 0.1, 20, segments=2),
    "one_step_newton": lambda model, problem: methods.one_step_newton(0.1),
    "arnoldi": lambda model, problem: methods.arnoldi(5, damping=1.0),
    "nystrom": lambda model, problem: methods.nystrom(5),
    "lissa": lambda model, problem: methods.lissa(0.5, steps=3, step=0.05, batch_size=8),
    "koh_liang": lambda model, problem: methods.koh_liang(5.0),
    "astra": lambda model, problem: methods.astra(0.1, steps=3),
}
ENTRIES: dict[str, Entry] = {
    name: by_method(SETTINGS.get(name, lambda model, problem, name=name: getattr(methods, name)()))
    for name in methods.__all__
}
ENTRIES |= {
    "attribute": lambda model, train, queries, folder: ptif.attribute(model, train, queries).values,
    "attribute, loss given": lambda model, train, queries, folder: (
        ptif.attribute(model, train, queries, loss=nn.CrossEntropyLoss(), top=3).values
    ),
    "attribute, many parameters": by_method(lambda model, problem: ptif.Influence(damping=0.1)),
    "checkpoints": lambda model, train, queries, folder: (
        ptif.attribute(model, train, queries, method=ptif.ekfac(), checkpoints=states(model)).values
    ),
    "forecast": lambda model, train, queries, folder: (
        ptif.Influence().forecast(ptif.Problem(model, nn.CrossEntropyLoss(), train), 3).passes
    ),
    "own loss and measure": lambda model, train, queries, folder: (
        fitted(model, train, ptif.dual(), lambda outputs, targets: (outputs[:, 0] - targets).square())
        .score(queries, lambda outputs, targets: outputs[:, 1])
        .values
    ),
    "EK-FAC from disk": lambda model, train, queries, folder: [
        fitted(model, train, ptif.ekfac(folder=folder)).score(queries).values for _ in range(2)
    ],
    "leverage": lambda model, train, queries, folder: (
        fitted(model, train, ptif.Influence(ptif.curvature.GGN(), scaling=ptif.scaling.Leverage()))
        .score(queries)
        .values
    ),
    "truncated": lambda model, train, queries, folder: (
        fitted(model, train, ptif.Influence(ptif.curvature.GGN(), truncation=ptif.solvers.Truncation(rank=1)))
        .score(queries)
        .values
    ),
    "damping curve": lambda model, train, queries, folder: fitted(model, train).damping_curve().losses,
    "self-influence": lambda model, train, queries, folder: fitted(model, train, ptif.ekfac()).self_influence(),
    "spectrum": lambda model, train, queries, folder: fitted(model, train).spectrum().mean,
    "responses": lambda model, train, queries, folder: (
        ptif.evaluation.pbrf(ptif.Problem(model, nn.CrossEntropyLoss(), train), [0], queries, 1.0, rtol=0.1).measured
    ),
    "classic": lambda model, train, queries, folder: torch.tensor(
        ptif.classic.calc_influence_single(
            model, loader(train), loader(queries), 0, recursion_depth=10, damp=0.5, scale=5.0, progress=False
        )[0]
    ),
}


def loader(data: Any) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 8)


@contextmanager
def training_passes(model: nn.Module) -> Iterator[list[str]]:
    """The layers of `model` that are run in training mode while this is open."""
    names = {id(module): name for name, module in model.named_modules()}
    noted: list[str] = []

    def note(module: nn.Module, args: Any) -> None:
        if id(module) in names and module.training:
            noted.append(f"{names[id(module)]} {type(module).__name__}")

    handle = register_module_forward_pre_hook(note)
    try:
        yield noted
    finally:
        handle.remove()


# These only multiply with the curvature, in the same way for any net: one net is enough.
ITERATIVE = ("arnoldi", "astra", "gauss_newton", "koh_liang", "lissa", "nystrom", "source")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "net"),
    [(entry, net) for entry in ENTRIES for net in NETS if net == "perceptron" or entry not in ITERATIVE],
)
def test_a_model_in_training_mode_is_neither_moved_nor_judged_so(entry: str, net: str, tmp_path: Path) -> None:
    model, train, queries = case(net)
    settled = copy.deepcopy(model).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with training_passes(model) as noted:
        values = ENTRIES[entry](model, train, queries, tmp_path / "training")
    assert not noted
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(values, ENTRIES[entry](settled, train, queries, tmp_path / "eval"))


def test_the_first_batch_is_looked_at_in_eval_mode_and_the_mode_comes_back() -> None:
    model, train, _ = case("perceptron")
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train, batch_size=5)
    with first_batch(problem) as (ids, batch):
        assert ids.tolist() == [0, 1, 2, 3, 4] and torch.equal(batch[0], train[0][:5])
        assert not any(m.training for m in model.modules())
    assert model.training
    with pytest.raises(ZeroDivisionError), first_batch(problem, ids=[7]) as (ids, _):
        assert ids.tolist() == [7]
        raise ZeroDivisionError
    assert model.training


def test_nothing_takes_the_first_of_a_sweep_and_goes_on_without_its_guard() -> None:
    root = Path(problem_module.__file__).parent.parent
    pattern = re.compile(r"next\(\s*(iter\()?\s*sweep\(\w")
    assert [str(p.relative_to(root)) for p in root.rglob("*.py") if pattern.search(p.read_text())] == []
