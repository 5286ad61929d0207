"""A model is told the places of tokens only if it counts as it is told, and padding behind a text has its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.hf.places import places_told
from tests.hf.test_trainer import tokens, trainer
from tests.hf.tiny import build, gpt2, gradient, own_loss, products, settings, texts, tokenizer
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

# Those that count places from the padding token on, each written in another way, and two that count from 0.
COUNTING: dict[str, dict[str, Any]] = {
    "MPNet": {},
    "Longformer": {"attention_window": [4, 4]},
    "IBert": {},
    "Roberta": {},
    "Bert": {},
    "Electra": {"embedding_size": 8},
}


def model_of(family: str, kind: str, **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**settings(**COUNTING[family], **options))
    return build(f"{family}For{kind}", config)


@pytest.mark.parametrize("family", COUNTING)
def test_classes_of_texts_have_the_gradients_of_each_text_alone(family: str, tmp_path: Path) -> None:
    model, words = model_of(family, "SequenceClassification", num_labels=3), tokenizer()
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(texts(5))]
    encoded = [{k: list(v) for k, v in words(row["text"]).items()} | {"labels": row["label"]} for row in rows]
    training = [gradient(model, model(**{k: torch.tensor([v]) for k, v in row.items()}).loss) for row in encoded]
    expected = products(model, training[:2], training)
    asked = trainer(model, datasets.Dataset.from_list(encoded), tmp_path, transformers.DataCollatorWithPadding(words))
    for problem, queries in ((ptif.hf.problem(model, words, rows), rows[:2]), (ptif.hf.problem(asked), encoded[:2])):
        assert gap(ptif.attribute(problem, queries=queries, method="grad_dot").values.double(), expected) < 1e-6


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", [family for family in COUNTING if family != "Longformer"])
def test_blanks_of_texts_have_the_gradients_of_each_text_alone(family: str, side: str) -> None:
    model, words = model_of(family, "MaskedLM"), tokenizer()
    words.pad_token = "<eos>" if family == "MPNet" else "<pad>"  # its padding token is number 1, whatever its settings
    rows = [{"input_ids": row, "labels": [row[0], *[-100] * (len(row) - 1)]} for row in tokens()["input_ids"]]
    training = [gradient(model, model(**{k: torch.tensor([v]) for k, v in row.items()}).loss) for row in rows]
    problem = ptif.hf.problem(model, words, rows, padding_side=side)
    scores = ptif.attribute(problem, queries=rows[:2], method="grad_dot").values.double()
    assert gap(scores, products(model, training[:2], training)) < 1e-6


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["Bert", "Electra", "Roberta"])
def test_marked_answers_in_padded_texts_are_told_no_places(family: str, side: str, tmp_path: Path) -> None:
    """Their softmax runs over padding, whose outputs depend on the places that padding itself had in training."""
    model, words = model_of(family, "QuestionAnswering"), tokenizer(padding_side=side)
    padded = words(texts(4), padding="max_length", max_length=16)
    marks = [{"start_positions": 1 + i % 2, "end_positions": 2} for i in range(4)]
    rows = [{k: list(v[i]) for k, v in padded.items()} | mark for i, mark in enumerate(marks)]
    training = [gradient(model, model(**{k: torch.tensor([v]) for k, v in row.items()}).loss) for row in rows]
    asked = trainer(model, datasets.Dataset.from_list(rows), tmp_path, transformers.default_data_collator)
    scores = ptif.attribute(asked, queries=rows[:2], method="grad_dot").values.double()
    assert gap(scores, products(model, training[:2], training)) < 1e-6


def test_a_text_with_a_hole_in_its_mask_keeps_the_places_of_training(tmp_path: Path) -> None:
    model = gpt2()
    long = [row for row in tokens()["input_ids"] if len(row) > 4]
    masks = [[1, 0, *[1] * (len(row) - 2)] for row in long]
    rows = [
        {"input_ids": row, "attention_mask": mask, "labels": [-100] * 3 + row[3:]}
        for row, mask in zip(long, masks, strict=True)
    ]
    training = [
        gradient(model, (len(row["labels"]) - 3) * model(**{k: torch.tensor([v]) for k, v in row.items()}).loss)
        for row in rows
    ]
    pad = transformers.DataCollatorForSeq2Seq(tokenizer(padding_side="right"))
    asked = trainer(model, datasets.Dataset.from_list(rows), tmp_path, pad)
    scores = ptif.attribute(asked, queries=rows[:2], method="grad_dot").values.double()
    assert gap(scores, products(model, training[:2], training)) < 1e-6


def test_places_are_those_of_each_text_alone() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    assert places_told(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    # padding that is taught has places of its own
    assert places_told(mask, torch.full_like(mask, 5)).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_a_trainer_that_pads_on_the_left_beside_whole_texts_is_right(tmp_path: Path) -> None:
    model = gpt2()
    asked = trainer(model, tokens(), tmp_path)
    asked.data_collator.tokenizer.padding_side = "left"
    training = [gradient(model, own_loss(model, row["input_ids"])) for row in tokens()]
    scores = ptif.attribute(asked, queries=tokens().select([0, 1]), method="grad_dot").values.double()
    assert gap(scores, products(model, training[:2], training)) < 1e-6
