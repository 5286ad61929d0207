"""`ptif.hf.problem` of a model for classes and rows of texts with labels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.text import as_title
from tests.hf.test_command_line import write
from tests.hf.test_trainer import trainer
from tests.hf.tiny import build, gradient, products, settings, texts, tokenizer
from tests.interface.cli_cases import Ran
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES = {"label2id": {"good": 0, "bad": 1, "so-so": 2}, "id2label": {0: "good", 1: "bad", 2: "so-so"}}
# What the loss of one text is, by the type of the problem, and a label for text i.
KINDS: dict[str, Any] = {
    "classes": (lambda out, y: cross_entropy(out[None], torch.tensor([y])), lambda i: i % 3, {"num_labels": 3}),
    "regression": (lambda out, y: mse_loss(out[0], torch.tensor(y).double()), lambda i: i / 3, {"num_labels": 1}),
    "several": (
        lambda out, y: binary_cross_entropy_with_logits(out, torch.tensor(y).double()),
        lambda i: [i % 2, 1, 0],
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
}


def classifier(kind: str = "Bert", **options: Any) -> Any:
    return build(f"{kind}ForSequenceClassification", getattr(transformers, f"{kind}Config")(**settings(**options)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["Bert", "Llama"])
def test_rows_with_labels_give_the_gradients_of_every_text_alone(kind: str, architecture: str) -> None:
    loss, label, options = KINDS[kind]
    model, words = classifier(architecture, **options), tokenizer()
    rows = [{"text": text, "label": label(i)} for i, text in enumerate(texts(6))]
    problem = ptif.hf.problem(model, words, rows, batch_size=4)
    own = [
        gradient(model, loss(model(**words(row["text"], return_tensors="pt")).logits[0], row["label"])) for row in rows
    ]
    scores = ptif.attribute(problem, queries=rows[:2], method="grad_dot")
    assert gap(scores.values.double(), products(model, own[:2], own)) < 1e-6
    assert gap(ptif.grad_dot().fit(problem).score(rows[:2]).values, scores.values) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["Bart", "T5"])
def test_an_encoder_decoder_with_classes_has_the_gradients_of_every_text_alone(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    loss, label, options = KINDS[kind]
    bart = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
    sizes = bart if architecture == "Bart" else {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = getattr(transformers, f"{architecture}Config")(vocab_size=41, d_model=16, **sizes, **special, **options)
    model, words = build(f"{architecture}ForSequenceClassification", config), tokenizer()
    # they tell classes by the token that ends a text
    rows = [{"text": f"{text} <eos>", "label": label(i)} for i, text in enumerate(texts(5))]
    encoded = [dict(words(row["text"])) | {"labels": row["label"]} for row in rows]
    asked = trainer(model, encoded, tmp_path, transformers.DataCollatorWithPadding(words))
    own = [
        gradient(model, loss(model(**words(row["text"], return_tensors="pt")).logits[0], row["label"])) for row in rows
    ]
    for problem, queries in ((ptif.hf.problem(model, words, rows), rows[:2]), (ptif.hf.problem(asked), encoded[:2])):
        scores = ptif.attribute(problem, queries=queries, method="grad_dot").values.double()
        assert gap(scores, products(model, own[:2], own)) < 1e-6


def test_an_encoder_with_classes_of_tokens_reads_no_decoders_inputs(tmp_path: Path) -> None:
    sizes = {"vocab_size": 41, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = build("T5ForTokenClassification", transformers.T5Config(**sizes, num_labels=3))
    ids = [tokenizer()(text)["input_ids"] for text in texts(5)]
    rows = [{"input_ids": row, "labels": [token % 3 for token in row]} for row in ids]
    own = [
        gradient(model, len(row["labels"]) * model(**{k: torch.tensor([v]) for k, v in row.items()}).loss)
        for row in rows
    ]
    asked = trainer(model, rows, tmp_path, transformers.DataCollatorForTokenClassification(tokenizer()))
    for problem in (ptif.hf.problem(asked), ptif.hf.problem(model, tokenizer(), rows)):
        scores = ptif.attribute(problem, queries=rows[:2], method="grad_dot").values.double()
        assert gap(scores, products(model, own[:2], own)) < 1e-6


def test_a_text_alone_is_asked_about_the_class_that_the_model_gives() -> None:
    model, words = classifier(num_labels=3, **CLASSES), tokenizer()
    names = list(CLASSES["label2id"])
    rows = [{"review": text, "stars": names[i % 3]} for i, text in enumerate(texts(6))]
    problem = ptif.hf.problem(model, words, rows, label_column="stars")
    model.train()
    with torch.no_grad():
        answer = int(model.eval()(**words("who wrote this book", return_tensors="pt")).logits.argmax())
    model.train()
    scores = ptif.attribute(problem, queries="who wrote this book", method="ekfac")
    assert model.training
    asked = {"review": "who wrote this book", "stars": names[answer]}
    for same in (asked, {"text": "who wrote this book", "label": answer}):
        assert gap(ptif.attribute(problem, queries=[same], method="ekfac").values, scores.values) < 1e-9
    other = asked | {"stars": names[(answer + 1) % 3]}
    assert gap(ptif.attribute(problem, queries=[other], method="ekfac").values, scores.values) > 1e-3


def test_queries_that_hold_texts_are_named_by_them(tmp_path: Path) -> None:
    """Of models for classes, of tokens' classes, of an encoder-decoder, and of a Trainer; a title leaves them be."""
    words = tokenizer()
    bert = transformers.BertConfig(**settings(num_labels=3))
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(texts(4))]
    tagged = [dict(words(text)) | {"labels": [0] * len(words(text)["input_ids"])} for text in texts(4)]
    written = [{"prompt": a, "completion": b} for a, b in itertools.pairwise(texts(4))]
    sizes = {"vocab_size": 41, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    t5 = build("T5ForConditionalGeneration", transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    trained = transformers.Trainer(
        build("BertForTokenClassification", bert),
        transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True),
        train_dataset=tagged,
        processing_class=words,
        data_collator=transformers.DataCollatorForTokenClassification(words),
    )
    for problem, asked, name in (
        (ptif.hf.problem(classifier(num_labels=3), words, rows), rows[1:3], texts(4)[1]),
        (ptif.hf.problem(build("BertForTokenClassification", bert), words, tagged), tagged[1:3], texts(4)[1]),
        (ptif.hf.problem(trained), tagged[1:3], texts(4)[1]),
        (ptif.hf.problem(t5, words, written), written[1:3], texts(4)[2]),
    ):
        scores = ptif.attribute(problem, queries=asked, method="grad_dot")
        assert name.startswith(scores.describe_query(0).removesuffix("…")) and scores.describe_query(0) in repr(scores)
        assert as_title(scores.describe_query(0)) == scores.describe_query(0)


def test_pairs_of_texts_are_read_together() -> None:
    model, words = classifier(num_labels=2), tokenizer()
    rows = [{"premise": a, "hypothesis": b, "label": i % 2} for i, (a, b) in enumerate(itertools.pairwise(texts(6)))]
    data = ptif.hf.problem(model, words, rows).data.dataset
    assert data[0]["input_ids"] == words(rows[0]["premise"], rows[0]["hypothesis"])["input_ids"]


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        ([{"words": "the cat", "label": 0}], {}, "'words', 'label' holds the texts .* give text_column="),
        ([{"text": "the cat", "grade": 0}], {}, "'text', 'grade' holds the labels .* give label_column="),
        ([{"text": "the cat", "label": "god"}], {}, r"label 'god', .*'good'.* Did you mean 'good'\?"),
        ([{"text": "the cat", "label": 3}], {}, "the label 3; expected a whole number from 0 to 2"),
        ([{"text": "the cat", "label": 0.5}], {}, "the label 0.5; expected a whole number"),
        ([{"text": "the cat", "label": None}], {}, "Example 0 has nothing under 'label'"),
        ([{"text": "the cat", "label": 0}], {"label_column": "lable"}, "label_column='lable' is not a column"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(rows: Any, options: Any, match: str) -> None:
    with pytest.raises(ptif.errors.InvalidInput, match=match):
        ptif.hf.problem(classifier(num_labels=3, **CLASSES), tokenizer(), rows, **options)


def test_what_has_no_answer_or_padding_is_refused() -> None:
    regression = ptif.hf.problem(classifier(num_labels=1), tokenizer(), [{"text": "the cat", "label": 0.5}])
    with pytest.raises(ptif.errors.InvalidInput, match="gives no single class that could stand in its place"):
        ptif.attribute(regression, queries="the cat", method="grad_dot")
    words = tokenizer()
    words.pad_token = None
    with pytest.raises(ptif.errors.InvalidInput, match=r"set tokenizer.pad_token = tokenizer.eos_token"):
        ptif.hf.problem(classifier(num_labels=2), words, [{"text": "the cat", "label": 0}])
    with pytest.warns(ptif.errors.TrainingDataWarning, match="1 of 2 texts are longer than 2 tokens"):
        ptif.hf.problem(
            classifier(num_labels=2),
            tokenizer(),
            [{"text": "the cat sat", "label": 0}, {"text": "moon", "label": 1}],
            max_length=2,
        )


def test_the_command_line_asks_a_model_for_classes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    classifier(num_labels=3, **CLASSES).float().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    rows = [{"text": text, "label": list(CLASSES["label2id"])[i % 3]} for i, text in enumerate(texts(6))]
    told = ("--hf", folder, "--dataset", write(tmp_path / "t.jsonl", rows), "--method", "grad-dot")
    for number, (flags, query) in enumerate(
        (((), "the moon"), (("--answer", "bad"), {"text": "the moon", "label": "bad"}))
    ):
        out = tmp_path / str(number)
        assert Ran("attribute", *told, "--query", "the moon", *flags, "--out", out, "--report").code == 0
        problem = ptif.hf.problem(folder, None, rows)
        expected = ptif.attribute(problem, queries=[query], method="grad-dot").values
        scores = ptif.Scores.load(out / "scores.safetensors")
        torch.testing.assert_close(scores.values, expected, rtol=1e-4, atol=1e-6)
        assert number == 0 or scores.label_name(scores.query_labels[0]) == "bad"


def labelled_data(n: int = 6) -> Any:
    """Texts with classes that the data set names, in numbers."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["sea", "land"])}
    )
    return datasets.Dataset.from_dict({"text": texts(n), "label": [i % 2 for i in range(n)]}, features=features)


@pytest.mark.parametrize("kept", [True, False])
def test_a_trainer_for_classes_is_asked_as_a_problem_of_the_rows_is(kept: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, words = classifier(num_labels=2), tokenizer()
    data = labelled_data()
    rows = data.map(lambda row: words(row["text"]), remove_columns=[] if kept else ["text"])
    asked = trainer(model, rows, tmp_path, transformers.DataCollatorWithPadding(words))
    problem = ptif.hf.problem(model, words, data)
    with torch.no_grad():
        answer = int(model(**words("who wrote this book", return_tensors="pt")).logits.argmax())
    for queries in (
        "who wrote this book",
        ["the moon", "who wrote this book"],
        [{"text": "who wrote this book", "label": ["sea", "land"][answer]}, {"text": "the moon", "label": 1}],
        data.select([1, 2]),
    ):
        scores = ptif.attribute(asked, queries=queries, method="grad_dot")
        assert gap(scores.values, ptif.attribute(problem, queries=queries, method="grad_dot").values) < 1e-6
        assert scores.class_names == ["sea", "land"]
    loss = cross_entropy(model(**words("the moon", return_tensors="pt")).logits, torch.tensor([1]))
    losses = [cross_entropy(model(**words(row["text"], return_tensors="pt")).logits, torch.tensor([row["label"]]))
              for row in data]  # fmt: skip
    expected = products(model, [gradient(model, loss)], [gradient(model, one) for one in losses])
    scores = ptif.attribute(asked, queries={"text": "the moon", "label": "land"}, method="grad_dot")
    assert gap(scores.values.double(), expected) < 1e-6
    with pytest.raises(ptif.errors.UnknownName, match=r"label 'lnd', and the model knows 'sea', 'land'. Did you mean"):
        ptif.attribute(asked, queries={"text": "the moon", "label": "lnd"})
    with pytest.raises(ptif.errors.InvalidInput, match="Query 0 has the columns 'body'; expected 'text'"):
        ptif.attribute(asked, queries={"body": "the moon"})


def test_pairs_are_asked_as_pairs() -> None:
    model, words = classifier(num_labels=2), tokenizer()
    rows = [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate(itertools.pairwise(texts(5)))]
    problem = ptif.hf.problem(model, words, rows)
    named, bare = (
        ptif.attribute(problem, queries=queries, method="grad_dot").values
        for queries in ({"sentence1": "the cat", "sentence2": "a dog"}, [("the cat", "a dog")])
    )
    assert gap(named, bare) < 1e-9
    for queries in ("the cat", {"text": "the cat"}):
        with pytest.raises(
            ptif.errors.InvalidInput, match="expected 'sentence1', 'sentence2', and 'label' beside them"
        ):
            ptif.attribute(problem, queries=queries)
    with pytest.raises(
        ptif.errors.InvalidInput, match=r"holds no text for each .* {'sentence1': …, 'sentence2': …, 'la"
    ):
        ptif.attribute(problem, queries=[("the cat", 1)])


def test_labels_are_doubted_and_predictions_flipped_in_texts() -> None:
    """Validation texts count as their token numbers do, and never with the model's own answers for labels."""
    model, words = classifier(num_labels=2), tokenizer()
    data = labelled_data()
    problem = ptif.hf.problem(model, words, data)
    trusted = [{"text": "the moon", "label": "land"}, {"text": "who wrote this", "label": 0}]
    numbers = [dict(words(row["text"])) | {"labels": label} for row, label in zip(trusted, (1, 0), strict=True)]
    in_texts, in_numbers = (ptif.actions.find_label_issues(problem, rows) for rows in (trusted, numbers))
    assert gap(in_texts.harm, in_numbers.harm) < 1e-9 and gap(in_texts.votes, in_numbers.votes) < 1e-9
    for untold in (["the moon"], [{"text": "the moon"}]):
        with pytest.raises(
            ptif.errors.InvalidInput, match=r"In validation=, .* no 'label', and labels are trusted here"
        ):
            ptif.actions.find_label_issues(problem, untold)
    flipped = ptif.actions.flip_prediction(problem, numbers[:1], most=2)
    for query in ("the moon", {"text": "the moon"}, {"text": "the moon", "label": "land"}):
        assert ptif.actions.flip_prediction(problem, query, most=2).before == pytest.approx(flipped.before)


def test_texts_beside_a_model_alone_are_refused() -> None:
    for data in (labelled_data(), texts(3)):
        with pytest.raises(
            ptif.errors.InvalidInput, match=r"The training data are texts .* attribute\(ptif.hf.problem\("
        ):
            ptif.attribute(classifier(num_labels=2), data, data)
