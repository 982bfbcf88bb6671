"""Channels beyond whole copies that leave a LayerNorm or an RMSNorm as it was.

Of T new channels, k·D are k copies of the D old ones. The others, the *padding*, carry the mean of
the old channels where a LayerNorm follows, and zero where an RMSNorm does: they move no mean, and
add nothing to the squares, which are averaged over T and so become η² = k·D/T of what they were.

Whoever writes the group writes that mean (it is linear in the rows of a weight) or that zero. What
the padding then holds is followed through a run, from the writers to the norms and readers
(:mod:`fxgrow.labels.padding`), and where it is neither, the answer is no.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.labels.interpreter import interpret
from fxgrow.labels.operators import place_of
from fxgrow.labels.padding import Holds, PaddingFlow


@dataclass(frozen=True)
class Padding:
    """What it takes to widen a group by more than whole copies.

    Attributes:
        copies: k, how often each old channel is there afterwards, at the least.
        holds: what the other channels carry.
        ratio: η² = k·D/T.
        statistics: the operations (tape indices) whose result becomes η² of what it was.
        filled: axes (indices) whose new entries, where they serve the padding, are what it holds.
        free: axes of readers that read it where it is zero: any column will do there.
        writers: the weights that write the group.
        sole: they write nothing else, so that all of them can be multiplied by 1/η.
    """

    copies: int
    holds: Holds
    ratio: float
    statistics: tuple[int, ...]
    filled: frozenset[int]
    free: frozenset[int]
    writers: tuple[str, ...]
    sole: bool


def follow_padding(analysis: Analysis, group: ChannelGroup) -> PaddingFlow:
    """Return what the padding channels of a group must hold, and where.

    Its ``refusal`` tells why some norm over its channels would not compute what it did, if so.
    """
    places = analysis.mixers_of(group)
    layer_norms = any(place.startswith("aten.native_layer_norm") for place in places)
    holds: Holds = "mean" if layer_norms else "zero"
    flow = PaddingFlow(analysis.channels, group.channels, group.axes, holds)
    group_norm = next((place for place in places if place.startswith("aten.native_group_norm")), "")
    if group_norm:
        flow.refuse(f"{group_norm} is no LayerNorm or RMSNorm")
        return flow
    interpret(analysis.operations_of(group), flow)
    operations = [analysis.tape.operations[index] for index in flow.statistics]
    seen = {place_of(op.target, op.node, op.module) for op in operations}
    unseen = [place for place in places if place not in seen]
    if unseen:
        flow.refuse(f"{unseen[0]} is no LayerNorm or RMSNorm")
    return flow


def padding_of(flow: PaddingFlow, group: ChannelGroup, width: int) -> Padding:
    """Return how a group grows to a width that is no multiple of its present one."""
    channels = flow.table
    axes = [axis for axis in group.axes if channels.roles[axis] == "writer"]
    copies = width // group.width
    return Padding(
        copies=copies,
        holds=flow.holds,
        ratio=copies * group.width / width,
        statistics=tuple(flow.statistics),
        filled=frozenset({*flow.filled, *axes}),
        free=frozenset(axis for axis, zero in flow.free.items() if zero),
        writers=tuple(dict.fromkeys(channels.axes[axis].tensor for axis in axes)),
        sole=all(flow.is_alone(channels.of_axis(axis)) for axis in axes),
    )
