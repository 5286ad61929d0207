"""The report on predicted numbers: names, units, raw values, errors; what the model says of a training example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.report.ranking import Classes
from pytorch_influence_functions.report.target import Target
from pytorch_influence_functions.scores.scores import Scores
from tests.interface.report_cases import CLASSES, Page, pictures, probabilities, values

MEAN, STD = 200.0, 50.0


def regression(columns: int = 7, **options: Any) -> Scores:
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(40, columns, generator=g), torch.randn(40, generator=g)
    given: dict[str, Any] = {"train_labels": y, "query_labels": y[:6], "class_names": None,
                             "train_source": (x, y), "query_source": (x[:6], y[:6])}  # fmt: skip
    return pictures(**(given | options))


def written(scores: Scores, tmp_path: Path, **options: Any) -> Page:
    return Page(scores.report(tmp_path / "r.html", **options).path)


def test_values_have_their_name_their_unit_and_are_raw(tmp_path: Path) -> None:
    s = regression()
    page = written(s, tmp_path, target="price [$]", denormalize_target=(MEAN, STD), predictions=torch.zeros(6, 1))
    assert (page.index["numeric"], page.index["target"], page.index["unit"]) == (True, "price [$]", "$")
    raw = s.query_labels.double() * STD + MEAN
    assert page.index["queries"]["label"] == [f"{v:.5g} $" for v in raw.tolist()]
    assert page.index["queries"]["said"] == ["200 $"] * 6
    assert page.index["queries"]["err"] == pytest.approx((MEAN - raw).tolist(), rel=1e-3)
    assert page.index["queries"]["sure"] == page.index["queries"]["wrong"] == [None] * 6
    first = next(iter(page.examples))
    assert page.examples[first]["l"] == f"{float(s.train_labels[first].double() * STD + MEAN):.5g} $"
    assert page.index["classes"] is None and "mean absolute" in page.words and "price [$]" in page.words
    as_function = written(s, tmp_path, target="price [$]", denormalize_target=lambda v: v * STD + MEAN)
    assert as_function.index["queries"]["label"] == page.index["queries"]["label"]


def test_a_row_has_all_its_columns_in_raw_values(tmp_path: Path) -> None:
    s = regression(75)
    mean, std = np.arange(75.0), np.full(75, 3.0)
    names = [f"c{i} [m]" for i in range(75)]
    page = written(s, tmp_path, denormalize=(mean, std), columns=names)
    record = page.queries[2]
    assert len(record["t"]) == 75 and record["m"] == 0
    raw = s.query_source[0][2].double().numpy() * std + mean
    assert [name for name, _ in record["t"]] == names
    assert [float(v) for _, v in record["t"]] == pytest.approx(raw.tolist(), rel=1e-4)
    x = s.train_source[0].double()
    z = ((s.query_source[0][2].double() - x.mean(0)) / x.std(0)).abs()
    assert record["u"][0] == int(z.argmax()) and len(record["u"]) == 4


def test_numbers_are_not_told_to_be_probabilities(tmp_path: Path) -> None:
    s = regression()
    assert written(s, tmp_path, predictions=torch.full((6, 1), 7.5)).index["queries"]["said"] == ["7.5"] * 6
    with pytest.raises(InvalidInput, match="has 3 numbers per example and the labels are one number each"):
        written(s, tmp_path, predictions=torch.zeros(6, 3))
    with pytest.raises(InvalidInput, match=r"train_predictions= has shape \(6,\) and there are 40 training examples"):
        written(s, tmp_path, train_predictions=torch.zeros(6))
    with pytest.raises(InvalidInput, match="a function or \\(mean, std\\)"):
        written(s, tmp_path, denormalize_target=3.0)
    with pytest.raises(InvalidInput, match="finite number"):
        written(s, tmp_path, denormalize_target=lambda v: v * float("inf"))
    with pytest.raises(InvalidInput, match="names the predicted number"):
        written(s, tmp_path, target=3)


def test_one_probability_of_yes_or_no_is_a_class(tmp_path: Path) -> None:
    labels = (torch.arange(40) % 2).float()  # as losses of one logit want them
    s = pictures(train_labels=labels, query_labels=labels[:6], class_names=["no", "yes"])
    page = written(s, tmp_path, predictions=torch.tensor([[0.9], [0.8], [0.1], [0.2], [0.3], [0.6]]))
    assert not page.index["numeric"] and page.index["classes"]["names"] == ["no", "yes"]
    assert page.index["queries"]["said"] == ["yes", "yes", "no", "no", "no", "yes"]
    assert page.index["queries"]["wrong"] == [1, 0, 0, 1, 0, 0]


def test_the_queue_takes_large_errors_too(tmp_path: Path) -> None:
    s = regression()
    own = torch.arange(40.0)  # 39 is the most self-influential
    said = s.train_labels.clone()
    said[5], said[7] = said[5] + 9, said[7] - 10
    page = written(s, tmp_path, self_influence=own, train_predictions=said[:, None])
    assert [e["i"] for e in page.index["queue"][:4]] == [39, 7, 38, 5] and page.index["queueBy"] == "turns"
    assert page.index["queue"][1]["err"] == pytest.approx(-10, rel=1e-3)
    assert page.examples[7]["err"] == pytest.approx(-10, rel=1e-3)


def test_a_training_example_has_what_the_model_says_and_the_queries_it_moves(tmp_path: Path) -> None:
    s = pictures()
    p = torch.softmax(torch.randn(40, 3, generator=torch.Generator().manual_seed(5)), 1)
    page = written(s, tmp_path, train_predictions=p, predictions=probabilities())
    for i, record in page.examples.items():
        assert record["said"] == CLASSES[int(p[i].argmax())] and record["wrong"] == int(int(p[i].argmax()) != i % 3)
        assert record["likely"][0][1] == pytest.approx(float(p[i].max()), rel=1e-3)
        column = s.values[:, i]
        order = column.argsort(descending=True).tolist()
        helped = [q for q in order if column[q] > 0][:4]
        harmed = [q for q in order[::-1] if column[q] < 0][:4]
        assert [q for q, _ in record["help"]] == helped and [q for q, _ in record["harm"]] == harmed
        assert [v for _, v in record["harm"]] == pytest.approx(column[harmed].tolist(), rel=1e-3)


def test_queries_that_are_moved_follow_the_measure(tmp_path: Path) -> None:
    page = written(pictures(lower_is_better=False), tmp_path)
    for i, record in page.examples.items():
        assert all(v < 0 for _, v in record["help"]) and all(v > 0 for _, v in record["harm"])
        assert len(record["help"]) == min(4, int((values()[:, i] < 0).sum()))


def test_which_labels_are_numbers() -> None:
    def numeric(labels: Any) -> bool:
        s = pictures(train_labels=labels, query_labels=labels[:6], class_names=None)
        return Target.of(s, Classes.of(s)).numeric

    assert numeric(torch.randn(40)) and numeric([i + 0.5 for i in range(40)])
    assert not numeric(torch.arange(40) % 3) and not numeric(["a"] * 40)
    many = Scores(values(6, 90), train_labels=torch.arange(90), query_labels=torch.arange(6))
    assert Target.of(many, Classes.of(many)).numeric  # counts are numbers


def test_one_step_is_one_step(tmp_path: Path) -> None:
    import dataclasses

    s = pictures()
    one = dataclasses.replace(s, diagnostics=dataclasses.replace(s.diagnostics, steps=1))
    words = written(one, tmp_path).words
    assert "after 1 step" in words and "after 1 steps" not in words
