"""The same texts give the same scores, however they are padded and whatever shares their batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, GGN, KFAC, EmpiricalFisher, Fisher, Shampoo
from pytorch_influence_functions.curvature.kronecker import moments
from pytorch_influence_functions.curvature.kronecker.moments import Sharing
from pytorch_influence_functions.solvers import Factored
from tests.tiny_lm import TinyLM, loader, padding, texts

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "to 64": {"length": 64},
    "left": {"left": True},
    "left to 20": {"left": True, "length": 20},
    "in twos": {"batch_size": 2},
    "alone": {"batch_size": 1},
}
CURVATURES = {
    "kfac": ptif.Influence(KFAC(), damping=1e-3),
    "kfac, factored": ptif.Influence(KFAC(), Factored(), 1e-3),
    "kfac, summed": ptif.Influence(KFAC(sharing=Sharing.REDUCE), damping=1e-3),
    "ekfac, two draws": ptif.Influence(EKFAC(Fisher(samples=2)), damping=1e-3),
    "ekfac, given labels": ptif.Influence(EKFAC(EmpiricalFisher()), damping=1e-3),
    "shampoo": ptif.Influence(Shampoo(), damping=1e-3),
}


EVERYTHING = {"left": True, "length": 20, "batch_size": 2}


def scores(method: Any, model: TinyLM, options: dict[str, Any], prompt: int = 0) -> torch.Tensor:
    options = {"prompt": prompt, **options}
    problem = ptif.Problem(model, ptif.TokenCrossEntropy(shift=True), loader(texts(8), **options))
    return method.fit(problem).score(loader(texts(3, seed=1), **options)).values


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_scores_do_not_depend_on_padding(arrangement: str) -> None:
    torch.manual_seed(0)
    model = TinyLM().double()
    want = scores(ptif.ekfac(), model, {})
    torch.testing.assert_close(scores(ptif.ekfac(), model, ARRANGEMENTS[arrangement]), want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", CURVATURES)
def test_no_factored_curvature_depends_on_padding(name: str) -> None:
    torch.manual_seed(0)
    model = TinyLM().double()
    want = scores(CURVATURES[name], model, {})
    torch.testing.assert_close(scores(CURVATURES[name], model, EVERYTHING), want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_scores_do_not_depend_on_padding_where_prompts_are_ignored(tied: bool) -> None:
    torch.manual_seed(0)
    model = TinyLM(tied=tied).double()
    method = ptif.Influence(EKFAC(), damping=1e-3)
    want = scores(method, model, {}, prompt=2)
    torch.testing.assert_close(scores(method, model, EVERYTHING, 2), want, rtol=1e-8, atol=1e-12)


def test_uses_that_are_left_out_do_not_depend_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many uses of a weight only some are looked at: which, is counted over those that teach."""
    monkeypatch.setattr(moments, "_USES_PER_SIDE", 1)
    torch.manual_seed(0)
    model = TinyLM().double()
    method = ptif.Influence(EKFAC(), damping=1e-3)
    want = scores(method, model, {})
    torch.testing.assert_close(scores(method, model, EVERYTHING), want, rtol=1e-8, atol=1e-12)


def test_enumerated_labels_do_not_depend_on_padding() -> None:
    torch.manual_seed(0)
    model = TinyLM(vocabulary=3).double()
    found = []
    for options in ({}, {"length": 7, "left": True}):
        few = [loader(texts(n, seed, 3, longest=5), **options) for n, seed in ((4, 0), (2, 1))]
        problem = ptif.Problem(model, ptif.TokenCrossEntropy(shift=True), few[0])
        found.append(ptif.Influence(EKFAC(GGN()), damping=1e-3).fit(problem).score(few[1]).values)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-12)


def test_a_label_that_padding_would_predict_does_not_count() -> None:
    """Padded on the left, the last padding position predicts the first token; padded on the right nothing does."""
    torch.manual_seed(0)
    model, objective, items = TinyLM().double(), ptif.TokenCrossEntropy(shift=True), texts(4)
    right, left = ({**padding(20, side)(items)} for side in (False, True))
    losses = [objective.losses(objective.outputs(model, batch), batch) for batch in (right, left)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("left", [False, True])
def test_where_padding_has_labels_all_of_them_count(left: bool) -> None:
    """As in cross entropy over all labels; a text beside it without labels there is left as it is."""
    torch.manual_seed(0)
    model, objective = TinyLM().double(), ptif.TokenCrossEntropy(average=False, shift=True)
    batch = padding(12, left)(texts(4))
    taught = {**batch, "labels": torch.where(torch.arange(4)[:, None] < 2, batch["input_ids"], batch["labels"])}
    logits = objective.outputs(model, batch)
    losses, plain = objective.losses(logits, taught), objective.losses(logits, batch)
    each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none").sum(1)
    torch.testing.assert_close(losses[:2], each[:2])
    torch.testing.assert_close(losses[2:], plain[2:])
    assert bool((losses[:2] > plain[:2]).all())


# --------------------------------------------------------------------------- models that are not told the lengths

LENGTHS = [3, 3, 5, 2, 4, 1, 5, 3]
SEQUENCES = [torch.randn(length, 2, generator=torch.Generator().manual_seed(length)).double() for length in LENGTHS]
CLASSES = torch.arange(len(LENGTHS)) % 3


class MeanOfSteps(torch.nn.Module):
    """Takes padding for steps, unless it is told that zeros are none."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.masked = torch.nn.Linear(2, 4), torch.nn.Linear(4, 3), masked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.body(x).tanh()
        counted = (x != 0).any(-1, keepdim=True).to(x) if self.masked else torch.ones_like(x[..., :1])
        output: torch.Tensor = self.head((steps * counted).sum(1) / counted.sum(1))
        return output


def sequences(length: int | None, **options: Any) -> torch.utils.data.DataLoader[Any]:
    """Padded to the longest of a batch, or to one length."""

    def collate(items: list[Any]) -> Any:
        rows = [x for x, _ in items] + ([torch.zeros(length, 2).double()] if length else [])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[: len(items)]
        return padded, torch.stack([y for _, y in items])

    return torch.utils.data.DataLoader(list(zip(SEQUENCES, CLASSES, strict=True)), collate_fn=collate, **options)


def ask(model: torch.nn.Module, length: int | None = None, batch_size: int | None = None) -> Any:
    data = sequences(length, batch_size=8)
    return ptif.attribute(model, data, data, loss=torch.nn.CrossEntropyLoss(), method="grad_dot", batch_size=batch_size)


def oracle(model: torch.nn.Module, length: int = 0) -> torch.Tensor:
    """Inner products of the gradients of examples alone, padded to one length where one is given."""
    rows = []
    for x, y in zip(SEQUENCES, CLASSES, strict=True):
        padded = torch.cat([x, x.new_zeros(max(0, length - len(x)), 2)])[None]
        loss = torch.nn.functional.cross_entropy(model(padded), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows) @ torch.stack(rows).T / len(rows)


def test_a_model_that_takes_padding_for_input_is_named_and_every_cure_works() -> None:
    """Its scores depend on who shares a batch, and are those of the examples alone in none but batches of one."""
    torch.manual_seed(0)
    model = MeanOfSteps().double()
    for batch_size in (None, 4):
        with pytest.warns(ptif.errors.TrainingDataWarning, match=r"Example 5 .* beside example 2, .*batch_size=1"):
            scores = ask(model, batch_size=batch_size)
        assert (scores.values - oracle(model)).abs().max() > 0.05 * oracle(model).abs().max()
        check = next(check for check in scores.diagnostics.checks() if check.name == "data")
        assert check.status == "warn" and "padding changes the outputs of an example by" in check.text
    masked = MeanOfSteps(masked=True).double()
    cures = [(ask(model, batch_size=1), oracle(model)), (ask(model, length=6), oracle(model, 6))]
    cures += [(ask(model, length=6, batch_size=3), oracle(model, 6)), (ask(masked), oracle(masked))]
    for scores, want in cures:  # without a warning, which would be an error here
        torch.testing.assert_close(scores.values, want, rtol=1e-8, atol=1e-12)
        assert next(check for check in scores.diagnostics.checks() if check.name == "data").status == "ok"
