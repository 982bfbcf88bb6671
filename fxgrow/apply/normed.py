"""The two parts of a weight-normed weight, made new so that the weight is as a plain one would be.

The weight is ``length · direction / |direction|``, so ``ratio · direction`` for a ratio that each
norm has. The direction is laid out as a plain weight is. The ratio goes on with what it belongs to,
and so the length is the ratio times the new norm: new columns change the norm, and no old entry.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxgrow.apply.axes import positions_of
from fxgrow.labels.space import Normed
from fxgrow.plan.edits import TensorEdit


def ratio_of(parts: Normed, direction: Tensor, length: Tensor) -> Tensor:
    """Return what a direction is multiplied by, in float64 and in the shape of the length."""
    return length.double() / _norm(parts, direction)


def weight_at(name: str, tensors: Mapping[str, Tensor], normed: Mapping[str, Normed]) -> Tensor:
    """Return a weight by its name, or by that of its direction: put together then."""
    parts = normed.get(name)
    if parts is None:
        return tensors[name]
    direction, length = tensors[parts.direction], tensors[parts.length]
    return ratio_of(parts, direction, length) * direction.double()


def means_in(
    parts: Normed, edit: TensorEdit, direction: Tensor, ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a new direction and its ratio with means of the weight where the edit says ``mean``.

    Args:
        parts: what they are of.
        edit: of the direction.
        direction: as the edit lays it out.
        ratio: in the shape of the new length.
    """
    for axis in edit.axes:
        at = torch.from_numpy(positions_of(axis, "mean")[:, 1]).to(direction.device)
        if axis.dim != parts.dim or not len(at):
            continue
        old = torch.from_numpy(positions_of(axis, "old")[:, 1]).to(direction.device)
        rows = direction.double().index_select(axis.dim, old)
        mean = (rows * ratio.index_select(axis.dim, old)).mean(axis.dim, keepdim=True)
        mean = mean.to(direction.dtype).expand(direction.index_select(axis.dim, at).shape)
        direction = direction.index_copy(axis.dim, at, mean)
        ratio = ratio.index_fill(axis.dim, at, 1.0)
    return direction, ratio


def pointing(parts: Normed, direction: Tensor) -> Tensor:
    """Return a direction that points somewhere wherever it was all zeros, and had no norm.

    Its length is zero there, so that it does not matter where.
    """
    norm = _norm(parts, direction)
    entries = max(direction.numel() // max(norm.numel(), 1), 1)
    return torch.where(norm == 0, entries**-0.5, direction).to(direction.dtype)


def length_of(parts: Normed, direction: Tensor, ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the length of a direction with a ratio."""
    return (ratio * _norm(parts, direction)).to(dtype)


def _norm(parts: Normed, direction: Tensor) -> Tensor:
    """Return the norms of a direction in float64, in the shape of the length."""
    if parts.dim is None:
        whole: Tensor = torch.linalg.vector_norm(direction.double())
        return whole
    others = [dim for dim in range(direction.ndim) if dim != parts.dim]
    if not others:
        return direction.double().abs()
    norm: Tensor = torch.linalg.vector_norm(direction.double(), dim=others, keepdim=True)
    return norm
