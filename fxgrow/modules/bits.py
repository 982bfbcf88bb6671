"""Tensors that are the same, bit for bit: NaN is as good a value as any, and 0 is not −0."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE = 1 << 20
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two dense tensors have the same shape and dtype and hold the same bits.

    Those on the meta device hold none. Nothing is copied where both are on one device.
    """
    if one.shape != other.shape or one.dtype != other.dtype or one.is_meta != other.is_meta:
        return False
    if one.is_meta or not one.numel():
        return True
    return torch.equal(_as_numbers(one), _as_numbers(other).to(one.device))


def first_difference(one: Tensor, other: Tensor) -> tuple[int, ...]:
    """Return the indices of the first entry whose bits differ, in tensors of one shape and dtype.

    Raises:
        ValueError: there is none.
    """
    found = (_as_numbers(one) != _as_numbers(other).to(one.device)).nonzero()
    if not len(found):
        raise ValueError("the tensors are the same")
    return tuple(int(index) for index in found[0][: one.ndim])


def pieces(tensor: Tensor) -> Iterator[slice]:
    """Yield slices of the first dim with about a million entries each, for what takes memory."""
    rows = tensor.shape[0] if tensor.ndim else 0
    step = max(1, _PIECE * rows // max(1, tensor.numel()))
    yield from (slice(start, start + step) for start in range(0, rows, step))


def _as_numbers(tensor: Tensor) -> Tensor:
    """Return the entries as whole numbers of as many bits; complex ones of 16 bytes as pairs."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    plain = torch.view_as_real(plain) if plain.dtype == torch.complex128 else plain
    return plain.view(_WHOLE[plain.dtype.itemsize])
