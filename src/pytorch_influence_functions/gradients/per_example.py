"""`pullback`: one row J_n^T c_n per example, the derivative primitive everything else is made of.

Loss rows, margin rows, sampled-Fisher rows and the Gauss-Newton's H^(1/2) J rows differ only in the
cotangent c. Layers with a rule are captured by hooks in one forward and one backward pass; any other parameter goes
through `torch.func.vmap`, and what vmap cannot do through one backward pass per example. Which parameter takes which
route is decided once, on a few real examples, by comparing every block with one-example autograd.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.batches import batch_slice, tensors_of, whole_batch
from ..core.distributed import World, current
from ..core.errors import InvalidInput, NonFinite, name_ids
from ..core.indexing import spread_sample
from ..linalg.block_diagonal import subspace
from ..linalg.blocks import AbstractBlock, Dense
from ..linalg.chunks import chunks
from ..linalg.rows import Route, Rows
from ..linalg.space import Space
from ..objectives.base import AbstractObjective
from ..objectives.tokens import attention_mask_of
from ..problem.data import Source
from ..problem.model_state import double_backward_safe, preserved
from ..problem.problem import Problem, check_weights, first_batch, sweep
from .assignment import misassigned
from .layer_rules import Layout, ParameterPart, find_rule, layout_of
from .one_by_one import rows_one_by_one
from .probe import Probe, tolerance
from .projections import AbstractProjector, AbstractReduction
from .recording import Capture, HookedLayer, record_calls
from .separability import loss_together, refuse_sum
from .vjp import detach_parameters, per_example_vjp

log = logging.getLogger("pytorch_influence_functions")

# Share of the memory that a batch may take; what the backward pass and the inner products hold comes beside it.
_BATCH_SHARE = 1 / 16
# Examples, spread over all, of which it is looked at whether layers read them in place; half as many where one takes
# more numbers than this.
_LOOKED_AT, _LARGE = 8, 1 << 24
# The most examples whose gradients are taken together.
MOST_TOGETHER = 1 << 12
# Largest temporary of a vmapped fallback, in numbers.
_VMAP_NUMBERS = 1 << 26


class GradientBatch(NamedTuple):
    """The rows of one batch, with the losses and the batch they come from."""

    ids: Int[Tensor, " n"]
    rows: Rows
    losses: Float[Tensor, " n"]
    batch: Any


@dataclass(eq=False)
class Tape:
    """One forward pass; `rows` may be called with several cotangents."""

    outputs: Tensor
    _capture: Capture
    _derivatives: Derivatives
    _batch: Any
    _objective: AbstractObjective

    def rows(self, cotangent: Tensor, keep_graph: bool = False) -> Rows:
        """Rows J_n^T c_n. `cotangent` has the shape of `outputs`; `keep_graph` allows another call."""
        d = self._derivatives
        if d.problem.is_cut_up:  # a process that failed since the forward pass is heard of here, and not waited for
            current().meet("a backward pass")
        blocks = self._capture.rows(self.outputs, cotangent, keep_graph)
        if d.vmapped:
            blocks |= d._by_vmap(self._batch, cotangent, self._objective)
        if d.looped:
            blocks |= d._by_loop(self._batch, cotangent, self._objective)
        n = self._capture.n
        rows = Rows({k: blocks[k] if k in blocks else self._zeros(n, k) for k in d.whole.blocks})
        return rows if d.projector is None else d.projector.apply(rows)

    def _zeros(self, n: int, block: str) -> Dense:
        like = self._derivatives.whole.like(self._derivatives.problem.model)
        return Dense(like.new_zeros(1).expand(n, *self._derivatives.whole.blocks[block].shape))


@dataclass(frozen=True, eq=False)
class Derivatives:
    """How this problem's per-example gradients are taken. Made by `Derivatives.of`, which pays once."""

    problem: Problem
    objective: AbstractObjective
    whole: Space
    """Every chosen parameter; `space`, where rows live, unless they are projected."""
    layers: Mapping[str, HookedLayer]
    vmapped: tuple[str, ...] = ()
    looped: tuple[str, ...] = ()
    numbers: float = 0.0
    """How many numbers one example's row takes; 0 where that was not measured."""
    held: float = 0.0
    """How many numbers one example takes while its row is made: inputs and activations, or the row if that is more."""
    memory: float = math.inf
    """Bytes that the whole method may take."""
    projector: AbstractProjector | None = None
    precision: torch.dtype = torch.float64
    """The narrowest type in which the model computes: below its weights' where it opens autocast itself."""

    @staticmethod
    def of(problem: Problem, route: Route = Route.AUTO) -> Derivatives:
        """Plan and verify on the first examples. `Route.VMAP` or `Route.LOOP` force that route for all parameters.

        Raises `InvalidInput` when an example's output depends on its neighbours in the batch.
        """
        check_weights(problem.model)
        space = problem.space
        with preserved(problem.model, space.names):
            probe = Probe.take(problem)
            every = tuple(space.blocks)
            start = Derivatives(problem, probe.objective, space, {}, held=probe.held, precision=probe.precision)
            if problem.is_cut_up and route in (Route.LOOP, Route.VMAP, Route.FORWARD):
                refuse_fallback(every[:1], f"route={route.value!r} was asked for")
            if route is Route.LOOP:
                return replace(start, looped=every, held=max(probe.held, space.size))
            if route is Route.VMAP:
                return _add_fallbacks(replace(start, held=max(probe.held, space.size)), probe, every, {})
            layers = _find_layers(problem.model, space, probe)
            covered = {b for s in layers.values() for b in s.parts}
            plan = replace(start, layers=layers)
            wrong = probe.disagreeing(plan.pullback, covered)
            if len(wrong) == len(covered):
                # What examples share is given an axis of its own, which code after the layer may not bear.
                layers = {k: s for k, s in layers.items() if "shared" not in s.layouts}
                plan = replace(plan, layers=layers)
                covered = {b for s in layers.values() for b in s.parts}
                wrong = probe.disagreeing(plan.pullback, covered)
            unusable = [b for b in every if b not in covered] + wrong
            layers = _without(layers, unusable)
            plan = replace(plan, layers=layers)
            for wider, blocks in _suspects(plan, probe):
                probe = wider
                unusable += [b for b in probe.disagreeing(plan.pullback, blocks) if b not in unusable]
            plan = replace(plan, layers=_without(layers, unusable))
            if unusable and problem.is_cut_up:
                refuse_fallback(unusable, "no rule gives them: the layer is of another kind, or is not called")
            plan = _add_fallbacks(plan, probe, tuple(b for b in every if b in unusable), space.blocks)
            rows = plan.pullback(probe.batch, probe.n, probe.cotangent)
            numbers = rows.numbers / probe.n
            return replace(plan, numbers=numbers, held=max(numbers, plan.held))

    @property
    def space(self) -> Space:
        """The space of the rows: projected, where there is a projection."""
        return self.whole if self.projector is None else self.projector.space

    def with_projection(self, projection: AbstractReduction) -> Derivatives:
        """The same derivatives with every row projected; raises as `AbstractReduction.projector`."""
        return replace(self, projector=projection.projector(self.whole))

    def restricted(self, names: Iterable[str]) -> Derivatives:
        """The same derivatives over some blocks only: every curvature of it is the diagonal block of the whole one's.

        Args:
            names: the blocks.
        """
        space = subspace(self.whole, names)
        layers = {}
        for key, layer in self.layers.items():
            parts = {block: part for block, part in layer.parts.items() if block in space.blocks}
            if parts:
                layers[key] = replace(layer, parts=parts)
        vmapped, looped = (tuple(b for b in some if b in space.blocks) for some in (self.vmapped, self.looped))
        return replace(self, whole=space, layers=layers, vmapped=vmapped, looped=looped)

    @property
    def routes(self) -> dict[str, str]:
        """For every block: `rule`, `vmap` or `loop`."""
        kinds = dict.fromkeys(self.vmapped, "vmap") | dict.fromkeys(self.looped, "loop")
        return {k: kinds.get(k, "rule") for k in self.whole.blocks}

    def tape(self, batch: Any, n: int, objective: AbstractObjective | None = None) -> Tape:
        """Run the model forward on `n` examples and record what rows need."""
        # A measure may be of other outputs than the loss is, so rows need the objective that took these.
        objective = objective or self.objective
        with (
            preserved(self.problem.model, self.whole.names),
            torch.enable_grad(),
            record_calls(self.layers, n) as capture,
            current().unheard() if self.problem.is_cut_up else nullcontext(),
        ):
            outputs = objective.outputs(self.problem.model, batch)
        if outputs.dim() == 0 or outputs.shape[0] != n:
            raise InvalidInput(
                f"The model gave outputs of shape {tuple(outputs.shape)} for {n} example{'' if n == 1 else 's'}; the "
                "first axis must run over the examples, so return one output per example, with .squeeze(-1) instead of "
                ".squeeze()."
            )
        return Tape(outputs, capture, self, batch, objective)

    def pullback(self, batch: Any, n: int, cotangent: Tensor) -> Rows:
        """Row n is J_n^T c_n, with c = `cotangent` in the shape of the model's outputs."""
        with preserved(self.problem.model, self.whole.names):
            return self.tape(batch, n).rows(cotangent)

    def loss_rows(self, ids: Tensor, batch: Any, objective: AbstractObjective | None = None) -> GradientBatch:
        """Row n is the gradient of example n's loss (or of another measure, given as `objective`)."""
        objective = objective or self.objective
        with preserved(self.problem.model, self.whole.names):
            tape = self.tape(batch, len(ids), objective)
            objective.check(tape.outputs.detach(), batch, ids)
            losses, slope = slopes(objective, tape.outputs, batch, ids)
            return GradientBatch(ids, tape.rows(slope).without_idle(), losses, batch)

    def stream(
        self,
        source: Source | None = None,
        objective: AbstractObjective | None = None,
        ids: Tensor | None = None,
        label: str = "gradients",
        world: World | None = None,
    ) -> Iterator[GradientBatch]:
        """Loss rows of the training data (or `source`), batch by batch, in dataset order.

        Batches suit the size of an example (`batched`): memory that the allocator cannot reuse also costs time (a
        transformer's rows take a fifth longer in batches of 64 than of 30).
        """
        source = self.batched(source or self.problem.data)
        for batch_ids, batch in sweep(self.problem, source, ids, label, world):
            gradients = self.loss_rows(batch_ids, batch, objective)
            _refuse_nonfinite(gradients.rows.sums(), batch_ids, "gradient")
            yield gradients

    def batched(self, source: Source, times: int = 1, most: int = MOST_TOGETHER) -> Source:
        """The examples of `source` in batches that suit what is held for one of them; see `Source.suited_to`.

        Args:
            source: training data or queries.
            times: how often an example's numbers are held at once, as for several directions.
            most: the most examples of a batch.
        """
        each = (self.held or self.space.size) * times
        number_bytes = self.whole.like(self.problem.model).element_size()
        return source.suited_to(each, most, current().size, self.memory * _BATCH_SHARE / number_bytes)

    def _by_vmap(self, batch: Any, cotangent: Tensor, objective: AbstractObjective) -> dict[str, AbstractBlock]:
        names = [p for b in self.vmapped for p in self.whole.blocks[b].parameters]
        parameters = detach_parameters(self.problem.model, names)
        chunk = max(1, _VMAP_NUMBERS // max(1, sum(p.numel() for p in parameters.values())))
        with double_backward_safe(self.problem.model):
            rows = per_example_vjp(self.problem.model, objective, parameters, batch, cotangent, chunk)
        return {b: self.whole.block(b, rows) for b in self.vmapped}

    def _by_loop(self, batch: Any, cotangent: Tensor, objective: AbstractObjective) -> dict[str, AbstractBlock]:
        names = [p for b in self.looped for p in self.whole.blocks[b].parameters]
        rows = rows_one_by_one(self.problem.model, objective, names, batch, cotangent)
        return {b: self.whole.block(b, rows) for b in self.looped}


def slopes(objective: AbstractObjective, outputs: Tensor, batch: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [n] and their derivative in the outputs; NaNs are named by dataset index.

    Large outputs are taken a few examples at a time: a loss holds as many numbers several times over, and the logits of
    a language model, one per token and word of its vocabulary, are most of what a batch takes.
    """
    n, outputs, tensors = len(ids), outputs.detach(), [t for _, t in tensors_of(batch)]
    parts = chunks(n, outputs.numel() // max(1, n))
    # Padded texts are cut as they are: collated again they would be padded otherwise than the outputs.
    if len(parts) == 1 or not tensors or not all(t.dim() == 0 or len(t) == n for t in tensors):
        return _slopes(objective, outputs, batch, ids)
    losses, slope = [], torch.empty_like(outputs)
    for part in parts:
        loss, slope[part] = _slopes(objective, outputs[part], batch_slice(whole_batch(batch), n, part), ids[part])
        losses.append(loss)
    return torch.cat(losses), slope


def _slopes(objective: AbstractObjective, outputs: Tensor, batch: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    closed = objective.losses_and_slope(outputs.detach(), batch)
    if closed is not None:
        _refuse_nonfinite(closed[0], ids, "loss", batch)
        return closed
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        losses = objective.losses(leaf, batch)
    if losses.shape != (len(ids),):
        raise InvalidInput(
            f"{type(objective).__name__} gave losses of shape {tuple(losses.shape)} for {len(ids)} examples; "
            "one number per example is needed, so reduce over everything but the first axis."
        )
    _refuse_nonfinite(losses.detach(), ids, "loss", batch)
    if not losses.requires_grad:
        raise InvalidInput(
            f"The loss of {type(objective).__name__} has no derivative in the model's outputs; it was probably "
            "detached or computed through argmax or numpy. Use a differentiable loss."
        )
    slope = torch.autograd.grad(losses.sum(), leaf)[0]
    with torch.no_grad():
        if (together := loss_together(objective, outputs, batch)) is not None:
            refuse_sum(objective, lambda: outputs, batch, losses.detach(), together, ids)
    return losses.detach(), slope


def _refuse_nonfinite(values: Tensor, ids: Tensor, what: str, batch: Any = None) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise NonFinite(
            f"The {what} is NaN or infinite at dataset indices {name_ids(ids.to(bad.device)[bad].tolist())}; "
            f"{_cure(bad, batch)}"
        )


def _cure(bad: Tensor, batch: Any) -> str:
    """What to do about losses that are not finite: padding may be to blame, not the examples."""
    mask = attention_mask_of(batch)
    if mask is not None and mask.ndim == 2 and len(mask) == len(bad) and not bool(mask[bad, 0].any()):
        return (
            "all of these are padded on the left, and attention over padding alone can be 0 / 0 (eager attention of "
            "float64 weights is). Load the model with attn_implementation='sdpa' or in float32, or pad on the right."
        )
    return "look at these examples, or remove them with torch.utils.data.Subset."


def refuse_fallback(blocks: Sequence[str], why: str) -> None:
    """Refuse gradients that need all weights in one place.

    Raises:
        InvalidInput: always.
    """
    raise InvalidInput(
        f"Gradients of {', '.join(map(repr, blocks[:3]))}{' and others' if len(blocks) > 3 else ''} cannot be taken in "
        f"a model that fully_shard has cut up ({why}); leave it out with parameters=, or put the model together first."
    )


def _find_layers(model: nn.Module, space: Space, probe: Probe) -> dict[str, HookedLayer]:
    """Modules with a rule that feed selected parameters, with the place of the examples at each call."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    block_of = {p: b for b, spec in space.blocks.items() for p in spec.parameters}
    layers: dict[str, HookedLayer] = {}
    for name, module in model.named_modules():
        rule = find_rule(module)
        if rule is None:
            continue
        parts: dict[str, ParameterPart] = {}
        for key in ("weight", "bias"):
            parameter = module._parameters.get(key)
            block = block_of.get(canonical.get(id(parameter), ""))
            if parameter is not None and block is not None:
                part: ParameterPart = "joint" if len(space.blocks[block].parameters) > 1 else key
                parts[block] = part
        if parts:
            layers[name] = HookedLayer(name, module, rule, parts)
    shapes = []
    for count in (2, 3):
        with torch.no_grad(), record_calls(layers, count, lambda layer, number, x: tuple(x.shape)) as capture:
            probe.objective.outputs(model, batch_slice(probe.batch, probe.n, slice(0, count)))
        shapes.append(capture.seen)
    return {k: replace(s, layouts=lay) for k, s in layers.items() if (lay := _layouts(k, *shapes)) is not None}


def _layouts(site: str, two: Mapping[str, Any], three: Mapping[str, Any]) -> tuple[Layout, ...] | None:
    a, b = two.get(site, []), three.get(site, [])
    if not a or len(a) != len(b):
        return None
    layouts = [layout_of(x, y) for x, y in zip(a, b, strict=True)]
    return None if None in layouts else tuple(x for x in layouts if x is not None)


def _without(layers: Mapping[str, HookedLayer], blocks: Sequence[str]) -> dict[str, HookedLayer]:
    """The layers without some of the blocks that they feed, and without those that feed no other."""
    parts = {name: {k: v for k, v in layer.parts.items() if k not in blocks} for name, layer in layers.items()}
    return {name: replace(layer, parts=parts[name]) for name, layer in layers.items() if parts[name]}


def _suspects(plan: Derivatives, probe: Probe) -> Iterator[tuple[Probe, set[str]]]:
    """Examples of the data, in two orders, and the blocks of layers that may take one's rows for another's."""
    if not plan.layers:
        return
    problem, most = probe.problem, _LOOKED_AT if probe.held <= _LARGE else _LOOKED_AT // 2
    spread, together = spread_sample(len(problem.data), most), max(2, problem.batch_size)
    for ids in (spread[first : first + together] for first in range(0, len(spread), together)):
        with _together(problem, ids) as (n, batch):
            allowed = tolerance(probe.precision)
            names = misassigned(plan.layers, problem.model, probe.objective, batch, n, allowed) if n > 1 else []
            blocks = {block for name in names for block in plan.layers[name].parts}
            for order in (torch.arange(n), torch.arange(n).flip(0)) if blocks else ():
                try:
                    wider = probe.wider(batch_slice(batch, n, order), n)
                except InvalidInput:  # a batch that must be sorted runs in one of them
                    continue
                yield wider, blocks


@contextmanager
def _together(problem: Problem, ids: Tensor) -> Iterator[tuple[int, Any]]:
    """Examples as one batch, or as many of the first where only examples of one shape go together; and how many."""
    with ExitStack() as stack:
        try:
            some = first_batch(problem, replace(problem.data, batch_size=len(ids)), ids)
            _, batch = stack.enter_context(some)
        except InvalidInput:
            ids = torch.arange(min(len(problem.data), len(ids), problem.batch_size))
            _, batch = stack.enter_context(first_batch(problem, problem.data, ids))
        yield len(ids), batch


def _add_fallbacks(plan: Derivatives, probe: Probe, blocks: tuple[str, ...], spec: Mapping[str, Any]) -> Derivatives:
    """Blocks without a rule: by vmap where that agrees with the definition, else one by one; the log says which."""
    if not blocks:
        return plan
    wrong = probe.disagreeing(replace(plan, vmapped=blocks).pullback, blocks)
    vmapped, looped = tuple(b for b in blocks if b not in wrong), tuple(wrong)
    if vmapped and wrong and probe.disagreeing(replace(plan, vmapped=vmapped).pullback, vmapped):
        vmapped, looped = (), blocks
    for route, names in (("torch.func.vmap", vmapped), ("one backward pass per example", looped)):
        if names and spec:
            log.info("No layer rule for %s; their per-example gradients are taken by %s.", ", ".join(names), route)
    return replace(plan, vmapped=vmapped, looped=looped)
