"""The loss that is taken is the one that training computed: the model's own, its weighing of texts, its labels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from tests.hf.test_trainer import tokens, trainer
from tests.hf.tiny import build, gradient, llama, own_loss, products, settings, texts, tokenizer
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

ModelLoss = ptif.objectives.ModelLoss


class MyLlama(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A class of one's own, under a name that says nothing."""


class MyBert(transformers.BertForSequenceClassification):  # type: ignore[misc]
    """Another."""


class Focal(transformers.BertForSequenceClassification):  # type: ignore[misc]
    """Whose forward computes a loss that no outputs show."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **rest: Any) -> Any:
        returned = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        returned.loss = None if labels is None else focal(returned.logits, labels)
        return returned


class Weighted(Focal):
    """Whose forward weighs classes: of one example alone the weights cancel."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **rest: Any) -> Any:
        returned = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            returned.loss = F.cross_entropy(returned.logits, labels, weight=WEIGHT.to(returned.logits))
        return returned


WEIGHT = torch.tensor([1.0, 5.0, 1.0])


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def mixtral() -> Any:
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**settings(output_router_logits=True, router_aux_loss_coef=0.5, **sizes))
    model = build("MixtralForCausalLM", config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    return model


def ids(n: int = 5) -> list[list[int]]:
    return [tokenizer()(text)["input_ids"] for text in texts(n)]


def collator() -> Any:
    return transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)


def labelled(n: int = 6) -> Any:
    return datasets.Dataset.from_list(
        [{k: list(v) for k, v in tokenizer()(text).items()} | {"labels": i % 3} for i, text in enumerate(texts(n))]
    )


def test_a_loss_with_the_balance_of_experts_is_refused_and_the_cure_is_the_models_own(tmp_path: Path) -> None:
    model, data = mixtral(), tokens()
    asked = trainer(model, data, tmp_path)
    loader = DataLoader(data.remove_columns("book"), 2, collate_fn=collator())
    said = r"for example.* and TokenCrossEntropy\(.*\), .* pass loss=.*ModelLoss\(average=False, shift=True\)"
    for call in (
        lambda: ptif.hf.problem(asked),
        lambda: ptif.hf.problem(model, tokenizer(), texts(5)),
        lambda: ptif.attribute(model, loader, loader, method="grad_dot"),
    ):
        with pytest.raises(ptif.errors.InvalidInput, match=said):
            call()
    sums = [gradient(model, own_loss(model, row)) for row in ids()]
    means = [g / (len(row) - 1) for g, row in zip(sums, ids(), strict=True)]
    for loss, training in ((ModelLoss(), means), (ModelLoss(average=False, shift=True), sums)):
        scores = ptif.attribute(asked, queries=data.select([0, 1]), loss=loss, method="grad_dot")
        assert gap(scores.values.double(), products(model, training[:2], training)) < 1e-6


@pytest.mark.parametrize("kind", [Focal, Weighted])
def test_a_loss_of_classes_that_forward_computes_is_refused_and_the_cures_work(kind: Any, tmp_path: Path) -> None:
    model, data = build("BertForSequenceClassification", transformers.BertConfig(**settings(num_labels=3))), labelled()
    model.__class__ = kind
    pad = transformers.DataCollatorWithPadding(tokenizer())
    asked, loader = trainer(model, data, tmp_path, pad), DataLoader(data, 6, collate_fn=pad)
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(texts(6))]
    for call in (
        lambda: ptif.hf.problem(asked),
        lambda: ptif.hf.problem(model, tokenizer(), rows),
        lambda: ptif.attribute(model, loader, loader, method="grad_dot"),
    ):
        with pytest.raises(ptif.errors.InvalidInput, match=r"gives .* and CrossEntropy\(\), .*CrossEntropy\(weight="):
            call()

    def loss(row: Any) -> Tensor:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        label = torch.tensor([row["labels"]])
        return focal(logits, label) if kind is Focal else WEIGHT[label[0]] * F.cross_entropy(logits, label)

    training = [gradient(model, loss(row)) for row in data]
    expected = products(model, training[:2], training)
    for cure in (focal, ModelLoss()) if kind is Focal else (ptif.CrossEntropy(weight=WEIGHT.double()),):
        scores = ptif.attribute(asked, queries=data.select([0, 1]), loss=cure, method="grad_dot")
        assert gap(scores.values.double(), expected) < 1e-6
        scores = ptif.attribute(
            model, loader, DataLoader(data.select([0, 1]), 2, collate_fn=pad), cure, method="grad_dot"
        )
        assert gap(scores.values.double(), expected) < 1e-6


def test_weights_of_classes_that_cancel_in_each_example_are_told(tmp_path: Path) -> None:
    model = build("BertForSequenceClassification", transformers.BertConfig(**settings(num_labels=3)))
    model.__class__ = Weighted
    pad = transformers.DataCollatorWithPadding(tokenizer())
    asked = trainer(model, labelled(), tmp_path, pad)
    with pytest.warns(ptif.errors.TrainingDataWarning, match=r"depends on which .*CrossEntropy\(weight="):
        ptif.attribute(asked, queries=labelled().select([0]), loss=ModelLoss(), method="grad_dot")


def test_labels_that_are_no_tensor_have_the_loss_of_the_model(tmp_path: Path) -> None:
    """Boxes in pictures, another number of them in each."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.YolosConfig(**sizes, image_size=[16, 16], patch_size=8, num_labels=3, num_detection_tokens=4)
    model = build("YolosForObjectDetection", config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "pixel_values": torch.randn(3, 16, 16, generator=generator),
            "labels": {"class_labels": torch.arange(n) % 3, "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.2},
        }
        for n in (1, 2, 1, 3, 1)
    ]

    def together(items: list[Any]) -> dict[str, Any]:
        return {"pixel_values": torch.stack([i["pixel_values"] for i in items]), "labels": [i["labels"] for i in items]}

    asked = trainer(model, rows, tmp_path, together, remove_unused_columns=False)
    training = [gradient(model, model(**together([row])).loss) for row in rows]
    attribution = ptif.grad_dot().fit(ptif.hf.problem(asked, loss=ModelLoss()))
    scores = attribution.score(rows[:2]).values
    assert gap(scores, products(model, training[:2], training)) < 1e-4


def test_classes_of_ones_own_are_what_they_build_on(tmp_path: Path) -> None:
    model = llama()
    model.__class__ = MyLlama
    model.loss_type = None  # transformers reads it from the name of the class
    sums = [gradient(model, own_loss(model, row)) for row in ids()]
    means = [g / (len(row) - 1) for g, row in zip(sums, ids(), strict=True)]
    for options, training in (({}, sums), ({"normalisation": "mean"}, means)):
        problem = ptif.hf.problem(model, tokenizer(), texts(5), **options)
        scores = ptif.attribute(problem, queries=texts(5)[:2], method="grad_dot")
        assert gap(scores.values.double(), products(model, training[:2], training)) < 1e-6
    asked = ptif.attribute(trainer(model, tokens(), tmp_path), queries=texts(5)[0], method="grad_dot")
    assert gap(asked.values.double(), products(model, sums[:1], sums)) < 1e-6
    assert ptif.hf.doctor(model, tokenizer(), texts(4)).healthy
    classifier = MyBert._from_config(transformers.BertConfig(**settings(num_labels=3)))
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(texts(4))]
    assert ptif.hf.problem(classifier, tokenizer(), rows).objective == ptif.CrossEntropy()
    assert classifier.config.problem_type is None  # its own loss was asked for, which writes what labels it saw
    for call, match in (
        (
            lambda: ptif.hf.problem(classifier, tokenizer(), rows, normalisation="sum"),
            "models that predict tokens, and MyBert",
        ),
        (
            lambda: ptif.hf.problem(model, tokenizer(), texts(4), normalisation="sum", loss=ptif.TokenCrossEntropy()),
            "and loss= takes its place; leave normalisation= out",
        ),
    ):
        with pytest.raises(ptif.errors.InvalidInput, match=match):
            call()


def test_a_model_of_pictures_and_texts_without_an_encoder_predicts_the_next_token() -> None:
    if not hasattr(transformers, "Gemma3ForConditionalGeneration"):
        pytest.skip("an older transformers")
    text = settings(num_key_value_heads=1, head_dim=8, num_hidden_layers=1)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        boi_token_index=38, eoi_token_index=39, image_token_index=40,
    )  # fmt: skip
    model = build("Gemma3ForConditionalGeneration", config)
    problem = ptif.hf.problem(model, tokenizer(), texts(3))
    assert problem.objective == ptif.TokenCrossEntropy(average=False, shift=True)


# --------------------------------------------------------------------------- loaders and tuples


def test_a_loader_of_texts_gives_the_scores_of_its_trainer(tmp_path: Path) -> None:
    """model(**batch).loss is the mean over a batch's tokens, so that a text counts by its tokens."""
    model, data = llama(), tokens().remove_columns("book")
    asked = trainer(model, data, tmp_path)
    queries = DataLoader(data.select([0, 1]), 2, collate_fn=collator())
    for options in ({}, {"weight_decay": 0.3}):
        expected = ptif.attribute(asked, queries=data.select([0, 1]), method=ptif.dual(damping=0.1), **options)
        for loader in (DataLoader(data, 3, shuffle=True, collate_fn=collator()), asked.get_train_dataloader()):
            scores = ptif.attribute(model, loader, queries, method=ptif.dual(damping=0.1), **options)
            assert gap(scores.values, expected.values) < 1e-9
        assert "a text counts with the sum over its predicted tokens" in str(scores.diagnostics)
        one = ptif.attribute(model, loader, queries, method=ptif.dual(damping=0.1), batch_size=1, **options)
        assert gap(one.values, expected.values) < 1e-9
    means = [gradient(model, own_loss(model, row)) / (len(row) - 1) for row in ids()]
    single = DataLoader(data, 1, collate_fn=collator())
    for size in (None, 3):
        scores = ptif.attribute(model, single, queries, method="grad_dot", batch_size=size)
        assert gap(scores.values.double(), products(model, means[:2], means)) < 1e-6
    assert "every text counts alike, with the mean over its predicted tokens, as in batches of one" in str(
        scores.diagnostics
    )


class OwnModel(torch.nn.Module):
    """A model of one's own, which returns what models of transformers return."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = llama()

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> dict[str, Any]:
        logits = self.inside(input_ids=input_ids, attention_mask=attention_mask).logits
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def test_a_model_of_ones_own_that_returns_its_loss_is_weighed_by_it(tmp_path: Path) -> None:
    model, data = OwnModel(), tokens().remove_columns("book")
    training = [gradient(model, own_loss(model.inside, row)) for row in ids()]
    asked, loader = trainer(model, data, tmp_path), DataLoader(data, 3, collate_fn=collator())
    scores = ptif.attribute(asked, queries=data.select([0, 1]), method="grad_dot")
    assert gap(scores.values.double(), products(model, training[:2], training)) < 1e-6
    decayed = [
        ptif.attribute(asked, queries=data.select([0]), method=ptif.dual(damping=0.1), weight_decay=0.3),
        ptif.attribute(model, loader, loader, method=ptif.dual(damping=0.1), weight_decay=0.3),
    ]
    assert gap(decayed[0].values[0], decayed[1].values[0]) < 1e-9


def test_labels_in_tuples_that_repeat_the_inputs_are_shifted() -> None:
    model, words = llama(), tokenizer()(texts(5), padding=True, return_tensors="pt")
    training = [gradient(model, own_loss(model, row)) for row in ids()]
    labels = words["input_ids"].masked_fill(words["attention_mask"] == 0, -100)
    data = TensorDataset(words["input_ids"], words["attention_mask"], labels)
    scores = ptif.attribute(model, DataLoader(data, 3), TensorDataset(*data[:2]), method="grad_dot")
    assert gap(scores.values.double(), products(model, training[:2], training)) < 1e-6
    # moved by one already, as a loop of one's own may give them to its own loss
    short = torch.tensor([row[:3] for row in ids()])
    moved = [{"input_ids": row[:-1], "labels": row[1:]} for row in short]
    for given in (moved, TensorDataset(short[:, :-1], short[:, 1:])):
        scores = ptif.attribute(model, given, given, method="grad_dot")
        assert "TokenCrossEntropy() (inferred" in str(scores.diagnostics)


def test_an_encoder_decoder_without_what_its_decoder_reads_is_told_what_to_give() -> None:
    sizes = {"vocab_size": 41, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = build(
        "T5ForConditionalGeneration", transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    )
    rows = [{"input_ids": torch.tensor(row[:3]), "labels": torch.tensor(row[:3])} for row in ids()]
    with pytest.raises(ptif.errors.InvalidInput, match=r"decoder_input_ids=model\.prepare_decoder_input_ids"):
        ptif.attribute(model, rows, rows[:1], method="grad_dot")
    for row in rows:
        row["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=row["labels"][None])[0]
    training = [gradient(model, 3 * model(**{k: v[None] for k, v in row.items()}).loss) for row in rows]
    scores = ptif.attribute(model, rows, rows[:1], method="grad_dot")
    assert gap(scores.values.double(), products(model, training[:1], training)) < 1e-6


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification", "regression"])
def test_what_values_leave_open_the_models_own_loss_says(problem_type: str | None, tmp_path: Path) -> None:
    """Logits that happen to lie in [0, 1], and targets of 0 and 1 that a regression would take too."""
    config = transformers.BertConfig(**settings(num_labels=3, problem_type=problem_type))
    model, words = build("BertForSequenceClassification", config), tokenizer()
    with torch.no_grad():
        model.classifier.weight.mul_(1e-3)
        model.classifier.bias.copy_(torch.tensor([0.2, 0.3, 0.9]))
    labels = [i % 3 if problem_type is None else [float(i % 2), 1.0, 0.0] for i in range(6)]
    rows = [
        {k: list(v) for k, v in words(text).items()} | {"labels": y} for text, y in zip(texts(6), labels, strict=True)
    ]
    pad = transformers.DataCollatorWithPadding(words)

    def loss(row: Any) -> Tensor:
        target = torch.tensor([row["labels"]])
        mean: Tensor = model(
            input_ids=torch.tensor([row["input_ids"]]), labels=target if problem_type is None else target.double()
        ).loss
        return mean

    training = [gradient(model, loss(row)) for row in rows]
    model.config.problem_type = problem_type
    expected, loader = products(model, training[:2], training), DataLoader(rows, 6, collate_fn=pad)
    asked = trainer(model, rows, tmp_path, pad)
    texts_of = [{"text": text, "label": y} for text, y in zip(texts(6), labels, strict=True)]
    for scores in (
        ptif.attribute(model, loader, DataLoader(rows[:2], 2, collate_fn=pad), method="grad_dot"),
        ptif.attribute(asked, queries=rows[:2], method="grad_dot"),
        ptif.attribute(ptif.hf.problem(model, words, texts_of), queries=texts_of[:2], method="grad_dot"),
    ):
        assert gap(scores.values.double(), expected) < 1e-6
    assert model.config.problem_type == problem_type


def test_what_no_known_loss_of_the_model_says_stays_open() -> None:
    class Own(torch.nn.Linear):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = super().forward(x)
            return {"logits": logits, "loss": None if labels is None else (logits - labels).abs().mean()}

    torch.manual_seed(0)
    rows = [{"x": torch.randn(4), "labels": torch.tensor([0.0, 1.0, 1.0])} for _ in range(5)]
    with pytest.raises(ptif.errors.InvalidInput, match=r"cannot be told from .*BCEWithLogitsLoss\(\)"):
        ptif.attribute(Own(4, 3), rows, rows, method="grad_dot")


# --------------------------------------------------------------------------- how much each text counts


def mean_of_texts(logits: Tensor, labels: Tensor) -> Tensor:
    """Every text alike, whatever its length."""
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (each.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


class Alike(transformers.Trainer):  # type: ignore[misc]
    """Texts count alike."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
        outputs = model(**inputs)
        loss = mean_of_texts(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class AlikeModel(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    """The same in forward."""

    def forward(self, labels: Any = None, **rest: Any) -> Any:
        returned = super().forward(**rest)
        returned.loss = None if labels is None else mean_of_texts(returned.logits, labels)
        return returned


def untrained(seed: int) -> Any:
    """All of whose texts have about the same loss, so that a mean over tokens is near the one over texts."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 41, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()


@pytest.mark.parametrize("seed", range(8))
def test_texts_that_count_alike_are_not_taken_for_sums_over_tokens(seed: int, tmp_path: Path) -> None:
    words = texts(30, seed)
    data = datasets.Dataset.from_dict({"input_ids": [tokenizer()(text)["input_ids"] for text in words]})
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    model = untrained(seed)
    asked = Alike(model, arguments, train_dataset=data, data_collator=collator())
    said = r"Alike\.compute_loss gives (\S+) for .*average=False.* gives (\S+); .*loss=TokenCrossEntropy\(shift=True\)"
    with pytest.raises(ptif.errors.InvalidInput, match=said) as told:
        ptif.hf.problem(asked)
    values = re.search(said, str(told.value))
    assert values is not None and values[1] != values[2]
    sums = trainer(model, data, tmp_path)
    assert ptif.hf.problem(sums).objective == ptif.TokenCrossEntropy(average=False, shift=True)
    alike = ptif.TokenCrossEntropy(shift=True)
    assert ptif.hf.problem(asked, normalisation="mean").objective == alike
    assert ptif.hf.problem(sums, normalisation="mean").objective == alike
    model.__class__ = AlikeModel
    with pytest.raises(
        ptif.errors.InvalidInput, match=r"AlikeModel\(labels=\.\.\.\) gives .*TokenCrossEntropy\(shift=True\)"
    ):
        ptif.hf.problem(model, tokenizer(), words)
    loader = DataLoader(data, 4, collate_fn=collator())
    assert "TokenCrossEntropy(shift=True) (inferred" in str(
        ptif.attribute(model, loader, loader, method="grad_dot").diagnostics
    )


def test_texts_that_count_alike_in_training_are_asked_so(tmp_path: Path) -> None:
    model, arguments = llama(), transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    data = tokens().remove_columns("book")
    asked = Alike(model, arguments, train_dataset=data, data_collator=collator(), processing_class=tokenizer())
    training = [gradient(model, own_loss(model, row)) / (len(row) - 1) for row in ids()]
    problem = ptif.hf.problem(asked, normalisation="mean")
    scores = ptif.attribute(problem, queries=data.select([0, 1]), method="grad_dot").values.double()
    assert gap(scores, products(model, training[:2], training)) < 1e-6


@pytest.mark.parametrize("kind", ["Bart", "TrOCR"])
def test_a_decoder_alone_whose_own_loss_is_not_shifted_is_told_the_loss_that_it_has(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 41, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=64, pad_token_id=0, dropout=0.0)
    model, data = build(f"{kind}ForCausalLM", config), tokens().remove_columns("book")
    asked, said = (
        trainer(model, data, tmp_path),
        r"predicts each token itself, .* loss=TokenCrossEntropy\(average=False\)\.",
    )
    for call in (lambda: ptif.hf.problem(model, tokenizer(), texts(5)), lambda: ptif.hf.problem(asked)):
        with pytest.raises(ptif.errors.InvalidInput, match=said):
            call()
    training = [
        gradient(model, len(row) * model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss)
        for row in ids()
    ]
    loss = ptif.TokenCrossEntropy(average=False)
    for problem in (ptif.hf.problem(model, tokenizer(), texts(5), loss=loss), ptif.hf.problem(asked, loss=loss)):
        scores = ptif.grad_dot().fit(problem).score(problem.data).values.double()
        assert gap(scores, products(model, training, training)) < 1e-6
    with pytest.raises(ptif.errors.InvalidInput, match="write it with shift=True"):
        ptif.hf.problem(llama(), tokenizer(), texts(5), loss=loss)


# --------------------------------------------------------------------------- labels at padding


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_at_padding_count_as_training_counted_them(side: str, tmp_path: Path) -> None:
    model, words = llama(), tokenizer(padding_side=side)
    batch = words(texts(5), padding="max_length", max_length=12, return_tensors="pt")
    data = datasets.Dataset.from_dict(
        {k: v.tolist() for k, v in batch.items()} | {"labels": batch["input_ids"].tolist()}
    )
    whole = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(5)]
    training = [gradient(model, 11 * model(**row, labels=row["input_ids"]).loss) for row in whole]
    expected = products(model, training[:2], training)
    asked, at_padding = trainer(model, data, tmp_path, transformers.default_data_collator), data.with_format("torch")
    with pytest.warns(ptif.errors.TrainingDataWarning, match=r"labels of the .* stand at padding .* set them to -100"):
        scores = ptif.attribute(asked, queries=data.select([0, 1]), method="grad_dot")
    assert gap(scores.values.double(), expected) < 1e-6
    with pytest.warns(ptif.errors.TrainingDataWarning, match=r"labels of the .* stand at padding"):
        scores = ptif.attribute(model, at_padding, at_padding.select([0, 1]), method="grad_dot")
    assert gap(scores.values.double(), expected) < 1e-6
    with pytest.warns(ptif.errors.TrainingDataWarning, match="labels stand at padding .* take no part"):
        ptif.hf.problem(model, words, data)
    # without labels there, the same scores as without padding
    own = torch.where(batch["attention_mask"] == 0, -100, batch["input_ids"])
    cured = data.remove_columns("labels").add_column("labels", own.tolist())
    plain = [gradient(model, own_loss(model, row)) for row in ids()]
    scores = ptif.attribute(
        trainer(model, cured, tmp_path, asked.data_collator), queries=cured.select([0]), method="grad_dot"
    )
    assert gap(scores.values.double(), products(model, plain[:1], plain)) < 1e-6


# --------------------------------------------------------------------------- what is said


def test_a_function_of_model_and_batch_is_told_what_it_is_given() -> None:
    rows = [{"input_ids": torch.tensor(row[:3]), "labels": torch.tensor(row[:3])} for row in ids()]
    said = r"TypeError: a tensor argument after \*\* .* its first argument, 'model', is what the model returned"
    with pytest.raises(ptif.errors.InvalidInput, match=said):
        ptif.attribute(llama(), rows, rows, loss=lambda model, batch: model(**batch).loss, method="grad_dot")


def test_trak_of_texts_takes_the_loss() -> None:
    problem = ptif.hf.problem(llama(), tokenizer(), texts(6))
    with pytest.raises(ptif.errors.InvalidInput, match=r"of TRAK trak\(measure=None\)"):
        ptif.attribute(problem, queries="the cat sat", method=ptif.methods.trak(k=4))
    scores = ptif.attribute(problem, queries="the cat sat", method=ptif.methods.trak(k=4, measure=None))
    assert bool(torch.isfinite(scores.values).all()) and float(scores.values.abs().max()) > 0


def test_padded_texts_are_retrained_whatever_the_attention() -> None:
    """Attention that looks at its mask cannot be stacked, so that models are trained one by one."""
    sizes = settings(num_key_value_heads=1, num_hidden_layers=1)

    def make() -> Any:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

    scores = ptif.attribute(ptif.hf.problem(make(), tokenizer(), texts(6)), queries=["the cat sat"], method="grad_dot")
    recipe = ptif.evaluation.Recipe(make, epochs=1, batch_size=3)
    assert "removals" in str(scores.verify(recipe, seeds=1))


def test_an_index_of_texts_knows_its_loss(tmp_path: Path) -> None:
    problem = ptif.hf.problem(llama(), tokenizer(), texts(5))
    ptif.Index.build(problem, tmp_path / "index", method="grad_dot")
    opened = ptif.Index.open(tmp_path / "index", problem.model)
    query = ptif.hf.query(problem.model, tokenizer(), "the", " cat sat")
    expected = ptif.attribute(problem, queries=query, method="grad_dot").values
    assert gap(opened.score(query).values, expected) < 1e-5


def test_a_trainers_weight_decay_is_told(tmp_path: Path) -> None:
    asked = trainer(llama(), tokens(), tmp_path, weight_decay=0.1)
    assert "weight_decay=0.1 takes no part: with adamw" in ptif.hf.problem(asked).data.reading
    coupled = trainer(llama(), tokens(), tmp_path, weight_decay=0.1, optim="sgd")
    assert "so pass weight_decay=trainer.optimizer" in ptif.hf.problem(coupled).data.reading
    coupled.train()
    problem = ptif.hf.problem(coupled, weight_decay=coupled.optimizer)
    tokens_of_a_text = sum(len(row) - 1 for row in ids()) / 5
    assert problem.weight_decay.strength["lm_head.weight"] == pytest.approx(0.1 * tokens_of_a_text)
    assert "weight_decay" not in problem.data.reading and "model.norm.weight" not in problem.weight_decay.strength
