"""All that is known of a network before anything is asked of it: channels, groups, blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from torch import Tensor, fx

from fxgrow.channels.blocks import ResidualBlock, find_pairs, residual_additions, stream_channels
from fxgrow.channels.channels import Channels, resolve
from fxgrow.channels.groups import ChannelGroup, find_groups, group_of_channel
from fxgrow.errors import TraceError
from fxgrow.labels.graphs import open_graph
from fxgrow.labels.propagate import Watch
from fxgrow.labels.sizes import Recorder, SizedCall
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Operation, Tape, Value
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
    """

    traced: Traced
    tape: Tape
    channels: Channels
    groups: tuple[ChannelGroup, ...]
    blocks: tuple[ResidualBlock, ...]

    @cached_property
    def own_forward(self) -> SizedRun:
        """A run of the network's own forward, at its present sizes.

        Raises:
            TraceError: the network does not run.
        """
        return sized_run(self.traced.label)

    @cached_property
    def opened(self) -> Opened | TraceError:
        """A copy of the stand-in with a graph in which sizes can be rewritten, and a run of it.

        If there is no such graph, the error that tells why.
        """
        copy = stand_in(self.traced.standin)
        part = copy.get_submodule(self.traced.module)
        try:
            graph = open_graph(part)
            traced = replace(self.traced, standin=copy)
            return Opened(traced, graph, sized_run(partial(traced.label_graph, graph)))
        except TraceError as error:
            return error

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
    def _operations(self) -> dict[str, list[Operation]]:
        """The operations that touch each channel group, by its name, in order."""
        group_of = group_of_channel(self.channels, self.groups)
        touched: dict[int, tuple[int, ...]] = {}  # groups by value
        found: dict[str, list[Operation]] = {group.name: [] for group in self.groups}
        for op in self.tape.operations:
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

    def block_of(self, group: ChannelGroup) -> str | None:
        """Return the residual block whose branch writes a hidden group, or None."""
        if group.kind == "stream":
            return None
        return next((b.name for b in self.blocks if group.writers[0] in b.layers), None)


@dataclass(frozen=True)
class Opened:
    """A network whose sizes can be rewritten.

    Attributes:
        traced: the network.
        graph: its graph.
        run: a run of the graph.
    """

    traced: Traced
    graph: fx.Graph
    run: SizedRun


@dataclass(frozen=True)
class SizedRun:
    """A run with the calls that took sizes.

    Attributes:
        channels: the channels of the run.
        calls: for eval mode, and for train mode if that was run, the calls in order.
    """

    channels: Channels
    calls: tuple[tuple[SizedCall, ...], ...]


def sized_run(label: Callable[[Watch], tuple[LabelSpace, Tape]]) -> SizedRun:
    """Return the calls that take sizes in a labelled run."""
    recorders: list[Recorder] = []

    def watch(value: Callable[[Tensor], Value]) -> Recorder:
        recorders.append(Recorder(value))
        return recorders[-1]

    space, _ = label(watch)
    return SizedRun(resolve(space), tuple(tuple(recorder.calls) for recorder in recorders))


def analyse(traced: Traced) -> Analysis:
    """Label a traced network and find its channel groups and residual blocks.

    Raises:
        TraceError: the network does not run on its inputs.
    """
    space, tape = traced.follow()
    channels = resolve(space)
    bare = residual_additions(tape)
    groups = find_groups(channels, stream_channels(channels, tape, bare))
    return Analysis(traced, tape, channels, groups, find_pairs(bare, groups, channels, tape))
