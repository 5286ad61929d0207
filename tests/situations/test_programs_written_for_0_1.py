"""Lines that stand in programs written for the 0.1 releases and their last commit."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import pytorch_influence_functions as ptif
from pytorch_influence_functions.classic import InfluenceResult
from pytorch_influence_functions.core.errors import InvalidInput
from tests.interface.classic_cases import quick, toy


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> InfluenceResult:
    t = toy(n=20, tests=6)
    config = quick(tmp_path_factory.mktemp("run"), test_sample_num=1, recursion_depth=30)
    return ptif.calc_img_wise(config, t.model, t.train, t.test)


def test_the_readme_unpacks_three_values(result: InfluenceResult) -> None:
    influences, harmful, helpful = result
    assert type(influences) is dict and sorted(harmful) == sorted(helpful) == list(range(20))
    (influences, *rest) = result
    assert rest == [harmful, helpful]
    for influences, harmful, helpful in [result]:
        assert influences == dict(result) and harmful == result.harmful and helpful == result.helpful


def test_the_last_commit_loops_over_a_dictionary(result: InfluenceResult) -> None:
    rows = []
    for i in result:
        rows.append(result[i]["influence"])
    assert len(rows) == len(result) == 3 and rows == result.scores.values.tolist()
    assert list(result) == [*result] == [i for i in result] == list(result.keys())
    assert set(result) == set(result.influences)
    assert {**result} == dict(result) == result.influences


def test_the_result_is_written_by_json(result: InfluenceResult, tmp_path: Path) -> None:
    assert isinstance(result, dict)
    for indent in (None, 2):
        assert json.loads(json.dumps(result, indent=indent)) == result.influences
    with open(tmp_path / "mine.json", "w") as file:
        json.dump(result, file)
    assert InfluenceResult.load(tmp_path / "mine.json").harmful == result.harmful


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_stay_results(result: InfluenceResult, again: Any) -> None:
    other = again(result)
    assert type(other) is InfluenceResult and other == result and other.harmful == result.harmful
    assert other.scores.values.equal(result.scores.values)


def test_a_start_behind_the_end_is_refused_under_the_name_that_was_used(tmp_path: Path) -> None:
    t = toy(n=20, tests=6)
    with pytest.raises(InvalidInput, match=r"^test_start_index=99 lies behind the end"):
        ptif.calc_img_wise({"outdir": str(tmp_path), "test_start_index": 99}, t.model, t.train, t.test)
