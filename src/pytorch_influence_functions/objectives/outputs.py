"""Everything a model returns as one tensor, and back: dictionaries, tuples and dataclasses of several outputs.

Whatever is differentiated in the library is one tensor `[n, K]` with a row per example. A model may return more than
that: two heads, a dictionary, an object with fields. `OutputLayouts.flatten` puts the numbers of every tensor in it
side by side, and `restore` gives the object back, so that a loss of the user's own sees what its model returned.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import accumulate
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform, TransformedDistribution

from ..core.errors import InvalidInput, first_line

#: Where an object of several outputs keeps the one that its loss is of.
MAIN: Final = ("logits", "out")
# What a container may hold beside tensors and reach the loss as it is.
_PLAIN: Final = (type(None), str, bytes, bool, int, float, complex, torch.dtype, torch.device)


# --------------------------------------------------------------------------- walking through


def map_outputs(returned: Any, f: Callable[[Any], Any]) -> Any:
    """The same container with `f` of every tensor in it; objects that cannot be looked into become None.

    Containers are tuples (named ones too), lists, mappings, dataclasses, and objects with tensors as attributes.
    """
    if isinstance(returned, (Tensor, _Place)):
        return f(returned)
    if isinstance(returned, _PLAIN):
        return returned
    if isinstance(returned, tuple) and hasattr(returned, "_fields"):
        return type(returned)(*(map_outputs(member, f) for member in returned))
    if isinstance(returned, (tuple, list)):
        return type(returned)(map_outputs(member, f) for member in returned)
    if isinstance(returned, Mapping):
        members = {key: map_outputs(member, f) for key, member in returned.items()}
        return _rebuild(returned, members)
    if isinstance(returned, (Distribution, _Unmade)):
        return _Unmade.of(returned).mapped(f)
    if isinstance(returned, Transform):
        return _mapped_transform(returned, f)
    attributes = _attributes(returned)
    if not attributes:
        return None
    twin = copy.copy(returned)
    for name, value in attributes.items():
        object.__setattr__(twin, name, map_outputs(value, f))
    return twin


@final
@dataclass(frozen=True)
class _Unmade:
    """A distribution by its arguments: it keeps the shape of its batch, so that it is made anew for each."""

    kind: type[Distribution]
    arguments: Mapping[str, Any]

    @staticmethod
    def of(returned: Distribution | _Unmade) -> _Unmade:
        if isinstance(returned, _Unmade):
            return returned
        if isinstance(returned, Independent):
            inside = {"base_distribution": returned.base_dist}
            return _Unmade(Independent, inside | {"reinterpreted_batch_ndims": returned.reinterpreted_batch_ndims})
        kind, own = type(returned), vars(returned)
        if isinstance(returned, TransformedDistribution) and kind is TransformedDistribution:
            return _Unmade(kind, {"base_distribution": returned.base_dist, "transforms": returned.transforms})
        arguments: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
            if name == "validate_args" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            others = next((group for group in _ALTERNATIVES if name in group), (name,))
            # Of several ways to say the same the one that was given: the rest may have been worked out from it.
            if name != next((other for other in others if other in own), others[0]):
                continue
            private = f"_{name}"
            try:
                arguments[name] = own[private] if private in own and name not in own else getattr(returned, name)
            except AttributeError as cause:
                raise _not_made(kind, f"it does not tell its argument {name!r}") from cause
        return _Unmade(kind, arguments)

    def mapped(self, f: Callable[[Any], Any]) -> Any:
        arguments = {name: map_outputs(value, f) for name, value in self.arguments.items()}
        if not all(map(_is_made, arguments.values())):
            return _Unmade(self.kind, arguments)
        try:
            return self.kind(**arguments, validate_args=False)
        except (TypeError, ValueError, AttributeError) as cause:
            raise _not_made(self.kind, f"{type(cause).__name__}: {first_line(cause)}") from cause


# Of each of these a distribution takes one.
_ALTERNATIVES: Final = (("logits", "probs"), ("scale_tril", "covariance_matrix", "precision_matrix"))


def _not_made(kind: type, why: str) -> InvalidInput:
    return InvalidInput(
        f"The model returned a {kind.__name__}, which cannot be made again for other examples ({why}); return its "
        "parameters as tensors, and make the distribution of them in the loss."
    )


def _mapped_transform(transform: Transform, f: Callable[[Any], Any]) -> Transform:
    """A transform of a distribution with `f` of every tensor in it."""
    if _is_inverse(transform):
        return _mapped_transform(transform.inv, f).inv
    twin = copy.copy(transform)
    for name, value in vars(transform).items():
        if name == "_cached_x_y":
            vars(twin)[name] = (None, None)
        elif name == "_inv":  # of the other
            vars(twin)[name] = None
        elif isinstance(value, (Tensor, Transform, _Place)):
            vars(twin)[name] = map_outputs(value, f)
        elif isinstance(value, (list, tuple)) and any(isinstance(member, Transform) for member in value):
            vars(twin)[name] = [map_outputs(member, f) for member in value]
    return twin


def _is_inverse(transform: Transform) -> bool:
    """Whether a transform is made of the one that it inverts."""
    return type(transform).__name__ == "_InverseTransform"


def _is_made(value: Any) -> bool:
    """Whether nothing in an argument stands for a tensor."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_made, value))
    if isinstance(value, Transform):
        members = vars(value.inv if _is_inverse(value) else value)
        inner = [member for name, member in members.items() if name not in ("_inv", "_cached_x_y")]
        return not any(isinstance(m, _Place) or (isinstance(m, (list, Transform)) and not _is_made(m)) for m in inner)
    return isinstance(value, (Tensor, Distribution, *_PLAIN))


def _attributes(returned: Any) -> dict[str, Any]:
    """The fields of a dataclass, or the attributes of an object that holds tensors itself; empty for anything else."""
    if isinstance(returned, (type, nn.Module)):
        return {}
    record: Any = returned
    if is_dataclass(record):
        return {member.name: getattr(returned, member.name) for member in fields(returned)}
    attributes = dict(getattr(returned, "__dict__", {}))
    # Not deeper: a cache of attention keys is no output.
    return attributes if any(isinstance(value, (Tensor, _Place)) for value in attributes.values()) else {}


def _rebuild(like: Mapping[Any, Any], members: dict[Any, Any]) -> Any:
    # An output class of transformers is a mapping and a dataclass at once, and is made from its fields by name.
    kind: Any = type(like)
    if hasattr(kind, "__dataclass_fields__"):
        return kind(**members)
    try:
        return kind(members)
    except Exception:  # a mapping with a constructor of its own
        return members


def output_tensors(returned: Any) -> list[Tensor]:
    """Every tensor in what a model returned, in the order of `map_outputs`."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_outputs(returned, note)
    return tensors


def describe_outputs(returned: Any) -> str:
    """What a model returned, in words: `a dict of logits (8, 3) and boxes (8, 4)`."""
    if isinstance(returned, Tensor):
        return f"shape {tuple(returned.shape)}"
    kind = type(returned).__name__
    article = "an" if kind[:1].lower() in tuple("aeiou") else "a"
    # A distribution of distributions holds no tensor itself.
    named = list(_named(returned)) or [("", tensor) for tensor in output_tensors(returned)]
    parts = [f"{name}{tuple(tensor.shape)}" for name, tensor in named]
    if not parts:
        return f"{article} {kind} without a tensor"
    shown = parts[:4] + ([f"{len(parts) - 4} more"] if len(parts) > 4 else [])
    return f"{article} {kind} of {' and '.join([', '.join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)}"


def _named(returned: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors with what to call them in a sentence."""
    members: list[tuple[str, Any]]
    if isinstance(returned, Mapping):
        members = [(f"{key} ", value) for key, value in returned.items()]
    elif isinstance(returned, tuple) and hasattr(returned, "_fields"):
        members = [(f"{name} ", value) for name, value in zip(returned._fields, returned, strict=True)]
    elif isinstance(returned, (tuple, list)):
        members = [("", value) for value in returned]
    else:
        members = [(f"{name} ", value) for name, value in _attributes(returned).items()]
    for name, value in members:
        yield from ((name, tensor) for tensor in output_tensors(value))


# --------------------------------------------------------------------------- the one output


@final
@dataclass(frozen=True, eq=False)
class OutputsAndWeights:
    """What a model returned, beside the weights of its loss: the loss is a function of both."""

    outputs: Any
    weights: Mapping[str, Tensor]


def without_weights(returned: Any) -> Any:
    """What the model itself returned."""
    return returned.outputs if isinstance(returned, OutputsAndWeights) else returned


def with_main(returned: Any) -> Any:
    """The one output that a loss is of, see `main_output`; the weights of the loss stay beside it."""
    if isinstance(returned, OutputsAndWeights):
        return replace(returned, outputs=main_output(returned.outputs))
    return main_output(returned)


def has_main(returned: Any) -> bool:
    """Whether one of several outputs is marked as the one that a loss is of: `.logits`, `["logits"]` or `["out"]`."""
    returned = without_weights(returned)
    return not isinstance(returned, Tensor) and _marked(returned) is not None


def main_output(returned: Any, otherwise: str = "") -> Tensor:
    """The one tensor that a loss of outputs and targets is of.

    That is the tensor itself; `logits` or `out` of a mapping or an object; or the only tensor of numbers there is.

    Args:
        returned: by a model.
        otherwise: what is asked of one tensor and what to do where there are several, as the end of a sentence; by
            default what is said of a loss.

    Raises:
        InvalidInput: there is no tensor, or several that it might be; the message names the readings.
    """
    if isinstance(returned, Tensor):
        return returned
    marked = _marked(returned)
    if marked is not None:
        return marked
    tensors = [tensor for tensor in output_tensors(returned) if tensor.is_floating_point()]
    if len(tensors) == 1:
        return tensors[0]
    if not tensors:
        raise InvalidInput(
            f"The model returned {type(returned).__name__}, expected a tensor, an object with .logits, or a container "
            "of tensors; wrap the model so that it returns its outputs."
        )
    raise InvalidInput(f"The model returned {describe_outputs(returned)}, and {otherwise or _ask_for_loss(returned)}.")


def _ask_for_loss(returned: Any) -> str:
    if isinstance(returned, Distribution):
        likelihood = "loss=lambda out, y: -out.log_prob(y)"
        return f"a loss of one tensor is no loss of it; write its negative log-likelihood, {likelihood}"
    return (
        "a loss of one tensor may be meant of one of them alone or of each of several heads; write a function of all "
        f"that the model returns, loss=lambda out, y: loss_fn({_first_of(returned)}, y) for the first alone, or one "
        "that adds up the losses of the heads"
    )


def _marked(returned: Any) -> Tensor | None:
    for name in MAIN:
        value = returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)
        if isinstance(value, Tensor):
            return value
    return None


def _first_of(returned: Any) -> str:
    if isinstance(returned, Mapping):
        return f"out[{next(key for key, value in returned.items() if output_tensors(value))!r}]"
    if isinstance(returned, (tuple, list)):
        return f"out[{next(k for k, value in enumerate(returned) if output_tensors(value))}]"
    return f"out.{next(name for name, value in _attributes(returned).items() if output_tensors(value))}"


# --------------------------------------------------------------------------- all of them


@final
@dataclass(frozen=True)
class _Place:
    """Where a tensor stood in a container."""

    index: int


@final
@dataclass(frozen=True)
class _Leaf:
    """One tensor of a container: the shape of an example's part, or of all of it where examples share it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shared: bool

    @staticmethod
    def of(tensor: Tensor, shared: bool) -> _Leaf:
        return _Leaf(tuple(tensor.shape if shared else tensor.shape[1:]), tensor.dtype, shared)

    @property
    def size(self) -> int:
        """How many real numbers it takes in a row."""
        return math.prod(self.shape) * (2 if self.dtype.is_complex else 1)

    def columns(self, tensor: Tensor, n: int) -> Tensor:
        """The tensor as [n, size]."""
        numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return numbers.reshape(1, self.size).expand(n, -1) if self.shared else numbers.reshape(n, self.size)

    def restored(self, columns: Tensor) -> Tensor:
        """The tensor from its columns; what examples share is read from the first row."""
        lead = () if self.shared else (len(columns),)
        columns = columns[0] if self.shared else columns
        if self.dtype.is_complex:
            # Not view_as_complex: under vmap it asks for strides that columns of a row do not have.
            pairs = columns.reshape((*lead, *self.shape, 2))
            return torch.complex(pairs[..., 0], pairs[..., 1])
        numbers = columns.reshape((*lead, *self.shape))
        # Whole numbers and yes or no are exact in any of these types, and have no derivative.
        return numbers if self.dtype.is_floating_point else numbers.detach().to(self.dtype)


@final
@dataclass(frozen=True)
class _Layout:
    """How one container was laid out."""

    template: Any
    leaves: tuple[_Leaf, ...]
    sure: bool
    """Whether it was seen on several examples: on one alone, a shared tensor [1] looks like that example's own."""

    @property
    def key(self) -> tuple[Any, ...]:
        return _skeleton(self.template), self.leaves

    def restore(self, flat: Tensor) -> Any:
        # Not by `split`, whose parts may not be written to.
        starts = accumulate((leaf.size for leaf in self.leaves), initial=0)
        parts = [flat.narrow(1, start, leaf.size) for start, leaf in zip(starts, self.leaves, strict=False)]
        return map_outputs(self.template, lambda place: self.leaves[place.index].restored(parts[place.index]))


@final
@dataclass(eq=False)
class OutputLayouts:
    """Flattens what a model returns, and remembers how, by the numbers in a row.

    Example:
        >>> layouts = OutputLayouts()
        >>> flat = layouts.flatten({"a": torch.zeros(2, 3), "b": torch.ones(2)}, 2)
        >>> flat.shape, {name: tuple(value.shape) for name, value in layouts.restore(flat).items()}
        (torch.Size([2, 4]), {'a': (2, 3), 'b': (2,)})
    """

    by_size: dict[int, _Layout] = field(default_factory=dict)
    shared: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)
    """Which tensors, by place and shape, were seen not to run over the examples."""
    one_by_one: bool = False
    """Whether outputs were met that have no row per example: each example is then run, and its loss taken, alone."""

    def flatten(self, returned: Any, n: int) -> Tensor:
        """One row per example with the numbers of every tensor; a tensor alone stays as it is.

        A tensor whose first axis does not run over the `n` examples is one that they share, such as a learned scale.

        Raises:
            InvalidInput: there is no tensor of real numbers, or two batches have as many numbers in other shapes.
        """
        if isinstance(returned, Tensor):
            return returned
        tensors = output_tensors(returned)
        if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
            raise InvalidInput(
                f"The model returned {type(returned).__name__}, expected a tensor, an object with .logits, or a "
                "container of tensors; wrap the model so that it returns its outputs."
            )
        own = len(tensors) - (len(returned.weights) if isinstance(returned, OutputsAndWeights) else 0)
        for place, tensor in enumerate(tensors):
            if place >= own or tensor.dim() == 0 or tensor.shape[0] != n:
                self.shared.add((place, tuple(tensor.shape)))
        # What was seen to be shared is so too where it has as many rows as a batch has examples.
        leaves = tuple(_Leaf.of(t, (place, tuple(t.shape)) in self.shared) for place, t in enumerate(tensors))
        # At least float32, as for a single tensor: a loss is a sum of many terms.
        dtype = torch.float32
        for tensor in tensors:
            real = tensor.real.dtype if tensor.is_complex() else tensor.dtype
            dtype = torch.promote_types(dtype, real) if real.is_floating_point else dtype
        flat = torch.cat([leaf.columns(t, n).to(dtype) for leaf, t in zip(leaves, tensors, strict=True)], 1)
        places = iter(range(len(tensors)))
        self._keep(_Layout(map_outputs(returned, lambda _: _Place(next(places))), leaves, n > 1))
        return flat

    def _keep(self, layout: _Layout) -> None:
        size = sum(leaf.size for leaf in layout.leaves)
        known = self.by_size.setdefault(size, layout)
        if layout.sure and not known.sure:
            self.by_size[size] = layout
        elif known.key != layout.key:
            raise InvalidInput(
                f"The outputs of two batches have {size} numbers per example in different shapes or with other values "
                f"beside the tensors ({_shapes(known.leaves)} and {_shapes(layout.leaves)}), so they cannot be told "
                "apart; pad the batches to one shape, or return tensors only."
            )

    def restore(self, flat: Tensor) -> Any:
        """What the model returned, from rows that `flatten` made; any other tensor stays as it is."""
        layout = self.by_size.get(flat.shape[1]) if flat.dim() == 2 else None
        return flat if layout is None else layout.restore(flat)

    def has_shared(self, flat: Tensor) -> bool:
        """Whether examples share one of the tensors, so that its slope must be taken example by example."""
        layout = self.by_size.get(flat.shape[1]) if flat.dim() == 2 else None
        return layout is not None and any(leaf.shared for leaf in layout.leaves)


def has_rows(returned: Any, n: int) -> bool:
    """Whether outputs of `n` examples lie along the first axis: not where there is an entry of a list for each."""
    returned = without_weights(returned)
    if isinstance(returned, Tensor):
        return returned.dim() > 0 and returned.shape[0] == n
    if type(returned) not in (list, tuple) or len(returned) != n:
        return True
    return all(tensor.dim() > 0 and tensor.shape[0] == n for tensor in output_tensors(returned))


def _skeleton(template: Any) -> Any:
    """What two layouts must share: containers, names, and what stands beside the tensors."""
    if isinstance(template, _Place):
        return "tensor"
    if isinstance(template, Mapping):
        members: Any = list(template.items())
    elif isinstance(template, (tuple, list)):
        members = enumerate(template)
    else:
        members = list(_attributes(template).items())
        if not members:
            return repr(template)
    return type(template).__name__, tuple((name, _skeleton(member)) for name, member in members)


def _shapes(leaves: Sequence[_Leaf]) -> str:
    return ", ".join(str(leaf.shape) for leaf in leaves)


def refuse_broadcast(name: str, outputs: Tensor, targets: Any) -> None:
    """Say so where a loss puts every output beside every target: an axis of 1 that only one of the two has.

    Args:
        name: of the loss.
        outputs: of a few examples.
        targets: theirs.

    Raises:
        InvalidInput: one has the shape (n, 1) and the other (n,).
    """
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return
    n, shapes = len(outputs), [tuple(outputs.shape), tuple(targets.shape)]
    if n > 1 and sorted(shapes) == [(n,), (n, 1)]:
        advice = "outputs.squeeze(-1)" if outputs.dim() == 2 else "targets.squeeze(-1)"
        raise InvalidInput(
            f"The loss {name} of {n} examples is neither the mean nor the sum of their own: its outputs of shape "
            f"{shapes[0]} and targets of shape {shapes[1]} broadcast to ({n}, {n}), every output beside every target; "
            f"write {advice} in it, and train the model again if training had it so."
        )
