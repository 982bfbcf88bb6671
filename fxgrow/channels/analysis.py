"""All that is known of a network before anything is asked of it: channels, groups, blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, fx

from fxgrow.channels.blocks import ResidualBlock, find_pairs, residual_additions, stream_channels
from fxgrow.channels.channels import Channels, resolve
from fxgrow.channels.groups import ChannelGroup, find_groups
from fxgrow.errors import TraceError
from fxgrow.labels.graphs import open_graph
from fxgrow.labels.sizes import Recorder, SizedCall
from fxgrow.labels.tape import Tape, Value
from fxgrow.labels.trace import Traced
from fxgrow.modules.standin import stand_in


@dataclass(frozen=True)
class Analysis:
    """A traced network and what its labels say.

    Attributes:
        traced: the stand-in on meta tensors, and inputs.
        tape: the operations of one run.
        channels: the channel of every position of every parameter axis.
        groups: channel groups in order of execution.
        blocks: residual blocks in order of execution, with their pairs.
        calls: that took sizes, in order: in eval mode, and in train mode if that was run.
    """

    traced: Traced
    tape: Tape
    channels: Channels
    groups: tuple[ChannelGroup, ...]
    blocks: tuple[ResidualBlock, ...]
    calls: tuple[tuple[SizedCall, ...], ...]

    @cached_property
    def opened(self) -> Opened | None:
        """A copy of the stand-in with a graph in which sizes can be rewritten, if there is one."""
        copy = stand_in(self.traced.standin)
        try:
            graph = open_graph(copy.get_submodule(self.traced.module))
        except TraceError:
            return None
        return Opened(replace(self.traced, standin=copy), graph)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The fx node that ran each operation; none if there is no graph that runs the same."""
        graph = self.traced.graph
        if graph is None:
            return ()
        try:
            _, tape = self.traced.label_graph(graph)
        except TraceError:
            return ()
        # By name: a graph has x + y where the code has x += y.
        ran, known = ([op.name for op in run.operations] for run in (tape, self.tape))
        return tuple(op.node for op in tape.operations) if ran == known else ()

    @cached_property
    def _block_of_layer(self) -> dict[str, str]:
        """The first residual block that each layer is a part of the branch of."""
        return {layer: block.name for block in reversed(self.blocks) for layer in block.layers}

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
        recording = Recording(self.traced)
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


class Recording:
    """Watches the runs of a network for the calls that take sizes."""

    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self._recorders: list[Recorder] = []

    def __call__(self, value: Callable[[Tensor], Value]) -> Recorder:
        """Return what watches the next run; one in eval mode is the first of its network."""
        if not self._traced.target.training:
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
    recording = Recording(traced)
    space, tape = traced.follow(recording)
    channels = resolve(space)
    bare = residual_additions(tape)
    groups = find_groups(channels, stream_channels(channels, tape, bare))
    blocks = find_pairs(bare, groups, channels, tape)
    return Analysis(traced, tape, channels, groups, blocks, recording.calls)
