"""Products that need no per-example gradient: directional derivatives, Gauss-Newton and Hessian products.

* `losses_along`: <grad loss_n, v_q> for every example and direction by forward mode: one forward pass
  along each solved query scores a whole batch, for any architecture (Pearlmutter 1994).
* `ggn_product`: sum_n J_n^T H_n J_n v, `hessian_product`: sum_n (d^2 loss_n) v, for many v at once.

Forward mode (`torch.func.jvp` under `vmap`) is used where every operation of the model has it; otherwise
the same numbers come from reverse mode twice, one direction at a time.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from ..core.errors import InvalidInput, first_line
from ..core.warn import silence_torch
from ..linalg.rows import Rows
from ..objectives.base import AbstractObjective, AbstractOutputCurvature
from ..objectives.differentiated import output_curvature
from ..objectives.tokens import TokenCrossEntropy
from ..problem.model_state import double_backward_safe, preserved
from .per_example import Derivatives
from .probe import tolerance
from .separability import loss_together, refuse_sum
from .vjp import as_function, detach_parameters, grads

log = logging.getLogger("pytorch_influence_functions")

# Directions pushed through the model together: bounds the activations held at once.
DIRECTIONS = 16

Tree = dict[str, Tensor]


class PushforwardMode(enum.Enum):
    """How J v is computed; the first mode that passes the check is used."""

    FORWARD = "forward mode"
    REVERSE = "reverse mode twice"
    ROWS = "per-example gradients"


@dataclass(frozen=True, eq=False)
class Products:
    """Matrix-free derivative products of one problem. `Products.of` checks what the model supports."""

    derivatives: Derivatives
    mode: PushforwardMode
    unusable: set[str] = field(default_factory=set, repr=False)
    """Products that forward mode was found not to give."""

    @staticmethod
    def of(derivatives: Derivatives, batch: Any, n: int) -> Products:
        """Compare J v in each mode with the verified rows on one batch, and take the first mode that agrees.

        An operation may have no forward derivative, or one that disagrees with its backward (padding rows of an
        embedding, for instance): both are noticed here rather than in the scores.
        """
        space = derivatives.space
        generator = torch.Generator().manual_seed(0)
        if derivatives.problem.is_cut_up:
            return Products(derivatives, PushforwardMode.ROWS)  # no function of weights that are not here
        like = space.like(derivatives.problem.model)
        v = space.rows(torch.randn(1, space.size, generator=generator, dtype=torch.float64).to(like))
        tape = derivatives.tape(batch, n)
        c = torch.randn(tape.outputs.shape, generator=generator, dtype=torch.float64).to(tape.outputs)
        with preserved(derivatives.problem.model, space.names):
            expected = tape.rows(c).inner(v)[:, 0]
        narrow = torch.finfo(derivatives.precision).eps > torch.finfo(like.dtype).eps
        for mode in (PushforwardMode.FORWARD, PushforwardMode.REVERSE):
            # Where forward opens autocast, layers meet inputs of another type than their weights: backward passes do
            # not allow that under vmap (layer normalisation).
            if narrow and mode is PushforwardMode.FORWARD:
                continue
            products = Products(derivatives, mode)
            try:
                pushed = products._push_one(batch, v)
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as reason:
                log.info("No %s for this model: %s", mode.value, first_line(reason))
                continue
            if not products._can_push_losses(batch, v, n):
                continue
            gap = ((pushed * c).reshape(n, -1).sum(1) - expected).norm()
            if bool(gap <= tolerance(derivatives.precision) * (expected.norm() + 1e-6 * pushed.norm() * c.norm())):
                return products
            log.info("The %s of this model disagrees with its backward pass; it is not used.", mode.value)
        return Products(derivatives, PushforwardMode.ROWS)

    def losses_along(
        self, ids: Tensor, batch: Any, directions: Rows, objective: AbstractObjective | None = None
    ) -> Float[Tensor, "n q"]:
        """<gradient of example n's loss, direction q>, without writing any gradient out."""
        objective = objective or self.derivatives.objective
        if self.mode is PushforwardMode.ROWS:
            return self.derivatives.loss_rows(ids, batch, objective).rows.inner(directions)
        if objective is self.derivatives.objective:
            return self._push_losses(batch, directions, objective, ids).T
        try:
            return self._push_losses(batch, directions, objective, ids).T
        except (RuntimeError, NotImplementedError, InvalidInput) as reason:  # only the training loss was tried before
            log.info("No %s for this measure: %s", self.mode.value, first_line(reason))
            return self.derivatives.loss_rows(ids, batch, objective).rows.inner(directions)

    def _push_losses(self, batch: Any, directions: Rows, objective: AbstractObjective, ids: Tensor) -> Tensor:
        def losses(p: Tree) -> Tensor:
            outputs = objective.outputs(as_function(self._model, p), batch)
            own = objective.losses(outputs, batch)
            together = loss_together(objective, outputs, batch)
            return own if together is None else torch.cat([own, together[None].to(own)])

        values, pushed = self._push_with_values(losses, directions)
        n = len(ids)
        if len(values) > n:
            with torch.no_grad(), preserved(self._model, self._names):
                own, together = values[:n].detach(), values[n].detach()
                refuse_sum(objective, lambda: objective.outputs(self._model, batch), batch, own, together, ids)
        return pushed[:, :n]

    def _can_push_losses(self, batch: Any, directions: Rows, n: int) -> bool:
        """Whether a loss of the user's own has the derivative that this mode needs, as the model has."""
        try:
            self._push_losses(batch, directions, self.derivatives.objective, torch.arange(n))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as reason:
            log.info("No %s for this loss: %s", self.mode.value, first_line(reason))
            return False
        return True

    def token_losses_along(self, batch: Any, directions: Rows) -> Float[Tensor, "q n l"]:
        """<gradient of each token's part of the loss, direction q>; the objective is a `TokenCrossEntropy`.

        Raises:
            InvalidInput: neither forward mode nor reverse mode twice works for this model.
        """
        objective = self.derivatives.objective
        assert isinstance(objective, TokenCrossEntropy), "token_scores() says so in a sentence first"
        if self.mode is PushforwardMode.ROWS:
            raise InvalidInput(
                "Tokens cannot be told apart in this model: an operation of it has no forward derivative and no "
                "double backward; replace it (for attention: the math backend), or use score()."
            )
        return self._push(
            lambda p: objective.token_losses(objective.outputs(as_function(self._model, p), batch), batch), directions
        )

    def _push(self, f: Callable[[Tree], Tensor], directions: Rows) -> Tensor:
        """The derivative of f along every direction, [q, *shape of f]."""
        return self._push_with_values(f, directions)[1]

    def _push_with_values(self, f: Callable[[Tree], Tensor], directions: Rows) -> tuple[Tensor, Tensor]:
        """f itself, and its derivative along every direction, [q, *shape of f]."""
        tree = self.derivatives.space.to_parameters(directions)
        with preserved(self._model, self._names), double_backward_safe(self._model):
            current = self._current
            if self.mode is PushforwardMode.FORWARD:
                push = vmap(lambda v: jvp(f, (current,), (v,))[:2], chunk_size=DIRECTIONS, randomness="different")
                with silence_torch():
                    values, pushed = cast(tuple[Tensor, Tensor], push(tree))
                return values[0], pushed
            both = [_push_by_reverse(f, current, v) for v in _unstack(tree)]
            return both[0][0], torch.stack([pushed for _, pushed in both])

    def ggn_product(self, ids: Tensor, batch: Any, directions: Rows) -> Rows:
        """sum over the batch of J^T (d^2 loss / d outputs^2) J v, for every direction."""
        objective = self.derivatives.objective
        curvature = output_curvature(objective)
        if self.mode is PushforwardMode.ROWS:
            return self._ggn_by_rows(ids, batch, directions, curvature)
        tree = self.derivatives.space.to_parameters(directions)
        with preserved(self._model, self._names), double_backward_safe(self._model), silence_torch():
            current = self._current

            def outputs(p: Tree) -> Tensor:
                return objective.outputs(as_function(self._model, p), batch)

            if self.mode is PushforwardMode.FORWARD and (pair := self._linearise(outputs)) is not None:
                f, pull = pair
                curve = curvature.hessian_map(f, batch)

                def product(v: Tree) -> Tree:
                    pushed = jvp(outputs, (current,), (v,))[1]
                    return cast(Tree, pull(curve(pushed))[0])

                return self._rows(vmap(product, chunk_size=DIRECTIONS, randomness="different")(tree))
            products, by_reverse = [], None
            for v in _unstack(tree):
                f, pushed = _push_by_reverse(outputs, current, v)
                by_reverse = by_reverse or curvature.hessian_map(f, batch)
                products.append(_pull(outputs, current, by_reverse(pushed)))
            return self._rows(_stack(products))

    def _linearise(self, outputs: Callable[[Tree], Tensor]) -> tuple[Tensor, Callable[[Tensor], Any]] | None:
        """(outputs, u -> J^T u), or None where torch.func cannot pull through forward, as through a checkpoint."""
        if "vjp" in self.unusable:
            return None
        try:
            f, pull = vjp(outputs, self._current)  # type: ignore[misc]
        except (RuntimeError, NotImplementedError, InvalidInput) as reason:
            log.info("No torch.func.vjp for this model: %s", first_line(reason))
            self.unusable.add("vjp")
            return None
        return f, pull

    def hessian_product(self, ids: Tensor, batch: Any, directions: Rows) -> Rows:
        """sum over the batch of (d^2 loss) v, for every direction."""
        objective = self.derivatives.objective
        tree = self.derivatives.space.to_parameters(directions)
        with preserved(self._model, self._names), double_backward_safe(self._model), silence_torch():
            current = self._current

            def total(p: Tree) -> Tensor:
                return objective.losses(objective.outputs(as_function(self._model, p), batch), batch).sum()

            if self.mode is PushforwardMode.FORWARD and len(directions) > 1 and "hessian" not in self.unusable:
                product = vmap(
                    lambda v: jvp(grad(total), (current,), (v,))[1], chunk_size=DIRECTIONS, randomness="different"
                )
                try:
                    return self._rows(product(tree))
                except (RuntimeError, NotImplementedError, InvalidInput) as reason:
                    # A backward pass may have no forward derivative, and yet be differentiable backwards.
                    log.info("No forward mode for the Hessian of this model: %s", first_line(reason))
                    self.unusable.add("hessian")
            return self._rows(_stack([_hessian_by_reverse(total, current, v) for v in _unstack(tree)]))

    def check_hessian(self, ids: Tensor, batch: Any) -> None:
        """Refuse a model whose second derivatives do not exist or are not symmetric.

        Some operations have no double backward, and some have a wrong one (the parametrised weight norm of torch 2.13
        on the CPU, by 45 %). Where <u, H v> differs from <v, H u> it is wrong; the check costs one product.
        """
        space = self.derivatives.space
        if self.derivatives.problem.is_cut_up:
            raise InvalidInput(
                "Hessian() needs second derivatives, which a model that fully_shard has cut up does not give; use "
                "GGN() or EmpiricalFisher(), or ptif.ekfac()."
            )
        like = space.like(self._model)
        flat = torch.randn(2, space.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(like)
        try:
            products = self.hessian_product(ids, batch, space.rows(flat)).flat()
            alone = self.hessian_product(ids, batch, space.rows(flat[:1])).flat()[0]
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as reason:
            raise InvalidInput(
                f"Hessian() needs second derivatives, and an operation of this model has none ({first_line(reason)}); "
                "use EmpiricalFisher(), or GGN() where the loss has one."
            ) from reason
        # In units of the largest entry: a loss that is nearly linear here has entries whose squares are zero.
        unit = products.abs().max().clamp_min(torch.finfo(like.dtype).tiny)
        products, alone = products / unit, alone / unit
        uhv, vhu = (products @ flat.T)[0, 1], (products @ flat.T)[1, 0]
        scale = (products.norm(dim=1) * flat.norm(dim=1)).max()
        bound = tolerance(self.derivatives.precision) * scale
        if bool((uhv - vhu).abs() > bound) or bool((alone - products[0]).norm() > bound):
            raise InvalidInput(
                f"The second derivative of this model is not symmetric (u.Hv = {float(uhv * unit):.4g}, "
                f"v.Hu = {float(vhu * unit):.4g}): the double backward of an operation is wrong, of a "
                "torch.autograd.Function of your own or of one of this version of PyTorch; use GGN() instead of "
                "Hessian()."
            )

    def _push_one(self, batch: Any, directions: Rows) -> Tensor:
        """J v for a single direction."""
        v = _unstack(self.derivatives.space.to_parameters(directions))[0]
        objective = self.derivatives.objective
        with preserved(self._model, self._names), double_backward_safe(self._model), silence_torch():

            def outputs(p: Tree) -> Tensor:
                return objective.outputs(as_function(self._model, p), batch)

            if self.mode is PushforwardMode.FORWARD:
                pushed = vmap(lambda w: jvp(outputs, (self._current,), (w,))[1], randomness="different")
                return cast(Tensor, pushed({k: x[None] for k, x in v.items()}))[0]
            return _push_by_reverse(outputs, self._current, v)[1]

    def _ggn_by_rows(self, ids: Tensor, batch: Any, directions: Rows, curvature: AbstractOutputCurvature) -> Rows:
        tape = self.derivatives.tape(batch, len(ids))
        total = torch.zeros_like(directions.flat())
        root = curvature.root(tape.outputs.detach(), batch)
        for k, column in enumerate(root):
            rows = tape.rows(column, keep_graph=k + 1 < len(root))
            total += rows.combine(rows.inner(directions).T).flat()
        return self.derivatives.space.rows(total)

    @property
    def _model(self) -> torch.nn.Module:
        return self.derivatives.problem.model

    @property
    def _names(self) -> tuple[str, ...]:
        return self.derivatives.space.names

    @property
    def _current(self) -> Tree:
        return detach_parameters(self._model, self._names)

    def _rows(self, tree: Tree) -> Rows:
        return self.derivatives.space.from_parameters(tree)


def _unstack(tree: Tree) -> list[Tree]:
    count = len(next(iter(tree.values())))
    return [{k: v[q] for k, v in tree.items()} for q in range(count)]


def _stack(trees: list[Tree]) -> Tree:
    return {k: torch.stack([t[k] for t in trees]) for k in trees[0]}


def _leaves(parameters: Tree) -> Tree:
    return {k: v.detach().requires_grad_() for k, v in parameters.items()}


def _pull(f: Callable[[Tree], Tensor], parameters: Tree, cotangent: Tensor) -> Tree:
    """J^T c by one backward pass."""
    leaves = _leaves(parameters)
    with torch.enable_grad():
        gradients = grads(f(leaves), list(leaves.values()), cotangent)
    return _fill_zeros(leaves, gradients)


def _push_by_reverse(f: Callable[[Tree], Tensor], parameters: Tree, v: Tree) -> tuple[Tensor, Tensor]:
    """(f, J v) by differentiating u -> <J^T u, v>, which is linear in u."""
    leaves = _leaves(parameters)
    with torch.enable_grad():
        out = f(leaves)
        dummy = torch.zeros_like(out, requires_grad=True)
        pulled = grads(out, list(leaves.values()), dummy, create_graph=True)
        products = [(g * v[k]).sum() for k, g in zip(leaves, pulled, strict=True) if g is not None]
        pushed = torch.autograd.grad(torch.stack(products).sum(), dummy)[0]
    return out.detach(), pushed.detach()


def _hessian_by_reverse(total: Callable[[Tree], Tensor], parameters: Tree, v: Tree) -> Tree:
    leaves = _leaves(parameters)
    with torch.enable_grad():
        first = grads(total(leaves), list(leaves.values()), create_graph=True)
        _refuse_once_differentiable(first)
        products = [(g * v[k]).sum() for k, g in zip(leaves, first, strict=True) if g is not None and g.requires_grad]
        if not products:
            return {k: torch.zeros_like(x) for k, x in parameters.items()}
        gradients = grads(torch.stack(products).sum(), list(leaves.values()))
    return _fill_zeros(leaves, gradients)


def _refuse_once_differentiable(gradients: Iterable[Tensor | None]) -> None:
    """Refuse a graph that ends at a backward pass without a derivative: autograd would take it for a constant."""
    nodes = [g.grad_fn for g in gradients if g is not None]
    visited = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node.name().endswith("autograd::Error"):
            raise NotImplementedError("a torch.autograd.Function of yours is marked @once_differentiable")
        nodes += [before for before, _ in node.next_functions]


def _fill_zeros(leaves: Tree, gradients: tuple[Tensor | None, ...]) -> Tree:
    pairs = zip(leaves, gradients, strict=True)
    return {k: torch.zeros_like(leaves[k]) if g is None else g.detach() for k, g in pairs}
