"""`ptif.hf.problem`: what is taught of texts, prompts and chats, what counts how much, and what is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.hf import streams as streams_module
from tests.hf.tiny import MARKED_CHAT, build, gpt2, gradient, llama, own_loss, products, texts, tokenizer
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*transformers.*", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

CHATS = [
    [{"role": "user", "content": "who wrote this"}, {"role": "assistant", "content": "the cat"}],
    [
        {"role": "system", "content": "on a mat"},
        {"role": "user", "content": "who"},
        {"role": "assistant", "content": "moon and sea"},
        {"role": "user", "content": "who ran"},
        {"role": "assistant", "content": "dog"},
    ],
]


def taught(problem: Any, words: Any, index: int) -> str:
    item = problem.data.dataset[index]
    return str(words.decode([int(token) for token in item["labels"] if token != -100]))


@pytest.mark.parametrize("template", [None, MARKED_CHAT])
def test_of_a_chat_the_answers_are_taught(template: str | None) -> None:
    words = tokenizer() if template is None else tokenizer(template)
    model = llama()
    problem = ptif.hf.problem(model, words, [{"messages": chat} for chat in CHATS])
    expected = ["the cat <eos>", "moon and sea <eos> dog <eos>"]
    assert [taught(problem, words, i).strip() for i in range(2)] == expected
    everything = ptif.hf.problem(model, words, CHATS, completion_only=False)
    turns = ["<system> on a mat", "<user> who", "<assistant> moon and sea", "<user> who ran", "<assistant> dog"]
    whole = " ".join(f"{turn} <eos>" for turn in turns)
    assert taught(everything, words, 1).strip() == whole


def bracketed(side: str, begin: str = "<user> ") -> Any:
    """A tokenizer that puts tokens around a text, as that of BERT, T5 or Llama does."""
    processors = pytest.importorskip("tokenizers").processors
    words = tokenizer(truncation_side=side)
    special = [(token, words.convert_tokens_to_ids(token)) for token in ("<user>", "<eos>")]
    words._tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin}$A <eos>", special_tokens=special)
    return words


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_a_tokenizer_puts_around_a_text_is_kept_where_it_is_cut(side: str) -> None:
    model, words = llama(), bracketed(side)
    with pytest.warns(ptif.errors.TrainingDataWarning, match=r"\d of 6 texts are longer than 5 tokens"):
        problem = ptif.hf.problem(model, words, texts(6), max_length=5)
    trained = words(texts(6), truncation=True, max_length=5)["input_ids"]
    assert [list(row.ids) for row in problem.data.dataset.encoded] == trained and trained[1][0] == 3
    training = [gradient(model, own_loss(model, ids)) for ids in trained]
    scores = ptif.grad_dot().fit(problem).score(ptif.hf.query(model, tokenizer(), "the cat", " sat")).values.double()
    asked = tokenizer()("the cat sat")["input_ids"]
    assert (
        gap(scores, products(model, [gradient(model, own_loss(model, asked, [-100, -100, asked[2]]))], training)) < 1e-6
    )
    # what is put behind texts by training code, as TRL does, is cut with them
    with pytest.warns(ptif.errors.TrainingDataWarning, match="were cut"):
        plainly = tokenizer(truncation_side=side)
        cut = ptif.hf.problem(model, plainly, texts(6), max_length=5, add_eos=True).data.dataset
    plain = [[*ids, 1] for ids in tokenizer()(texts(6))["input_ids"]]
    assert [list(row.ids) for row in cut.encoded] == [ids[:5] if side == "right" else ids[-5:] for ids in plain]
    # of fewer tokens than it adds there is no text that it could cut
    with pytest.warns(ptif.errors.TrainingDataWarning, match="were cut"):
        few = ptif.hf.problem(model, bracketed(side, "<user> <user> "), texts(2), max_length=2).data.dataset
    assert [len(row.ids) for row in few.encoded] == [2, 2]


def test_an_encoder_decoder_reads_and_writes_what_its_tokenizer_cut() -> None:
    sizes = {"vocab_size": 41, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = build(
        "T5ForConditionalGeneration", transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    )
    words, rows = bracketed("right", ""), [{"prompt": a, "completion": b} for a, b in itertools.pairwise(texts(5))]
    with pytest.warns(ptif.errors.TrainingDataWarning, match="7 of 8 texts are longer than 4 tokens"):
        problem = ptif.hf.problem(model, words, rows, max_length=4)
    for index, row in enumerate(rows):
        for name, key in (("prompt", "input_ids"), ("completion", "labels")):
            expected = words(row[name], truncation=True, max_length=4)["input_ids"]
            assert problem.data.dataset[index][key].tolist() == expected and expected[-1] == 1


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    words = tokenizer("{% for m in messages %}<{{ m.role }}> {{ m.content if loop.last else 'old' }} {% endfor %}")
    with pytest.raises(ptif.errors.InvalidInput, match=re.escape("put {% generation %} around answers")):
        ptif.hf.problem(llama(), words, CHATS)
    with pytest.raises(ptif.errors.InvalidInput, match="has no chat template"):
        ptif.hf.problem(llama(), tokenizer(None), CHATS)


def test_of_a_prompt_with_its_completion_the_completion_is_taught() -> None:
    words, model = tokenizer(), llama()
    rows = [{"ask": "who wrote this", "say": " the cat"}, {"ask": "the moon", "say": " rose over sea"}]
    problem = ptif.hf.problem(model, words, rows, prompt_column="ask", completion_column="say")
    assert [taught(problem, words, i) for i in range(2)] == ["the cat <eos>", "rose over sea <eos>"]
    scores = ptif.attribute(
        problem, queries=[{"prompt": "who wrote this", "completion": " the cat"}], method="grad_dot"
    )
    ids = [words(row["ask"] + row["say"])["input_ids"] + [1] for row in rows]
    labels = [[-100] * len(words(row["ask"])["input_ids"]) + words(row["say"])["input_ids"] + [1] for row in rows]
    training = [gradient(model, own_loss(model, *row)) for row in zip(ids, labels, strict=True)]
    asked = [gradient(model, own_loss(model, ids[0][:-1], labels[0][:-1]))]
    assert gap(scores.values.double(), products(model, asked, training)) < 1e-6
    assert scores.query_names == ["the cat"]


def test_how_much_a_text_counts_is_the_trainers_unless_said() -> None:
    model, words = llama(), tokenizer()
    grads = [gradient(model, own_loss(model, words(text)["input_ids"])) for text in texts(4)]
    counts = [len(words(text)["input_ids"]) - 1 for text in texts(4)]
    means = [g / n for g, n in zip(grads, counts, strict=True)]
    for normalisation, training, said in (
        ("trainer", grads, "as in a Trainer's mean over the tokens of a batch"),
        ("sum", grads, "sum over its predicted tokens"),
        ("mean", means, "every text counts alike"),
    ):
        problem = ptif.hf.problem(model, words, texts(4), normalisation=normalisation)
        scores = ptif.attribute(problem, queries=texts(4)[:2], method="grad_dot")
        assert gap(scores.values.double(), products(model, training[:2], training)) < 1e-6
        assert said in str(scores.diagnostics)
    assert ptif.hf.problem(model, words, texts(4)).objective == ptif.TokenCrossEntropy(average=False, shift=True)
    with pytest.raises(ptif.errors.InvalidInput, match="normalisation"):
        ptif.hf.problem(model, words, texts(4), normalisation="batch")


def test_weight_decay_beside_a_trainers_mean_is_scaled_to_the_sum() -> None:
    """mean over tokens + decay, times the tokens of a text: the same minimum, so the same scores."""
    model, words = gpt2(), tokenizer()
    tokens = sum(len(words(text)["input_ids"]) - 1 for text in texts(4)) / 4
    assert ptif.hf.problem(model, words, texts(4), weight_decay=0.1).weight_decay.strength == pytest.approx(
        0.1 * tokens
    )
    named = ptif.hf.problem(model, words, texts(4), weight_decay={"lm_head.weight": 0.1})
    assert named.weight_decay.strength == {"lm_head.weight": pytest.approx(0.1 * tokens)}
    for normalisation in ("sum", "mean"):
        plain = ptif.hf.problem(model, words, texts(4), weight_decay=0.1, normalisation=normalisation)
        assert plain.weight_decay.strength == 0.1


def test_what_is_cut_is_told_once() -> None:
    lengths = [len(text.split()) for text in texts(6)]
    over = [n - 5 for n in lengths if n > 5]
    said = f"{len(over)} of 6 texts are longer than 5 tokens .* {sum(over)} of {sum(lengths)} tokens"
    with pytest.warns(ptif.errors.TrainingDataWarning, match=said) as told:
        problem = ptif.hf.problem(llama(), tokenizer(), texts(6), max_length=5)
    assert len(told) == 1
    assert f"{len(over)} of 6 were cut at 5 tokens" in problem.data.reading
    assert max(len(problem.data.dataset[i]["input_ids"]) for i in range(6)) == 5


def test_a_completion_that_is_cut_away_is_refused() -> None:
    rows = [{"prompt": "the cat sat on a mat", "completion": " and dog"}]
    with pytest.raises(ptif.errors.InvalidInput, match="No token is taught by text 0: what they teach was cut off"):
        ptif.hf.problem(llama(), tokenizer(), rows, max_length=4)


@pytest.mark.parametrize("form", ["python", "torch", "numpy", "frame"])
def test_a_dataset_in_any_format_is_the_same(form: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": chat, "from": f"book {i}", "n": i} for i, chat in enumerate(CHATS)]
    data = datasets.Dataset.from_list(rows)
    data = data.to_pandas() if form == "frame" else data if form == "python" else data.with_format(form)
    words = tokenizer()
    problem = ptif.hf.problem(gpt2(), words, data, messages_column="messages", source_column="from")
    assert [taught(problem, words, i).strip() for i in range(2)] == ["the cat <eos>", "moon and sea <eos> dog <eos>"]
    assert problem.data.dataset.kinds == ("book 0", "book 1")


def test_token_numbers_are_taken_as_they_are() -> None:
    datasets = pytest.importorskip("datasets")
    words, model = tokenizer(), gpt2()
    data = datasets.Dataset.from_list([{"input_ids": words(text)["input_ids"]} for text in texts(4)])
    numbers = ptif.attribute(ptif.hf.problem(model, words, data), queries=data.select([0]), method="grad_dot")
    same = ptif.attribute(ptif.hf.problem(model, words, texts(4)), queries=texts(4)[0], method="grad_dot")
    assert gap(numbers.values, same.values) < 1e-6


def refused() -> list[tuple[str, Any, dict[str, Any]]]:
    rows = [{"body": "the cat sat", "title": "cat"}]
    return [
        ("Which of the columns 'body', 'title' holds the texts cannot be told", rows, {}),
        (
            "text_column='bodi' is not a column; there are 'body', 'title'. Did you mean 'body'?",
            rows,
            {"text_column": "bodi"},
        ),
        ("belong together; give both", rows, {"prompt_column": "body"}),
        (
            "Texts are read from one place",
            rows,
            {"prompt_column": "body", "completion_column": "title", "text_column": "body"},
        ),
        ("Example 1 has nothing under 'text'", [{"text": "the cat"}, {"text": None}], {}),
        ("list_iterator gives no example; one that was read before may be used up", iter([]), {}),
        ("holds no text", [], {}),
        ("Example 0 is of type int", [3], {}),
        ("Example 0 is of type NoneType", [None, "the cat sat"], {}),
        (
            "A DataLoader gives batches, and texts are encoded one by one; pass its dataset",
            torch.utils.data.DataLoader(texts(2)),
            {},
        ),
        ("has the splits 'train', 'test'", type("Splits", (dict,), {"column_names": {"train": [], "test": []}})(), {}),
        ("hf.problem() needs dataset=", None, {}),
        ("hf.problem() has no argument 'text_colum'. Did you mean 'text_column'?", rows, {"text_colum": "body"}),
        ("padding_side='up' is none", ["the cat sat"], {"padding_side": "up"}),
        ("source_column='who' is not a column", ["the cat sat"], {"source_column": "who"}),
        ("No token is taught by text 0: leave them out", ["the"], {}),
        ("packing", ["the cat sat"], {"packing": 1}),
    ]


@pytest.mark.parametrize(("message", "data", "options"), refused())
def test_what_cannot_be_read_is_refused_in_a_sentence(message: str, data: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ptif.errors.InvalidInput, match=re.escape(message)):
        ptif.hf.problem(gpt2(), tokenizer(), data, **options)


def test_a_model_without_a_tokenizer_says_which_is_meant() -> None:
    with pytest.raises(ptif.errors.InvalidInput, match="pass tokenizer=, the one that training used"):
        ptif.hf.problem(gpt2(), None, texts(3))


def test_a_path_is_loaded_with_its_tokenizer(tmp_path: Any) -> None:
    model, words = gpt2(dtype=torch.float32), tokenizer()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded = ptif.attribute(ptif.hf.problem(str(tmp_path), dataset=texts(4)), queries="the cat sat", method="grad_dot")
    given = ptif.attribute(ptif.hf.problem(model, words, texts(4)), queries="the cat sat", method="grad_dot")
    assert gap(loaded.values, given.values) < 1e-6


def test_a_problem_is_asked_without_training_data_again() -> None:
    problem = ptif.hf.problem(gpt2(), tokenizer(), texts(4))
    with pytest.raises(ptif.errors.InvalidInput, match=re.escape("got a problem and loss=, which belongs to it")):
        ptif.attribute(problem, queries="the cat sat", loss=torch.nn.CrossEntropyLoss())
    with pytest.raises(ptif.errors.InvalidInput, match="nothing is asked"):
        ptif.attribute(problem)
    with pytest.raises(ptif.errors.InvalidInput, match=re.escape("attribute() of a model needs queries=")):
        ptif.attribute(problem.model, problem.data)
    assert ptif.forecast(problem, queries="the cat sat", method="grad_dot").passes > 0


def test_packed_texts_get_their_own_scores_back() -> None:
    model, words = gpt2(), tokenizer()
    training = texts(6)
    problem = ptif.hf.problem(model, words, training, packing=8, add_eos=True)
    ids = [token for text in training for token in [*words(text)["input_ids"], 1]]
    owners = [i for i, text in enumerate(training) for _ in [*words(text)["input_ids"], 1]]
    blocks = [list(range(start, min(start + 8, len(ids)))) for start in range(0, len(ids), 8)]
    asked = gradient(model, own_loss(model, words("the cat sat")["input_ids"]))
    expected = torch.zeros(len(training), dtype=torch.float64)
    for block in blocks:
        inputs = [ids[place] for place in block]
        for t in range(1, len(block)):
            labels = [-100] * len(block)
            labels[t] = inputs[t]
            slope = gradient(model, own_loss(model, inputs, labels))
            expected[owners[block[t]]] += asked @ slope / len(blocks)
    attribution = ptif.methods.grad_dot().fit(problem)
    queries = ptif.hf.query(model, words, "the", " cat sat")
    scores = ptif.hf.document_scores(attribution, queries)
    assert scores.values.shape == (1, len(training)) and len(problem) == len(blocks)
    assert gap(scores.values[0], expected) < 1e-6
    plain = ptif.methods.grad_dot().fit(ptif.hf.problem(model, words, training))
    with pytest.raises(ptif.errors.InvalidInput, match="shares out blocks of packed texts"):
        ptif.hf.document_scores(plain, queries)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(texts(5))


def test_data_that_can_only_be_iterated_are_read_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the texts that a problem holds, up to a bound; an index of more of them takes the stream itself."""
    datasets = pytest.importorskip("datasets")
    model, words, asked = llama(), tokenizer(), "who wrote this book"
    rows = datasets.Dataset.from_dict({"text": texts(5)})
    some = ptif.hf.problem(model, words, texts(5))
    expected = ptif.attribute(some, queries=asked, method="ekfac")
    for stream in (rows.to_iterable_dataset().with_format("torch"), Stream(), iter(texts(5))):
        encoded = ptif.hf.problem(model, words, stream).data.dataset
        assert [encoded.text(i) for i in range(len(encoded))] == texts(5)
    problem = ptif.hf.problem(model, words, rows.to_iterable_dataset())
    index = ptif.Index.build(problem, tmp_path / "index", "ekfac", ptif.store.Factors())
    assert gap(index.score(asked).values, expected.values) < 1e-7
    assert ptif.Index.open(tmp_path / "index", some).score(asked).train_source.dataset.text(2) == texts(5)[2]
    endless = (text for _ in range(2) for text in texts(5))
    index = ptif.Index.build(some, tmp_path / "more", "ekfac", ptif.store.Factors(), data=endless)
    index = index.append([{"text": texts(5)[0]}, {"text": texts(5)[1]}]).append([some.data.dataset[2]])
    again = torch.cat([expected.values, expected.values, expected.values[:, :3]], 1)
    assert gap(index.score(asked).values, again * 5 / 13) < 1e-7
    monkeypatch.setattr(streams_module, "MOST", 4)
    with pytest.raises(
        ptif.errors.InvalidInput, match=r"IterableDataset can only be iterated and goes on after 4 examples.*islice\("
    ):
        ptif.hf.problem(model, words, rows.to_iterable_dataset())
    assert len(ptif.hf.problem(model, words, rows.to_iterable_dataset().take(4))) == 4


def test_a_folder_of_shards_is_a_checkpoint_and_a_model(tmp_path: Any) -> None:
    """`save_pretrained` cuts large models into several safetensors files with an index."""
    words, states = tokenizer(), [llama(seed=seed, dtype=torch.float32) for seed in (1, 2)]
    for step, state in enumerate(states, 1):
        state.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size="6KB")
        words.save_pretrained(tmp_path / f"checkpoint-{step}")
        assert len(list((tmp_path / f"checkpoint-{step}").glob("model-*.safetensors"))) > 1

    def ask(model: Any, **options: Any) -> torch.Tensor:
        problem = ptif.hf.problem(model, words, texts(4), **options)
        return ptif.attribute(problem, queries="who wrote this book", method="grad_dot").values

    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    expected = (ask(states[0]) + ask(states[1])) / 2
    assert gap(ask(states[1], checkpoints=folders), expected) < 1e-5
    assert gap(ask(folders[0]), ask(states[0])) < 1e-5
    recording = ptif.Recording.open(tmp_path)
    assert recording.steps == (1, 2) and gap(ask(states[1], checkpoints=recording.checkpoints), expected) < 1e-5
