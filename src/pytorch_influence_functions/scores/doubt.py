"""How doubtful a training label is: one rule, wherever labels are ordered."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def left_out_loss(loss: Float[Tensor, " n"], own: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The predicted loss on each training example of a model that never saw it: `loss + s / (1 - s)`.

    With s = (1/N) g^T (C + D)^-1 g under the empirical Fisher, s is also the example's leverage, and dividing by 1 - s
    takes its own gradient out of the curvature (Sherman-Morrison). A model can memorise a wrong label, which lowers its
    loss, but then depends on that label alone, which raises the second term.

    Args:
        loss: the model's loss on each training example.
        own: its self-influence under the empirical Fisher, as `dual()` gives it.
    """
    return loss.double() + own.double() / (1.0 - own.double()).clamp_min(1e-9)


def label_doubt(loss: Float[Tensor, " n"], harm: Float[Tensor, " n"] | None) -> Float[Tensor, " n"]:
    """The loss in units of its standard deviation, plus the harm in units of its own; larger is more doubtful.

    Args:
        loss: of each training example, left out where that is known.
        harm: how much better others would be without it; None: the loss alone.
    """
    doubt = loss.double() / _deviation(loss)
    return doubt if harm is None else doubt + harm.double() / _deviation(harm)


def _deviation(values: Tensor) -> float:
    """The standard deviation, or 1 where all values are the same."""
    deviation = float(values.double().std()) if len(values) > 1 else 0.0
    return deviation if deviation > 0 else 1.0
