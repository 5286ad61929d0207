"""Models that mark where an answer starts and ends, and queries of a Trainer that are not in the form of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.hf.spans import SpanCrossEntropy
from tests.hf.test_trainer import tokens, trainer
from tests.hf.tiny import build, gpt2, gradient, products, settings, texts, tokenizer
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

BART = {
    "vocab_size": 41,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
    "dropout": 0.0,
}


def marked(n: int) -> Any:
    rows = [
        {"input_ids": [6 + i, 7, 8 + i, 9, 10], "attention_mask": [1] * 5, "start_positions": i % 4, "end_positions": 4}
        for i in range(n)
    ]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("kind", ["Bert", "Bart"])
def test_marked_answers_have_the_loss_of_the_model(kind: str, tmp_path: Path) -> None:
    config = transformers.BertConfig(**settings()) if kind == "Bert" else transformers.BartConfig(**BART, num_labels=2)
    model, rows = build(f"{kind}ForQuestionAnswering", config), marked(4)
    asked = trainer(model, rows, tmp_path, transformers.default_data_collator)
    training = [
        gradient(model, model(**{key: torch.tensor([value]) for key, value in row.items()}).loss) for row in rows
    ]
    scores = ptif.attribute(asked, queries=rows.select([0, 1]), method="grad_dot").values.double()
    assert gap(scores, products(model, training[:2], training)) < 1e-6
    if kind == "Bert":  # the last bias moves all places alike, so that a softmax over them cancels it
        assert bool(torch.isfinite(ptif.attribute(asked, queries=rows.select([0]), method="ekfac").values).all())
        with pytest.raises(ptif.errors.InvalidInput, match="marks answers in texts, so texts alone teach it nothing"):
            ptif.hf.problem(model, tokenizer(), texts(3))
        loader = torch.utils.data.DataLoader(rows.with_format("torch"), batch_size=2)
        with pytest.raises(ptif.errors.InvalidInput, match=r"'start_positions', as .* pass such a model's Trainer"):
            ptif.attribute(model, loader, rows.with_format("torch"), method="grad_dot")


@pytest.mark.parametrize("place", [5, -1, -100])
def test_an_answer_outside_its_text_is_refused(place: int, tmp_path: Path) -> None:
    rows = [row | ({"start_positions": place} if i == 2 else {}) for i, row in enumerate(marked(4))]
    model = build("BertForQuestionAnswering", transformers.BertConfig(**settings()))
    asked = trainer(model, datasets.Dataset.from_list(rows), tmp_path, transformers.default_data_collator)
    message = f"starts or ends at token {place} at dataset index 2, outside the text's 5 tokens"
    with pytest.raises(ptif.errors.InvalidInput, match=message):
        ptif.attribute(asked, queries=marked(1), method="grad_dot")


def test_two_places_have_curvature_in_all_directions_but_two() -> None:
    outputs, batch = torch.randn(3, 2, 7, dtype=torch.float64), {"labels": torch.tensor([[0, 6], [1, 1], [2, 5]])}
    loss = SpanCrossEntropy()
    loss.check(outputs, batch, torch.arange(3))
    hessian = torch.autograd.functional.hessian(lambda one: loss.losses(one[None], {"labels": batch["labels"][:1]})[0],
                                                outputs[0]).reshape(14, 14)  # fmt: skip
    assert loss.output_directions(outputs, batch) == int(torch.linalg.matrix_rank(hessian)) == 12


def test_a_trainer_is_asked_about_rows_of_texts(tmp_path: Path) -> None:
    model = gpt2()
    asked = trainer(model, tokens(), tmp_path)
    chat = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "cat"}]

    def scores(queries: Any, one: Any = asked) -> Any:
        return ptif.attribute(one, queries=queries, method="grad_dot").values

    assert gap(scores([{"text": "the cat", "book": "one"}]), scores("the cat")) < 1e-7
    assert gap(scores([{"messages": chat}]), scores([chat])) < 1e-7
    with pytest.raises(ptif.errors.InvalidInput, match=r"columns 'question' and the training data .* 'input_ids'"):
        scores([{"question": "the cat"}])
    with pytest.raises(ptif.errors.InvalidInput, match=r"the splits 'test'; pass .* queries\['test'\]"):
        scores(datasets.DatasetDict(test=tokens()))
    frame = pytest.importorskip("pandas").DataFrame({"text": ["the cat"]})
    assert gap(scores(frame), scores("the cat")) < 1e-7
    words = tokenizer()
    rows = [dict(words("the cat sat")) | {"labels": i % 2, "text": "the cat sat"} for i in range(3)]
    classes = transformers.BertConfig(**settings(num_labels=2, problem_type="single_label_classification"))
    classifier = trainer(
        build("BertForSequenceClassification", classes),
        datasets.Dataset.from_list(rows),
        tmp_path,
        transformers.DataCollatorWithPadding(words),
    )
    assert gap(scores([{"text": "the cat sat", "labels": 1}], classifier), scores([rows[1]], classifier)) < 1e-6


def test_a_collate_function_that_cannot_pad_is_said(tmp_path: Path) -> None:
    words = tokenizer()
    words.pad_token = None
    collator = transformers.DataCollatorForLanguageModeling(words, mlm=False)
    asked = trainer(gpt2(), tokens(), tmp_path, collator)
    with pytest.raises(ptif.errors.InvalidInput, match=r"has no padding token, .*tokenizer.pad_token = "):
        ptif.attribute(asked, queries="the cat", method="grad_dot")
    asked.data_collator.tokenizer.pad_token = asked.data_collator.tokenizer.eos_token
    assert ptif.attribute(asked, queries="the cat", method="grad_dot").shape == (1, 5)
