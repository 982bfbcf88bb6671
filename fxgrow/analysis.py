"""All that is known of a network before anything is asked of it: channels, groups, blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fxgrow.blocks import ResidualBlock, find_pairs, residual_additions, stream_channels
from fxgrow.channels import Channels, resolve
from fxgrow.groups import ChannelGroup, find_groups
from fxgrow.labels.sizes import Recorder, SizedCall
from fxgrow.labels.tape import Tape, Value
from fxgrow.trace import Traced


@dataclass(frozen=True)
class Analysis:
    """A traced network and what its labels say.

    Attributes:
        traced: the stand-in on meta tensors, its graph and inputs.
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
    def sized_calls(self) -> tuple[Channels, tuple[tuple[SizedCall, ...], ...]]:
        """The calls that take sizes, for each run of the network's own forward; and its channels.

        Raises:
            TraceError: the network does not run.
        """
        recorders: list[Recorder] = []

        def watch(value: Callable[[Tensor], Value]) -> Recorder:
            recorders.append(Recorder(value))
            return recorders[-1]

        space, _ = self.traced.label_module(watch)
        return resolve(space), tuple(tuple(recorder.calls) for recorder in recorders)

    def block_of(self, group: ChannelGroup) -> str | None:
        """Return the residual block whose branch writes a hidden group, or None."""
        if group.kind == "stream":
            return None
        return next((b.name for b in self.blocks if group.name in b.layers), None)


def analyse(traced: Traced) -> Analysis:
    """Label a traced network and find its channel groups and residual blocks.

    Raises:
        TraceError: the network does not run on its inputs.
    """
    space, tape = traced.label()
    channels = resolve(space)
    bare = residual_additions(tape)
    groups = find_groups(channels, stream_channels(channels, tape, bare))
    return Analysis(traced, tape, channels, groups, find_pairs(bare, groups, channels, tape))
