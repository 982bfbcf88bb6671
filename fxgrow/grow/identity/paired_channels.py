"""Pairs among the channels of a new block: written alike, and read with opposite signs."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fxgrow.channels.channels import Channels, resolve
from fxgrow.grow.identity.new_block import Filling, NewBlock
from fxgrow.grow.match.axis_edits import MINUS, NEW, OLD, ZERO, as_runs
from fxgrow.grow.match.match import kinds
from fxgrow.labels.forest import IntArray
from fxgrow.labels.pins import Pin, PinKind
from fxgrow.plan.edits import AxisEdit
from fxgrow.plan.pairing import vv_z_negz


def pair_channels(block: NewBlock, weight: str, readers: Collection[str], filling: Filling) -> str:
    """Let the channels that a weight reads cancel in it by pairs; return why not, or "".

    Args:
        block: the block.
        weight: the weight.
        readers: all weights in which channels of the block cancel.
        filling: gets the edits of all tensors that have these channels.
    """
    channels = block.channels
    axes = [(axis.tensor, role) for axis, role in zip(channels.axes, channels.roles, strict=True)]
    reading = [index for index, axis in enumerate(axes) if axis == (weight, "reader")]
    if not reading:
        return "it reads a single channel, or each channel by itself"
    members = np.unique(np.concatenate([channels.of_axis(index) for index in reading]))
    touched = np.unique(channels.axis_of_row[np.isin(channels.channel, members)]).tolist()
    problem = _obstacle(block, members, touched)
    if problem:
        return problem
    buckets, ranks = kinds(channels)
    draw, sign = _layout(channels, [bucket[np.isin(bucket, members)] for bucket in buckets])
    if not sign.any():
        return "it reads a single channel" if len(members) == 1 else "no two channels are alike"
    for index in touched:
        tensor, role = axes[index]
        rows = slice(int(channels.start[index]), int(channels.start[index + 1]))
        if role == "reader" and tensor in readers:
            signs = sign[channels.channel[rows]]
        elif role != "reader" and channels.fills[index] in ("copy", "draw"):
            signs = None
        else:
            continue
        drawn = _drawn_slices(channels.channel[rows], ranks[rows], draw)
        copied = channels.fills[index] == "copy"
        filling.edits.setdefault(tensor, []).append(_edit(channels, index, drawn, signs, copied))
    return ""


def _obstacle(block: NewBlock, members: IntArray, touched: Collection[int]) -> str:
    """Return why some channels cannot be paired, given the axes that have them; "" if they can."""
    channels = block.channels
    tensors = (channels.axes[index].tensor for index in touched)
    outside = next((tensor for tensor in tensors if tensor not in block.tensors), "")
    if outside:
        return f"what it reads is tied to {outside}, outside of the block"
    if not any(channels.roles[index] == "writer" for index in touched):
        return "no layer of the block writes what it reads"
    pins = [channels.pins[c] for c in members.tolist() if c in channels.pins]
    noise = pins or _noise(
        block, {(channels.axes[i].tensor, channels.axes[i].dim) for i in touched}
    )
    return f"what it reads cannot be doubled ({noise[0]})" if noise else ""


def _noise(block: NewBlock, axes: Collection[tuple[str, int]]) -> list[Pin]:
    """Return where train mode draws noise for each channel of some axes, by tensor and dim."""
    found: list[Pin] = []
    for run in block.runs[1:]:
        if not any(pin.kind is PinKind.NOISE for _, pin in run.space.pins):
            continue
        channels = resolve(run.space)
        for index, axis in enumerate(channels.axes):
            if (axis.tensor, axis.dim) in axes:
                pins = map(channels.pins.get, channels.of_axis(index).tolist())
                found += [pin for pin in pins if pin and pin.kind is PinKind.NOISE]
    return found


def _layout(channels: Channels, kinds: Collection[IntArray]) -> tuple[IntArray, IntArray]:
    """Return the drawn row of each channel, -1 for none, and its sign; pairs are of one kind."""
    draw = np.full(channels.count, -1, dtype=np.int64)
    sign = np.zeros(channels.count, dtype=np.int64)
    drawn = 0
    for members in kinds:
        layout = vv_z_negz(len(members), 0, "")
        draw[members] = np.asarray(layout.draws, dtype=np.int64) + drawn
        sign[members] = layout.column_signs
        drawn += max(layout.draws, default=-1) + 1
    return draw, sign


def _edit(
    channels: Channels, index: int, drawn: IntArray, signs: IntArray | None, copied: bool
) -> AxisEdit:
    """Return the edit of an axis, given the drawn slice of each position.

    It is read with ``signs``, if there are any; else positions that share a slice may be ``copied``
    from the first of them.
    """
    kind, start = np.full(len(drawn), NEW), drawn
    if signs is not None:
        kind = np.where(signs > 0, NEW, np.where(signs < 0, MINUS, ZERO))
        start = np.where(kind == ZERO, 0, drawn)
    elif copied:
        _, first, inverse = np.unique(drawn, return_index=True, return_inverse=True)
        kind, start = np.full(len(drawn), OLD), first[inverse]
    axis = channels.axes[index]
    return AxisEdit(axis.dim, channels.roles[index], axis.groups, as_runs(kind, start))


def _drawn_slices(channel: IntArray, rank: IntArray, draw: IntArray) -> IntArray:
    """Return the drawn slice of each position of an axis; what has no pair has its own."""
    own = draw[channel] < 0
    key = np.where(own, -1 - np.arange(len(channel)), draw[channel] * (1 << 31) + rank)
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse]
