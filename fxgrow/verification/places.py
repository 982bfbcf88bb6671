"""Where the edit of one axis puts what: positions as arrays, and tensors taken apart by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxgrow.plan.edits import AxisEdit, RunKind, TensorEdit

Places: TypeAlias = npt.NDArray[np.int64]
_NONE: Places = np.zeros(0, dtype=np.int64)


class AxisPlaces:
    """Where an edit puts what, along one axis.

    Args:
        axis: the edit.
        size: the number of old positions.

    Attributes:
        size: the same.
        share: new positions that hold shares, and the old ones that they are of.
        first: for each old position, the first new one that is a copy of it; -1 if there is none.
        goes_on: the old positions that go on, in order.
    """

    def __init__(self, axis: AxisEdit, size: int) -> None:
        self._found: dict[str, tuple[Places, Places]] = {}
        position = 0
        pieces: dict[str, list[tuple[Places, Places]]] = {}
        for run in axis.runs:
            span = np.arange(run.length)
            pieces.setdefault(run.kind, []).append((position + span, run.start + span))
            position += run.length
        for kind, parts in pieces.items():
            at, sources = (np.concatenate(each) for each in zip(*parts, strict=True))
            self._found[kind] = (at, sources)
        old, sources = self.of("old")
        self.size = max(size, 1 + int(sources.max(initial=-1)))
        self.share = self.of("share")
        self.first = first_of(sources, old, self.size)
        self.goes_on = np.union1d(sources, self.share[1])

    def of(self, kind: RunKind) -> tuple[Places, Places]:
        """Return the new positions of one kind, and the old or drawn ones that they take."""
        return self._found.get(kind, (_NONE, _NONE))

    def before(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the old positions that go on, in order; shares of one are added up in float64."""
        copied = self.first[self.goes_on]
        if not len(self.share[0]):
            return take(tensor, dim, copied)
        plain = np.flatnonzero(copied >= 0)
        index = torch.from_numpy(plain).to(tensor.device)
        copies = take(tensor, dim, copied[plain]).double()
        return self.sums(tensor, dim).index_copy_(dim, index, copies)

    def sums(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the sums of shares for the old positions that go on, in float64."""
        at, sources = self.share
        shape = list(tensor.shape)
        shape[dim] = len(self.goes_on)
        total = torch.zeros(shape, dtype=torch.float64, device=tensor.device)
        index = torch.from_numpy(np.searchsorted(self.goes_on, sources)).to(tensor.device)
        return total.index_add_(dim, index, take(tensor, dim, at).double())


@dataclass(frozen=True)
class TwinColumns:
    """Columns that are read with opposite signs.

    Attributes:
        pairs: by convolution group, those read with plus and those with minus.
        targets: all that are read with minus, in any group.
        same_for_all: whether the pairs are the same in every group.
    """

    pairs: dict[int, tuple[Places, Places]]
    targets: Places
    same_for_all: bool


def twin_columns(reader: AxisEdit, old: int) -> TwinColumns:
    """Return the twins that a reader reads."""
    places = AxisPlaces(reader, old)
    width = sum(run.length for run in reader.runs) // reader.groups
    (plus, draws), (minus, negated) = places.of("new"), places.of("minus")
    last = dict(zip(draws.tolist(), plus.tolist(), strict=True))
    found: dict[int, list[tuple[int, int]]] = {}
    crossing = False
    for at, draw in zip(minus.tolist(), negated.tolist(), strict=True):
        if draw in last and last[draw] // width == at // width:
            found.setdefault(at // width, []).append((last[draw] % width, at % width))
        crossing |= draw in last and last[draw] // width != at // width
    pairs = {}
    for group, both in found.items():
        one, other = np.array(both, dtype=np.int64).T
        pairs[group] = (one, other)
    same = len(pairs) == reader.groups and len({tuple(both) for both in found.values()}) == 1
    return TwinColumns(pairs, np.unique(minus % width), same and not crossing)


def old_size(edit: TensorEdit, axis: AxisEdit) -> int:
    """Return how many positions an axis had, those of all its groups together."""
    sizes = list(edit.shape)
    before, after = edit.groups
    if before != after:
        together = -(-before // after)
        sizes[0], sizes[1] = sizes[0] // before * after * together, sizes[1] * together
    return sizes[axis.dim] * axis.groups


def along(tensor: Tensor, axis: AxisEdit) -> tuple[Tensor, int]:
    """Return a tensor in which one dim has all positions of an axis, and that dim."""
    if axis.groups == 1:
        return tensor, axis.dim
    split = tensor.reshape(axis.groups, -1, *tensor.shape[1:]).transpose(1, 2)
    return split.reshape(-1, *split.shape[2:]), 0


def back(tensor: Tensor, axis: AxisEdit) -> Tensor:
    """Return what :func:`along` made of a tensor in the tensor's own layout."""
    if axis.groups == 1:
        return tensor
    split = tensor.reshape(axis.groups, -1, *tensor.shape[1:]).transpose(1, 2)
    return split.reshape(-1, *split.shape[2:])


def take(tensor: Tensor, dim: int, at: Places) -> Tensor:
    """Return some positions along a dim: a view where they follow each other."""
    if len(at) and bool((np.diff(at) == 1).all()):
        return tensor.narrow(dim, int(at[0]), len(at))
    return tensor.index_select(dim, torch.from_numpy(np.ascontiguousarray(at)).to(tensor.device))


def first_of(keys: Places, values: Places, size: int) -> Places:
    """Return the first value of each key below ``size``; -1 where there is none."""
    found = np.full(size, -1, dtype=np.int64)
    found[keys[::-1]] = values[::-1]
    return found


def wrong_along(wrong: Tensor, dim: int) -> npt.NDArray[np.bool_]:
    """Return which positions along a dim have a wrong entry."""
    flat = wrong.movedim(dim, 0).reshape(wrong.shape[dim], -1).any(1)
    return flat.cpu().numpy()
