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
