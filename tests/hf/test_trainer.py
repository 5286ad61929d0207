"""`ptif.attribute(trainer, queries=...)`: the Trainer's data, columns, collate function and loss are read from it."""

from __future__ import annotations

import inspect
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.hf.normalisation import trainers_normalisation
from tests.hf.tiny import build, gpt2, gradient, llama, own_loss, products, settings, texts, tokenizer
from tests.interface.report_cases import Page
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
pytestmark = [pytest.mark.filterwarnings("ignore")]


def trainer(model: Any, data: Any, folder: Path, collator: Any = None, **options: Any) -> Any:
    arguments = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    extra = {"compute_loss_func": options.pop("compute_loss_func", None), "callbacks": options.pop("callbacks", None)}
    words = tokenizer()
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **(arguments | options)),
        train_dataset=data,
        processing_class=words,
        data_collator=collator or transformers.DataCollatorForLanguageModeling(words, mlm=False),
        **extra,
    )


def tokens(n: int = 5) -> Any:
    words = tokenizer()
    rows = [words(text) | {"book": f"book {i}"} for i, text in enumerate(texts(n))]
    return datasets.Dataset.from_list([{k: list(v) if k != "book" else v for k, v in row.items()} for row in rows])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_trainer_is_asked_about_a_text(side: str, tmp_path: Path) -> None:
    model, words = gpt2(), tokenizer()
    asked = trainer(model, tokens(), tmp_path)
    asked.processing_class.padding_side = asked.data_collator.tokenizer.padding_side = side
    columns = asked._signature_columns
    scores = ptif.attribute(asked, queries="who wrote this book", method="grad_dot")
    training = [gradient(model, own_loss(model, words(text)["input_ids"])) for text in texts(5)]
    query = gradient(model, own_loss(model, words("who wrote this book")["input_ids"]))
    assert gap(scores.values.double(), products(model, [query], training)) < 1e-6
    assert "as in a Trainer's mean over the tokens of a batch" in str(scores.diagnostics)
    assert asked._signature_columns is columns
    rows = ptif.attribute(asked, queries=tokens().select([1, 2]), method="grad_dot")
    assert rows.shape == (2, 5)
    assert gap(rows.values[1].double(), products(model, [training[2]], training)[0]) < 1e-6


@pytest.mark.parametrize("flat", [False, True])
def test_texts_are_told_the_kinds_of_tokens_that_training_was_told(flat: bool, tmp_path: Path) -> None:
    """GPT-2 adds the vector of word 0 to every token of kind 0, and nothing where no kinds are given."""
    model, words = gpt2(), tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    rows = datasets.Dataset.from_list([dict(words(text)) for text in texts(4)])
    collator = transformers.DataCollatorWithFlattening() if flat else None
    asked = trainer(model, rows, tmp_path, collator or transformers.DataCollatorForLanguageModeling(words, mlm=False))
    asked.processing_class = words

    def loss(text: str) -> torch.Tensor:
        ids = torch.tensor([words(text)["input_ids"]])
        kinds = {} if flat else {"token_type_ids": torch.zeros_like(ids)}
        mean: torch.Tensor = model(input_ids=ids, labels=ids, **kinds).loss
        return mean * (ids.shape[1] - 1)

    expected = products(model, [gradient(model, loss("the cat sat on"))], [gradient(model, loss(t)) for t in texts(4)])
    for question in ("the cat sat on", {"prompt": "the", "completion": " cat sat on"}):
        scores = ptif.attribute(asked, queries=question, method="grad_dot")
        assert gap(scores.values.double(), expected) < 1e-6
    direct = ptif.hf.query(asked, prompt="the", completion=" cat sat on")
    assert gap(ptif.attribute(asked, queries=direct, method="grad_dot").values.double(), expected) < 1e-6
    if not flat:
        alone = ptif.attribute(ptif.hf.problem(model, words, texts(4)), queries="the cat sat on", method="grad_dot")
        assert gap(alone.values.double(), expected) < 1e-6
    kinds = {} if flat else {"token_type_ids": torch.zeros(1, 1, dtype=torch.long)}
    written = model.generate(torch.tensor([[6]]), do_sample=False, max_new_tokens=4, pad_token_id=0, **kinds)[0]
    generated = ptif.hf.query(asked, prompt="the", max_new_tokens=4)
    assert generated.texts.encoded[0].ids == tuple(written.tolist())


def test_the_trainers_loss_is_a_sum_over_tokens_up_to_one_factor(tmp_path: Path) -> None:
    """The gradient of its loss of a batch is that of our objective over the same texts."""
    model = llama()
    asked = trainer(model, tokens(6), tmp_path, per_device_train_batch_size=6)
    problem = ptif.hf.problem(asked)
    items = [{k: v for k, v in row.items() if k != "book"} for row in tokens(6)]
    batch = asked.data_collator(items)
    count = int((batch["labels"][:, 1:] != -100).sum())
    theirs = gradient(model, asked.compute_loss(model, dict(batch), num_items_in_batch=count))
    _, own = next(iter(problem.data.batches()))
    losses = problem.objective.losses(problem.objective.outputs(model, own), own)
    assert gap(gradient(model, losses.sum()) / count, theirs) < 1e-6


def test_batches_of_one_text_without_their_count_are_means(tmp_path: Path) -> None:
    asked = trainer(gpt2(), tokens(), tmp_path, per_device_train_batch_size=1)
    asked.model_accepts_loss_kwargs = False
    assert ptif.hf.problem(asked).objective == ptif.TokenCrossEntropy(average=True, shift=True)
    assert "every text counts alike" in ptif.hf.problem(asked).data.reading
    asked.model_accepts_loss_kwargs = True
    assert ptif.hf.problem(asked).objective == ptif.TokenCrossEntropy(average=False, shift=True)


def test_a_loss_that_is_not_the_models_is_refused_or_given(tmp_path: Path) -> None:
    own = trainer(gpt2(), tokens(), tmp_path, compute_loss_func=lambda outputs, labels, **_: outputs.logits.mean())
    with pytest.raises(ptif.errors.InvalidInput, match="has a compute_loss_func"):
        ptif.attribute(own, queries="the cat sat")
    loss = ptif.TokenCrossEntropy(average=True, shift=True)
    assert ptif.attribute(own, queries="the cat sat", loss=loss, method="grad_dot").values.shape == (1, 5)


SMOOTHING = 0.3


def smoothed_losses(model: Any, ids: list[int], logits: torch.Tensor | None = None) -> torch.Tensor:
    """Every predicted token's smoothed loss of a text alone, written out by torch's own cross entropy."""
    outputs = model(input_ids=torch.tensor([ids])).logits[0] if logits is None else logits
    return torch.nn.functional.cross_entropy(
        outputs[:-1], torch.tensor(ids[1:]), label_smoothing=SMOOTHING, reduction="none"
    )


@pytest.mark.parametrize("make", [llama, gpt2])
def test_smoothed_labels_of_tokens_are_the_trainers(make: Any, tmp_path: Path) -> None:
    """Its own loss of a batch, by the count of its tokens and as their mean; scores, shares of tokens, both sides."""
    model, words = make(), tokenizer()
    asked = trainer(
        model, tokens(5), tmp_path, label_smoothing_factor=SMOOTHING, per_device_train_batch_size=5,
        average_tokens_across_devices=False,
    )  # fmt: skip
    problem = ptif.hf.problem(asked)
    assert problem.objective == ptif.TokenCrossEntropy(average=False, shift=True, label_smoothing=SMOOTHING)
    _, own = next(iter(problem.data.batches()))
    ours = gradient(model, problem.objective.losses(problem.objective.outputs(model, own), own).sum())
    batch = asked.data_collator([{k: v for k, v in row.items() if k != "book"} for row in tokens(5)])
    count = int((batch["labels"][:, 1:] != -100).sum())
    for number in (None, count):  # it adds up the smoothed half in float32
        theirs = gradient(model, asked.compute_loss(model, dict(batch), num_items_in_batch=number))
        assert gap(ours / count, theirs) < 1e-5

    ids = [words(text)["input_ids"] for text in (*texts(5), "who wrote this book")]
    *training, query = [gradient(model, smoothed_losses(model, i).sum()) for i in ids]
    scores = ptif.attribute(asked, queries="who wrote this book", method="grad_dot")
    assert gap(scores.values.double(), products(model, [query], training)) < 1e-6
    attribution, asks = ptif.ekfac(damping=0.1).fit(problem), ptif.hf.query(asked, prompt="who", completion=" wrote")
    total, shares = attribution.score(asks).values.double(), attribution.token_scores(asks, range(5))
    assert gap(torch.stack([shares[i][0].sum() for i in range(5)]), total[0]) < 1e-6
    assert shares[1].shape[1] >= len(ids[1]) and not bool(shares[1][0, len(ids[1]) :].any())


def test_smoothed_labels_leave_the_gauss_newton_matrix_that_of_the_softmax(tmp_path: Path) -> None:
    """Oracle: Jacobians of all logits and autograd's Hessian of the smoothed loss in them."""
    model, words = gpt2(), tokenizer()
    asked = trainer(model, tokens(4), tmp_path, label_smoothing_factor=SMOOTHING)
    name = "transformer.h.1.attn.c_proj.weight"
    weight = model.get_parameter(name)
    ggn, gradients = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64), []
    for text in texts(4):
        ids = words(text)["input_ids"]

        def logits(w: torch.Tensor, ids: list[int] = ids) -> torch.Tensor:
            return torch.func.functional_call(model, {name: w}, (), {"input_ids": torch.tensor([ids])}).logits[0]

        def loss(z: torch.Tensor, ids: list[int] = ids) -> torch.Tensor:
            return smoothed_losses(model, ids, z).sum()

        jacobian = torch.autograd.functional.jacobian(logits, weight).reshape(-1, weight.numel())
        hessian = torch.autograd.functional.hessian(loss, logits(weight).detach())
        ggn += jacobian.T @ hessian.reshape(len(jacobian), -1) @ jacobian / 4
        gradients.append(gradient(model, loss(logits(weight)), [name]))
    rows = torch.stack(gradients)
    expected = rows[:1] @ torch.linalg.solve(ggn + 0.01 * torch.eye(len(ggn)), rows.T) / 4
    scores = ptif.attribute(
        asked, queries=texts(4)[0], parameters=[name], method=ptif.Influence(ptif.GGN(), damping=0.01)
    )
    assert gap(scores.values.double(), expected) < 1e-6


def test_a_trainer_that_smooths_without_the_shift_is_refused(tmp_path: Path) -> None:
    """Of a class that transformers does not list, labels are smoothed where they stand."""

    class OwnForCausalLM(transformers.GPT2LMHeadModel):
        pass

    model = OwnForCausalLM(gpt2().config).double().eval()
    with pytest.raises(ptif.errors.InvalidInput, match=r"Trainer\.compute_loss gives .* each token itself"):
        ptif.hf.problem(trainer(model, tokens(), tmp_path, label_smoothing_factor=0.1))
    assert ptif.hf.problem(trainer(model, tokens(), tmp_path)).objective == ptif.TokenCrossEntropy(
        average=False, shift=True
    )


def test_smoothed_labels_without_the_count_of_a_batch_are_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of transformers 4, which divide by the tokens at hand."""
    smooths = trainer(gpt2(), tokens(), tmp_path, label_smoothing_factor=0.1, per_device_train_batch_size=1)
    whole = type(smooths.label_smoother).__call__

    def before(self: Any, model_output: Any, labels: Any, shift_labels: bool = False) -> torch.Tensor:
        loss: torch.Tensor = whole(self, model_output, labels, shift_labels)
        return loss

    counted = "num_items_in_batch" in inspect.signature(whole).parameters
    assert trainers_normalisation(smooths) == ("trainer" if counted else "mean")
    monkeypatch.setattr(type(smooths.label_smoother), "__call__", before)
    assert trainers_normalisation(smooths) == "mean"


def test_texts_of_a_trainer_are_read_by_their_column(tmp_path: Path) -> None:
    words, model = tokenizer(), gpt2()
    raw = datasets.Dataset.from_list([{"text": text} for text in texts(4)])
    asked = trainer(model, raw, tmp_path)
    scores = ptif.attribute(ptif.hf.problem(asked, text_column="text"), queries="the cat sat", method="grad_dot")
    direct = ptif.attribute(ptif.hf.problem(model, words, texts(4)), queries="the cat sat", method="grad_dot")
    assert gap(scores.values, direct.values) < 1e-6


def test_what_a_trainer_does_not_have_is_said(tmp_path: Path) -> None:
    with pytest.raises(ptif.errors.InvalidInput, match="The Trainer has no train_dataset"):
        ptif.attribute(trainer(gpt2(), None, tmp_path), queries="the cat sat")
    stream = trainer(gpt2(), tokens().to_iterable_dataset(), tmp_path)
    with pytest.raises(ptif.errors.InvalidInput, match="can only be iterated, but examples are named by index"):
        ptif.attribute(stream, queries="the cat sat")
    with pytest.raises(ptif.errors.InvalidInput, match="nothing is asked"):
        ptif.attribute(trainer(gpt2(), tokens(), tmp_path))


def test_what_is_advised_for_packed_texts_is_what_their_trainer_taught(tmp_path: Path) -> None:
    """TRL ends every text, and keeps texts of a block apart."""
    model, words = llama(), tokenizer()
    ended = [[*ids, 1][:8] for ids in words(texts(4))["input_ids"]]
    packed = datasets.Dataset.from_dict({"input_ids": [[*chain(*ended)]], "seq_lengths": [[len(row) for row in ended]]})
    asked = trainer(model, packed, tmp_path)
    asked.args.max_length = 8
    advised = r"ptif\.hf\.problem\(trainer\.model, tokenizer, texts, add_eos=True, max_length=8\)"
    with pytest.raises(ptif.errors.InvalidInput, match=advised):
        ptif.hf.problem(asked)
    problem = ptif.hf.problem(asked.model, words, texts(4), add_eos=True, max_length=8)
    training = [gradient(model, own_loss(model, row)) for row in ended]
    scores = ptif.grad_dot().fit(problem).score(problem.data).values.double()
    assert gap(scores, products(model, training, training)) < 1e-6
    asked.args.max_length = None
    with pytest.raises(ptif.errors.InvalidInput, match=r"texts, add_eos=True\)"):
        ptif.hf.problem(asked)


@pytest.mark.parametrize("name", ["{}_ids", "{}_input_ids", "{}"])
def test_a_trainer_of_preferences_is_told_what_can_be_asked(name: str, tmp_path: Path) -> None:
    rows = [{name.format("chosen"): [6, 7], name.format("rejected"): [8]} for _ in range(3)]
    said = "pairs of a chosen and a rejected answer.*completion_column='chosen'"
    for data in (datasets.Dataset.from_list(rows), rows):
        with pytest.raises(ptif.errors.InvalidInput, match=said):
            ptif.attribute(trainer(llama(), data, tmp_path), queries="the cat", method="grad_dot")
    texts_beside = tokens().add_column("chosen", ["a"] * 5).add_column("rejected", ["b"] * 5)
    assert len(ptif.hf.problem(trainer(llama(), texts_beside, tmp_path))) == 5
    reward = build("LlamaForSequenceClassification", transformers.LlamaConfig(**settings(num_labels=1)))
    with pytest.raises(ptif.errors.InvalidInput, match=r"pairs of a chosen .* rows of single texts"):
        ptif.hf.problem(trainer(reward, rows, tmp_path), loss=torch.nn.MSELoss())


def test_a_classifiers_trainer_has_its_own_loss(tmp_path: Path) -> None:
    config, words = transformers.BertConfig(**settings(num_labels=3)), tokenizer()
    model = build("BertForSequenceClassification", config)
    rows = [{**{k: list(v) for k, v in words(text).items()}, "label": i % 3} for i, text in enumerate(texts(5))]
    data = datasets.Dataset.from_list(rows)
    asked = trainer(model, data, tmp_path, transformers.DataCollatorWithPadding(words), label_smoothing_factor=0.2)
    scores = ptif.attribute(asked, queries=data.select([0, 3]), method="grad_dot")

    def loss(row: dict[str, Any]) -> torch.Tensor:
        inputs = {k: torch.tensor([v]) for k, v in row.items() if k not in ("label", "token_type_ids")}
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits, torch.tensor([row["label"]]), label_smoothing=0.2)

    training = [gradient(model, loss(row)) for row in rows]
    assert gap(scores.values.double(), products(model, [training[0], training[3]], training)) < 1e-6
    with torch.no_grad():
        answer = int(model(**words("the cat sat", return_tensors="pt")).logits.argmax())
    alone, labelled = (
        ptif.attribute(asked, queries=queries, method="grad_dot").values
        for queries in ("the cat sat", {"text": "the cat sat", "label": answer})
    )
    assert gap(alone, labelled) < 1e-9


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_trainers_token_numbers_are_shown_as_texts(side: str, tmp_path: Path) -> None:
    asked = trainer(gpt2(), tokens(), tmp_path)
    asked.data_collator = transformers.DataCollatorForLanguageModeling(
        asked.processing_class, mlm=False, pad_to_multiple_of=8
    )
    asked.processing_class.padding_side = side
    attribution = ptif.methods.grad_dot().fit(ptif.hf.problem(asked))
    scores = ptif.attribute(asked, queries=tokens().select([1]), method="grad_dot")
    best = scores.helpful(0, 1)[0][0]
    assert scores.describe_train(best) == f"#{best} {texts(5)[best]}"[:62] and texts(5)[best][:40] in repr(scores)
    assert texts(5)[best][:40] in scores._repr_html_()
    scores.report(tmp_path / "page.html", tokens=attribution)
    page = Page(tmp_path / "page.html")
    assert "".join(page.queries[0]["p"]) == texts(5)[1]
    shares = attribution.token_scores(scores.query_source, range(5))
    for i, text in enumerate(texts(5)):
        record, strongest = page.examples[i], int(shares[i][0].abs().argmax())
        assert "".join(record["p"]) == text
        skipped = shares[i].shape[1] - len(record["p"]) if side == "left" else 0
        assert record["g"] == [[1, len(record["p"])]]  # the first token of a text is not predicted
        assert max(range(len(record["p"])), key=lambda t: abs(record["v"]["0"][t])) == strongest - skipped
    assert not page.index["labelled"] and "label" not in page.words.lower()


@pytest.mark.slow
def test_a_run_is_recorded_and_asked_along(tmp_path: Path) -> None:
    model = llama(dtype=torch.float32)
    recorded = trainer(
        model, tokens(8), tmp_path / "out", callbacks=[ptif.hf.PtifCallback(tmp_path / "run")], max_steps=6,
        learning_rate=1e-3, per_device_train_batch_size=4,
    )  # fmt: skip
    recorded.train()
    scores = ptif.attribute(recorded, queries="who wrote this book", method="grad_dot", run=tmp_path / "run")
    assert scores.shape == (1, 8) and scores.diagnostics.members > 1


@pytest.mark.parametrize("tokenised", [True, False])
def test_a_tokenizer_given_beside_a_trainer_is_used(tokenised: bool, tmp_path: Path) -> None:
    """Where the Trainer has none, as with a collate function that tokenises by itself."""
    model, words = gpt2(), tokenizer()

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"] if tokenised else words(row["text"])["input_ids"]) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = padded != 0
        return {"input_ids": padded, "attention_mask": mask.long(), "labels": padded.where(mask, -100)}

    data = tokens() if tokenised else datasets.Dataset.from_dict({"text": texts(5)})
    asked = trainer(model, data, tmp_path, collate, remove_unused_columns=False)
    asked.processing_class = None
    expected = ptif.attribute(ptif.hf.problem(model, words, texts(5)), queries="the cat sat", method="grad_dot").values
    for problem in (ptif.hf.problem(asked, words), ptif.hf.problem(asked, tokenizer=words)):
        assert gap(ptif.attribute(problem, queries="the cat sat", method="grad_dot").values, expected) < 1e-6
        assert gap(ptif.methods.grad_dot().fit(problem).score("the cat sat").values, expected) < 1e-6
    sentence = r"no tokenizer .* give the one that training used, ptif.attribute\(ptif.hf.problem\(trainer, tokenizer\)"
    with pytest.raises(ptif.errors.InvalidInput, match=sentence):
        ptif.attribute(asked, queries="the cat sat")


def test_what_is_wrong_with_a_batch_is_said_once(tmp_path: Path) -> None:
    words, model = tokenizer(), gpt2()
    untokenised = trainer(model, datasets.Dataset.from_dict({"text": texts(3)}), tmp_path)
    with pytest.raises(ptif.errors.InvalidInput, match=r"^None of the columns 'text'"):
        ptif.attribute(untokenised, queries="the cat sat")
    ids = words(texts(3), padding=True, return_tensors="pt")
    sentence = (
        "has no target; expected it under 'labels' or 'label', for a language model the token numbers, .* taught; "
    )
    with pytest.raises(ptif.errors.InvalidInput, match=sentence + r"ptif.hf.problem\(model, tokenizer, texts\) makes"):
        ptif.attribute(model, ids, ids)
