"""Ground truth in dattri's layout, and our scores as other libraries' metrics take them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions import Scores
from pytorch_influence_functions.core.errors import InvalidInput, MissingExtra
from pytorch_influence_functions.evaluation import explanations, from_dattri, lds, quanda_explainer, removal_correlation


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 20, generator=generator)
    kept = torch.stack([torch.randperm(20, generator=generator)[:10] for _ in range(30)])
    noise = torch.randn(30, 4, generator=generator)
    return scores, kept, -torch.stack([scores[:, k].sum(1) for k in kept]) + noise


def test_lds_is_dattris_formula_with_the_sign_of_a_loss() -> None:
    """dattri: Spearman, over subsets, of the sum of scores of what is kept with the value; per query, then the mean."""
    scores, kept, values = drawn()
    truth = from_dattri((values, kept), n=20)
    theirs = [stats.spearmanr([float(scores[q, k].sum()) for k in kept], values[:, q]).statistic for q in range(4)]
    assert lds(scores, truth, resamples=10).value == pytest.approx(-float(np.mean(theirs)), abs=1e-12)
    assert lds(scores, truth, resamples=10).value > 0.5


def test_leave_one_out_layout() -> None:
    scores, _, _ = drawn()
    out = torch.arange(20)[:, None]
    truth = from_dattri((scores.T + 1.0, out), n=20, removed=True, baseline=torch.ones(4))
    assert truth.protocol.value == "leave-one-out"
    assert removal_correlation(scores, truth, resamples=10).value == pytest.approx(1.0)
    assert torch.allclose(truth.changes()[:, 0].T, scores.double(), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_dattri((torch.ones(3, 2), torch.ones(4, 2, dtype=torch.long)), 5), "do not fit"),
        (lambda: from_dattri((torch.ones(3, 2), torch.full((3, 2), 9)), 5), "outside the 5 training examples"),
        (lambda: explanations(Scores(torch.ones(2, 5)).top(1)), "metrics need all"),
    ],
)
def test_bad_input_in_one_sentence(call: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        call()


def test_exports_are_positive_for_proponents_whatever_was_measured() -> None:
    """Of two classes, the loss falls exactly where the margin rises: d loss = -sigmoid(-margin) d margin."""
    x, y = torch.randn(40, 3).double(), torch.arange(40) % 2
    model, queries = nn.Linear(3, 2).double(), (torch.randn(6, 3).double(), torch.arange(6) % 2)
    fitted = ptif.exact(damping=0.01).fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y)))
    of_loss, of_margin = fitted.score(queries), fitted.score(queries, ptif.Margin())
    assert of_loss.lower_is_better and not of_margin.lower_is_better
    outputs = model(queries[0]).detach()
    margins = (outputs[:, 0] - outputs[:, 1]) * (1 - 2 * queries[1])
    exported = explanations(of_margin) * torch.sigmoid(-margins)[:, None]
    torch.testing.assert_close(exported, explanations(of_loss))
    torch.testing.assert_close(explanations(of_loss), of_loss.values)
    for q in range(6):
        assert int(explanations(of_margin)[q].argmax()) == of_margin.helpful(q, 1)[0][0] == of_loss.helpful(q, 1)[0][0]


class Explainer:
    """What quanda's own does with these arguments; the real one is asked by `make quanda`."""

    def __init__(self, model: Any, train_dataset: Any, task: Any, checkpoints: Any, load: Any) -> None:
        self.model, self.train_dataset = model, train_dataset

    def load_last_checkpoint(self) -> None:
        pass


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("quanda"), ModuleType("quanda.explainers")
    module.Explainer = Explainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quanda", package)
    monkeypatch.setitem(sys.modules, "quanda.explainers", module)


def test_the_explainer_scores_targets_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    model = nn.Linear(4, 3)
    made = quanda_explainer(ptif.exact(), nn.CrossEntropyLoss(), weight_decay=0.01)
    explainer = made(model=model, train_dataset=torch.utils.data.TensorDataset(x, y))
    other = (y[:5] + 1) % 3
    expected = ptif.attribute(model, (x, y), (x[:5], other), method=ptif.exact(), weight_decay=0.01)
    assert torch.allclose(explainer.explain(x[:5], other), expected.values)


def test_self_influences_keep_their_order_where_quanda_adds_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over thirty orders of magnitude, as where most examples are fitted well; ties fall as quanda lets them."""
    stand_in(monkeypatch)
    x, y = torch.randn(300, 4), torch.arange(300) % 3
    made = quanda_explainer(ptif.exact(), nn.CrossEntropyLoss(), weight_decay=0.01)
    explainer = made(model=nn.Linear(4, 3), train_dataset=torch.utils.data.TensorDataset(x, y))
    own = torch.logspace(-30, 0, 300, dtype=torch.float64)[torch.randperm(300)]
    own[7] = own[3]
    monkeypatch.setattr(type(explainer.fitted), "self_influence", lambda self: own)
    added = explainer.self_influence(8) + torch.arange(300) * 1e-4  # quanda's SelfInfluenceRanking
    ranked = added.argsort(descending=True, stable=True)
    expected = sorted(range(300), key=lambda i: (-float(own[i]), -i))
    assert ranked.tolist() == expected


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out((self.table(input_ids) * attention_mask[..., None]).sum(1))
        return result


def test_the_explainer_takes_text_as_a_mapping_without_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    texts = {"input_ids": torch.randint(9, (40, 3)), "attention_mask": torch.ones(40, 3, dtype=torch.long)}
    labels, model = texts["input_ids"][:, 0] % 2, Words()
    train = [{**{k: v[i] for k, v in texts.items()}, "labels": labels[i]} for i in range(40)]
    made = quanda_explainer(ptif.ekfac(), nn.CrossEntropyLoss(), weight_decay=0.01)
    explainer = made(model=model, train_dataset=train, task="text_classification")
    some = {k: v[:5] for k, v in texts.items()}
    expected = ptif.attribute(model, train, {**some, "labels": 1 - labels[:5]}, method=ptif.ekfac(), weight_decay=0.01)
    assert torch.allclose(explainer.explain(some, (1 - labels[:5]).tolist()), expected.values)


def test_without_quanda_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quanda.explainers", None)
    with pytest.raises(MissingExtra, match=r"pytorch-influence-functions\[quanda\]"):
        quanda_explainer(ptif.exact(), nn.CrossEntropyLoss())
