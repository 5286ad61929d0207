"""A text has the same score whatever it is padded and batched with, and however attention is computed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from tests.hf.tiny import build, gpt2, gradient, llama, settings, texts, tokenizer
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

ASKED = ["the cat sat on a mat", "who wrote this book", "moon over sea while dog ran to the old house"]


def bert() -> Any:
    return build("BertForMaskedLM", transformers.BertConfig(**settings()))


def t5() -> Any:
    sizes = {"vocab_size": 41, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return build(
        "T5ForConditionalGeneration",
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1),
    )


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


@pytest.mark.parametrize("masked", [True, False])
def test_doctor_names_labels_at_padding_and_what_it_says_cures_them(masked: bool) -> None:
    words = tokenizer()

    def taught(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(item["input_ids"]) for item in items], batch_first=True)
        return {"input_ids": ids, "labels": ids.clone()} | ({"attention_mask": mask} if masked else {})

    def cured(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch, mask = taught(items), torch.zeros(len(items), max(len(item["labels"]) for item in items)).bool()
        for row, item in zip(mask, items, strict=True):
            row[: len(item["labels"])] = True
        return batch | {"labels": batch["labels"].where(mask, -100)}

    sick = ptif.hf.doctor(gpt2(), words, texts(4), collate=taught).findings[-1]
    assert "labels[attention_mask == 0] = -100" in sick.cure and "position_ids" not in sick.cure
    assert not ptif.hf.doctor(gpt2(), words, texts(4), collate=cured).findings[-1].cure
    if not masked:  # a model that reads what follows needs the mask as well
        blank = [{"input_ids": i["input_ids"], "labels": i["labels"]} for i in words_of(words)]
        sick = ptif.hf.doctor(bert(), words, blank, collate=cured).findings[-1]
        assert "attention_mask, 0 at padding" in sick.cure and "position_ids" not in sick.cure


def words_of(words: Any) -> list[dict[str, list[int]]]:
    """Texts whose first token is hidden."""
    rows = [words(text)["input_ids"] for text in texts(4)]
    return [{"input_ids": [2, *row[1:]], "labels": [row[0], *[-100] * (len(row) - 1)]} for row in rows]


def test_doctor_takes_the_collate_functions_of_transformers() -> None:
    """They make labels themselves or pad those of items; the truth is that of each text alone, by autograd."""
    words, model = tokenizer(), llama()
    own = transformers.DataCollatorForLanguageModeling(words, mlm=False)
    found = ptif.hf.doctor(model, words, texts(4), collate=own).findings[-2:]
    assert [f.situation for f in found] == ["alone, by your collate function", "by your collate function"]
    assert all(f.cosine > 1 - 1e-9 and not f.cure for f in found)

    def cut(items: list[dict[str, Tensor]]) -> Any:
        return own([{"input_ids": item["input_ids"][:3]} for item in items])

    found = ptif.hf.doctor(model, words, texts(4), collate=cut).findings[-2:]
    whole, part = (words(texts(4)[found[0].text], return_tensors="pt")["input_ids"][:, :n] for n in (64, 3))
    grads = [gradient(model, model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)) for ids in (whole, part)]
    assert abs(found[0].cosine - float(torch.nn.functional.cosine_similarity(*grads, dim=0))) < 1e-6
    assert "max_length=" in found[0].cure and not found[1].cure
    left = tokenizer(padding_side="left")
    padded_left = transformers.DataCollatorForLanguageModeling(left, mlm=False)
    found = ptif.hf.doctor(gpt2(), left, texts(4), collate=padded_left).findings[-2:]
    assert not found[0].cure and "position_ids" in found[1].cure
    for collate, match in (
        (transformers.DataCollatorForLanguageModeling(tokenizer(mask_token="<unk>"), mlm=True), "hides other tokens"),
        (
            transformers.DataCollatorWithPadding(words),
            "gives a mapping of 'input_ids', 'attention_mask', from which no",
        ),
        (torch.utils.data.default_collate, "failed on items with 'input_ids', 'labels', and without labels too"),
    ):
        with pytest.raises(ptif.errors.InvalidInput, match=match):
            ptif.hf.doctor(model, words, texts(4), collate=collate)


def test_doctor_of_models_that_do_more_than_read_one_text() -> None:
    words = tokenizer()
    written = [{"prompt": a, "completion": b} for a, b in itertools.pairwise(texts(4))]
    labelled = [{"text": text, "label": i % 2} for i, text in enumerate(texts(4))]
    bert = transformers.BertConfig(**settings())
    for model, rows, collate in (
        (t5(), written, transformers.DataCollatorForSeq2Seq(words)),
        (build("BertForSequenceClassification", bert), labelled, transformers.DataCollatorWithPadding(words)),
    ):
        checkup = ptif.hf.doctor(model, words, rows, collate=collate)
        assert checkup.healthy and len(checkup.findings) == 4
        with pytest.raises(ptif.errors.InvalidInput, match=r"give doctor\(\) rows \{'(prompt|text)': …, '"):
            ptif.hf.doctor(model, words, texts(4))
    for kind, match in (
        ("TokenClassification", "rows that hold input_ids and labels"),
        ("QuestionAnswering", "one len"),
    ):
        with pytest.raises(ptif.errors.InvalidInput, match=match):
            ptif.hf.doctor(build(f"BertFor{kind}", bert), words, texts(4))


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
