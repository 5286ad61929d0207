"""Whether a model still has the weights that a method was fitted at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor, nn

from ..core.cut_up import cut_modules, free_gathered, own_part
from ..core.digest import digest
from ..core.errors import InvalidInput
from .model_state import normalised_by
from .problem import Problem

_WORD: Final = 8
# Other buffers may count or keep what no output depends on.
_RUNNING: Final = ("running_mean", "running_var")


@final
@dataclass(frozen=True, eq=False)
class FittedWeights:
    """The weights of a model by a sum of each one's bits: what was computed at them is not mixed with later ones.

    Sums are compared and no version counters, which do not move with `p.data.add_(...)`, and do where a checkpoint was
    loaded and put back. They cost one pass over the weights, as the look for NaN before every sweep does.

    Args:
        model: whose weights; None: nothing is watched.
        sums: shape, type and sum of bits of every parameter and running statistic by name.
    """

    model: nn.Module | None = None
    sums: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(problem: Problem) -> FittedWeights:
        """The present weights; nothing where the problem has checkpoints, which are loaded for every question.

        Args:
            problem: whose model, as it was given: not a copy in another precision.
        """
        return FittedWeights() if problem.checkpoints else FittedWeights(problem.model, _sums(problem.model))

    def check(self, cure: str = "call fit() again") -> None:
        """Refuse weights that have changed since.

        Args:
            cure: what to do about it, for the message.

        Raises:
            InvalidInput: they have; names the parameters.
        """
        present = {} if self.model is None else _sums(self.model)
        names = [name for name in {**self.sums, **present} if present.get(name) != self.sums.get(name)]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InvalidInput(
                f"The model's weights have changed since they were fitted, in {names[0]!r}{more}, and old curvature "
                f"does not go with new gradients; {cure}, or load the weights of then."
            )


def sum_of_bits(tensor: Tensor) -> int:
    """The sum of a tensor's bits as whole numbers of 64: the same in every order of summing, so on every device.

    Args:
        tensor: any; of one that is cut up, the part that this process has.
    """
    plain = own_part(tensor).detach()
    if plain.layout is not torch.strided or plain.is_quantized:
        return int(digest(plain)[:16], 16)
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    octets = plain.contiguous().reshape(-1).view(torch.uint8)
    # Whole words are read from where one may begin.
    octets = octets if octets.storage_offset() % _WORD == 0 else octets.clone()
    whole = len(octets) // _WORD * _WORD
    return int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum(dtype=torch.int64))


def _sums(model: nn.Module) -> dict[str, str]:
    free_gathered(cut_modules(model))
    # Rows of such an embedding are shortened by every forward of the user's, to what the next one would make of them.
    shortened = {id(weight) for module in model.modules() for weight in normalised_by(module)}
    # Frozen weights that accelerate keeps elsewhere between passes are not read for it.
    return {
        name: f"{tuple(weight.shape)} {weight.dtype} {sum_of_bits(weight)}"
        for name, weight in (*model.named_parameters(), *_statistics(model))
        if id(weight) not in shortened and not weight.is_meta
    }


def _statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What batch normalisation divides by outside of training, which a forward pass in training mode moves."""
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in _RUNNING and isinstance(buffer, Tensor):
            yield name, buffer
