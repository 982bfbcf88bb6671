"""Twins among the channels of a new block: written alike, and read with opposite signs."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fxgrow.grow.identity.new_block import Filling, NewBlock
from fxgrow.grow.match.axis_edits import MINUS, NEW, OLD, ZERO, as_runs
from fxgrow.grow.match.match import kinds
from fxgrow.labels.forest import IntArray
from fxgrow.plan.edits import AxisEdit
from fxgrow.plan.pairing import vv_z_negz


def lay_out_twins(block: NewBlock, weight: str, readers: Collection[str], filling: Filling) -> str:
    """Let the channels that a weight reads be twins that cancel in it; return why not, or ""."""
    channels = block.channels
    axes = list(zip(channels.axes, channels.roles, channels.fills, strict=True))
    reading = [
        i for i, (axis, role, _) in enumerate(axes) if (axis.tensor, role) == (weight, "reader")
    ]
    if not reading:
        return "it reads a single channel, or each channel by itself"
    members = np.unique(np.concatenate([channels.of_axis(index) for index in reading]))
    touched = np.unique(channels.axis_of_row[np.isin(channels.channel, members)]).tolist()
    outside = [t for index in touched if (t := axes[index][0].tensor) not in block.tensors]
    if outside:
        return f"what it reads is tied to {outside[0]}, outside of the block"
    if not any(axes[index][1] == "writer" for index in touched):
        return "no layer of the block writes what it reads"
    pins = [channels.pins[c] for c in members.tolist() if c in channels.pins]
    if pins:
        return f"what it reads cannot be doubled ({pins[0]})"
    buckets, ranks = kinds(channels)
    draw = np.full(channels.count, -1, dtype=np.int64)
    sign = np.zeros(channels.count, dtype=np.int64)
    drawn = 0
    for bucket in buckets:
        mine = bucket[np.isin(bucket, members)]
        layout = vv_z_negz(len(mine), 0, "")
        draw[mine] = np.asarray(layout.draws, dtype=np.int64) + drawn
        sign[mine] = layout.column_signs
        drawn += max(layout.draws, default=-1) + 1
    if not sign.any():
        return "it reads a single channel" if len(members) == 1 else "no two channels are alike"
    for index in touched:
        axis, role, fill = axes[index]
        rows = slice(int(channels.start[index]), int(channels.start[index + 1]))
        edit = _twin_axis(channels.channel[rows], ranks[rows], draw)
        if role == "reader":
            if axis.tensor not in readers:
                continue
            signs = sign[channels.channel[rows]]
            kind = np.where(signs > 0, NEW, np.where(signs < 0, MINUS, ZERO))
        elif fill == "copy":
            _, first, inverse = np.unique(edit, return_index=True, return_inverse=True)
            kind, edit = np.full(len(edit), OLD), first[inverse]
        elif fill == "draw":
            kind = np.full(len(edit), NEW)
        else:
            continue
        start = np.where(kind == ZERO, 0, edit)
        made = AxisEdit(axis.dim, role, axis.groups, as_runs(kind, start))
        filling.edits.setdefault(axis.tensor, []).append(made)
    return ""


def _twin_axis(channel: IntArray, rank: IntArray, draw: IntArray) -> IntArray:
    """Return the drawn slice of each position of an axis; what has no twin has its own."""
    own = draw[channel] < 0
    key = np.where(own, -1 - np.arange(len(channel)), draw[channel] * (1 << 31) + rank)
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse]
