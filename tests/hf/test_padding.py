"""A text has the same score whatever it is padded and batched with, and however attention is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from tests.hf.tiny import build, gpt2, llama, settings, texts, tokenizer
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

ASKED = ["the cat sat on a mat", "who wrote this book", "moon over sea while dog ran to the old house"]


def bert() -> Any:
    return build("BertForMaskedLM", transformers.BertConfig(**settings()))


def scores(model: Any, method: Any, **options: Any) -> Tensor:
    problem = ptif.hf.problem(model, tokenizer(), texts(7), **options)
    # In the form of the training data, which a model that fills in blanks is asked in too.
    return ptif.attribute(problem, queries=[{"text": text} for text in ASKED], method=method).values.double()


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("method", ["grad_dot", "dual"])
def test_padding_side_and_batch_do_not_matter(make: Any, method: str) -> None:
    model = make()
    alone = scores(model, method, batch_size=1)
    assert float(alone.abs().max()) > 0
    for options in ({}, {"padding_side": "left"}, {"batch_size": 2}, {"batch_size": 3, "padding_side": "left"}):
        assert gap(scores(model, method, **options), alone) < 1e-6, options


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_attentions_implementation_does_not_matter(make: Any) -> None:
    same = [scores(make(attn_implementation=name), "grad_dot") for name in ("eager", "sdpa")]
    # eager attention takes its softmax in float32, whatever the weights are
    assert gap(*same) < 1e-5


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_types_of_the_weights_matter_as_much_as_they_round(dtype: torch.dtype, allowed: float) -> None:
    rounded = llama(dtype=dtype)
    exact = llama()
    exact.load_state_dict({name: value.double() for name, value in rounded.state_dict().items()})
    assert gap(scores(rounded, "grad_dot"), scores(exact, "grad_dot")) < allowed
    for side in ("left", "right"):
        assert gap(scores(rounded, "grad_dot", padding_side=side), scores(exact, "grad_dot")) < allowed


def test_a_loader_of_ones_own_with_left_padding_is_right_without_labels_for_padding() -> None:
    """What precedes a text would otherwise be taught to predict its first token, only where there is padding."""
    model, words = llama(), tokenizer()
    encoded = [words(text)["input_ids"] for text in texts(5)]

    def left(items: list[list[int]]) -> dict[str, Tensor]:
        longest = max(map(len, items))
        padded = [[0] * (longest - len(ids)) + ids for ids in items]
        batch = torch.tensor(padded)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in items])
        labels = torch.where(mask == 0, -100, batch)
        return {"input_ids": batch, "attention_mask": mask, "labels": labels}

    loss = ptif.TokenCrossEntropy(average=False, shift=True)
    given = torch.utils.data.DataLoader(encoded, batch_size=5, collate_fn=left)
    one = torch.utils.data.DataLoader(encoded, batch_size=1, collate_fn=left)
    values = [ptif.attribute(model, data, one, loss=loss, method="grad_dot").values for data in (given, one)]
    assert gap(*values) < 1e-5


def test_doctor_finds_positions_that_are_not_told() -> None:
    words = tokenizer()
    sick = ptif.hf.doctor(gpt2(), words, texts(4))
    named = [finding for finding in sick.findings if finding.cure]
    assert not sick.healthy and [f.situation for f in named] == ["padded on the left, places not told"]
    assert named[0].cosine < 0.99 and "position_ids" in str(sick) and "NOT" in str(sick)
    assert all(abs(f.cosine - 1) < 1e-6 and abs(f.size - 1) < 1e-6 for f in sick.findings if not f.cure)
    # rotary places are relative: left padding shifts all of them alike
    assert ptif.hf.doctor(llama(), words, texts(4)).healthy
    assert not ptif.hf.doctor(bert(), words, texts(4)).healthy


def test_doctor_tries_the_users_own_collate_function() -> None:
    model = llama()

    def no_mask(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        pad = [(longest - len(item["input_ids"]), 0) for item in items]
        rows = {
            key: torch.stack([torch.nn.functional.pad(i[key], p, value=v) for i, p in zip(items, pad, strict=True)])
            for key, v in (("input_ids", 0), ("labels", -100))
        }
        return {"input_ids": rows["input_ids"], "labels": rows["labels"]}

    checkup = ptif.hf.doctor(model, tokenizer(), texts(4), collate=no_mask)
    assert [f.situation for f in checkup.findings if f.cure] == ["by your collate function"]
    assert model.model.embed_tokens.weight.grad is None and not model.training


def test_doctor_needs_texts_to_compare() -> None:
    with pytest.raises(ptif.errors.InvalidInput, match="give at least two"):
        ptif.hf.doctor(llama(), tokenizer(), "one text")


def test_attention_over_padding_alone_is_named_and_what_is_advised_works() -> None:
    """Not the examples are to blame: eager attention takes a float64 model's mask into float32, where it overflows."""
    model = llama(attn_implementation="eager")
    with pytest.raises(ptif.errors.NonFinite, match="padded on the left, and attention over padding alone") as told:
        scores(model, "grad_dot", padding_side="left")
    assert "attn_implementation='sdpa' or in float32, or pad on the right" in str(told.value)
    for advised, options in (
        (llama(attn_implementation="sdpa"), {"padding_side": "left"}),
        (llama(attn_implementation="eager", dtype=torch.float32), {"padding_side": "left"}),
        (model, {"padding_side": "right"}),
    ):
        assert bool(torch.isfinite(scores(advised, "grad_dot", **options)).all())
