"""Only my collate function understands my batches: bags with offsets, graphs as one, lists of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.batches import Collated, map_tensors
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, TrainingDataWarning
from pytorch_influence_functions.curvature import GGN, EmpiricalFisher, Hessian
from pytorch_influence_functions.damping import Absolute
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.problem.ingredients import digest_data
from tests.oracles.autograd import gradients_of, hessian_of, influence
from tests.tolerance import gap, rounding

N, Q, C = 13, 3, 3
CE = nn.CrossEntropyLoss()
SIZES = [2, 1, 4, 3, 1, 2, 5, 2, 3, 1, 1, 4, 2]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Items(Dataset[Any]):
    """A dataset of what a function of the index gives."""

    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item = item

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


# --------------------------------------------------------------------------- bags of words


def bag(i: int) -> tuple[Tensor, int]:
    return (torch.arange(SIZES[i]) * 7 + i * 3) % 11, i % C


def join_bags(items: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    starts = torch.tensor([0, *(len(words) for words, _ in items[:-1])]).cumsum(0)
    return torch.cat([words for words, _ in items]), starts, torch.tensor([label for _, label in items])


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(11, 4), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))

    def forward(self, words: Tensor, starts: Tensor) -> Any:
        return self.head(self.words(words, starts))


# --------------------------------------------------------------------------- graphs


@dataclass
class Graphs:
    """Several graphs as one, as graph libraries batch them: an object of its own, with nodes and edges in a row."""

    nodes: Tensor
    edges: Tensor
    graph: Tensor
    count: int

    def to(self, device: Any) -> Graphs:
        return replace(self, nodes=self.nodes.to(device), edges=self.edges.to(device), graph=self.graph.to(device))


def graph(i: int) -> tuple[Tensor, Tensor, int]:
    size = SIZES[i] + 1
    ring = torch.arange(size)
    return numbers(size, 3, seed=i), torch.stack([ring, (ring + 1) % size]), i % C


def join_graphs(items: list[Any]) -> tuple[Graphs, Tensor]:
    sizes = torch.tensor([len(nodes) for nodes, _, _ in items])
    starts = sizes.cumsum(0) - sizes
    edges = torch.cat([e + start for (_, e, _), start in zip(items, starts, strict=True)], 1)
    which = torch.repeat_interleave(torch.arange(len(items)), sizes)
    joined = Graphs(torch.cat([nodes for nodes, _, _ in items]), edges, which, len(items))
    return joined, torch.tensor([label for _, _, label in items])


@dataclass
class Labelled(Graphs):
    """Graphs that hold their labels, too."""

    y: Tensor


def join_labelled(items: list[Any]) -> Labelled:
    joined, y = join_graphs(items)
    return Labelled(joined.nodes, joined.edges, joined.graph, joined.count, y)


def join_nodes(items: list[Any]) -> tuple[Graphs, Tensor]:
    """Every node has a label."""
    joined, _ = join_graphs(items)
    return joined, (joined.nodes[:, 0] > 0).long()


class Convolution(nn.Module):
    def __init__(self, per_node: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.per_node = nn.Linear(3, 4), nn.Linear(4, C), per_node

    def forward(self, graphs: Graphs) -> Any:
        h = self.first(graphs.nodes).tanh()
        h = h + torch.zeros_like(h).index_add(0, graphs.edges[1], h[graphs.edges[0]])
        if self.per_node:
            return self.second(h)
        total = torch.zeros(graphs.count, h.shape[1], dtype=h.dtype).index_add(0, graphs.graph, h)
        return self.second(total / torch.bincount(graphs.graph, minlength=graphs.count)[:, None])


# --------------------------------------------------------------------------- sequences


def sequence(i: int) -> tuple[Tensor, int]:
    return numbers(SIZES[i], 3, seed=50 + i), i % C


def pack(items: list[Any]) -> tuple[PackedSequence, Tensor]:
    packed = pack_sequence([x for x, _ in items], enforce_sorted=False)
    return packed, torch.tensor([label for _, label in items])


def pad(items: list[Any]) -> tuple[Tensor, Tensor]:
    return pad_sequence([x for x, _ in items], batch_first=True), torch.tensor([label for _, label in items])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, C)

    def forward(self, x: PackedSequence) -> Any:
        return self.head(self.cell(x)[1][-1])


class Pooled(nn.Module):
    """Padding is 0 and adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.inside(x).tanh().sum(1))


# --------------------------------------------------------------------------- images and boxes


def image(i: int) -> tuple[Tensor, dict[str, Tensor]]:
    boxes = numbers(SIZES[i], 4, seed=80 + i)
    return numbers(3, 4 + i % 3, 5, seed=30 + i), {"boxes": boxes, "labels": torch.arange(SIZES[i]) % 2}


def as_lists(items: list[Any]) -> tuple[Any, ...]:
    """What detection references write: `tuple(zip(*batch))`."""
    return tuple(zip(*items, strict=True))


class Detector(nn.Module):
    """A list of images of different sizes in; out come stacked predictions, or a list with an entry for each image."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.body, self.boxes, self.labels = nn.Conv2d(3, 4, 3), nn.Linear(4, 8), nn.Linear(4, 4)
        self.form = form

    def forward(self, images: Any) -> Any:
        several = [self.body(x[None]).tanh().mean((2, 3)) for x in images]
        if self.form == "stacked":
            h = torch.cat(several)
            return {"boxes": self.boxes(h).reshape(-1, 2, 4), "logits": self.labels(h).reshape(-1, 2, 2)}
        return [
            {"boxes": self.boxes(h).reshape(2, 4)[: 1 + x.shape[1] % 2], "logits": self.labels(h).reshape(2, 2)}
            for h, x in zip(several, images, strict=True)
        ]


def match(boxes: Tensor, logits: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """Every true box against the nearest prediction."""
    nearest = torch.cdist(truth["boxes"], boxes).argmin(1)
    return F.l1_loss(boxes[nearest], truth["boxes"]) + F.cross_entropy(logits[nearest], truth["labels"])


def stacked_detection(out: Any, truths: Any) -> Tensor:
    return torch.stack([match(b, f, t) for b, f, t in zip(out["boxes"], out["logits"], truths, strict=True)]).mean()


def list_detection(out: Any, truths: Any) -> Tensor:
    return torch.stack([match(o["boxes"], o["logits"], t) for o, t in zip(out, truths, strict=True)]).mean()


# --------------------------------------------------------------------------- words


def sentence(i: int) -> tuple[str, int]:
    return " ".join("abcdefgh"[(i + k) % 8] for k in range(SIZES[i])), i % C


def keep_words(items: list[Any]) -> tuple[list[str], Tensor]:
    return [text for text, _ in items], torch.tensor([label for _, label in items])


class Reader(nn.Module):
    """Takes sentences as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.head = nn.Embedding(8, 4), nn.Linear(4, C)

    def forward(self, texts: list[str]) -> Any:
        means = [self.letters(torch.tensor([ord(w) - ord("a") for w in text.split()])).mean(0) for text in texts]
        return self.head(torch.stack(means))


# --------------------------------------------------------------------------- the law


def nll_of_nodes(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


class Situation(NamedTuple):
    item: Callable[[int], Any]
    collate: Callable[[list[Any]], Any]
    model: Callable[[], nn.Module]
    loss: Any = CE
    second: bool = True
    """Whether the model can be differentiated twice."""


SITUATIONS = {
    "bags with offsets": Situation(bag, join_bags, Bags, second=False),
    "graphs as one": Situation(graph, join_graphs, Convolution),
    "graphs with labels inside": Situation(graph, join_labelled, Convolution),
    "labels of nodes": Situation(graph, join_nodes, lambda: Convolution(True), lambda f, y: nll_of_nodes(f, y).sum()),
    "packed sequences": Situation(sequence, pack, Recurrent),
    "detection, stacked": Situation(image, as_lists, lambda: Detector("stacked"), stacked_detection),
    "detection, lists": Situation(image, as_lists, lambda: Detector("lists"), list_detection),
    "sentences": Situation(sentence, keep_words, Reader),
}  # fmt: skip


def make(situation: Situation) -> nn.Module:
    torch.manual_seed(1)
    return situation.model().double()


def loader(situation: Situation, ids: range | None = None, **options: Any) -> DataLoader[Any]:
    data: Dataset[Any] = Items(situation.item)
    options = {"batch_size": 5, "collate_fn": situation.collate} | options
    return DataLoader(data if ids is None else Subset(data, ids), **options)


def take_apart(batch: Any) -> tuple[Any, ...]:
    return (batch, batch.y) if isinstance(batch, Labelled) else tuple(batch)


def example_losses(situation: Situation, model: nn.Module) -> Iterator[Tensor]:
    """Every example's loss by itself: `collate([dataset[i]])` through the model."""
    for i in range(N):
        *inputs, target = take_apart(situation.collate([situation.item(i)]))
        yield situation.loss(model(*inputs), target)


def score(situation: Situation, model: nn.Module, method: Any, damping: float | None = None, **options: Any) -> Tensor:
    damped = None if damping is None else Absolute(damping)
    queries = loader(situation, range(Q))
    train = loader(situation, shuffle=True, **options)
    return ptif.attribute(model, train, queries, loss=situation.loss, method=method, damping=damped).values


@pytest.mark.parametrize("name", SITUATIONS)
def test_gradients_are_those_of_collate_of_one_example(name: str) -> None:
    situation = SITUATIONS[name]
    model = make(situation)
    rows = gradients_of(list(model.parameters()), example_losses(situation, model))
    assert gap(score(situation, model, "grad_dot"), rows[:Q] @ rows.T / N) < rounding(torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_curvature_is_that_of_the_examples(name: str) -> None:
    situation = SITUATIONS[name]
    model = make(situation)
    parameters, losses = list(model.parameters()), list(example_losses(situation, model))
    rows = gradients_of(parameters, losses)
    dual = score(situation, model, ptif.dual(EmpiricalFisher()), 0.1)
    assert gap(dual, influence(rows.T @ rows / N, 0.1, rows[:Q], rows)) < rounding(torch.float64, 1e3)
    if situation.second:
        hessian = hessian_of(parameters, torch.stack(losses).mean())
        exact = score(situation, model, ptif.exact(Hessian()), 5.0)
        assert gap(exact, influence(hessian, 5.0, rows[:Q], rows)) < rounding(torch.float64, 1e4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bags with offsets", "graphs as one", "packed sequences", "sentences"])
def test_gauss_newton_is_that_of_the_examples(name: str) -> None:
    situation = SITUATIONS[name]
    model = make(situation)
    parameters, total = list(model.parameters()), torch.zeros(())
    rows = gradients_of(parameters, example_losses(situation, model))
    for i in range(N):
        *inputs, _ = take_apart(situation.collate([situation.item(i)]))
        f = model(*inputs)
        p, jacobian = f[0].softmax(0).detach(), gradients_of(parameters, f[0].unbind())
        total = total + jacobian.T @ (torch.diag(p) - p[:, None] * p) @ jacobian / N
    expected = influence(total, 0.1, rows[:Q], rows)
    for method in (ptif.exact(GGN()), ptif.Influence(GGN(), ptif.solvers.CG(rtol=1e-10, max_steps=400))):
        assert gap(score(situation, model, method, 0.1), expected) < rounding(torch.float64, 1e4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal", "datainf", None])
@pytest.mark.parametrize("name", ["bags with offsets", "graphs as one"])
def test_other_methods_do_not_depend_on_the_batch_size(name: str, method: str | None) -> None:
    situation = SITUATIONS[name]
    one, several = (score(situation, make(situation), method, batch_size=size) for size in (1, 6))
    assert gap(one, several) < rounding(torch.float64, 1e5)


def test_worker_processes_give_the_same() -> None:
    situation = SITUATIONS["graphs as one"]
    model = make(situation)
    assert gap(score(situation, model, "grad_dot", num_workers=2), score(situation, model, "grad_dot")) == 0


def test_parts_are_changed_as_the_batch_was() -> None:
    """A move to another device, or any other change, is made to what is collated again, too."""
    batch = Collated(join_bags([bag(i) for i in range(4)]), tuple(bag(i) for i in range(4)), join_bags)
    changed = map_tensors(batch, lambda t: t + 100)
    assert changed.part(slice(2, 3)).whole[0].tolist() == (bag(2)[0] + 100).tolist()
    assert changed.part(torch.tensor([3, 1])).whole[2].tolist() == [100 + bag(3)[1], 100 + bag(1)[1]]


def test_padded_batches_are_cut_as_before() -> None:
    """Padding alone is no reason to collate again."""
    padded = Situation(sequence, pad, Pooled)
    assert Source.of(loader(padded)).is_cut_by_rows
    assert Source.of(loader(Situation(sequence, torch.utils.data.default_collate, Pooled))).is_cut_by_rows
    assert not any(Source.of(loader(situation)).is_cut_by_rows for situation in SITUATIONS.values())
    model = make(padded)
    rows = gradients_of(list(model.parameters()), example_losses(padded, model))
    assert gap(score(padded, model, "grad_dot"), rows[:Q] @ rows.T / N) < rounding(torch.float64)


def test_layers_after_the_bag_keep_their_rules() -> None:
    situation = SITUATIONS["bags with offsets"]
    problem = ptif.Problem(make(situation), CE, loader(situation))
    routes = Derivatives.of(problem).routes
    assert routes == {"words.weight": "loop", "head.0": "rule", "head.2": "rule"}


def test_the_digest_of_the_data_is_that_of_the_examples() -> None:
    situation = SITUATIONS["bags with offsets"]
    digests = [digest_data(Source.of(loader(situation, batch_size=size))) for size in (1, 4)]
    changed = situation._replace(item=lambda i: (bag(i)[0] + (i == 9), bag(i)[1]))
    assert digests[0] == digests[1] != digest_data(Source.of(loader(changed, batch_size=4)))


# --------------------------------------------------------------------------- refusals, for true reasons


def test_examples_with_nan_are_named() -> None:
    situation = SITUATIONS["graphs as one"]
    torn = situation._replace(item=lambda i: (graph(i)[0] * (float("nan") if i == 6 else 1), *graph(i)[1:]))
    with pytest.raises(NonFinite, match=r"NaN or infinity at dataset index 6 \(in item\[0\]\)"):
        score(torn, make(torn), "grad_dot")


def of_list(items: list[Any]) -> tuple[list[Tensor], Tensor]:
    """Images less the mean of their batch."""
    images = [x.mean((1, 2)) for x, _ in items]
    mean = torch.stack(images).mean(0)
    return [x - mean for x in images], torch.arange(len(items)) % C


class OfLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, C)

    def forward(self, images: list[Tensor]) -> Any:
        return self.head(torch.stack(list(images)))


def test_a_collate_function_that_mixes_examples_is_refused() -> None:
    mixing = Situation(image, of_list, OfLists)
    with pytest.raises(InvalidInput, match=r"changes by .* the collate function or the model lets examples see each"):
        score(mixing, make(mixing), "grad_dot")


def test_a_loss_over_the_boxes_of_a_batch_is_refused() -> None:
    def over_all_boxes(out: Any, truths: Any) -> Tensor:
        return list_detection(out, truths) * len(truths) / sum(len(t["labels"]) for t in truths)

    situation = SITUATIONS["detection, lists"]._replace(loss=over_all_boxes)
    with pytest.raises(InvalidInput, match=r"over_all_boxes of .* examples is neither the mean nor the sum"):
        score(situation, make(situation), "grad_dot")


class TrainsOnly(nn.Module):
    """Gives its losses in training mode only, as the detectors of torchvision do."""

    def __init__(self) -> None:
        super().__init__()
        self.detector = Detector("lists")

    def forward(self, images: Any, truths: Any = None) -> Any:
        out = self.detector(images)
        return {"sum": list_detection(out, truths)} if self.training else out


class ItsLosses(nn.Module):
    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Any, truths: Any) -> Tensor:
        self.detector.train()
        return torch.stack([sum(self.detector([i], [t]).values()) for i, t in zip(images, truths, strict=True)])


def test_a_detector_that_gives_losses_in_training_mode_only_works_as_the_refusal_says() -> None:
    situation = SITUATIONS["detection, lists"]
    torch.manual_seed(0)
    model = TrainsOnly().double()
    data = loader(situation)
    words = (
        r"failed on outputs of a list .*; the model is asked in eval mode, so write .* there and the targets, .* needs "
        r"a module around it whose forward .* calls train\(\) on it .* items \(image, target, 0\) and loss=lambda"
    )
    with pytest.raises(InvalidInput, match=words):
        ptif.attribute(model, data, data, loss=lambda out, truths: sum(out.values()), method="grad_dot")
    expected = ptif.attribute(model, data, data, loss=list_detection, method="grad_dot")
    wrapped = loader(situation._replace(item=lambda i: (*situation.item(i), 0)))
    around = ItsLosses(model).eval()
    scores = ptif.attribute(around, wrapped, wrapped, loss=lambda losses, _: losses, method="grad_dot")
    assert gap(scores.values, expected.values) < rounding(torch.float64)
    assert not any(module.training for module in around.modules())


@pytest.mark.parametrize("policy", ["warn", "error", "ignore"])
def test_a_collate_function_that_draws_is_named(policy: str) -> None:
    def drop(items: list[Any]) -> tuple[Tensor, Tensor]:
        x, y = pad(items)
        return x * (torch.rand_like(x) > 0.3), y

    situation = Situation(sequence, drop, Pooled)
    expected: Any = {
        "warn": pytest.warns(TrainingDataWarning, match="collate function gave two different batches"),
        "error": pytest.raises(InvalidInput, match=r"collate function gave two .* store one draw per example"),
        "ignore": nullcontext(),
    }[policy]
    with expected:
        ptif.attribute(
            make(situation), loader(situation), loader(SITUATIONS["packed sequences"]._replace(collate=pad)),
            loss=CE, method="grad_dot", deterministic=policy,
        )  # fmt: skip
