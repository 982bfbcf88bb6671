"""All that is known of a network before anything is asked of it: channels, groups, blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor, fx

from fxgrow.channels.blocks import (
    ResidualBlock,
    find_pairs,
    recurrent_blocks,
    residual_additions,
    stream_channels,
)
from fxgrow.channels.channels import Channels, resolve
from fxgrow.channels.computed import with_computed_weights_told
from fxgrow.channels.groups import ChannelGroup, find_groups, group_of_channel
from fxgrow.channels.present import Present, present
from fxgrow.channels.tied import Silenced, find_silenced
from fxgrow.errors import TraceError
from fxgrow.labels.graphs import open_graph
from fxgrow.labels.sizes import Recorder, SizedCall
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Operation, Tape, Value
from fxgrow.labels.trace import Traced
from fxgrow.modules.standin import stand_in

_MAKING = ("lift_fresh", "lift_fresh_copy", "detach")  # what torch makes a constant tensor with


@dataclass(frozen=True)
class Analysis:
    """A traced network and what its labels say.

    Attributes:
        traced: the stand-in on meta tensors, and inputs.
        tape: the operations of one run.
        channels: the channel of every position of every parameter axis.
        groups: channel groups in order of execution.
        additions: the residual additions, as places on the tape: those of blocks, and of what the
            gates of recurrent layers and loops add.
        blocks: residual blocks in order of execution, with their pairs.
        calls: that took sizes, in order: in eval mode, and in train mode if that was run.
        silenced: the tensors that both write and read channels which can grow all the same.
        plain: the same network followed at its own widths, where some groups were at others.
    """

    traced: Traced
    tape: Tape
    channels: Channels
    groups: tuple[ChannelGroup, ...]
    additions: tuple[int, ...]
    blocks: tuple[ResidualBlock, ...]
    calls: tuple[tuple[SizedCall, ...], ...]
    silenced: tuple[Silenced, ...] = ()
    plain: Analysis | None = None

    @cached_property
    def present(self) -> Present:
        """The channels that the network has, of those that were followed."""
        return present(self.channels, self.groups)

    @property
    def flops(self) -> int:
        """The floating-point operations of a run at the network's own widths."""
        return (self.plain or self).tape.flops

    @cached_property
    def opened(self) -> Opened | None:
        """A copy of the stand-in with a graph in which sizes can be rewritten, if there is one."""
        if self.plain is not None:
            return None  # the graph runs at the network's own widths
        copy = stand_in(self.traced.standin)
        try:
            graph = open_graph(copy.get_submodule(self.traced.module))
        except TraceError:
            return None
        return Opened(replace(self.traced, standin=copy), graph)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The fx node that ran each operation; none if there is no graph that runs the same."""
        # By name: a graph has x + y where the code has x += y. A graph holds constants ready-made.
        known = [op.name for op in self.tape.operations if op.name not in _MAKING]
        ran = [(name, node) for name, node in self.traced.nodes if name not in _MAKING]
        if [name for name, _ in ran] != known:
            return ()
        nodes = iter([node for _, node in ran])
        return tuple("" if op.name in _MAKING else next(nodes) for op in self.tape.operations)

    @cached_property
    def _block_of_layer(self) -> dict[str, str]:
        """The first residual block that each layer is a part of the branch of."""
        return {layer: block.name for block in reversed(self.blocks) for layer in block.layers}

    @cached_property
    def _operations(self) -> dict[str, list[Operation]]:
        """The operations that touch each channel group and lead to an output, by its name."""
        group_of = group_of_channel(self.channels, self.groups)
        touched: dict[int, tuple[int, ...]] = {}  # groups by value
        found: dict[str, list[Operation]] = {group.name: [] for group in self.groups}
        for op in self.tape.read:
            own: set[int] = set()
            for value in op.inputs:
                if value.layers and value.index not in touched:
                    groups = np.unique(group_of[self.channels.of_layers(value.layers)])
                    touched[value.index] = tuple(groups[groups >= 0].tolist())
                own.update(touched.get(value.index, ()))
            for index in own:
                found[self.groups[index].name].append(op)
        return found

    def operations_of(self, group: ChannelGroup) -> Sequence[Operation]:
        """Return the operations that get any channel of a group, in order of execution."""
        return self._operations[group.name]

    @cached_property
    def _mixers(self) -> dict[str, list[str]]:
        """Where operations over several channels ran, by the name of each group among these."""
        group_of = group_of_channel(self.channels, self.groups)
        found: dict[str, list[str]] = {}
        for mixer in self.channels.mixers:
            for index in np.unique(group_of[mixer.channels]).tolist():
                if index >= 0:
                    found.setdefault(self.groups[index].name, []).append(mixer.place)
        return found

    def mixers_of(self, group: ChannelGroup) -> Sequence[str]:
        """Return where operations ran that depend on several of a group's channels together."""
        return self._mixers.get(group.name, ())

    def block_of(self, group: ChannelGroup) -> str | None:
        """Return the residual block whose branch writes a hidden group, or None."""
        return None if group.kind == "stream" else self._block_of_layer.get(group.writers[0])


@dataclass(frozen=True)
class Opened:
    """A network whose sizes can be rewritten.

    Attributes:
        traced: the network.
        graph: its graph.
    """

    traced: Traced
    graph: fx.Graph

    @cached_property
    def run(self) -> SizedRun | None:
        """A run of the graph at the present sizes, if it runs."""
        recording = CallRecording(self.traced)
        try:
            space, _ = self.traced.label_graph(self.graph, recording)
        except TraceError:
            return None
        return SizedRun(resolve(space), recording.calls)


@dataclass(frozen=True)
class SizedRun:
    """A run with the calls that took sizes.

    Attributes:
        channels: the channels of the run.
        calls: for eval mode, and for train mode if that was run, the calls in order.
    """

    channels: Channels
    calls: tuple[tuple[SizedCall, ...], ...]


class CallRecording:
    """Watches the runs of a network for the calls that take sizes."""

    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self._recorders: list[Recorder] = []

    def __call__(self, value: Callable[[Tensor], Value]) -> Recorder:
        """Return what watches the next run; the first of the network's replaces others."""
        if self._traced.begins:
            self._recorders.clear()
        self._recorders.append(Recorder(value))
        return self._recorders[-1]

    @property
    def calls(self) -> tuple[tuple[SizedCall, ...], ...]:
        """The calls of each run."""
        return tuple(tuple(recorder.calls) for recorder in self._recorders)


def analyse(traced: Traced) -> Analysis:
    """Label a traced network and find its channel groups and residual blocks.

    Raises:
        TraceError: the network does not run on its inputs.
    """
    recording = CallRecording(traced)
    return _found(traced, *traced.follow(recording), recording)


def analyse_resized(traced: Traced, plain: Analysis) -> Analysis:
    """Label a network that has other sizes for a while, on the inputs that were found before.

    Args:
        traced: of the network.
        plain: what is known of it at its own sizes.

    Raises:
        TraceError: the network does not run at these sizes.
    """
    recording = CallRecording(traced)
    return replace(_found(traced, *traced.label(recording), recording), plain=plain)


def _found(traced: Traced, space: LabelSpace, tape: Tape, recording: CallRecording) -> Analysis:
    """Return what the labels of a run say."""
    told = with_computed_weights_told(resolve(space), traced.standin)
    silenced, channels = find_silenced(told, tape)
    bare = residual_additions(tape)
    groups = find_groups(channels, stream_channels(channels, tape, bare))
    recurrent = recurrent_blocks(bare, tape)
    blocks = [
        block
        for block in bare
        if block.addition not in recurrent and not _is_in_layer(block, traced, tape)
    ]
    return Analysis(
        traced,
        tape,
        channels,
        groups,
        tuple(block.addition for block in bare),
        find_pairs(blocks, groups, channels, tape),
        recording.calls,
        silenced,
    )


def _is_in_layer(block: ResidualBlock, traced: Traced, tape: Tape) -> bool:
    """Return whether the addition is of a layer of torch's own, as the gates of an LSTM are."""
    module = traced.standin.get_submodule(tape.operations[block.addition].module)
    return not any(module.children()) and fx.Tracer().is_leaf_module(module, "")
