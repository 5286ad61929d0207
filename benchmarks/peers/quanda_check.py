"""Our metrics and quanda's on the same input: `make quanda`, in an environment of quanda's own.

Each line holds a quantity that both define, both values and their difference; 1 is returned where they differ by more
than the tolerance.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric
from quanda.metrics.ground_truth import LinearDatamodelingMetric
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import (
    Subsets,
    explanations,
    found_when_checking,
    lds,
    mislabel_auc,
    quanda_explainer,
    retrain,
)

TOLERANCE = 1e-5
N, QUERIES, CLASSES, DECAY = 200, 20, 3, 0.01
Pair = tuple[str, float, float]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def fitted(data: Dataset[Any], seed: int) -> nn.Module:
    """A small network trained on all of a dataset at once."""
    torch.manual_seed(seed)
    net = network()
    x, y = (torch.stack([torch.as_tensor(data[i][k]) for i in range(len(data))]) for k in (0, 1))  # type: ignore[arg-type]
    optimiser = torch.optim.SGD(net.parameters(), lr=0.3, weight_decay=DECAY)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval()


def mislabelled(own: Tensor, planted: Tensor, model: nn.Module, data: Dataset[Any]) -> list[Pair]:
    """The detection curve, point by point, and its area, which is ours of the ROC curve in other units."""
    # Far apart: quanda breaks ties by adding 1e-4 per position.
    far = own.double() / own.abs().max() * 1e4 * N
    theirs = MislabelingDetectionMetric(
        model, data, planted.nonzero().flatten().tolist(), precomputed_self_influence=far
    ).compute()
    curve = torch.tensor(found_when_checking(own, planted, [k / N for k in range(1, N + 1)]))
    wrong = int(planted.sum())
    # Area under quanda's curve: the chance of ours, and what checking the wrong ones first costs at least.
    auc = mislabel_auc(own, planted, resamples=10).value
    below = (N - wrong) * auc + (wrong - 1) / 2  # examples suspected less than a wrong one, on average
    area = (below + 1 - (float(curve[0]) + 1) / 2) / N
    return [
        ("wrong labels found, largest gap of the curves", 0.0, float((curve - theirs["curve"]).abs().max())),
        ("area under that curve, from our AUC", area, theirs["score"]),
    ]


def datamodelling(x: Tensor, y: Tensor, queries: tuple[Tensor, Tensor], scores: ptif.Scores) -> Pair:
    """Half-subset LDS of the margin, one seed, on the same trained models."""
    models: list[nn.Module] = []

    def recipe(data: Dataset[Any], seed: int) -> nn.Module:
        models.append(fitted(data, seed))
        return models[-1]

    subsets = Subsets.halves(N, count=12)
    data = TensorDataset(x, y)
    truth = retrain(recipe, subsets, seeds=1, train=data, queries=queries, measure=ptif.Margin())
    kept = [row.nonzero().flatten().tolist() for row in subsets.kept]
    # Which of the trained models is whose: the one trained on everything may come first or last.
    measured = [ptif.Margin().losses(m(queries[0]), queries) for m in models]
    order = [min(range(len(models)), key=lambda k: float((measured[k] - row[0]).abs().max())) for row in truth.measured]
    theirs = LinearDatamodelingMetric(
        models[0], data, m=len(kept), subset_ids=kept, subset_ckpt_filenames=[""] * len(kept), cache_dir="."
    )
    logits = {s: models[k](queries[0]).detach() for s, k in enumerate(order)}
    theirs.update(explanations(scores), queries[1], queries[0], subset_logits=logits)
    return "LDS of the margin, 12 halves", lds(scores, truth, resamples=10).value, theirs.compute()["score"]


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + QUERIES, 6, generator=generator)
    y = (x[:, :CLASSES] + 0.3 * torch.randn(N + QUERIES, CLASSES, generator=generator)).argmax(1)
    queries = (x[N:], y[N:])
    planted = torch.zeros(N, dtype=torch.bool)
    planted[torch.randperm(N, generator=generator)[:20]] = True
    labels = torch.where(planted, (y[:N] + 1) % CLASSES, y[:N])
    data = TensorDataset(x[:N], labels)
    model = fitted(data, 0)
    attribution = ptif.ekfac().fit(ptif.Problem(model, ptif.CrossEntropy(), data, weight_decay=DECAY))
    scores, own = attribution.score(queries), attribution.self_scores()
    pairs = mislabelled(own, planted, model, data)
    pairs.append(datamodelling(x[:N], labels, queries, attribution.score(queries, ptif.Margin())))

    top = [[i for i, _ in scores.helpful(q, 5)] for q in range(QUERIES)]
    same = torch.stack([(labels[ids] == queries[1][q]).float().mean() for q, ids in enumerate(top)])
    classes = ClassDetectionMetric(model, data, s=5)
    classes.update(explanations(scores), queries[1])
    pairs.append(("class detection, the five most helpful", float(same.mean()), classes.compute()["score"]))

    # The adaptor, as quanda's own code calls it: from a checkpoint, with targets of its own.
    explainer = quanda_explainer(ptif.ekfac(), nn.CrossEntropyLoss(), weight_decay=DECAY)
    with tempfile.TemporaryDirectory() as folder:
        saved = str(Path(folder) / "model.pt")
        torch.save(model.state_dict(), saved)
        given = {"model": network(), "train_dataset": data, "checkpoints": saved}
        through = explainer(**given).explain(queries[0], queries[1])
        metric = MislabelingDetectionMetric(
            mislabeling_indices=planted.nonzero().flatten().tolist(), explainer_cls=explainer, **given
        )
        area = metric.compute()["score"]
    pairs.append(("our explainer in quanda, largest gap of scores", 0.0, float((through - scores.values).abs().max())))
    pairs.append(("our explainer in quanda, area of wrong labels", pairs[1][1], area))

    print(f"{'':<50}{'ours':>12}{'quanda':>12}{'difference':>12}")
    for name, ours, theirs in pairs:
        print(f"{name:<50}{ours:>12.6f}{theirs:>12.6f}{abs(ours - theirs):>12.1e}")
    return int(any(not abs(ours - theirs) <= TOLERANCE for _, ours, theirs in pairs))


if __name__ == "__main__":
    sys.exit(main())
