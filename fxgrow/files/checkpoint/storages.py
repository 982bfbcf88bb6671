"""The memory of tensors: read from a file by range, and given a shape that lies inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxgrow.files.checkpoint.pickles import PickleError
from fxgrow.files.checkpoint.reading import Readable, refuse_damaged

_MOST_DIMS = 64


@dataclass(frozen=True)
class Storage:
    """The memory of one or more tensors.

    Attributes:
        data: its bytes, a tensor of ``uint8``.
        dtype: of the tensors that it was saved with; they may say another.
    """

    data: Tensor
    dtype: torch.dtype


def read_storage(file: Readable, start: int, nbytes: int) -> Tensor:
    """Return a range of a file as a tensor of bytes.

    Raises:
        SourceError: the file ends before that.
    """
    if start + nbytes > file.size:  # before memory is taken for it
        refuse_damaged(file.path, "it ends too early")
    where = file.mapped(start, nbytes) if nbytes else None
    if where is not None:
        return torch.frombuffer(where, dtype=torch.uint8)
    data = torch.empty(nbytes, dtype=torch.uint8)
    if nbytes:
        file.read_into(start, memoryview(data.numpy()))  # type: ignore[arg-type]
    return data


def make_tensor(
    storage: object, offset: object, size: object, stride: object, dtype: object = None
) -> Tensor:
    """Return a view of some memory.

    Args:
        storage: a :class:`Storage`; the others are of any type, and checked.
        offset: of the first entry.
        size: its sizes.
        stride: its strides.
        dtype: if it is not that of the storage.

    Raises:
        PickleError: it would lie outside of the memory.
    """
    if not isinstance(storage, Storage):
        raise PickleError("a tensor of something else than a file's memory")
    kind = storage.dtype if dtype is None else dtype
    shape, strides = _numbers(size), _numbers(stride)
    if not isinstance(kind, torch.dtype) or type(offset) is not int or len(shape) != len(strides):
        raise PickleError("a tensor without a shape")
    last = -1 if 0 in shape else sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if offset < 0 or (offset + last + 1) * kind.itemsize > storage.data.nbytes:
        raise PickleError("a tensor that reaches beyond its memory")
    empty = torch.empty(0, dtype=kind)
    return empty.set_(storage.data.untyped_storage(), offset, shape, strides)


def _numbers(items: Any) -> tuple[int, ...]:
    """Return a size or strides: not negative, and not too many."""
    plain = type(items) in (tuple, list, torch.Size) and len(items) <= _MOST_DIMS
    if not plain or not all(type(item) is int and 0 <= item < 2**48 for item in items):
        raise PickleError("a tensor without a shape")
    return tuple(items)
