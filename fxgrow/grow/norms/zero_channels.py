"""Channels that are written as zeros: are they zero wherever they are read, and can they learn?

Zeros written by every writer must still be zeros at every reader, so that any column will do
there. And a gradient must come back from some reader to each writer: a ReLU has no slope at zero,
and behind one such channels would stay zero for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.channels import Channels
from fxgrow.channels.groups import ChannelGroup
from fxgrow.labels.interpreter import interpret
from fxgrow.labels.padding import PaddingFlow
from fxgrow.labels.tape import Operation
from fxgrow.modules.tensors import layer_of


def follow_zeros(analysis: Analysis, group: ChannelGroup) -> frozenset[int] | str:
    """Return the axes (indices) of a group that zeros fill, or why its new channels cannot be zero.

    These are those of its writers, and of what is added to them.

    Args:
        analysis: of the network.
        group: the group; no norm over its channels says how they are laid out.
    """
    channels = analysis.channels
    flow = PaddingFlow(channels, group.channels, group.axes, "zero", gradient_later=True)
    operations = analysis.operations_of(group)
    interpret(operations, flow)
    if flow.refusal:
        return flow.refusal
    _follow_alike(channels, flow)
    readers = [axis for axis in group.axes if channels.roles[axis] == "reader"]
    for axis in readers:
        if not flow.free.get(axis, False):
            layer = layer_of(channels.axes[axis].tensor)
            why = flow.reasons.get(axis, "they come to it in an unknown way")
            return f"new channels need not be zero where {layer} reads them: {why}"
    writers = {axis for axis in group.axes if channels.roles[axis] == "writer"}
    stuck = _without_gradient(flow, operations)
    if stuck is not None:
        why = next(iter(flow.flat.values()), "no gradient comes back to them")
        return f"new channels of {stuck} would stay zero: {why}"
    return frozenset(flow.filled | writers)


def _follow_alike(channels: Channels, flow: PaddingFlow) -> None:
    """Let axes that are used in train mode alone be what those are that make a weight with them.

    What a noisy layer multiplies its noise by reads and writes what its mean does.
    """
    for axis in (axis for axis in channels.alike if axis not in flow.free):
        met = [flow.free[other] for other in channels.alike[axis] if other in flow.free]
        if met:
            flow.free[axis] = all(met)
    flow.filled |= {other for axis in flow.filled for other in channels.alike.get(axis, ())}


def _without_gradient(flow: PaddingFlow, operations: Sequence[Operation]) -> str | None:
    """Return a layer that writes zeros to which no reader sends a gradient, or None.

    A factor that multiplies zeros (a gate) gets its gradient as soon as these have learned.
    """
    live: set[int] = set()  # values that some reader sends a gradient to
    for op in reversed(operations):
        carriers = flow.carriers(op)
        sent = any(value.index in live for value in op.outputs)
        writer = next((v for v in op.inputs if flow.axes_of(v, "writer")), None)
        if carriers and writer is not None and not sent:
            return layer_of(writer.origins[0])
        read = any(flow.axes_of(value, "reader") for value in op.inputs)
        if read or (sent and op.index not in flow.flat):
            live |= {value.index for value in carriers}
    return None
