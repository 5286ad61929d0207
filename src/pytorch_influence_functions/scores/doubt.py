"""How doubtful a training label is."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
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


def harm_reliability(harm: Float[Tensor, "v n"]) -> float:
    """How far the mean harm would be the same on other validation data, from 0 (chance) to 1.

    The correlation r, over the training examples, of the mean harm to every other query with that to the rest, stepped
    up to the length of both halves, 2 r / (1 + r) (Spearman 1910, Brown 1910); 0 where r is negative, and 1 for a
    single query, of which nothing can be said.

    Args:
        harm: of each training example to each query, [V, n].

    Example:
        >>> harm_reliability(torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]))
        1.0
    """
    if len(harm) < 2 or harm.shape[1] < 2:
        return 1.0
    halves = torch.stack([harm[::2].double().mean(0), harm[1::2].double().mean(0)])
    # No correlation is defined where a half is constant: then it orders nothing.
    r = max(0.0, float(torch.corrcoef(halves)[0, 1].nan_to_num(0.0)))
    return min(1.0, 2.0 * r / (1.0 + r))


def likeliest_other(
    votes: Float[Tensor, "n c"], given: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """The most votes for a class other than the given one, and which class that is.

    Args:
        votes: for every class, [n, C].
        given: the classes as the data have them, [n].

    Example:
        >>> likeliest_other(torch.tensor([[0.7, 0.1, 0.2]]), torch.tensor([0]))
        (tensor([0.2000]), tensor([2]))
    """
    most = votes.scatter(1, given[:, None], -torch.inf).max(1)
    return most.values, most.indices


def label_doubt(votes: Float[Tensor, "n c"], given: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The most votes for a class other than the given one, less those for the given one; above 0 is doubtful.

    Args:
        votes: for every class, [n, C].
        given: the classes as the data have them, [n].
    """
    return likeliest_other(votes, given)[0] - votes.gather(1, given[:, None])[:, 0]
