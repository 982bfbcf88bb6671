"""Operations whose kernels take no float64, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)


def run(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operation gives, in float64 too."""
    is_grouped = _GROUPED is not None and func.overloadpacket is _GROUPED
    if is_grouped and args[0].dtype == torch.float64 and args[1].ndim == 3:
        return _grouped(*args, **kwargs)
    return func(*args, **kwargs)


def _grouped(
    rows: Tensor, matrices: Tensor, offsets: Tensor, bias: Tensor | None = None, *_: object,
    **__: object,
) -> Tensor:  # fmt: skip
    """Return the product of each group of rows and its matrix; rows behind the last are zeros.

    Args:
        rows: (N, K).
        matrices: (E, K, M).
        offsets: (E,), where each group of rows ends.
        bias: added to all rows, if any.
    """
    found = rows.new_zeros((rows.shape[0], matrices.shape[2]))
    start = 0
    for matrix, end in zip(matrices, offsets.tolist(), strict=True):
        found[start:end] = rows[start:end] @ matrix
        start = end
    return found if bias is None else found + bias
