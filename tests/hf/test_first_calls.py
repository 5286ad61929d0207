"""What is written first with objects that were not chosen here: it works, or one sentence says what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from tests.hf.test_trainer import tokens, trainer
from tests.hf.tiny import build, gpt2, llama, settings, texts, tokenizer
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_a_pipeline_holds_model_and_tokenizer() -> None:
    model, words = llama(), tokenizer()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=words)
    expected = ptif.attribute(ptif.hf.problem(model, words, texts(4)), queries="the cat sat", method="grad_dot")
    assert gap(ptif.attribute(pipe, texts(4), "the cat sat", method="grad_dot").values, expected.values) < 1e-6
    assert len(ptif.hf.query(pipe, prompt="the cat", completion=" sat")) == 1
    with pytest.raises(ptif.errors.InvalidInput, match="There is no prompt"):
        ptif.hf.query(pipe)


def test_a_trainer_in_training_mode_with_checkpointed_activations_stays_as_it_was(tmp_path: Path) -> None:
    model = llama(dtype=torch.float32)
    asked = trainer(model, tokens(), tmp_path, gradient_checkpointing=True)
    asked.train()
    scores = ptif.attribute(asked, queries="the cat sat", method="grad_dot")
    assert model.training and model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert gap(ptif.attribute(asked, queries="the cat sat", method="grad_dot").values, scores.values) < 1e-5


def test_texts_put_end_to_end_are_taken_one_by_one(tmp_path: Path) -> None:
    model = gpt2()
    flat = trainer(model, tokens(), tmp_path, transformers.DataCollatorWithFlattening())
    plain = trainer(model, tokens(), tmp_path)
    found, expected = (ptif.attribute(one, queries="the cat sat", method="grad_dot").values for one in (flat, plain))
    assert gap(found, expected) < 1e-6


def test_tokens_hidden_at_random_are_hidden_once(tmp_path: Path) -> None:
    words = tokenizer(mask_token="<mask>")
    model = build("BertForMaskedLM", transformers.BertConfig(**settings()))
    asked = trainer(model, tokens(), tmp_path, transformers.DataCollatorForLanguageModeling(words, mlm=True))
    with pytest.raises(ptif.errors.InvalidInput, match="hides other tokens in every epoch"):
        ptif.hf.problem(asked)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"][:1] + [-100] * (len(row["input_ids"]) - 1)}
            for row in tokens()]  # fmt: skip
    once = datasets.Dataset.from_list(rows)
    asked = trainer(model, once, tmp_path, transformers.DataCollatorForTokenClassification(words))
    assert ptif.attribute(asked, queries=once.select([0]), method="grad_dot").shape == (1, 5)


class Own(transformers.Trainer):  # type: ignore[misc]
    """A Trainer with a loss of its own, or the same loss written once more."""

    factor = 1.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        outputs = model(**inputs)
        loss = self.factor * outputs.loss
        return (loss, outputs) if return_outputs else loss


def test_a_compute_loss_of_ones_own_is_compared_with_the_models(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    own = Own(gpt2(), arguments, train_dataset=tokens(), processing_class=tokenizer(), data_collator=collator)
    assert ptif.attribute(own, queries="the cat sat", method="grad_dot").shape == (1, 5)
    own.factor = 1.5
    with pytest.raises(ptif.errors.InvalidInput, match=r"Own.compute_loss gives .* for example 0 .* pass loss="):
        ptif.attribute(own, queries="the cat sat", method="grad_dot")
    loss = ptif.TokenCrossEntropy(average=True, shift=True)
    assert ptif.attribute(own, queries="the cat sat", method="grad_dot", loss=loss).shape == (1, 5)


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ptif.errors.InvalidInput, match=r"adapters are merged .* call model.unmerge_adapter\(\) first"):
        ptif.hf.problem(model, tokenizer(), texts(3))
    model.unmerge_adapter()
    assert len(ptif.hf.problem(model, tokenizer(), texts(3))) == 3
    tuned = peft.get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ptif.errors.InvalidInput, match="PROMPT_TUNING adapters put virtual tokens before every text"):
        ptif.hf.problem(tuned, tokenizer(), texts(3))
    classifier = build("BertForTokenClassification", transformers.BertConfig(**settings(num_labels=3)))
    rows = [{"text": text, "label": 0} for text in texts(3)]
    with pytest.raises(ptif.errors.InvalidInput, match="gives every token a class, so texts alone teach it nothing"):
        ptif.hf.problem(classifier, tokenizer(), rows)
    with pytest.raises(ptif.errors.InvalidInput, match=r"no tokenizer; write attribute\(ptif.hf.problem"):
        ptif.attribute(llama(), texts(3), "the cat sat")
    packed = tokens().add_column("seq_lengths", [[len(row["input_ids"])] for row in tokens()])
    with pytest.raises(ptif.errors.InvalidInput, match=r"packed from several texts .* pass the texts themselves"):
        ptif.attribute(trainer(gpt2(), packed, tmp_path), queries="the cat sat")
    with pytest.raises(ptif.errors.InvalidInput, match=r"nothing that is asked; write queries="):
        ptif.attribute(trainer(gpt2(), tokens(), tmp_path), "the cat sat")


class Weighted(transformers.Trainer):  # type: ignore[misc]
    """Classes with weights, as many write it: of one example alone they cancel."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        targets = inputs.pop("labels")
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits, targets, weight=torch.tensor([1.0, 5.0, 1.0]).to(logits))


def test_a_loss_that_differs_only_over_several_examples_is_refused(tmp_path: Path) -> None:
    words, model = (
        tokenizer(),
        build("BertForSequenceClassification", transformers.BertConfig(**settings(num_labels=3))),
    )
    rows = [dict(words(text)) | {"label": i % 3} for i, text in enumerate(texts(6))]
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    collator = transformers.DataCollatorWithPadding(words)
    asked = Weighted(model, arguments, train_dataset=datasets.Dataset.from_list(rows), data_collator=collator)
    with pytest.raises(ptif.errors.InvalidInput, match=r"for examples 0, .* together .*CrossEntropy\(weight="):
        ptif.hf.problem(asked)
    weight = torch.tensor([1.0, 5.0, 1.0])
    scores = ptif.attribute(asked, queries=rows[:1], loss=ptif.CrossEntropy(weight=weight), method="grad_dot")
    plain = ptif.attribute(trainer(model, asked.train_dataset, tmp_path, collator), queries=rows[:1], method="grad_dot")
    assert gap(scores.values, plain.values * torch.tensor([1.0, 5.0, 1.0] * 2).to(plain.values)) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_gives_is_read_without_its_padding(side: str, tmp_path: Path) -> None:
    model, words = gpt2(), tokenizer(padding_side=side)
    expected = ptif.attribute(ptif.hf.problem(model, words, texts(4)), queries="the cat", method="grad_dot").values
    together, full = words(texts(4), padding=True), words(texts(4), padding="max_length", max_length=20)
    for data in (together, datasets.Dataset.from_dict(dict(full))):
        for asked in (words("the cat"), words(["the cat"], return_tensors="pt"), [dict(words("the cat"))]):
            scores = ptif.attribute(ptif.hf.problem(model, words, data), queries=asked, method="grad_dot")
            assert gap(scores.values, expected) < 1e-6
    of_trainer = ptif.attribute(trainer(model, tokens(4), tmp_path), queries=words("the cat"), method="grad_dot")
    assert gap(of_trainer.values, expected) < 1e-6
    with pytest.raises(ptif.errors.InvalidInput, match="other columns of 'input_ids', 'labels' have another number"):
        ptif.hf.problem(model, words, {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2]]})


SAID: list[tuple[Any, str]] = [
    (lambda m, w, f: ptif.hf.problem(m, w, "the cat sat"), "is one string, 'the cat sat'; pass a list of texts"),
    (lambda m, w, f: ptif.hf.problem(m, w, f / "texts.jsonl"), r"texts\.jsonl'; .*load_dataset\('json'"),
    (lambda m, w, f: ptif.hf.problem(m, w, {"text": texts(2)}), "is a mapping of 'text'; pass a list of rows"),
    (lambda m, w, f: ptif.hf.problem(m, w, 3), "The dataset is of type int; pass a list of texts"),
    (lambda m, w, f: ptif.hf.problem(f / "none", w, texts(2)), r"There is no model at '.*none' \(.*save_pretrained\("),
    (lambda m, w, f: ptif.hf.problem(m, w, ["a cat", 3]), "^Example 1 cannot be read: A text was expected, got int"),
    (lambda m, w, f: ptif.hf.problem(m, w, texts(2), max_length="9"), "max_length='9' must be a whole number"),
    (
        lambda m, w, f: ptif.hf.problem(m, w, texts(2), loss=ptif.TokenCrossEntropy()),
        r"GPT2LMHeadModel predicts the next token, and loss=TokenCrossEntropy\(\) .* write it with shift=True",
    ),
    (
        lambda m, w, f: ptif.attribute(ptif.hf.problem(m, w, texts(2)), queries="cat " * 80),
        "Query 0 has 80 tokens, and model and tokenizer were made for 64",
    ),
    (
        lambda m, w, f: ptif.hf.query(m, w, "the cat", " sat" * 80),
        "Query 0 has 82 tokens, and model and tokenizer were made for 64",
    ),
    (
        lambda m, w, f: ptif.attribute(trainer(m, datasets.Dataset.from_list([{"text": "a cat"}]), f), queries="a cat"),
        r"None of the columns 'text' .*ptif\.hf\.problem\(trainer, text_column='text'\)",
    ),
]


class Frame:
    """The rows of a polars frame: no `to_dict("records")`."""

    columns = ("text",)

    def to_dicts(self) -> list[dict[str, str]]:
        return [{"text": text} for text in texts(3)]

    def to_dict(self) -> dict[str, Any]:
        return {}

    def __len__(self) -> int:
        return 3

    def __getitem__(self, name: Any) -> Any:
        raise KeyError(name)


def test_frames_of_polars_are_rows() -> None:
    problem = ptif.hf.problem(gpt2(), tokenizer(), Frame())
    expected = ptif.attribute(ptif.hf.problem(gpt2(), tokenizer(), texts(3)), queries=texts(3), method="grad_dot")
    assert gap(ptif.attribute(problem, queries=Frame(), method="grad_dot").values, expected.values) < 1e-6


@pytest.mark.parametrize(("call", "sentence"), SAID)
def test_a_slip_gets_one_sentence(call: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ptif.errors.InvalidInput, match=sentence):
        call(gpt2(), tokenizer(), tmp_path)


def test_texts_without_blanks_are_told_to_a_model_that_fills_them_in() -> None:
    model = build("BertForMaskedLM", transformers.BertConfig(**settings()))
    with pytest.warns(ptif.errors.TrainingDataWarning, match="fills in blanks and these texts have none"):
        ptif.hf.problem(model, tokenizer(), texts(2))
