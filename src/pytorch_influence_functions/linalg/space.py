"""Space: how the chosen parameters of a model are laid out as blocks. The only file that knows names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.errors import InvalidInput, UnknownName, nearest
from ..core.validate import finite_number
from .blocks import Dense
from .rows import Rows

ROOT = "(root)"
"""The name under which a model that is itself a single layer appears as a block."""

Predicate: TypeAlias = Callable[[str, nn.Parameter], bool]
Selector: TypeAlias = str | nn.Module | nn.Parameter | Predicate
Selection: TypeAlias = Selector | Iterable[Selector] | None


@dataclass(frozen=True)
class BlockSpec:
    """One block of parameter space: which parameters it holds, and in which shape.

    A joint block holds a weight and its bias as one matrix `[out, in * kernel + 1]`, the bias being the
    last column; `transposed` says that the weight is stored as `[in, out]` (transformer-style Conv1D).
    Any other block holds one parameter in its own shape (`[1]` for a single number). `decay` is the L2
    strength on the whole block.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    decay: float = 0.0

    @property
    def numel(self) -> int:
        """The number of coordinates in this block."""
        return math.prod(self.shape)

    @property
    def joint(self) -> bool:
        """Whether the block is a weight with its bias as last column."""
        return len(self.parameters) == 2


@dataclass(frozen=True, eq=False)
class Space:
    """The chosen parameters of a model as ordered blocks; `size` is their total number of coordinates.

    Example:
        >>> space = Space.of(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), "2")
        >>> space.size, space.blocks["2"].shape
        (3, (1, 3))
    """

    blocks: Mapping[str, BlockSpec]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        parameters: Selection = None,
        decay: Mapping[str, float] | float = 0.0,
    ) -> Space:
        """Lay out the chosen parameters of `model`.

        Args:
            model: any module; parameters shared between modules count once, under their first name, and those without
                elements take no part.
            parameters: `None` for everything with `requires_grad`; or a glob over parameter or module names
                (`"fc*.weight"`, `"layers.3"`: a module name stands for all parameters under it), a module
                of the model, a parameter, a predicate `(name, parameter) -> bool`, or a list of these.
                What is asked for by name is taken even if it is frozen (`requires_grad=False`).
            decay: L2 strength, one number, or one per name of a parameter or glob as above (absent names: 0); a
                parameter's own name goes before globs.

        Raises:
            UnknownName: a pattern or a decay's name matches nothing; the nearest name is offered.
            InvalidInput: nothing with elements is selected, or a selected parameter is integer, complex or
                uninitialised, or a decay is negative, or two globs give a parameter different ones.
        """
        names = _Names.of(model)
        chosen = _select(model, names, parameters)
        for name in chosen:
            _check_parameter(name, names.parameters[name])
        chosen = [name for name in chosen if names.parameters[name].numel() > 0]
        if not chosen:
            raise InvalidInput("The chosen parameters have no elements; choose others with parameters=.")
        strengths = _decay_strengths(model, names, decay)
        shapes = {name: tuple(names.parameters[name].shape) for name in chosen}
        blocks = _joint_blocks(model, names, shapes, strengths)
        in_joint_blocks = {p for block in blocks.values() for p in block.parameters}
        # Blocks follow the order of the model's parameters, so that flat vectors read like the model.
        first = {block.parameters[0]: block for block in blocks.values()}
        ordered: dict[str, BlockSpec] = {}
        for name, shape in shapes.items():
            if name in first:
                ordered[first[name].name] = first[name]
            elif name not in in_joint_blocks:
                ordered[name] = BlockSpec(name, (name,), shape or (1,), decay=strengths.get(name, 0.0))
        return cls(ordered, shapes)

    @property
    def size(self) -> int:
        """P, the number of coordinates over all blocks."""
        return sum(block.numel for block in self.blocks.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in block order."""
        return tuple(name for block in self.blocks.values() for name in block.parameters)

    @property
    def decay(self) -> dict[str, float]:
        """L2 strength per block."""
        return {name: block.decay for name, block in self.blocks.items()}

    @property
    def slices(self) -> dict[str, slice]:
        """Where each block lies in a flat vector."""
        slices, start = {}, 0
        for name, block in self.blocks.items():
            slices[name] = slice(start, start + block.numel)
            start += block.numel
        return slices

    def numel(self, name: str) -> int:
        """The number of coordinates of a block or of a parameter."""
        if name in self.blocks:
            return self.blocks[name].numel
        if name in self.shapes:
            return math.prod(self.shapes[name])
        known = [*self.blocks, *self.shapes]
        raise UnknownName(f"{name!r} is neither a block nor a parameter of this space.{nearest(name, known)}")

    def values(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The live parameters of `model` in this space, by name, in block order."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        missing = [name for name in self.names if name not in parameters]
        if missing:
            raise UnknownName(f"The model has no parameter {missing[0]!r}.{nearest(missing[0], parameters)}")
        return {name: parameters[name] for name in self.names}

    def like(self, model: nn.Module) -> Tensor:
        """An empty tensor with the type and on the device of the first parameter."""
        first = next(iter(self.values(model).values()))
        return torch.empty(0, dtype=first.dtype, device=first.device)

    def rows(self, flat: Float[Tensor, "_ _"]) -> Rows:
        """Rows whose dense blocks are views onto `flat` `[n, P]`; writing to one writes to the other."""
        if flat.ndim != 2 or flat.shape[1] != self.size:
            raise InvalidInput(f"Expected a matrix [n, {self.size}], got shape {list(flat.shape)}.")
        n = len(flat)  # splitting an axis is always a view, whatever the strides
        return Rows({k: Dense(flat[:, part].view(n, *self.blocks[k].shape)) for k, part in self.slices.items()})

    def to_parameters(self, rows: Rows) -> dict[str, Tensor]:
        """Rows as parameter-shaped tensors `[n, *parameter.shape]` by name; inverse of `from_parameters`."""
        tensors: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            values = rows.blocks[name].dense()
            if not block.joint:
                tensors[block.parameters[0]] = values.view(len(values), *self.shapes[block.parameters[0]])
                continue
            weight, bias = block.parameters
            matrix = values[..., :-1]
            matrix = matrix.transpose(1, 2) if block.transposed else matrix
            tensors[weight] = matrix.reshape(len(values), *self.shapes[weight])
            tensors[bias] = values[..., -1]
        return tensors

    def from_parameters(self, values: Mapping[str, Float[Tensor, "_ ..."]]) -> Rows:
        """Rows from parameter-shaped tensors `[n, *parameter.shape]`; inverse of `to_parameters`."""
        return Rows({name: self.block(name, values) for name in self.blocks})

    def block(self, name: str, values: Mapping[str, Float[Tensor, "_ ..."]]) -> Dense:
        """One block of `from_parameters`; `values` need hold only that block's parameters."""
        block = self.blocks[name]
        for part in block.parameters:
            if part not in values:
                raise InvalidInput(f"No value was given for parameter {part!r}.{nearest(part, values)}")
            if tuple(values[part].shape[1:]) != self.shapes[part]:
                shape, expected = list(values[part].shape), ["n", *self.shapes[part]]
                raise InvalidInput(f"Parameter {part!r} needs shape {expected}, got {shape}.")
        weight = values[block.parameters[0]]
        if block.joint:
            weight = weight.transpose(1, 2) if block.transposed else weight.flatten(2)
            weight = torch.cat([weight, values[block.parameters[1]][..., None]], -1)
        return Dense(weight.reshape(len(weight), *block.shape))

    def __eq__(self, other: object) -> bool:
        """Two spaces are equal when they hold the same blocks in the same order."""
        return isinstance(other, Space) and list(self.blocks.values()) == list(other.blocks.values())

    def __hash__(self) -> int:
        return hash(tuple(self.blocks.values()))

    def __repr__(self) -> str:
        inside = ", ".join(f"{name} {list(block.shape)}" for name, block in self.blocks.items())
        return f"Space({self.size:,} coordinates: {inside})"


# --------------------------------------------------------------------------- names


@dataclass(frozen=True, eq=False)
class _Names:
    """Every parameter of a model once, with all names it goes by, and who owns it."""

    parameters: Mapping[str, nn.Parameter]  # first name -> parameter
    canonical: Mapping[str, str]  # any name -> first name
    owners: Mapping[str, int]  # first name -> number of distinct (module, attribute) that hold it

    @classmethod
    def of(cls, model: nn.Module) -> _Names:
        parameters = dict(model.named_parameters())
        first = {id(parameter): name for name, parameter in parameters.items()}
        every = model.named_parameters(remove_duplicate=False)
        canonical = {name: first[id(parameter)] for name, parameter in every}
        owners = dict.fromkeys(parameters, 0)
        # A module registered twice is one owner: its calls are seen by one set of hooks.
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners[first[id(parameter)]] += 1
        return cls(parameters, canonical, owners)


def _select(model: nn.Module, names: _Names, selection: Selection) -> list[str]:
    """First names of the chosen parameters, in the model's order."""
    if selection is None:
        chosen = {name for name, p in names.parameters.items() if p.requires_grad}
        if not chosen:
            raise InvalidInput(
                "The model has no trainable parameter (requires_grad is False everywhere or there is none); "
                "call requires_grad_(True) or name the parameters with parameters=."
            )
    else:
        chosen = set()
        one = isinstance(selection, (str, nn.Module, Tensor)) or not isinstance(selection, Iterable)
        for selector in [selection] if one else selection:  # type: ignore[union-attr]
            chosen |= _match(model, names, selector)  # type: ignore[arg-type]
        if not chosen:
            raise InvalidInput("parameters= selects no parameter; pass None for everything that is trainable.")
    return [name for name in names.parameters if name in chosen]


def _match(model: nn.Module, names: _Names, selector: Selector) -> set[str]:
    if isinstance(selector, str):
        return _match_pattern(model, names, selector)
    if isinstance(selector, nn.Module):
        if not any(module is selector for module in model.modules()):
            raise InvalidInput(f"The selected module {type(selector).__name__} is not part of the model.")
        wanted = {id(p) for p in selector.parameters()}
        if not wanted:
            raise InvalidInput(f"The selected module {type(selector).__name__} holds no parameter.")
    elif isinstance(selector, Tensor):
        wanted = {id(selector)}
        if not any(p is selector for p in names.parameters.values()):
            raise InvalidInput(f"A selected tensor of shape {list(selector.shape)} is no parameter of the model.")
    elif callable(selector):
        return {name for name, p in names.parameters.items() if _selects(selector, name, p)}
    else:
        raise InvalidInput(
            f"parameters= takes patterns, modules, parameters or a predicate, not {type(selector).__name__}."
        )
    return {name for name, p in names.parameters.items() if id(p) in wanted}


def _selects(predicate: Callable[[str, nn.Parameter], bool], name: str, parameter: nn.Parameter) -> bool:
    try:
        return bool(predicate(name, parameter))
    except Exception as cause:
        raise InvalidInput(
            f"The predicate given as parameters= failed on {name!r} ({type(cause).__name__}: {cause}); it must take "
            "(name, parameter) and return True or False."
        ) from cause


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name or ROOT: m for name, m in model.named_modules(remove_duplicate=False)}


def _matching(model: nn.Module, names: _Names, pattern: str) -> set[str]:
    """First names of the parameters that a glob over names of parameters and modules means."""
    matches = {first for name, first in names.canonical.items() if fnmatchcase(name, pattern)}
    for name, module in _modules(model).items():
        if name == pattern or (name != ROOT and fnmatchcase(name, pattern)):
            ids = {id(p) for p in module.parameters()}
            matches |= {first for first, p in names.parameters.items() if id(p) in ids}
    return matches


def _match_pattern(model: nn.Module, names: _Names, pattern: str) -> set[str]:
    matches = _matching(model, names, pattern)
    if not matches:
        modules = _modules(model)
        known = [*names.canonical, *(name for name, m in modules.items() if any(True for _ in m.parameters()))]
        hint = nearest(pattern, known)
        if not hint:
            hint = f" There are {', '.join(map(repr, known[:6]))}{', ...' if len(known) > 6 else ''}."
        raise UnknownName(f"The pattern {pattern!r} matches no parameter and no module with parameters.{hint}")
    return matches


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise InvalidInput(
            f"Parameter {name!r} is not initialised yet (a lazy module); run the model once on a batch first."
        )
    if not parameter.is_floating_point():
        raise InvalidInput(
            f"Parameter {name!r} is {parameter.dtype}; only real floating point parameters take part, "
            "leave it out with parameters=."
        )


def _decay_strengths(model: nn.Module, names: _Names, decay: Mapping[str, float] | float) -> dict[str, float]:
    """L2 strength by first name."""
    if not isinstance(decay, Mapping):
        decay = dict.fromkeys(names.parameters, float(decay))
    by_glob: dict[str, tuple[str, float]] = {}
    own = {names.canonical[name]: strength for name, strength in decay.items() if name in names.canonical}
    for name, strength in decay.items():
        finite_number(f"The weight decay of {name!r}", strength, least=0)
        if name in names.canonical:
            continue
        matches = _matching(model, names, name)
        if not matches:
            hint = nearest(name, names.canonical)
            raise UnknownName(f"Weight decay is given for {name!r}, which is no parameter of the model.{hint}")
        for first in matches:
            other, before = by_glob.setdefault(first, (name, float(strength)))
            if before != float(strength) and first not in own:
                raise InvalidInput(
                    f"Weight decay is given for {other!r} ({before:g}) and {name!r} ({strength:g}), and both mean "
                    f"{first!r}; give that one by its own name."
                )
    return {first: float(s) for first, s in ({first: s for first, (_, s) in by_glob.items()} | own).items()}


# --------------------------------------------------------------------------- joint blocks


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the transformer-style Conv1D: a linear layer whose weight is stored `[in, out]`."""
    if isinstance(module, torch.jit.ScriptModule):  # its parameters are no dictionary
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(module).__name__ != "Conv1D" or weight is None or bias is None or not hasattr(module, "nf"):
        return False
    return weight.ndim == 2 and bias.ndim == 1 and weight.shape[1] == bias.shape[0]


def _joint_blocks(
    model: nn.Module,
    names: _Names,
    shapes: Mapping[str, tuple[int, ...]],
    decay: Mapping[str, float],
) -> dict[str, BlockSpec]:
    """Blocks that hold a weight and its bias together."""
    joint: dict[str, BlockSpec] = {}
    for name, module in model.named_modules():
        transposed = is_conv1d(module)
        if not (transposed or isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))):
            continue
        # A parametrized weight is no ordinary parameter, and its gradient no outer product.
        if module._parameters.get("weight") is None or module._parameters.get("bias") is None:
            continue
        prefix = f"{name}." if name else ""
        pair = tuple(names.canonical[prefix + part] for part in ("weight", "bias"))
        if any(p not in shapes or names.owners[p] > 1 for p in pair):
            continue
        strengths = {decay.get(p, 0.0) for p in pair}
        if len(strengths) > 1:
            continue
        shape = shapes[pair[0]]
        matrix = (shape[1], shape[0] + 1) if transposed else (shape[0], math.prod(shape[1:]) + 1)
        block = name or ROOT
        joint[block] = BlockSpec(block, pair, matrix, transposed, strengths.pop())
    return joint
