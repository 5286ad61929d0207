"""Law: the extremes of a stream do not depend on how it was cut, also among ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytorch_influence_functions.influence.topk import TopK
from pytorch_influence_functions.scores.scores import Scores


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 9), st.booleans())
def test_merged_extremes_equal_those_of_the_whole(seed: int, k: int, cut: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 30, generator=generator, dtype=torch.float64)
    if ties:
        values = values.round()
    merged = TopK(3, k)
    order = torch.randperm(30, generator=generator)
    for ids in order.split(cut):
        for queries in (torch.tensor([0, 2]), torch.tensor([1])):
            merged.add(queries, ids, values[queries][:, ids])
    kept, indices = merged.result()
    top = Scores(kept, indices=indices, n_train=30)
    whole = Scores(values)
    for q in range(3):
        assert top.helpful(q, k) == whole.helpful(q, k)
        assert top.harmful(q, k) == whole.harmful(q, k)
