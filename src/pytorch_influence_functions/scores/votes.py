"""What the other examples say about each one's class: ridge regression, each example left out in closed form."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .doubt import label_doubt

# Ridges that are tried, in units of the Gram matrix's mean eigenvalue: half decades.
RIDGES = tuple(10.0 ** (k / 2) for k in range(-8, 5))


def left_out_votes(gram: Float[Tensor, "m m"], classes: Int[Tensor, " m"], width: int, n: int) -> Float[Tensor, "n c"]:
    """The votes of all other examples on the classes of the first n, about 0 to 1 for each class.

    Kernel ridge regression of the one-hot classes, less their mean, on the examples, each left out in turn:
    with H = K (K + r)^-1, the vote on example i without i is y_i - (y_i - (H y)_i) / (1 - H_ii), exactly. The ridge r
    is the one that predicts the left-out classes best. Then the doubtful ones among the first n lose their vote and
    the rest vote again, unless fewer than half or not all classes would be left.

    Args:
        gram: inner products K of all m examples.
        classes: of all of them.
        width: how many classes there are.
        n: how many examples are voted on; the classes of those after them are taken to be right.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [0.0, 1.0], [0.1, 1.0], [0.0, 0.9], [1.0, 0.1]])
        >>> left_out_votes(x @ x.T, torch.tensor([0, 0, 0, 1, 1, 1, 1]), 2, 7).argmax(1).tolist()  # the last is wrong
        [0, 0, 0, 1, 1, 1, 0]
    """
    gram = gram.double()
    one_hot = torch.nn.functional.one_hot(classes, width).to(gram)
    voting = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    votes = _votes_of(gram, one_hot, voting)
    voting[:n] = label_doubt(votes[:n], classes[:n]) <= 0
    left = one_hot[voting].sum(0)
    if 2 * int(voting.sum()) < len(gram) or bool((left[one_hot.sum(0) > 0] == 0).any()):
        return votes[:n]
    return _votes_of(gram, one_hot, voting)[:n]


def _votes_of(gram: Tensor, one_hot: Tensor, voting: Bool[Tensor, " m"]) -> Float[Tensor, "m c"]:
    """Votes on all examples of those who vote, who do not vote on themselves."""
    targets = one_hot[voting]
    mean = targets.mean(0)
    values, vectors = torch.linalg.eigh(gram[voting][:, voting])
    values = values.clamp_min(0.0)
    unit = values.mean().clamp_min(torch.finfo(torch.float64).tiny)
    turned, squares = vectors.T @ (targets - mean), vectors.square()
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for ridge in RIDGES:
        kept = values / (values + ridge * unit)
        missed = targets - mean - vectors @ (kept[:, None] * turned)
        missed = missed / (1.0 - squares @ kept).clamp_min(1e-9)[:, None]
        error = missed.square().mean()
        if best is None or error < best[0]:
            best = error, missed, turned / (values + ridge * unit)[:, None]
    assert best is not None
    votes = torch.empty_like(one_hot)
    votes[voting] = targets - best[1]
    votes[~voting] = mean + gram[~voting][:, voting] @ (vectors @ best[2])
    return votes
