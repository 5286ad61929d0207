"""Our metrics and quanda's on the same input: `make quanda`, in an environment of quanda's own.

Each line of the first table holds a quantity that both define, both values and their difference; 1 is returned where
they differ by more than the tolerance. The second table holds what the two define differently.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric
from quanda.metrics.ground_truth import LinearDatamodelingMetric
from quanda.metrics.heuristics import TopKCardinalityMetric
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pytorch_influence_functions as ptif
from peers.quanda_adaptor import CLASSES, DECAY, TOP, Pair, Setting, adaptor, network
from pytorch_influence_functions.evaluation import (
    Subsets,
    Truth,
    explanations,
    found_when_checking,
    lds,
    mislabel_auc,
    precision_at,
    retrain,
    top_overlap,
)

TOLERANCE = 1e-5
N, QUERIES, WRONG, HALVES = 200, 20, 20, 12


def fitted(data: Dataset[Any], seed: int) -> nn.Module:
    """A small network trained on all of a dataset at once."""
    torch.manual_seed(seed)
    net = network()
    x, y = (torch.stack([torch.as_tensor(data[i][k]) for i in range(len(data))]) for k in (0, 1))  # type: ignore[arg-type]
    optimiser = torch.optim.SGD(net.parameters(), lr=0.3, weight_decay=DECAY)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return net.eval()


def setting() -> Setting:
    """Three classes, a tenth of the labels wrong, a network trained on them, and its EK-FAC scores."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + QUERIES, 6, generator=generator)
    y = (x[:, :CLASSES] + 0.3 * torch.randn(N + QUERIES, CLASSES, generator=generator)).argmax(1)
    planted = torch.zeros(N, dtype=torch.bool)
    planted[torch.randperm(N, generator=generator)[:WRONG]] = True
    labels = torch.where(planted, (y[:N] + 1) % CLASSES, y[:N])
    data = TensorDataset(x[:N], labels)
    model = fitted(data, 0)
    attribution = ptif.ekfac().fit(ptif.Problem(model, ptif.CrossEntropy(), data, weight_decay=DECAY))
    return Setting(data, labels, planted, (x[N:], y[N:]), model, attribution)


def mislabelled(s: Setting) -> tuple[list[Pair], list[Pair]]:
    """The curve of wrong labels found, point by point, its beginning, and its area: ours of the ROC in other units."""
    own = s.attribution.self_influence()
    metric = {"model": s.model, "train_dataset": s.data, "mislabeling_indices": s.planted.nonzero().flatten().tolist()}
    # Places, far apart: quanda adds 1e-4 per position.
    places = own.unique(return_inverse=True)[1].double()
    theirs = MislabelingDetectionMetric(**metric, precomputed_self_influence=places).compute()
    small = MislabelingDetectionMetric(**metric, precomputed_self_influence=own / own.max() * 1e-3).compute()
    curve = torch.tensor(found_when_checking(own, s.planted, [k / N for k in range(1, N + 1)]))
    # Area under quanda's curve: the chance of ours, and what checking the wrong ones first costs at least.
    auc = mislabel_auc(own, s.planted, resamples=10).value
    below = (N - WRONG) * auc + (WRONG - 1) / 2  # examples suspected less than a wrong one, on average
    area = (below + 1 - (float(curve[0]) + 1) / 2) / N
    first = float(theirs["success_arr"][:WRONG].double().mean())
    same: list[Pair] = [
        ("wrong labels found, largest gap of the curves", 0.0, float((curve - theirs["curve"]).abs().max())),
        (f"wrong labels among the first {WRONG}", precision_at(own, s.planted, WRONG, resamples=10).value, first),
        ("area under that curve, from our AUC", area, theirs["score"]),
    ]
    apart: list[Pair] = [
        ("wrong labels: area under the ROC | under the curve found", auc, theirs["score"]),
        ("… with self-influences below 0.001, as they come", auc, small["score"]),
    ]
    return same, apart


def datamodelling(s: Setting, folder: Path) -> tuple[list[Pair], list[Pair]]:
    """Half-subset LDS on the same trained models, which quanda loads from their files."""
    files: dict[tuple[tuple[int, ...], int], str] = {}

    def recipe(data: Any, seed: int) -> nn.Module:
        net = fitted(data, seed)
        saved = files.setdefault((tuple(data.indices), seed), str(folder / f"subset-{len(files)}.pt"))
        torch.save(net.state_dict(), saved)
        return net

    subsets = Subsets.halves(N, count=HALVES)

    def truth(measure: Any, seeds: int) -> Truth:
        return retrain(recipe, subsets, seeds=seeds, train=s.data, queries=s.queries, measure=measure)

    more, loss = truth(ptif.CrossEntropy(), 3), truth(ptif.CrossEntropy(), 1)
    scores, margin = s.attribution.score(s.queries, ptif.Margin()), truth(ptif.Margin(), 1)
    kept = [row.nonzero().flatten().tolist() for row in subsets.kept]
    metric = LinearDatamodelingMetric(
        network(), s.data, m=HALVES, subset_ids=kept, subset_ckpt_filenames=[files[tuple(k), 0] for k in kept]
    )
    metric.update(explanations(scores), s.queries[1], s.queries[0])
    theirs = metric.compute()["score"]
    same: list[Pair] = [
        (f"LDS of the margin, {HALVES} halves, one seed", lds(scores, margin, resamples=10).value, theirs),
        # The margin is a function of the loss that only falls: the same ranks.
        (f"LDS of the loss, {HALVES} halves, one seed", lds(s.scores, loss, resamples=10).value, theirs),
    ]
    return same, [("LDS: mean of three seeds | one model a subset", lds(s.scores, more, resamples=10).value, theirs)]


def tops(s: Setting) -> tuple[list[Pair], list[Pair]]:
    """What the most helpful examples are: their classes, and how many two seeds share."""
    best = [[i for i, _ in s.scores.helpful(q, TOP)] for q in range(QUERIES)]
    alike = torch.stack([(s.labels[ids] == s.queries[1][q]).float().mean() for q, ids in enumerate(best)])
    classes = ClassDetectionMetric(s.model, s.data, s=TOP)
    classes.update(explanations(s.scores), s.queries[1])

    other = ptif.attribute(fitted(s.data, 1), s.data, s.queries, method=ptif.ekfac(), weight_decay=DECAY)
    overlap = top_overlap([s.scores, other], k=TOP, resamples=10).value

    def cardinality(rows: Tensor) -> float:
        metric = TopKCardinalityMetric(s.model, s.data, top_k=TOP)
        metric.update(rows)
        return float(metric.compute()["score"])

    mine, its = explanations(s.scores), explanations(other)
    # Of two rows that share a part o of their top, 1 - o / 2 are different examples.
    shared = [2 - 2 * cardinality(torch.stack([mine[q], its[q]])) for q in range(QUERIES)]
    name = f"class of the query among the {TOP} most helpful"
    same: list[Pair] = [
        (name, float(alike.mean()), classes.compute()["score"]),
        (f"top {TOP} shared by two seeds, a query at a time", overlap, sum(shared) / QUERIES),
    ]
    return same, [(f"top {TOP}: two seeds | different among all queries' tops", overlap, cardinality(mine))]


def main() -> int:
    s = setting()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found, found_apart = mislabelled(s)
        models, models_apart = datamodelling(s, folder)
        ends, ends_apart = tops(s)
        same = [*found, *models, *ends, *adaptor(s, folder)]
        apart = [*found_apart, *models_apart, *ends_apart]

    print(f"{'':<60}{'ours':>10}{'quanda':>10}{'difference':>12}")
    for title, ours, theirs in same:
        print(f"{title:<60}{ours:>10.6f}{theirs:>10.6f}{abs(ours - theirs):>12.1e}")
    print("\nDefined differently: ours | quanda's")
    for title, ours, theirs in apart:
        print(f"{title:<60}{ours:>10.6f}{theirs:>10.6f}")
    wrong = [title for title, ours, theirs in same if not abs(ours - theirs) <= TOLERANCE]
    print(f"\nMore than {TOLERANCE:g} apart: {', '.join(wrong) or 'none'}.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
