"""What is written in place into a view is seen by the tensor that the view is of."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgrow.labels.layers import Layers, compact
from fxgrow.labels.pins import PinKind
from fxgrow.labels.space import LabelSpace


def written_back(
    space: LabelSpace,
    base: Tensor,
    known: Layers,
    view: Tensor,
    written: Layers,
    place: str,
    table: Tensor | None = None,
) -> Layers:
    """Return the layers of a tensor after some labels were written into a view of it.

    Args:
        space: where labels meet.
        base: the tensor.
        known: its layers before.
        view: the part of it that was written.
        written: the layers of what was written.
        place: the operation, for reasons.
        table: the labels that were written into a tensor that was one number everywhere, 0 where
            it still is, changed in place; None for any other tensor.
    """
    if len(known) > 1 or len(written) > 1 or not base.is_contiguous():
        for layer in (*known, *written):
            space.pin(layer, PinKind.OVERWRITTEN)
        return known
    blank = torch.zeros(base.shape, dtype=torch.int32)
    whole = (known[0].contiguous().clone() if known else blank) if table is None else table
    part = whole.as_strided(view.shape, view.stride(), view.storage_offset())
    (fresh,) = written
    if torch.equal(part, fresh):
        return known
    space.unify(part.contiguous(), fresh.contiguous())
    part.copy_(torch.where(fresh != 0, fresh, part))
    return (compact(whole if table is None else _beside_padding(table)),)


def _beside_padding(table: Tensor) -> Tensor:
    """Return what is written, also where nothing is, along dims along which it is all alike.

    One number may stand beside channels of any kind: padding behind sequences.
    """
    found = table
    for dim in range(table.ndim):
        most = found.amax(dim, keepdim=True)
        if bool(((found == 0) | (found == most)).all()):
            found = most
    return found.expand(table.shape) if bool((found != 0).all()) else table.clone()
