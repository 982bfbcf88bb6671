"""What is written in place into a view is seen by the tensor that the view is of."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgrow.labels.layers import Layers, compact
from fxgrow.labels.pins import PinKind
from fxgrow.labels.space import LabelSpace


def written_back(
    space: LabelSpace, base: Tensor, known: Layers, view: Tensor, written: Layers, place: str
) -> Layers:
    """Return the layers of a tensor after some labels were written into a view of it.

    Args:
        space: where labels meet.
        base: the tensor.
        known: its layers before.
        view: the part of it that was written.
        written: the layers of what was written.
        place: the operation, for reasons.
    """
    if len(known) > 1 or len(written) > 1 or not base.is_contiguous():
        for layer in (*known, *written):
            space.pin(layer, PinKind.OVERWRITTEN)
        return known
    blank = torch.zeros(base.shape, dtype=torch.int32)
    table = known[0].contiguous().clone() if known else blank
    part = table.as_strided(view.shape, view.stride(), view.storage_offset())
    (fresh,) = written
    if torch.equal(part, fresh):
        return known
    space.unify(part.contiguous(), fresh.contiguous())
    part.copy_(torch.where(fresh != 0, fresh, part))
    return (compact(table),)
