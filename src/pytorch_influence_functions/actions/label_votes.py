"""What the other training examples, and trusted data, say about each label, through the model's own gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..curvature.base import Budget
from ..gradients.per_example import Derivatives
from ..gradients.projections import JOINT
from ..gradients.sketches import Sketch, SketchProjector
from ..influence.attribution import Attribution
from ..linalg.rows import Rows
from ..linalg.space import BlockSpec, Space
from ..objectives.base import tensor_targets
from ..objectives.class_scores import class_scores
from ..problem.checkpoints import at_checkpoint
from ..problem.data import Source
from ..problem.problem import sweep
from ..scores.votes import left_out_votes

# Examples that vote together: time grows with the cube of their number.
_TOGETHER = 4000
# Trusted examples that vote with each of these groups, at most.
_TRUSTED = 1000
# Directions in the outputs whose gradients are taken: each output where there are no more, else random signs of all.
_DIRECTIONS = 4
# Numbers a gradient is sketched to where all of it would take more than the memory allowed.
_SKETCH = 4096


def label_votes(
    fitted: Attribution, given: Int[Tensor, " n"], width: int, validation: Any = None
) -> Float[Tensor, "n c"]:
    """The votes of all other examples, and of the validation data, on every training example's class.

    Ridge regression of the classes on the gradients of the model's outputs: the model, linearised around its weights
    and fitted again without the example. More than 4,000 examples vote in groups of about that many, drawn at random.

    Args:
        fitted: gives the gradients and the memory they may take.
        given: the given classes, in the order of the training data.
        width: how many classes there are.
        validation: labelled data whose labels are right, which vote on everyone; None: none.
    """
    member, problem = fitted.members[0], fitted.problem
    trusted = None
    if validation is not None:
        asked = problem.batch_size if problem.data.fixed else None
        trusted = problem.data.read_alike(validation, asked)
    random = torch.Generator().manual_seed(0)
    groups = torch.randperm(len(given), generator=random).chunk(-(-len(given) // _TOGETHER))
    votes = torch.zeros(len(given), width, dtype=torch.float64)
    with at_checkpoint(problem.model, member.checkpoint):
        room = Budget.of(fitted.spec.memory).bytes / 2
        derivatives = _affordable(member.derivatives, min(len(given), _TOGETHER) + _TRUSTED, room)
        for group in groups:
            chosen = group.sort().values
            people = [(derivatives.batched(problem.data), chosen)]
            if trusted is not None:
                some = torch.randperm(len(trusted), generator=random)[:_TRUSTED].sort().values
                people.append((derivatives.batched(trusted), some))
            electorate = _Electorate.of(derivatives, people)
            classes = torch.cat([given[chosen], electorate.classes[len(chosen) :]])
            unknown = sorted({c for c in classes.tolist() if not 0 <= c < width})
            if unknown:
                raise InvalidInput(
                    f"The labels name the classes {unknown} and the model knows 0 to {width - 1}; leave these examples "
                    "out, or number their classes otherwise."
                )
            votes[chosen] = left_out_votes(
                electorate.gram, classes.to(electorate.gram.device), width, len(chosen)
            ).cpu()
    return votes


def class_labels(batch: Any, n: int) -> Int[Tensor, " n"]:
    """The class numbers of a batch.

    Args:
        batch: what the collate function gave.
        n: how many examples it holds.

    Raises:
        InvalidInput: its targets are no class numbers.
    """
    targets = tensor_targets(batch).reshape(n, -1)
    if targets.shape[1] != 1 or (targets.is_floating_point() and bool((targets != targets.round()).any())):
        raise InvalidInput(
            f"The labels have shape {tuple(tensor_targets(batch).shape)} and type {targets.dtype}, which are no "
            "class numbers; find_label_issues() is about one class for each example: give one-hot labels as "
            "y.argmax(1), ask about several labels one by one, and for numbers look at the residuals."
        )
    return targets[:, 0].long().cpu()


def _affordable(derivatives: Derivatives, n: int, room: float) -> Derivatives:
    """The same derivatives, their rows sketched where n of them would take more than the room, in bytes."""
    like = derivatives.whole.like(derivatives.problem.model)
    if (derivatives.numbers or derivatives.space.size) * n * like.element_size() <= room:
        return derivatives
    k = min(_SKETCH, derivatives.whole.size)
    space = Space({JOINT: BlockSpec(JOINT, (), (k,))}, {})
    return replace(derivatives, projector=SketchProjector(space, Sketch(k)))


@final
@dataclass(frozen=True, eq=False)
class _Electorate:
    """Examples with the inner products of the gradients of their outputs, and their classes."""

    gram: Float[Tensor, "m m"]
    classes: Int[Tensor, " m"]

    @staticmethod
    def of(derivatives: Derivatives, people: list[tuple[Source, Tensor]]) -> _Electorate:
        """Sum over directions r in the outputs of <J_i^T r, J_j^T r>, which is the tangent kernel on average."""
        gram, classes, k, directions = None, [], 0, 1
        # A sweep for each direction: the rows of one, and not of four, are in memory together.
        while k < directions:
            kept = []
            for source, chosen in people:
                for ids, batch in sweep(derivatives.problem, source, chosen, "votes on labels", World()):
                    n = len(ids)
                    tape = derivatives.tape(batch, n)
                    with torch.enable_grad():
                        outputs = tape.outputs.detach().clone().requires_grad_()
                        scores = class_scores(derivatives.objective, outputs)
                        units = _directions(scores.shape[1])
                        directions = len(units)
                        # Of several outputs of a model those alone that are the scores of classes.
                        slope = torch.autograd.grad(scores, outputs, units[k].to(scores).expand(n, -1))[0]
                    kept.append(tape.rows(slope).compact())
                    if k == 0:
                        classes.append(class_labels(batch, n))
            rows = Rows.cat(kept)
            products = rows.inner(rows, dtype=torch.promote_types(rows.dtype, torch.float32)).double()
            gram = products if gram is None else gram.add_(products)
            k += 1
        assert gram is not None
        return _Electorate((gram + gram.T) / 2, torch.cat(classes))


def _directions(width: int) -> Float[Tensor, "k width"]:
    """Unit vectors where there are few, else random signs, the same at every call."""
    if width <= _DIRECTIONS:
        return torch.eye(width)
    random = torch.Generator().manual_seed(0)
    return 2.0 * torch.randint(0, 2, (_DIRECTIONS, width), generator=random) - 1.0
