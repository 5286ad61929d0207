"""Values of a batch that no score can be made of are refused by the examples' names."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.batches import Collated, tensors_of
from ..core.errors import InvalidInput, NonFinite, name_ids


def check_finite(ids: Int[Tensor, "_"], batch: Any, positions: Int[Tensor, "_"] | None) -> None:
    """Refuse NaN and infinity in the floating point tensors of a batch that have one row per example.

    Args:
        ids: the examples of the batch.
        batch: as it was collated.
        positions: their places in the dataset, where it is a part of one.

    Raises:
        NonFinite: names the dataset indices.
        InvalidInput: a tensor holds no values.
    """
    refuse_meta(batch, "The batch")
    if isinstance(batch, Collated):
        _check_items(ids, batch, positions)
        return
    for where, tensor in tensors_of(batch):
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.shape[:1] != ids.shape:
            continue
        # The sum is one cheap pass; a sum that is not finite may also be an overflow, hence the second check.
        if bool(torch.isfinite(tensor.sum())):
            continue
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            _refuse(ids[(~finite).reshape(len(ids), -1).any(1).cpu()], f"batch{where}", positions)


def refuse_meta(data: Any, what: str) -> None:
    """Refuse tensors that hold no values.

    Args:
        data: an example or a batch.
        what: what it is, as a sentence begins.

    Raises:
        InvalidInput: one lies on the meta device.
    """
    for where, tensor in tensors_of(data):
        if tensor.is_meta:
            raise InvalidInput(
                f"{what} lies on the meta device{f' (in {where})' if where else ''}, which holds no values; load the "
                "data on the CPU or on the model's device."
            )


def _check_items(ids: Int[Tensor, "_"], batch: Collated, positions: Int[Tensor, "_"] | None) -> None:
    """As `check_finite`, where an example is no row: its tensors are looked at before they were collated."""
    for place, item in zip(ids, batch.items, strict=True):
        for where, tensor in tensors_of(item):
            if not bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):
                _refuse(place[None], f"item{where}", positions)


def _refuse(ids: Int[Tensor, "_"], where: str, positions: Int[Tensor, "_"] | None) -> None:
    places = ids if positions is None else positions[ids]
    part = "" if where == "batch" else f" (in {where})"
    raise NonFinite(
        f"The data hold NaN or infinity at dataset index {name_ids(places.tolist())}{part}; "
        "repair or remove these examples."
    )
