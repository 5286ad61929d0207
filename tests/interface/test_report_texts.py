"""The report page of texts token by token: what it holds, how much of it, and that nothing of it is markup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pytorch_influence_functions.core.errors import InvalidInput, NonFinite
from pytorch_influence_functions.core.token_text import TokenText, split_into_pieces
from pytorch_influence_functions.report.token_colours import token_record
from tests.interface.report_cases import ATTACK, Chats, Page, chat_tokens, chats


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("texts") / "r.html"
    chats().report(path, tokens=chat_tokens(), k=4)
    return Page(path)


def test_every_text_has_its_pieces_its_turns_and_what_is_taught(page: Page) -> None:
    data = Chats(12)
    assert page.index["tokens"] is True
    for i, record in page.examples.items():
        text = data.token_text(i)
        assert "".join(record["p"]) == "".join(text.pieces).replace("\ud800", "?")
        assert record["g"] == [[5, len(text.pieces)]]
        assert [place for place, _ in record["r"]] == [0, 4] and record["cut"] == [0, 0]
    assert [record["p"][2] for record in page.queries] == [" is0", " is1", " is2"]


def test_colours_are_shares_of_the_strongest_token_shown_for_the_query(page: Page) -> None:
    scores, tokens = chats(), chat_tokens()
    for q, record in enumerate(page.queries):
        shown = [i for side in ("help", "harm") for i, _ in record[side]]
        assert shown == [i for side in (scores.helpful(q, 4), scores.harmful(q, 4)) for i, _ in side]
        strongest = max(float(tokens[i][q].abs().max()) for i in shown)
        assert record["x"] == pytest.approx(strongest, rel=1e-3)
        for i in shown:
            expected = (tokens[i][q] * 99 / strongest).round().long().tolist()
            assert page.examples[i]["v"][str(q)] == expected
        others = set(range(12)) - set(shown)
        assert not any(str(q) in page.examples[i].get("v", {}) for i in others & set(page.examples))


def test_of_a_measure_that_should_be_high_positive_still_helps(tmp_path: Path) -> None:
    scores = replace(chats(), lower_is_better=False)
    scores.report(tmp_path / "r.html", tokens=chat_tokens(), k=4)
    record = Page(tmp_path / "r.html").examples[3]
    assert max(record["v"][next(iter(record["v"]))], key=abs) > 0


def test_sources_are_named_counted_and_summed(page: Page) -> None:
    table, scores = page.index["sources"], chats()
    assert sorted(table["names"]) == sorted(name.replace("\ud800", "?")[:80] for name in set(Chats(12).sources))
    assert table["counts"] == [4, 4, 4]
    for q, record in enumerate(page.queries):
        for at, total in record["by"]:
            own = [i for i in range(12) if page.examples[i]["f"] == at] if len(page.examples) == 12 else None
            assert own is not None
            assert total == pytest.approx(float(scores.values[q, own].double().sum()), rel=1e-3)


def test_no_text_is_markup(page: Page) -> None:
    assert "window.broken=1</script>" not in page.text and "<img src=x" not in page.text
    assert ATTACK.split("\u2028")[0] in page.queries[0]["p"][3]


def test_a_long_text_keeps_the_part_around_its_strongest_token() -> None:
    text = TokenText(tuple(f" w{t:03}" for t in range(200)), (True,) * 200, ((0, "user"), (50, "assistant")))
    values = [0] * 200
    values[150] = -99
    record = token_record(text, {"v": {0: values}}, 100)
    first, behind = record["cut"]
    assert first + len(record["p"]) + behind == 200 and len("".join(record["p"])) <= 100
    assert first <= 150 < 200 - behind and record["v"]["0"][150 - first] == -99
    assert record["r"] == [[0, "assistant"]] and record["g"] == [[0, len(record["p"])]]
    assert token_record(text, {}, 100)["cut"] == [0, 180] and "v" not in token_record(text, {}, 100)


def test_what_a_decoder_reads_stands_before_what_it_writes() -> None:
    text = TokenText(("read", " this", " write", " that"), (False, False, True, True), ((0, "reads"), (2, "writes")), 2)
    record = token_record(text, {"v": {0: [5, -7]}}, 100)
    assert record["v"] == {"0": [0, 0, 5, -7]} and record["g"] == [[2, 4]]


def test_letters_of_several_tokens_stand_at_the_last_of_them() -> None:
    class Bytes:
        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode("utf-8", "replace")

    ids = list("aé語b".encode())
    pieces = split_into_pieces(Bytes(), ids)
    assert pieces == ("a", "", "é", "", "", "語", "b") and "".join(pieces) == "aé語b"


def test_what_is_no_token_scores_is_refused(tmp_path: Path) -> None:
    path, broken = tmp_path / "r.html", chat_tokens()
    with pytest.raises(InvalidInput, match="tokens= is Tensor; pass the fitted method"):
        chats().report(path, tokens=torch.zeros(3))
    with pytest.raises(InvalidInput, match=r"of 3 queries; expected \[queries, tokens\]"):
        chats().report(path, tokens={i: row[:2] for i, row in broken.items()})
    shown = chats().helpful(0, 1)[0][0]
    broken[shown][0, 6] = float("nan")
    with pytest.raises(NonFinite, match=rf"tokens\[{shown}\] holds NaN"):
        chats().report(path, tokens=broken)
    with pytest.raises(InvalidInput, match="sources= names 2 and there are 12 training examples"):
        chats().report(path, sources=["a", "b"])
    assert not path.exists()


def test_rows_of_several_queries_have_no_tokens_of_their_own(tmp_path: Path) -> None:
    """Of a contrast, a mean or a group the page cannot say which token of which query."""
    import pytorch_influence_functions as ptif
    from tests.laws.test_token_scores import setting

    problem, queries = setting()
    attribution = ptif.methods.grad_dot().fit(problem)
    both = attribution.score(queries, contrast=queries[::-1])
    with pytest.raises(InvalidInput, match="rows of these scores are made of several queries"):
        both.report(tmp_path / "r.html", tokens=attribution)
    with pytest.raises(InvalidInput, match="do not hold their queries"):
        attribution.score(queries, aggregate="mean").report(tmp_path / "r.html", tokens=attribution)
