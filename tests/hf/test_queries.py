"""`ptif.hf.query`: answers as queries, generated ones too, and one answer rather than another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.influence.token_pairs import shown_token_scores
from tests.hf.tiny import gpt2, gradient, llama, own_loss, products, texts, tokenizer
from tests.interface.report_cases import Page
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def answer_loss(model: Any, words: Any, prompt: str, answer: str) -> torch.Tensor:
    given, whole = words(prompt)["input_ids"], words(prompt + answer)["input_ids"]
    return own_loss(model, whole, [-100] * len(given) + whole[len(given) :])


def test_an_answer_rather_than_another_is_the_difference_of_their_losses() -> None:
    model, words = llama(), tokenizer()
    training = [gradient(model, own_loss(model, words(text)["input_ids"])) for text in texts(5)]
    problem = ptif.hf.problem(model, words, texts(5))
    queries = ptif.hf.query(model, words, "who wrote", " this book", against=" the moon")
    asked = gradient(
        model,
        answer_loss(model, words, "who wrote", " this book") - answer_loss(model, words, "who wrote", " the moon"),
    )
    scores = ptif.attribute(problem, queries=queries, method="grad_dot")
    assert scores.values.shape == (1, 5) and scores.query_names == ["this book / the moon"]
    assert gap(scores.values.double(), products(model, [asked], training)) < 1e-6
    row = {"prompt": "who wrote", "completion": " this book", "against": " the moon"}
    assert gap(ptif.attribute(problem, queries=row, method="grad_dot").values, scores.values) < 1e-7
    top = ptif.attribute(problem, queries=queries, method="grad_dot", top=1)
    assert top.helpful(0, 1)[0][0] == scores.helpful(0, 1)[0][0] and top.shape == (1, 2)
    fitted = ptif.methods.grad_dot().fit(problem)
    assert gap(queries.contrast(fitted.score(queries)).values, scores.values) < 1e-7
    with pytest.raises(ptif.errors.InvalidInput, match="score without top="):
        queries.contrast(fitted.score(queries, top=1))
    with pytest.raises(ptif.errors.InvalidInput, match="There are 1 rows of scores and 2 queries"):
        queries.contrast(scores)
    with pytest.raises(ptif.errors.InvalidInput, match="not for a pair"):
        ptif.attribute(problem, queries=queries, verify=lambda data, seed: model)


def test_a_fitted_method_is_asked_in_texts_as_attribute_is(tmp_path: Path) -> None:
    problem = ptif.hf.problem(llama(), tokenizer(), texts(5))
    pair = {"prompt": "who wrote", "chosen": " this book", "rejected": " the moon"}
    one, other = ({"prompt": "who wrote", "completion": answer} for answer in (" this book", " the moon"))
    for method in (ptif.ekfac(), ptif.methods.grad_dot(), ptif.methods.BM25()):
        fitted = method.fit(problem)
        for queries in (
            "the moon",
            ["the moon", "who wrote"],
            *((pair, [one]) if method != ptif.methods.BM25() else ()),
        ):
            expected = ptif.attribute(problem, queries=queries, method=method)
            scores = fitted.score(queries)
            assert gap(scores.values, expected.values) < 1e-9 and scores.query_names == expected.query_names
    fitted = ptif.ekfac().fit(problem)
    assert gap(fitted.score(one, contrast=other).values, fitted.score(pair).values) < 1e-9
    assert fitted.score(["the moon", "who wrote"], aggregate="mean").shape == (1, 5)
    assert fitted.token_scores("the moon", ids=[1])
    index = ptif.Index.build(problem, tmp_path / "index", representation=ptif.store.Factors())
    assert gap(index.score(pair).values, fitted.score(pair).values) < 1e-4
    assert len(index.score(pair).query_source) == 2  # both sides, for the colours of a page
    with pytest.raises(ptif.errors.InvalidInput, match="leave contrast= out"):
        fitted.score(pair, contrast="the moon")
    with pytest.raises(ptif.errors.InvalidInput, match=r"In contrast=, .*'answer'"):
        fitted.score("the moon", contrast={"prompt": "who wrote", "answer": "x"})


def test_the_models_own_answer_is_generated_and_nothing_is_changed() -> None:
    model, words = gpt2(), tokenizer()
    model.train()
    state = torch.get_rng_state()
    queries = ptif.hf.query(model, words, ["who wrote this", "the cat sat on a mat"], max_new_tokens=5)
    assert model.training and torch.equal(state, torch.get_rng_state())
    ids = words("the cat sat on a mat")["input_ids"]
    model.eval()
    for _ in range(5):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    row = queries.texts[1]
    assert row["input_ids"].tolist() == ids[: len(row["input_ids"])]
    assert row["labels"].tolist()[:6] == [-100] * 6 and -100 not in row["labels"].tolist()[6:]


def test_of_a_chat_the_last_answer_is_asked() -> None:
    model, words = llama(), tokenizer()
    chat = [
        {"role": "user", "content": "who"},
        {"role": "assistant", "content": "the cat"},
        {"role": "user", "content": "and who"},
        {"role": "assistant", "content": "the dog"},
    ]

    def asked(queries: Any) -> str:
        labels = queries.texts[0]["labels"]
        return str(words.decode(labels[labels != -100])).strip()

    assert asked(ptif.hf.query(model, words, chat)) == "the dog <eos>"
    assert asked(ptif.hf.query(model, words, chat[:3], "moon")) == "moon <eos>"
    pair = ptif.hf.query(model, words, chat, against="moon")
    assert pair.names == ["the dog / moon"] and len(pair) == 2
    generated = ptif.hf.query(model, words, chat[:3], max_new_tokens=4)
    assert len(generated.texts[0]["labels"]) > 0
    problem = ptif.hf.problem(model, words, texts(4))
    by_call = ptif.attribute(problem, queries=chat, method="grad_dot")
    assert (
        gap(
            by_call.values, ptif.attribute(problem, queries=ptif.hf.query(model, words, chat), method="grad_dot").values
        )
        < 1e-7
    )


def test_what_is_no_question_is_refused() -> None:
    model, words = gpt2(), tokenizer()
    for message, arguments in (
        ("There is no prompt", ([],)),
        ("A prompt is of type int", ([3],)),
        ("completion= holds 1 for 2 prompts", (["the", "cat"], "sat")),
        ("No token is taught by query 0", ("the cat", "")),
    ):
        with pytest.raises(ptif.errors.InvalidInput, match=re.escape(message)):
            ptif.hf.query(model, words, *arguments)
    with pytest.raises(ptif.errors.InvalidInput, match="leaves no room for an answer within 64"):
        ptif.hf.query(model, words, " ".join(["cat"] * 64))
    with pytest.raises(ptif.errors.InvalidInput, match="cannot generate an answer; pass completion="):
        ptif.hf.query(torch.nn.Linear(1, 1), words, "the cat")


def test_token_scores_of_texts_add_up() -> None:
    model, words = llama(), tokenizer()
    fitted = ptif.methods.grad_dot().fit(ptif.hf.problem(model, words, texts(4)))
    queries = ptif.hf.query(model, words, "who wrote", " this book")
    shares = fitted.token_scores(queries, [0, 2])
    scores = fitted.score(queries)
    for i, values in shares.items():
        assert values.shape == (1, len(words(texts(4)[i])["input_ids"]))
        assert gap(values.sum(1), scores.values[:, i].double()) < 1e-6


def test_top_tokens_of_pairs_are_those_of_the_difference() -> None:
    model, words = llama(), tokenizer()
    fitted = ptif.methods.grad_dot().fit(ptif.hf.problem(model, words, texts(4)))
    queries = ptif.hf.query(model, words, "who wrote", " this book", against=" the moon")
    top, shares = fitted.top_tokens(queries, k=2), fitted.token_scores(queries, range(4))
    assert top.values.shape == (1, 4)
    best = top.helpful(0, 1)[0]
    differences = {(i, t): float(d) for i, v in shares.items() for t, d in enumerate(v[0] - v[1])}
    assert max(differences, key=lambda place: differences[place]) == (best.index, best.position)
    assert abs(differences[best.index, best.position] - best.score) < 1e-6 * abs(best.score)
    with pytest.raises(ptif.errors.InvalidInput, match="hold what they are contrasted with"):
        fitted.top_tokens(queries, contrast=queries)


def test_pages_of_pairs_colour_tokens_by_the_difference(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    model, words = llama(), tokenizer()
    problem = ptif.hf.problem(model, words, texts(4))
    fitted = ptif.methods.grad_dot().fit(problem)
    pair = {"prompt": "who wrote", "completion": " this book", "against": " the moon"}
    rows = [{"prompt": "the", "completion": " cat", "against": " dog"}, pair]
    queries = ptif.hf.query(model, words, rows)
    shares = fitted.token_scores(queries.sides[0], range(4)), fitted.token_scores(queries.sides[1], range(4))
    asked_at_once = ptif.attribute(problem, queries=rows, method="grad_dot")
    several = (fitted.score(rows), asked_at_once, queries.contrast(fitted.score(queries)))
    for scores in (*several, fitted.score(pair)):
        assert len(scores.query_source) == 2 * len(scores)
        row = len(scores) - 1
        asked = shown_token_scores(fitted, scores[row], [[0, 3]])[0]
        for i in (0, 3):
            expected = shares[0][i][1] - shares[1][i][1]
            assert gap(asked[i], expected) < 1e-9
            assert abs(float(asked[i].sum() - scores.values[row, i])) < 1e-4 * float(scores.values[row].abs().max())
    scores = fitted.score(rows)
    scores.report(tmp_path / "page.html", tokens=fitted)
    page = Page(tmp_path / "page.html")
    for q in (0, 1):
        differences = torch.stack([(shares[0][i][q] - shares[1][i][q]).abs().max() for i in range(4)])
        assert page.queries[q]["x"] == pytest.approx(float(differences.max()), rel=1e-3)
    with pytest.raises(
        ptif.errors.InvalidInput, match=r"\(one row for each of 2 measures.* score the queries one by one"
    ):
        fitted.score(rows, [None, ptif.TokenCrossEntropy(shift=True)]).report(tmp_path / "m.html", tokens=fitted)
    apart = shown_token_scores(fitted, fitted.score(queries), [[0]] * 4)  # all answers, one below the other
    assert gap(apart[3][0], shares[1][0][1]) < 1e-9
    with pytest.raises(ptif.errors.InvalidInput, match="a contrast or a difference"):
        several[2].verify(lambda data, seed: model)


def test_the_difference_of_two_cosines_is_refused_and_that_of_the_gradients_is_right() -> None:
    model, words = llama(), tokenizer()
    problem = ptif.hf.problem(model, words, texts(4))
    queries = ptif.hf.query(model, words, "who wrote", " this book", against=" the moon")
    fitted = ptif.methods.grad_cos().fit(problem)
    with pytest.raises(ptif.errors.InvalidInput, match=re.escape("attribution.score(answers, contrast=others)")):
        queries.contrast(fitted.score(queries))
    answers, others = queries.sides
    difference = answer_loss(model, words, "who wrote", " this book") - answer_loss(
        model, words, "who wrote", " the moon"
    )
    asked = gradient(model, difference)
    training = [gradient(model, own_loss(model, words(text)["input_ids"])) for text in texts(4)]
    cosines = torch.stack([torch.nn.functional.cosine_similarity(asked, g, dim=0) for g in training])[None] / 4
    assert gap(fitted.score(answers, contrast=others).values.double(), cosines) < 1e-6
    assert gap(ptif.attribute(problem, queries=queries, method="grad_cos").values.double(), cosines) < 1e-6


def test_answers_of_some_queries_only_are_refused() -> None:
    model, words = llama(), tokenizer()
    problem = ptif.hf.problem(model, words, texts(4))
    full = {"prompt": "who", "chosen": " cat", "rejected": " dog"}
    for gap_in, message in (
        ({"chosen": None}, "Query 1 has no 'completion' and query 0 has one; give one to each"),
        ({"chosen": float("nan")}, "Query 1 has no 'completion' and query 0"),
        ({"rejected": None}, "Query 1 has no 'against' and query 0 has one; give one to each, or to none and ask"),
    ):
        with pytest.raises(ptif.errors.InvalidInput, match=message):
            ptif.attribute(problem, queries=[full, full | gap_in], method="grad_dot")
    with pytest.raises(ptif.errors.InvalidInput, match="Query 0 has no 'completion' and query 1 has one"):
        ptif.hf.query(model, words, ["who", "the"], [None, " cat"])
    chat = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "cat"}]
    assert ptif.hf.query(model, words, [chat, "the"], [None, " cat"]).names == ["cat", "cat"]
    assert ptif.hf.query(model, words, ["who"], [" cat"], against=[None]).pairs == 0
