"""From matched channels to edits of axes: what each new position holds."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fxgrow.channels.channels import Channels
from fxgrow.channels.tied import Silenced
from fxgrow.errors import PlanError
from fxgrow.grow.match.match import Matching
from fxgrow.grow.norms.padding import Padding
from fxgrow.labels.forest import IntArray
from fxgrow.labels.space import Fill, Role
from fxgrow.plan.edits import AxisEdit, Run, RunKind

# Codes for the kinds of positions, in the order of _KINDS.
_KINDS: tuple[RunKind, ...] = (
    "old", "share", "borrowed", "new", "minus", "zero", "one", "mean",
)  # fmt: skip
OLD, SHARE, BORROWED, NEW, MINUS, ZERO, ONE, MEAN = range(8)


def axis_edits(
    old: Channels,
    new: Channels,
    matching: Matching,
    padding: Collection[Padding] = (),
    zero_channels: Collection[frozenset[int]] = (),
    silenced: Collection[Silenced] = (),
) -> dict[str, list[AxisEdit]]:
    """Return, for each tensor, the edits of the axes whose positions change; readers first.

    Args:
        old: the channels at the old sizes.
        new: the channels at the new sizes.
        matching: which new channel continues which old one.
        padding: of the groups that have channels beyond whole copies.
        zero_channels: of the groups whose new channels are zeros.
        silenced: what stands before tensors that both write and read channels.

    Raises:
        PlanError: a position of an old channel has no counterpart.
    """
    index_of = {(axis.tensor, axis.dim): index for index, axis in enumerate(old.axes)}
    edits: dict[str, list[AxisEdit]] = {}
    codes = {"mean": MEAN, "zero": ZERO}
    filled = {axis: codes[found.holds] for found in padding for axis in found.filled}
    filled |= {axis: ZERO for found in zero_channels for axis in found}
    free = {axis for found in padding for axis in found.free}
    splits = {name for found in silenced for name in (*found.weights, *found.biases)}
    behind = {place for found in silenced for place in found.readers}
    for index, axis in enumerate(new.axes):
        before = index_of[axis.tensor, axis.dim]
        if axis.groups != old.axes[before].groups:
            continue  # whole convolution groups were added: their rows are new altogether
        if _is_unchanged(old, before, new, index, matching):
            continue
        role = new.roles[index]
        if axis.tensor in splits:  # new channels are read by nobody, copies by all in parts
            role = "reader"
        elif (axis.tensor, axis.dim) in behind:  # what it reads has been split
            role = "carrier"
        special = _Special(role, filled.get(before), before in free, axis.tensor in splits)
        kind, start = _positions(old, before, new, index, matching, special)
        if len(kind) == old.axes[before].size and bool(
            (kind == OLD).all() and (start == np.arange(len(start))).all()
        ):
            continue
        edit = AxisEdit(axis.dim, role, axis.groups, as_runs(kind, start))
        edits.setdefault(axis.tensor, []).append(edit)
    for axes in edits.values():
        axes.sort(key=lambda edit: (edit.role != "reader", edit.dim))
    return edits


class _Special(NamedTuple):
    """What sets an axis apart.

    Attributes:
        role: what it is to copies: a reader has shares of an old column, others have it whole.
        filled: the kind that is asked for padding channels, if any.
        is_free: it reads these where they are zero, so that a column without a twin need not be.
        silences: its new entries are zero.
    """

    role: Role
    filled: int | None
    is_free: bool
    silences: bool


def _is_unchanged(
    old: Channels, old_axis: int, new: Channels, new_axis: int, matching: Matching
) -> bool:
    """Return whether an axis has the same rows of the same channels, none of them copied."""
    rows = slice(int(new.start[new_axis]), int(new.start[new_axis + 1]))
    before = slice(int(old.start[old_axis]), int(old.start[old_axis + 1]))
    channel, origin = old.channel[before], matching.old[new.channel[rows]]
    return (
        np.array_equal(channel, origin)
        and np.array_equal(matching.old_rank[before], matching.new_rank[rows])
        and not matching.is_copied[channel].any()
    )


def _positions(
    old: Channels,
    old_axis: int,
    new: Channels,
    new_axis: int,
    matching: Matching,
    special: _Special,
) -> tuple[IntArray, IntArray]:
    """Return the kind and the source of each position of a new axis."""
    rows = slice(int(new.start[new_axis]), int(new.start[new_axis + 1]))
    channel, rank = new.channel[rows], matching.new_rank[rows]
    origin = np.where(matching.old >= 0, matching.old, matching.copy)[channel]
    fresh = origin < 0
    kind = np.full(len(channel), OLD, dtype=np.int64)
    start = np.zeros(len(channel), dtype=np.int64)

    old_rows = slice(int(old.start[old_axis]), int(old.start[old_axis + 1]))
    old_keys = _keys(old.channel[old_rows], matching.old_rank[old_rows])
    found, unread = _found(_keys(origin[~fresh], rank[~fresh]), old_keys)
    if bool(unread.any()) and special.role == "writer":
        raise PlanError(f"{new.axes[new_axis].tensor} would lose a position of an old channel.")
    # A reader that the old channel did not have reads it by zeros; a carrier may hold anything.
    reads = special.role == "reader"
    shared = matching.is_copied[origin[~fresh]] & reads
    start[~fresh] = np.where(unread, 0, found)
    without = ZERO if reads else BORROWED
    kind[~fresh] = np.where(unread, without, np.where(shared, SHARE, OLD))

    padding = matching.padding[channel]
    if special.filled is not None:
        kind[padding] = special.filled
        fresh &= ~padding
    if special.silences:
        kind[fresh & ~padding] = ZERO
        fresh &= padding
    if new.roles[new_axis] != "reader":
        row = matching.row[channel]
        at, missing = _found(_keys(row, rank), old_keys)
        copied = fresh & (row >= 0) & ~missing
        kind[copied], start[copied] = BORROWED, at[copied]
        fresh &= ~copied
    draw = _keys(matching.draw[channel[fresh]], rank[fresh])
    sign = matching.sign[channel[fresh]]
    if special.is_free:
        sign = np.where(padding[fresh] & (sign == 0), 1, sign)
    kind[fresh], start[fresh] = _fresh(
        new.roles[new_axis], new.fills[new_axis], draw, sign, len(old_keys)
    )
    return kind, start


def _found(wanted: IntArray, keys: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Return where each of some wanted keys is among others, and whether it is missing there."""
    if not len(keys):
        return np.zeros_like(wanted), np.ones(len(wanted), dtype=bool)
    order = np.argsort(keys)
    found = order[np.searchsorted(keys[order], wanted) % len(order)]
    missing: npt.NDArray[np.bool_] = keys[found] != wanted
    return found, missing


def _keys(channel: IntArray, rank: IntArray) -> IntArray:
    """Return one number for a channel and a rank within it."""
    return channel * (1 << 31) + rank


def _fresh(
    role: Role, fill: Fill, draw: IntArray, sign: IntArray, size: int
) -> tuple[IntArray, IntArray]:
    """Return kind and start of the new positions of an axis."""
    nothing = np.zeros(len(draw), dtype=np.int64)
    if role == "reader":
        read = sign != 0
        start = nothing.copy()
        start[read] = _dense(draw[read])
        return np.where(sign > 0, NEW, np.where(sign < 0, MINUS, ZERO)), start
    if fill == "one":
        return nothing + ONE, nothing
    if fill == "zero":
        return nothing + ZERO, nothing
    if fill == "copy" and size:  # values of a domain we do not know: old ones, round-robin
        return nothing + BORROWED, _dense(draw) % size
    return nothing + NEW, _dense(draw)


def _dense(draw: IntArray) -> IntArray:
    """Renumber draws 0, 1, 2… in order of first appearance."""
    _, first, inverse = np.unique(draw, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def as_runs(kind: IntArray, start: IntArray) -> tuple[Run, ...]:
    """Return positions as runs: same kind, and consecutive sources where there is a source."""
    if not len(kind):
        return ()
    sourced = kind <= MINUS
    step = np.where(sourced[1:], start[:-1] + 1, start[:-1])
    breaks = np.flatnonzero((kind[1:] != kind[:-1]) | (start[1:] != step)) + 1
    bounds = [0, *breaks.tolist(), len(kind)]
    return tuple(
        Run(_KINDS[int(kind[low])], int(start[low]), high - low)
        for low, high in itertools.pairwise(bounds)
    )
