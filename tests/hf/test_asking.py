"""What is taught and asked of rows, blanks and ends of texts: as written, as trained, or refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from tests.hf.tiny import build, gradient, llama, own_loss, products, settings, texts, tokenizer
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = [("who wrote", " this book"), ("the cat", " sat on a mat"), ("moon", " rose over")]
CHAT = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "the cat"}]


def ends_texts() -> Any:
    """A tokenizer that puts the end token behind every text by itself, as that of T5."""
    words = tokenizer()
    tokenizers = pytest.importorskip("tokenizers")
    words.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return words


def labels_of(queries: Any) -> list[list[int]]:
    return [[label for label in item["labels"].tolist() if label != -100] for item in queries.dataset]


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_masks_of_token_numbers_say_what_is_taught(mask: str) -> None:
    """Against the gradients of the model's own loss, with the labels that the masks mean."""
    model, words = llama(), tokenizer()
    sides = [[words(text)["input_ids"] for text in pair] for pair in PAIRS]
    rows = [{"input_ids": a + b, mask: [0] * len(a) + [1] * len(b)} for a, b in sides]
    own = [gradient(model, own_loss(model, a + b, [-100] * len(a) + b)) for a, b in sides]
    problem = ptif.hf.problem(model, words, rows)
    scores = ptif.attribute(problem, queries=rows[:2], method="grad_dot")
    assert gap(scores.values.double(), products(model, own[:2], own)) < 1e-6
    whole = [gradient(model, own_loss(model, a + b)) for a, b in sides]
    everything = ptif.hf.problem(model, words, rows, completion_only=False)
    scores = ptif.attribute(everything, queries=rows[:2], method="grad_dot")
    assert gap(scores.values.double(), products(model, whole[:2], whole)) < 1e-6
    labelled = [row | {"labels": [-100, *row["input_ids"][1:]]} for row in rows]
    assert labels_of(ptif.hf.problem(model, words, labelled).data) == [b for _, b in sides]
    with pytest.raises(ptif.errors.InvalidInput, match=f"Example 1 has 6 token numbers and 1 under '{mask}'"):
        ptif.hf.problem(model, words, [rows[0], rows[1] | {mask: [1]}])


def test_rows_are_read_alike_by_query_and_attribute() -> None:
    datasets = pytest.importorskip("datasets")
    model, words = llama(), tokenizer()
    problem = ptif.hf.problem(model, words, texts(4))
    row = {"prompt": "who wrote", "completion": " this book"}
    by_hand = ptif.hf.query(model, words, "who wrote", " this book")
    for rows in (row, [row], datasets.Dataset.from_list([row]), {"prompt": "who wrote", "chosen": " this book"}):
        assert labels_of(ptif.hf.query(model, words, rows)) == labels_of(by_hand)
    for rows in (
        row | {"against": " the moon"},
        {"text": "the cat sat"},
        [{"messages": CHAT}],
        CHAT[0],
        {"prompt": "a"},
    ):
        queries = ptif.hf.query(model, words, rows)
        direct = ptif.attribute(problem, queries=rows, method="grad_dot")
        through = ptif.attribute(problem, queries=queries, method="grad_dot")
        assert gap(direct.values, through.values) < 1e-9 and direct.query_names == through.query_names
    assert labels_of(ptif.hf.query(model, words, {"text": "the cat sat"})) == [words("the cat sat")["input_ids"]]
    assert labels_of(ptif.hf.query(model, words, {"messages": CHAT})) == [words("the cat <eos>")["input_ids"]]


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ({"body": "x"}, {}, "columns 'body'; give 'prompt' with 'completion', 'text' or 'messages'"),
        (
            {"prompt": "x"},
            {"completion": "y"},
            "rows, which hold their answers, beside completion=; put it into the rows",
        ),
        ([{"text": "a cat"}, {"body": "x"}], {}, "Query 1 has nothing under 'text' and query 0 has"),
        (
            [{"prompt": "x"}, "a cat"],
            {},
            "Query 1 is a text and query 0 is a row with columns; ask texts, chats and rows",
        ),
        (["a cat", {"prompt": "x"}], {}, "Query 1 is a row with columns and query 0 is a text"),
        ({"prompt": "x"}, {"tools": [{}]}, "tools= is told to a chat template, and a prompt is a text"),
        ("", {}, "Query 0 cannot be read: A prompt holds no token, .* pass completion="),
        ("a cat", {"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        (3, {}, "The prompt is of type int; give a text, a chat, or a list"),
    ],
)
def test_what_a_query_cannot_read_is_refused(prompt: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ptif.errors.InvalidInput, match=sentence):
        ptif.hf.query(llama(), tokenizer(), prompt, **options)


def test_a_mixture_is_refused_where_a_problem_is_asked_and_a_tokenizer_is_no_model() -> None:
    model, words = llama(), tokenizer()
    for mixed in ([{"prompt": "who", "completion": " cat"}, "a cat"], [CHAT, "a cat"]):
        with pytest.raises(
            ptif.errors.InvalidInput, match=r"Query 1 is a text and query 0 is a .* or write all as rows"
        ):
            ptif.attribute(ptif.hf.problem(model, words, texts(3)), queries=mixed)
    with pytest.raises(
        ptif.errors.InvalidInput, match=r"The model is of type .*; write ptif.hf.query\(model, tokenizer"
    ):
        ptif.hf.query(words, model, "a cat")


def test_a_folder_is_asked(tmp_path: Any) -> None:
    model, words = llama(dtype=torch.float32), tokenizer()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    asked = ptif.hf.query(tmp_path, prompt="who wrote", max_new_tokens=2)
    assert labels_of(asked) == labels_of(ptif.hf.query(model, words, "who wrote", max_new_tokens=2))
    checkup = ptif.hf.doctor(str(tmp_path), None, texts(2))
    assert checkup.dtype == "float32"


def blanked() -> tuple[Any, Any, list[dict[str, list[int]]]]:
    model, words = build("BertForMaskedLM", transformers.BertConfig(**settings())), tokenizer()
    words.mask_token = "<unk>"
    rows = [{"input_ids": words(text)["input_ids"]} for text in texts(4)]
    for row in rows:
        row["labels"] = [row["input_ids"][0], *[-100] * (len(row["input_ids"]) - 1)]
        row["input_ids"] = [2, *row["input_ids"][1:]]
    return model, words, rows


def test_blanks_are_asked_about_by_what_stands_there() -> None:
    """Against the model's own loss at the blanks, the rest of the text read and not taught."""
    model, words, rows = blanked()

    def loss(ids: list[int], labels: list[int]) -> Tensor:
        taught = torch.tensor([labels])
        mean: Tensor = model(input_ids=torch.tensor([ids]), labels=taught).loss
        return mean * (taught != -100).sum()

    ids = words("who <unk> this <unk>")["input_ids"]
    wrote, book, cat = words("wrote book cat")["input_ids"]
    own = [gradient(model, loss(row["input_ids"], row["labels"])) for row in rows]
    asked = gradient(model, loss(ids, [-100, wrote, -100, book]))
    other = gradient(model, loss(ids, [-100, wrote, -100, cat]))
    problem = ptif.hf.problem(model, words, rows)
    row = {"prompt": "who <unk> this <unk>", "completion": "wrote book"}
    scores = ptif.attribute(problem, queries=row, method="grad_dot")
    assert gap(scores.values.double(), products(model, [asked], own)) < 1e-6
    pair = ptif.attribute(problem, queries=row | {"against": "wrote cat"}, method="grad_dot")
    assert gap(pair.values.double(), products(model, [asked - other], own)) < 1e-6
    by_call = ptif.hf.query(model, words, "who <unk> this <unk>", "wrote book")
    assert labels_of(by_call) == [[wrote, book]]


def test_texts_are_refused_by_models_that_say_nothing_about_them() -> None:
    model, words, rows = blanked()
    problem = ptif.hf.problem(model, words, rows)
    alone = r"fills in blanks, so a text alone asks nothing; give \{'prompt': a text with <unk>, 'completion'"
    for query, sentence in (
        ("who <unk> book", alone),
        ({"text": "who <unk> book"}, alone),
        ([CHAT], alone),
        ({"prompt": "who <unk>"}, alone),
        ({"prompt": "who", "completion": "cat"}, "the prompt 'who' has none; write <unk> where the answer stands"),
        ({"prompt": "who <unk>", "completion": "the cat"}, "blanks in the prompt is 1 and that of tokens .* is 2"),
    ):
        for ask in (lambda q: ptif.attribute(problem, queries=q), lambda q: ptif.hf.query(model, words, q)):
            with pytest.raises(ptif.errors.InvalidInput, match=sentence):
                ask(query)
    names = build("BertForTokenClassification", transformers.BertConfig(**settings(num_labels=41)))
    classes = [{"input_ids": row["input_ids"], "labels": [i % 3 for i in range(len(row["input_ids"]))]} for row in rows]
    tagged = ptif.hf.problem(names, words, classes)
    for query in ("the cat", {"prompt": "the", "completion": " cat"}, {"text": "the cat"}):
        for ask in (lambda q: ptif.attribute(tagged, queries=q), lambda q: ptif.hf.query(names, words, q)):
            with pytest.raises(
                ptif.errors.InvalidInput, match=r"gives every token a class, .* rows with input_ids and labels"
            ):
                ask(query)
    assert ptif.attribute(tagged, queries=classes[:1], method="grad_dot").shape == (1, 4)
    named = ptif.hf.problem(model, words, [{"body": text} for text in texts(4)], text_column="body")
    assert ptif.attribute(named, queries=rows[:1], method="grad_dot").shape == (1, 4)  # as the sentence advises


def test_a_text_ends_once() -> None:
    model, completions = llama(), [{"prompt": a, "completion": b} for a, b in PAIRS]
    for words in (tokenizer(), ends_texts()):
        cat = words("cat", add_special_tokens=False)["input_ids"]
        for add_eos, count in ((True, 1), (False, 0), (None, 0 if words("cat")["input_ids"] == cat else 1)):
            problem = ptif.hf.problem(model, words, [*texts(3), "the cat <eos>"], add_eos=add_eos)
            ends = [row["input_ids"].tolist().count(1) for row in problem.data.dataset]
            assert ends[:3] == [count] * 3 and (add_eos is None or ends[3] == 1)
            whole = ptif.hf.problem(model, words, completions, add_eos=add_eos).data
            assert [labels.count(1) for labels in labels_of(whole)] == [0 if add_eos is False else 1] * 3
            written = ptif.hf.query(model, words, "the", " cat <eos>", add_eos=bool(add_eos))
            assert labels_of(written) == [[*cat, 1]]
        assert labels_of(ptif.hf.query(model, words, "who <eos>", " cat")) == [cat]


def test_what_an_encoder_decoder_writes_ends_as_it_was_taught() -> None:
    sizes = {"vocab_size": 41, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model = build("T5ForConditionalGeneration", config)
    rows = [{"read": a, "write": b} for a, b in PAIRS]
    question = {"prompt": "who wrote", "completion": " this book"}
    for words in (tokenizer(), ends_texts()):
        book = words("this book", add_special_tokens=False)["input_ids"]
        for add_eos, end in ((None, [1]), (True, [1]), (False, [])):
            problem = ptif.hf.problem(
                model, words, rows, prompt_column="read", completion_column="write", add_eos=add_eos
            )
            ask: Any = problem.data.ask
            for data in (problem.data, ask(problem, question), ask(problem, rows[:1])):
                assert labels_of(data)[0] == book + end
            assert labels_of(ptif.hf.query(model, words, "who wrote", " this book", add_eos=add_eos)) == [book + end]


def test_a_row_in_the_form_of_the_training_data_ends_as_they_do() -> None:
    model, words = llama(), tokenizer()
    rows = [{"prompt": a, "completion": b} for a, b in PAIRS]
    book = words("this book")["input_ids"]
    for add_eos, end in ((None, [1]), (False, [])):
        problem = ptif.hf.problem(model, words, rows, add_eos=add_eos)
        ask: Any = problem.data.ask
        assert labels_of(ask(problem, rows[:1])) == labels_of(problem.data)[:1] == [book + end]
        assert labels_of(ask(problem, rows[0] | {"against": " the moon"}))[0] == book
    other = ptif.hf.problem(model, words, [{"ask": a, "say": b} for a, b in PAIRS],
                            prompt_column="ask", completion_column="say")  # fmt: skip
    ask = other.data.ask
    assert labels_of(ask(other, rows[0])) == [book]
    problem = ptif.hf.problem(model, words, rows)
    generated = ptif.attribute(problem, queries={"prompt": "who wrote", "completion": None}, method="grad_dot")
    assert generated.shape == (1, 3)
