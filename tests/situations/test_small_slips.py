"""What is typed wrong at the first try, each with the one sentence that helps, and what it says carried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
TRAIN, QUERIES, LOSS = (X, Y), (X[:2], Y[:2]), nn.CrossEntropyLoss()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class TwoHeads(nn.Module):
    """A class and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.size = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.kind(x), self.size(x)


def both(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1][:, 0], targets[1])


def test_several_targets_side_by_side() -> None:
    with pytest.raises(InvalidInput, match=r"several targets as one, \(x, \(y1, y2\)\)"):
        ptif.attribute(TwoHeads(), (X, Y, X[:, 0]), (X[:2], Y[:2], X[:2, 0]), loss=both)
    items = [(x, (y, x[0])) for x, y in zip(X, Y, strict=True)]
    assert ptif.attribute(TwoHeads(), items, items[:2], loss=both).shape == (2, 24)


@pytest.mark.parametrize("query", [(X[0], Y[0]), (X[0], Y[:1])])
def test_a_query_without_a_batch_axis(query: Any) -> None:
    with pytest.raises(InvalidInput, match=r"a single example is written as a list of one, \[\(x, y\)\]"):
        ptif.attribute(net(), TRAIN, query, loss=LOSS)
    assert ptif.attribute(net(), TRAIN, [(X[0], Y[0])], loss=LOSS).shape == (1, 24)


def test_whole_numbers_in_a_frame() -> None:
    frame = pytest.importorskip("pandas").DataFrame((10 * X.numpy()).astype(int))
    with pytest.raises(InvalidInput, match=r"an array or frame with \.astype\('float32'\)"):
        ptif.attribute(net(), (frame, Y), (frame[:2], Y[:2]), loss=LOSS)
    real = frame.astype("float32")
    assert ptif.attribute(net(), (real, Y), (real[:2], Y[:2]), loss=LOSS).shape == (2, 24)


def test_gaps_dates_and_words_in_a_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X.numpy(), columns=list("abcd"))
    gap = frame.astype("Float64")
    gap.iloc[4, 0] = pandas.NA
    with pytest.raises(NonFinite, match="NaN or infinity at dataset index 4"):
        ptif.attribute(net(), (gap, Y), QUERIES, loss=LOSS)
    dated = frame.assign(d=pandas.date_range("2020", periods=24))
    with pytest.raises(InvalidInput, match=r"not numeric \('d'\); drop dates or count days in them"):
        ptif.attribute(net(), (dated, Y), QUERIES, loss=LOSS)
    days = dated.assign(d=(dated["d"] - dated["d"].min()).dt.days / 24)
    assert ptif.attribute(net(), (days, Y), (days[:2], Y[:2]), loss=LOSS).shape == (2, 24)
    worded = frame.assign(d="u")
    with pytest.raises(InvalidInput, match=r"not numeric \('d'\); encode them as numbers first"):
        ptif.attribute(net(), (worded, Y), QUERIES, loss=LOSS)
    encoded = pandas.get_dummies(worded)
    assert ptif.attribute(net(), (encoded, Y), (encoded[:2], Y[:2]), loss=LOSS).shape == (2, 24)


def test_labels_with_gaps() -> None:
    labels = pytest.importorskip("pandas").Series(["ant", "bee", None] * 8, dtype=object)
    with pytest.raises(InvalidInput, match="Array 1 holds None, which is no number, and not words alone"):
        ptif.attribute(net(), (X, labels), QUERIES, loss=LOSS)
    kept = labels.notna().to_numpy(copy=True)
    assert ptif.attribute(net(), (X[kept], labels[kept]), QUERIES, loss=LOSS).shape == (2, 16)


@pytest.mark.parametrize(("other", "ours"), [("criterion", "loss"), ("params", "parameters"), ("k", "top")])
def test_an_argument_by_its_name_elsewhere(other: str, ours: str) -> None:
    values: dict[str, Any] = {"criterion": LOSS, "params": "2.*", "k": 3}
    rest = {} if ours == "loss" else {"loss": LOSS}
    with pytest.raises(InvalidInput, match=rf"no argument '{other}'; write {ours}=\."):
        ptif.attribute(net(), TRAIN, QUERIES, **rest, **{other: values[other]})
    assert len(ptif.attribute(net(), TRAIN, QUERIES, **rest, **{ours: values[other]})) == 2


def test_a_mean_over_tokens_of_unequal_texts_written_as_a_function() -> None:
    x, y = torch.randn(10, 5, 4), torch.arange(50).reshape(10, 5) % 3
    y[2, 3:] = y[7, 1:] = -100

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), targets)

    model = nn.Linear(4, 3)
    with pytest.raises(InvalidInput, match=r"use TokenCrossEntropy\(\) for a mean over tokens"):
        ptif.attribute(model, (x, y), (x[:2], y[:2]), loss=loss)
    assert ptif.attribute(model, (x, y), (x[:2], y[:2]), loss=ptif.TokenCrossEntropy()).shape == (2, 10)


def test_a_model_that_is_sure_of_every_example() -> None:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e6)
    sure = (X, model(X).argmax(1))
    message = r"mean eigenvalue of the curvature, which is 0 here; use Absolute\(value\), or train with weight decay\."
    with pytest.raises(InvalidInput, match=message):
        ptif.attribute(model, sure, sure, loss=LOSS, method="exact", damping=ptif.damping.Relative(0.1))
    assert ptif.attribute(model, sure, sure, loss=LOSS, damping=0.01).shape == (24, 24)


@pytest.mark.filterwarnings("ignore:The collate function gave two different batches")
def test_a_collate_function_that_draws_noise_stands_in_the_diagnostics() -> None:
    def noisy(items: Any) -> Any:
        x, y = torch.utils.data.default_collate(items)
        return x + 0.1 * torch.randn_like(x), y

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8, collate_fn=noisy)
    scores = ptif.attribute(net(), loader, QUERIES, loss=LOSS, method="grad_dot")
    assert "[bad]  data: an example reads differently twice" in str(scores.diagnostics)


class Squeezed(nn.Module):
    """Loses the batch axis where there is one example."""

    def __init__(self, *axis: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.axis = nn.Linear(4, 1), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze(*self.axis)


def test_an_output_that_is_squeezed_away() -> None:
    train, query = (X, X[:, 0]), (X[:1], X[:1, 0])
    with pytest.raises(InvalidInput, match=r"outputs of shape \(\) for 1 example; .* with \.squeeze\(-1\) instead"):
        ptif.attribute(Squeezed(), train, query, loss=nn.MSELoss(), method="grad_dot")
    assert ptif.attribute(Squeezed(-1), train, query, loss=nn.MSELoss(), method="grad_dot").shape == (1, 24)


class Overwrites(nn.Module):
    """Changes in place what its backward pass needs: it cannot be trained."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.copied = nn.Linear(4, 5), nn.Linear(5, 3), copied

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = hidden.clone() if self.copied else hidden
        hidden[:, 0] *= 2
        return self.second(hidden)


def test_a_forward_that_overwrites_what_its_backward_needs() -> None:
    with pytest.raises(InvalidInput, match=r"backward pass of Overwrites failed \(.*in-?place operation.*as it would"):
        ptif.attribute(Overwrites(copied=False), TRAIN, QUERIES, loss=LOSS, method="grad_dot")
    assert ptif.attribute(Overwrites(copied=True), TRAIN, QUERIES, loss=LOSS, method="grad_dot").shape == (2, 24)


class Scales(nn.Module):
    """Scales what it is given, in place."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.copied = nn.Linear(4, 3), copied

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if self.copied else x
        return self.layer(x.mul_(2.0))


def test_a_forward_that_overwrites_its_input() -> None:
    before = X.clone()
    with pytest.raises(InvalidInput, match=r"forward changes its input in place; begin it with x = x\.clone"):
        ptif.attribute(Scales(copied=False), TRAIN, QUERIES, loss=LOSS, method="grad_dot")
    assert ptif.attribute(Scales(copied=True), TRAIN, QUERIES, loss=LOSS, method="grad_dot").shape == (2, 24)
    assert torch.equal(X, before)


@pytest.mark.parametrize("kind", [">f8", "<f8"])
def test_numbers_of_another_byte_order(kind: str) -> None:
    array = X.numpy().astype(kind)
    scores = ptif.attribute(net(), (array, Y), (array[:2], Y[:2]), loss=LOSS, method="grad_dot")
    expected = ptif.attribute(net(), TRAIN, QUERIES, loss=LOSS, method="grad_dot")
    torch.testing.assert_close(scores.values, expected.values, rtol=1e-5, atol=1e-7)


SLIPS: dict[str, tuple[Callable[[], Any], str]] = {
    "a query by a word": (
        lambda: ptif.attribute(net(), TRAIN, QUERIES, loss=LOSS, method="grad_dot").helpful("a"),  # type: ignore[arg-type]
        "A query is picked by whole numbers, a slice or a mask of 2; got 'a'",
    ),
    "weights on meta": (
        lambda: ptif.attribute(net().to("meta"), TRAIN, QUERIES),
        r"Parameter '0\.weight' lies on the meta device, which holds no values; load the model's weights first",
    ),
    "class weights on meta": (
        lambda: ptif.attribute(net(), TRAIN, QUERIES, loss=nn.CrossEntropyLoss(torch.ones(3, device="meta"))),
        "A class weight lies on the meta device, which holds no values; give numbers",
    ),
    "a new label out of range": (
        lambda: ptif.what_if(ptif.Problem(net(), LOSS, TRAIN), relabel={5: 9}),
        "Label 9 at dataset index 5 is out of range",
    ),
    "a new input with a batch axis": (
        lambda: ptif.what_if(ptif.Problem(net(), LOSS, TRAIN), replace={5: X[:1]}),
        r"^At index 5: The new input has shape \(1, 4\) and the old one \(4,\)",
    ),
}


@pytest.mark.parametrize("name", SLIPS)
def test_one_sentence_says_what_and_where(name: str) -> None:
    call, message = SLIPS[name]
    with pytest.raises(InvalidInput, match=message):
        call()


def test_a_frame_and_labels_in_different_orders() -> None:
    pandas = pytest.importorskip("pandas")
    frame, labels = pandas.DataFrame(X.numpy()), pandas.Series(Y.numpy())
    turned = labels[::-1]
    match = (
        r"0 and 1 label the same rows in different orders \(row 0 is 0 and 23\).*y\.loc\[x\.index\], or pass y\.to_nu"
    )
    with pytest.raises(InvalidInput, match=match):
        ptif.attribute(net(), (frame, turned), QUERIES, loss=LOSS, method="grad_dot")
    expected = ptif.attribute(net(), TRAIN, QUERIES, loss=LOSS, method="grad_dot").values
    for y in (turned.loc[frame.index], turned.to_numpy()[::-1].copy(), labels):
        scores = ptif.attribute(net(), (frame, y), QUERIES, loss=LOSS, method="grad_dot")
        torch.testing.assert_close(scores.values, expected)


def test_a_ranking_as_what_is_removed() -> None:
    problem = ptif.Problem(net(), LOSS, TRAIN)
    worst = ptif.methods.grad_dot().fit(problem).score(QUERIES).harmful(0, 3)
    ids = [index for index, _ in worst]
    edits = [ptif.actions.what_if(problem, remove=removed, method="exact").change(QUERIES) for removed in (worst, ids)]
    torch.testing.assert_close(*edits)
    assert len(ptif.actions.curate(TRAIN, worst).dataset) == 21


def test_a_set_of_examples_to_score() -> None:
    scores = ptif.attribute(net(), TRAIN, QUERIES, loss=LOSS, method="grad_dot", ids={3, 1})
    assert scores.indices is not None and scores.indices.tolist() == [[1, 3], [1, 3]]
