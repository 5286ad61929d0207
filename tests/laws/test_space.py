"""Space: every chosen parameter in one block; flat vectors, blocks and parameters are the same numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, UnknownName
from pytorch_influence_functions.linalg.blocks import Dense, Outer
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.linalg.space import ROOT, Space, is_conv1d
from tests.tolerance import gap, rounding


class Conv1D(nn.Module):
    """The transformer-style linear layer: weight [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


LAYERS = st.sampled_from(
    [
        lambda: nn.Linear(3, 2),
        lambda: nn.Linear(2, 5, bias=False),
        lambda: nn.Conv1d(4, 6, 3, groups=2),
        lambda: nn.Conv2d(2, 3, (2, 3)),
        lambda: nn.Conv2d(2, 3, 1, bias=False),
        lambda: nn.Conv3d(1, 2, 2),
        lambda: nn.ConvTranspose2d(2, 3, 2),
        lambda: Conv1D(3, 5),
        lambda: nn.LayerNorm(4),
        lambda: nn.Embedding(5, 2),
        lambda: nn.LSTM(2, 3),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        Scale,
        nn.ReLU,
    ]
)


@settings(max_examples=40)
@given(st.lists(LAYERS, min_size=1, max_size=5), st.integers(0, 3), st.randoms(use_true_random=False))
def test_flat_blocks_and_parameters_are_the_same_numbers(layers, n, rng) -> None:
    model = nn.Sequential(*(make() for make in layers), nn.Linear(2, 2))
    frozen = {name for name, p in model.named_parameters() if rng.random() < 0.3 and name[-4:] == "bias"}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    space = Space.of(model)
    expected = {name: p for name, p in model.named_parameters() if name not in frozen}
    assert sorted(space.names) == sorted(expected)  # each once, none twice
    assert space.size == sum(p.numel() for p in expected.values())
    flat = torch.randn(n, space.size)
    rows = space.rows(flat)
    assert torch.equal(rows.flat(), flat)
    tree = space.to_parameters(rows)
    assert {k: tuple(v.shape) for k, v in tree.items()} == {k: (n, *p.shape) for k, p in expected.items()}
    assert torch.equal(space.from_parameters(tree).flat(), flat)
    values = {k: torch.randn(n, *p.shape) for k, p in expected.items()}
    back = space.to_parameters(space.from_parameters(values))
    assert all(torch.equal(back[k], values[k]) for k in values)


def test_rows_are_views_of_the_flat_vector() -> None:
    space = Space.of(nn.Sequential(nn.Conv2d(2, 3, 2), Scale(), Conv1D(2, 3)))
    flat = torch.zeros(2, 2 * space.size)[:, ::2]  # strided, still no copy
    for k, (name, block) in enumerate(space.rows(flat).blocks.items(), 1):
        block.dense().fill_(k)
        assert flat[:, space.slices[name]].unique().tolist() == [k]
    assert flat.min() == 1


def test_a_joint_block_is_the_weight_with_the_bias_as_last_column() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), Conv1D(5, 4))
    space = Space.of(model)
    assert {k: b.shape for k, b in space.blocks.items()} == {"0": (3, 9), "1": (5, 5)}
    assert space.blocks["1"].transposed and not space.blocks["0"].transposed
    rows = space.from_parameters({k: p.detach()[None] for k, p in model.named_parameters()})
    conv, linear = model
    assert torch.equal(rows.blocks["0"].dense()[0], torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1))
    x = torch.randn(4)
    one = torch.cat([x, torch.ones(1)])
    assert torch.allclose(rows.blocks["1"].dense()[0] @ one, linear(x))


def test_a_scalar_parameter_is_a_block_of_its_own() -> None:
    space = Space.of(Scale())
    assert space.blocks["factor"].shape == (1,) and space.size == 1
    assert space.to_parameters(space.rows(torch.ones(3, 1)))["factor"].shape == (3,)


class WithoutElements(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.empty, self.none, self.layer = (
            nn.Parameter(torch.empty(0)),
            nn.Parameter(torch.empty(4, 0).double()),
            layer,
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x) + (x @ self.none).sum(1, keepdim=True)
        return outputs


@pytest.mark.parametrize("method", [None, "grad_dot", "dual", "ekfac", "lissa"])
def test_a_parameter_without_elements_takes_no_part(method: str | None) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    layer = nn.Linear(4, 3).double()
    model = WithoutElements(layer)
    assert list(Space.of(model).blocks) == ["layer"]
    with pytest.raises(InvalidInput, match=r"^The chosen parameters have no elements; choose others with par"):
        Space.of(model, "none")
    values = [
        ptif.attribute(one, (x, y), (x[:2], y[:2]), nn.CrossEntropyLoss(), method=method).values
        for one in (model, layer)
    ]
    assert gap(values[0], values[1]) < rounding(torch.float64)


def test_a_root_layer_has_a_name() -> None:
    space = Space.of(nn.Linear(3, 2))
    assert list(space.blocks) == [ROOT] and space.names == ("weight", "bias")
    assert Space.of(nn.Linear(3, 2), ROOT) == space
    assert list(Space.of(nn.Linear(3, 2), "weight").blocks) == ["weight"]


def test_tied_parameters_count_once_and_answer_to_every_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight
    space = Space.of(model)
    # The head's matrix is not its own, so it is no joint block with its bias.
    assert list(space.blocks) == ["embed.weight", "head.bias"] and space.size == 20
    assert Space.of(model, "head.weight").names == ("embed.weight",)
    assert Space.of(model, "head").names == ("embed.weight", "head.bias")
    assert Space.of(model, decay={"head.weight": 0.5}).blocks["embed.weight"].decay == 0.5


def test_one_module_under_two_names_is_still_one_joint_block() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert list(Space.of(model).blocks) == ["0"]
    assert Space.of(model, "2") == Space.of(model, "0")


def test_parametrized_weights_are_blocks_of_their_own() -> None:
    space = Space.of(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    assert all(not block.joint for block in space.blocks.values()) and len(space.blocks) == 3


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("0", ("0.weight", "0.bias")),
        ("*.weight", ("0.weight", "2.weight")),
        (["2", "0.b*"], ("0.bias", "2.weight", "2.bias")),
        ("2.*", ("2.weight", "2.bias")),
        ("[0-1]", ("0.weight", "0.bias")),
        (lambda name, p: p.ndim == 1, ("0.bias", "2.bias")),
        (["2.bias", lambda name, p: name == "0.bias"], ("0.bias", "2.bias")),
        ("*", ("0.weight", "0.bias", "2.weight", "2.bias")),
    ],
)
def test_selection_by_name_and_predicate(pattern, names) -> None:
    assert Space.of(net(), pattern).names == names


def test_selection_by_module_and_parameter() -> None:
    model = net()
    assert Space.of(model, model[2]).names == ("2.weight", "2.bias")
    assert Space.of(model, [model[0].bias, model[2]]).names == ("0.bias", "2.weight", "2.bias")
    assert Space.of(model, model[2].parameters()).names == ("2.weight", "2.bias")
    assert Space.of(model, model).size == Space.of(model).size


def test_frozen_parameters_take_part_only_when_named() -> None:
    model = net()
    model[0].requires_grad_(False)
    assert Space.of(model).names == ("2.weight", "2.bias")
    assert Space.of(model, "0").names == ("0.weight", "0.bias")


def test_a_frozen_bias_splits_the_joint_block() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    assert list(Space.of(model).blocks) == ["0.weight", "2"]


def test_unequal_decay_splits_the_joint_block() -> None:
    space = Space.of(net(), decay={"0.weight": 0.1, "2.weight": 0.2, "2.bias": 0.2})
    assert space.decay == {"0.weight": 0.1, "0.bias": 0.0, "2": 0.2}
    assert Space.of(net(), decay=0.3).decay == {"0": 0.3, "2": 0.3}


def test_decay_is_given_by_globs_and_a_name_goes_before_them() -> None:
    assert Space.of(net(), decay={"0.*": 0.1}).decay == {"0": 0.1, "2": 0.0}
    assert Space.of(net(), decay={"2.bias": 0.2, "*": 0.1}).decay == {"0": 0.1, "2.weight": 0.1, "2.bias": 0.2}
    assert Space.of(net(), decay={"2": 0.1}).decay == {"0": 0.0, "2": 0.1}


def test_sizes_by_name() -> None:
    space = Space.of(net())
    assert (space.numel("0"), space.numel("0.weight"), space.size) == (16, 12, 26)
    assert "26 coordinates" in repr(space) and hash(space) == hash(Space.of(net()))
    assert space != Space.of(net(), "0")


def test_only_the_transformer_style_conv1d_is_taken_for_one() -> None:
    assert is_conv1d(Conv1D(3, 2)) and not is_conv1d(nn.Conv1d(2, 3, 1)) and not is_conv1d(nn.Linear(2, 3))


def test_live_values() -> None:
    model = net()
    assert Space.of(model, "0.bias").values(model)["0.bias"] is model[0].bias


def _with_int() -> nn.Module:
    model = net()
    model.register_parameter("count", nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False))
    return model


def _with_complex() -> nn.Module:
    model = net()
    model.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    return model


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Space.of(net(), "0.wieght"), UnknownName, r"matches no parameter.*'0.weight'"),
        (lambda: Space.of(net(), ["0", "1"]), UnknownName, "'1' matches no parameter"),
        (lambda: Space.of(net().requires_grad_(False)), InvalidInput, "no trainable parameter"),
        (lambda: Space.of(nn.ReLU()), InvalidInput, "no trainable parameter"),
        (lambda: Space.of(net(), []), InvalidInput, "selects no parameter"),
        (lambda: Space.of(net(), lambda name, p: False), InvalidInput, "selects no parameter"),
        (lambda: Space.of(net(), nn.Linear(2, 2)), InvalidInput, "Linear is not part of the model"),
        (lambda: Space.of(net(), nn.Parameter(torch.ones(2))), InvalidInput, "is no parameter of the model"),
        (lambda: Space.of(_with_int(), "*"), InvalidInput, "'count' is torch.int64"),
        (lambda: Space.of(_with_complex()), InvalidInput, "'phase' is torch.complex64"),
        (lambda: Space.of(nn.Sequential(nn.LazyLinear(2))), InvalidInput, "'0.weight' is not initialised"),
        (lambda: Space.of(net(), decay=-1.0), InvalidInput, "is -1.0; it must be a finite number of at least 0"),
        (lambda: Space.of(net(), decay={"0.weigth": 0.1}), UnknownName, "Did you mean '0.weight'"),
        (
            lambda: Space.of(net(), decay={"0.*": 0.1, "*.weight": 0.2}),
            InvalidInput,
            r"'0\.\*' \(0\.1\) and '\*\.weight' \(0\.2\), and both mean '0\.weight'; give that one by its own name",
        ),
        (lambda: Space.of(net()).numel("3"), UnknownName, "'3' is neither a block nor a parameter"),
        (lambda: Space.of(net()).rows(torch.zeros(2, 3)), InvalidInput, r"\[n, 26\], got shape \[2, 3\]"),
        (
            lambda: Space.of(net()).from_parameters({}),
            InvalidInput,
            "No value was given for parameter '0.weight'",
        ),
        (lambda: Space.of(net()).values(nn.Linear(2, 2)), UnknownName, "no parameter '0.weight'"),
        (
            lambda: Space.of(net(), "0.bias").from_parameters({"0.bias": torch.zeros(1, 3)}),
            InvalidInput,
            r"needs shape \['n', 4\], got \[1, 3\]",
        ),
    ],
)
def test_bad_selections_are_refused_in_words(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()


def test_a_module_without_parameters_cannot_be_selected() -> None:
    model = net()
    with pytest.raises(InvalidInput, match="ReLU holds no parameter"):
        Space.of(model, model[1])


@pytest.mark.parametrize("other", ["outer", "dense"])
@pytest.mark.parametrize("terms", [1, 3, 40])
def test_matching_rows_are_multiplied_as_if_written_out(terms: int, other: str) -> None:
    generator = torch.Generator().manual_seed(terms)

    def outer(t: int) -> Outer:
        left = torch.randn(5, t, 4, generator=generator, dtype=torch.float64)
        return Outer(left, torch.randn(5, t, 6, generator=generator, dtype=torch.float64))

    one, two = outer(terms), outer(2)
    second = two if other == "outer" else Dense(two.dense())
    want = (one.dense() * two.dense()).flatten(1).sum(1)
    for pair in ((one, second), (second, one)):
        rows = [Rows({"w": block}) for block in pair]
        torch.testing.assert_close(rows[0].rowwise(rows[1]), want, rtol=1e-12, atol=1e-12)
