"""Our methods called by quanda's own code through `quanda_explainer`, against our scores passed directly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset as Texts
from quanda.benchmarks.downstream_eval import ClassDetection
from quanda.explainers.global_ranking import SelfInfluenceRanking
from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric
from quanda.metrics.heuristics import ModelRandomizationMetric
from quanda.utils.common import get_load_state_dict_func
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import explanations, found_when_checking, quanda_explainer
from pytorch_influence_functions.evaluation.correlate import plain, spearman

CLASSES, DECAY, TOP = 3, 0.01, 5
Pair: TypeAlias = tuple[str, float, float]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


@dataclass(frozen=True)
class Setting:
    """A model with its data, some of whose labels are wrong, queries, and our method fitted."""

    data: TensorDataset
    labels: Tensor
    planted: Tensor
    queries: tuple[Tensor, Tensor]
    model: nn.Module
    attribution: Any

    @property
    def scores(self) -> ptif.Scores:
        scores: ptif.Scores = self.attribution.score(self.queries)
        return scores


def adaptor(s: Setting, folder: Path) -> list[Pair]:
    """The same numbers through quanda's metrics and benchmarks, from a checkpoint, as from our scores."""
    saved, explainer = (
        str(folder / "model.pt"),
        quanda_explainer(ptif.ekfac(), nn.CrossEntropyLoss(), weight_decay=DECAY),
    )
    torch.save(s.model.state_dict(), saved)
    given = {"model": network(), "train_dataset": s.data, "checkpoints": saved}
    through = explainer(**given).explain(*s.queries)

    wrong = MislabelingDetectionMetric(
        mislabeling_indices=s.planted.nonzero().flatten().tolist(), explainer_cls=explainer, **given
    ).compute()
    n = len(s.data)
    curve = torch.tensor(
        found_when_checking(s.attribution.self_influence(), s.planted, [k / n for k in range(1, n + 1)])
    )

    classes = ClassDetectionMetric(s.model, s.data, s=TOP)
    classes.update(explanations(s.scores), s.queries[1])
    load = get_load_state_dict_func("cpu")
    benchmark = ClassDetection(network(), s.data, TensorDataset(*s.queries), [saved], load, s=TOP)

    random = ModelRandomizationMetric(
        model_id="small", cache_dir=str(folder), explainer_cls=explainer, **{**given, "checkpoints": [saved]}
    )
    random.update(explanations(s.scores), *s.queries)
    untrained = ptif.attribute(random.rand_model, s.data, s.queries, method=ptif.ekfac(), weight_decay=DECAY)
    alike = float(plain(spearman, s.scores.values, untrained.values).mean())
    return [
        ("our explainer: largest gap of scores", 0.0, float((through - s.scores.values).abs().max())),
        ("our explainer: largest gap of the curves found", 0.0, float((curve - wrong["curve"]).abs().max())),
        (
            "our explainer: class detection, quanda's benchmark",
            classes.compute()["score"],
            benchmark.evaluate(explainer, batch_size=8)["score"],
        ),
        ("our explainer: rank correlation with a random model", alike, random.compute()["score"]),
        well_fitted(),
        texts(folder),
    ]


def well_fitted() -> Pair:
    """Self-influences over many orders of magnitude keep their order; of equal ones quanda takes the later first."""
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    y, model = (x[:, 0] > 0).long(), nn.Linear(5, 2)
    optimiser = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    made = quanda_explainer(ptif.exact(), nn.CrossEntropyLoss(), weight_decay=1e-4)(model, TensorDataset(x, y))
    own = made.fitted.self_influence().tolist()
    expected = sorted(range(200), key=lambda i: (-own[i], -i))
    found = SelfInfluenceRanking(explainer=made).get_global_rank().tolist()
    in_place = sum(a == b for a, b in zip(expected, found, strict=True)) / 200
    return "our explainer: in place by self-influence, well fitted", 1.0, in_place


class Words(nn.Module):
    """A mean of word vectors, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(30, 6), nn.Linear(6, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.out((self.table(input_ids) * attention_mask[..., None]).mean(1))
        return found


def texts(folder: Path) -> Pair:
    """Text classification, where quanda asks with a mapping that lacks the labels."""
    torch.manual_seed(0)
    ids = torch.randint(30, (90, 5))
    labels = (ids[:, 0] > 14).long()

    def some(part: slice) -> Texts:
        columns = {"input_ids": ids[part], "attention_mask": torch.ones_like(ids[part]), "labels": labels[part]}
        return Texts.from_dict({k: v.tolist() for k, v in columns.items()}).with_format("torch")

    train, asked, model = some(slice(0, 70)), some(slice(70, 90)), Words()
    saved = str(folder / "words.pt")
    torch.save(model.state_dict(), saved)
    scores = ptif.attribute(model, train, asked, method=ptif.ekfac(), weight_decay=DECAY)
    best = [[i for i, _ in scores.helpful(q, TOP)] for q in range(20)]
    alike = torch.stack([(labels[ids] == labels[70 + q]).float().mean() for q, ids in enumerate(best)])
    explainer = quanda_explainer(ptif.ekfac(), nn.CrossEntropyLoss(), weight_decay=DECAY)
    benchmark = ClassDetection(Words(), train, asked, [saved], get_load_state_dict_func("cpu"), s=TOP)
    found = benchmark.evaluate(explainer, {"task": "text_classification"}, batch_size=8)["score"]
    return "our explainer: class detection of texts, their benchmark", float(alike.mean()), found
