"""The model is wrapped, compiled, or was saved from a wrapper; part of it is frozen; a data worker fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.problem.problem import Problem
from tests.tolerance import gap, rounding

X, Y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(30) % 3
TRAIN, QUERIES = (X[:24], Y[:24]), (X[24:], Y[24:])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def refuse_to_run(graph: Any, inputs: Any) -> Any:
    """A compiler that must not be asked: whatever is compiled for the user would be compiled anew for our hooks."""
    raise AssertionError("the model was compiled")


def compiled_in_place() -> nn.Module:
    model = net()
    model.compile(backend=refuse_to_run)
    return model


def with_a_compiled_layer() -> nn.Module:
    model = net()
    model[0] = torch.compile(model[0], backend=refuse_to_run)  # type: ignore[assignment]
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "torch.compile": lambda: torch.compile(net(), backend=refuse_to_run),  # type: ignore[dict-item, return-value]
    "model.compile()": compiled_in_place,
    "a compiled layer": with_a_compiled_layer,
    "DataParallel": lambda: nn.DataParallel(net()),
    "compiled in DataParallel": lambda: nn.DataParallel(torch.compile(net(), backend=refuse_to_run)),  # type: ignore[type-var]
}


@pytest.mark.parametrize("method", ["ekfac", "dual", "gauss_newton", "datainf"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_scores_are_those_of_the_model_inside(wrapper: str, method: str) -> None:
    expected = ptif.attribute(net(), TRAIN, QUERIES, method=method).values
    values = ptif.attribute(WRAPPED[wrapper](), TRAIN, QUERIES, method=method).values
    assert gap(values, expected) < rounding(torch.float64, 1e4)


@pytest.mark.parametrize("names", ["module.2.weight", "2.weight", ["module.2.*"]])
def test_parameters_are_named_as_the_wrapper_or_as_the_model_names_them(names: Any) -> None:
    problem = Problem(nn.DataParallel(net()), nn.CrossEntropyLoss(), TRAIN, parameters=names)
    assert set(problem.space.names) <= {"2.weight", "2.bias"}


def test_weight_decay_is_read_from_the_optimiser_of_a_wrapper_or_named_as_the_wrapper_names_it() -> None:
    model = net()
    wrapper = nn.DataParallel(model)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1, weight_decay=0.3)
    read = ptif.WeightDecay.from_optimizer(optimizer, wrapper)
    assert read.strength == {name: 0.3 for name, _ in model.named_parameters()}
    expected = ptif.attribute(model, TRAIN, QUERIES, method="exact", weight_decay=0.3).values
    of_wrapper: Any = {name: 0.3 for name, _ in wrapper.named_parameters()}
    for given in (read, optimizer, of_wrapper, ptif.WeightDecay(of_wrapper)):
        values = ptif.attribute(wrapper, TRAIN, QUERIES, method="exact", weight_decay=given).values
        torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("saved", [False, True], ids=["the optimiser", "its state dict"])
def test_moments_of_adam_are_read_for_the_model_inside(saved: bool) -> None:
    model = net()
    wrapper = nn.DataParallel(model)
    optimizer = torch.optim.Adam(list(wrapper.named_parameters()), lr=0.1)
    nn.functional.cross_entropy(wrapper(X), Y).backward()
    optimizer.step()
    state = ptif.trajectory.AdamState.of(optimizer.state_dict() if saved else optimizer, wrapper)
    assert list(state.second_moments) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "model.", "module._orig_mod.", "model.net."])
@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "from a file"])
def test_checkpoints_of_a_wrapper_fit_the_model_inside(prefix: str, saved: bool, tmp_path: Path) -> None:
    model = net()
    moved = {k: 1.1 * v for k, v in model.state_dict().items()}
    prefixed: Any = {prefix + k: v for k, v in moved.items()}
    if saved:
        torch.save(prefixed, tmp_path / "checkpoint.pt")
        prefixed = tmp_path / "checkpoint.pt"
    expected = ptif.attribute(model, TRAIN, QUERIES, method="dual", checkpoints=[moved]).values
    values = ptif.attribute(model, TRAIN, QUERIES, method="dual", checkpoints=[prefixed]).values
    torch.testing.assert_close(values, expected)


def test_a_prefix_stays_where_the_names_do_not_fit_without_it() -> None:
    odd = {"module.0.wight": torch.zeros(5, 4)}
    with pytest.raises(InvalidInput, match=r"holds 'module.0.wight', which the model does not have"):
        ptif.attribute(net(), TRAIN, QUERIES, method="dual", checkpoints=[odd])


def test_a_model_whose_own_layer_is_called_net_keeps_its_names() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.net(x)
            return outputs

    model = Holder()
    ptif.attribute(model, TRAIN, QUERIES, method="dual", checkpoints=[model.state_dict()])


def test_a_scripted_model_is_refused_in_one_sentence() -> None:
    scripted = torch.jit.script(net())  # type: ignore[no-untyped-call]
    for call in (ptif.attribute, ptif.forecast):
        with pytest.raises(InvalidInput, match=r"is a TorchScript module, .*pass the Python module it was made from"):
            call(scripted, TRAIN, QUERIES, loss=nn.CrossEntropyLoss())


class Thing:
    """An object that a training script put beside the weights."""


def test_a_file_with_objects_is_refused_in_one_sentence_without_advice_to_unpickle(tmp_path: Path) -> None:
    torch.save({"state_dict": net().state_dict(), "args": Thing()}, tmp_path / "checkpoint.pt")
    with pytest.raises(InvalidInput, match=r"cannot be read: it holds Python objects .*is not unpickled") as caught:
        ptif.attribute(net(), TRAIN, QUERIES, method="dual", checkpoints=[tmp_path / "checkpoint.pt"])
    message = str(caught.value)
    assert "\x1b" not in message and "\n" not in message and "weights_only" not in message


def test_a_frozen_backbone_is_no_alarm() -> None:
    model = net()
    model[0].requires_grad_(False)
    scores = ptif.attribute(model, TRAIN, QUERIES, method="dual")
    check = next(c for c in scores.diagnostics.checks() if c.name == "parameters")
    assert check.status == "ok"
    assert check.text == "18 of 43 took part: all that are trainable; the model's other parameters are frozen"


def test_trainable_parameters_that_are_left_out_are_an_alarm_still() -> None:
    model = net()
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    scores = ptif.attribute(model, TRAIN, QUERIES, method="dual", parameters="2.bias")
    check = next(c for c in scores.diagnostics.checks() if c.name == "parameters")
    assert check.status == "warn"
    assert "% of the squared gradient norm of what is trainable" in check.text


class FailingItem(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        if i == 7:
            raise OSError("image truncated\nand more lines\nof no use")
        return X[i], Y[i]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_cannot_be_read_is_named_in_one_line(workers: int) -> None:
    loader = torch.utils.data.DataLoader(FailingItem(), 4, num_workers=workers)
    with pytest.raises(InvalidInput) as caught:
        ptif.attribute(net(), loader, QUERIES, loss=nn.CrossEntropyLoss(), method="dual")
    assert str(caught.value) == "Reading item 7 of the dataset failed with OSError: image truncated."
