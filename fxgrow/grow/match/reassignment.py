"""Where a signature has fewer new channels than old ones: places that touch more serve too."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fxgrow.channels.channels import Channels
from fxgrow.errors import listed
from fxgrow.grow.obstacle import Obstacle
from fxgrow.labels.forest import IntArray
from fxgrow.modules.tensors import layer_of

if TYPE_CHECKING:
    import networkx as nx

Touch: TypeAlias = Counter[tuple[int, int]]  # how often (axis code, convolution group)
Node: TypeAlias = tuple[str, int]  # of the flow network: old or new, and a signature
_DONE = -1  # stands for an axis where something is done to a channel


def told_groups(runs: tuple[Channels, Channels], codes: Iterable[int]) -> str:
    """Return the numbers of groups of the grouped convolutions among some axes, as told."""
    tensors = dict.fromkeys(runs[0].axes[code].tensor for code in codes)
    counts = {name: [run.convolution_groups.get(name, 1) for run in runs] for name in tensors}
    told = [
        f"{layer_of(name)} has {before} groups, and {after} then"
        for name, (before, after) in counts.items()
        if before > 1 or after > 1
    ]
    return f" ({'; '.join(told)})" if told else ""


@dataclass(frozen=True)
class BySignature:
    """Channels by signature, where some signature has fewer new channels than old ones.

    An old channel may then continue as a new one that touches all it touches, and more besides:
    the extra readers get zero columns, so that any carriers on the way to them are free.
    """

    old: Channels
    new: Channels
    new_codes: Sequence[int]
    old_buckets: dict[int, IntArray]
    new_buckets: dict[int, IntArray]
    history: Sequence[str]

    def reassign(self, continued: IntArray, oversubscribed: Sequence[int]) -> Obstacle | None:
        """Assign anew, in place, the channels that share their writers with some.

        Of the signatures of these there are too few new channels; where there is no place for some
        channel, that is in the way.

        As many as possible keep a place of their own signature: a minimum-cost flow over
        signatures, in which any other place costs one.
        """
        if not oversubscribed:
            return None
        codes = range(len(self.old.axes))
        wanted = self._first_touches(self.old, codes, self.old_buckets)
        offered = self._first_touches(self.new, self.new_codes, self.new_buckets)
        touched = _touches(self.old, codes, oversubscribed)
        writers = {code for code, role in enumerate(self.old.roles) if role == "writer"}
        concerned = {code for touch in touched.values() for code, _ in touch} & writers
        for touch in touched.values():
            if writers.isdisjoint(code for code, _ in touch):
                return self._displaced(touch)
        wanted, offered = (
            {
                kind: touch
                for kind, touch in some.items()
                if not concerned.isdisjoint(c for c, _ in touch)
            }
            for some in (wanted, offered)
        )
        from networkx import min_cost_flow  # late: it takes long to load, and few widths need it

        found = min_cost_flow(self._network(wanted, offered, writers))
        homeless = {kind: count for kind in wanted if (count := found["old", kind].pop("all"))}
        if homeless:
            first = min(homeless, key=lambda kind: int(self.old_buckets[kind][0]))
            return self._obstacle(wanted[first], homeless[first])
        self._move(continued, {kind: found["old", kind] for kind in wanted})
        return None

    def _move(self, continued: IntArray, served: Mapping[int, Mapping[Node, int]]) -> None:
        """Let channels continue elsewhere, in place: how many of each signature as which."""
        moved = np.concatenate([self.old_buckets[kind] for kind in served])
        continued[np.isin(continued, moved)] = -1
        free = {kind: list(members) for kind, members in self.new_buckets.items()}
        for own, counts in served.items():
            members = list(self.old_buckets[own])
            for (_, kind), count in sorted(counts.items(), key=lambda to: to[0][1] != own):
                for member in members[:count]:
                    continued[free[kind].pop(0)] = member
                members = members[count:]

    def _network(
        self, wanted: Mapping[int, Touch], offered: Mapping[int, Touch], writers: Set[int]
    ) -> nx.DiGraph:
        """Return the flow network from old signatures to new ones that could serve them.

        Args:
            wanted: what the old channels of each signature touch.
            offered: what the new ones do.
            writers: the codes of axes that write.
        """
        total = sum(len(self.old_buckets[kind]) for kind in wanted)
        from networkx import DiGraph

        flow = DiGraph()
        for kind in wanted:
            flow.add_node(("old", kind), demand=-len(self.old_buckets[kind]))
        for kind, touch in offered.items():
            flow.add_edge(("new", kind), "all", capacity=len(self.new_buckets[kind]))
            for other, own in wanted.items():
                if kind != other and _has_several(own):
                    continue  # another of its rows might have to do there what one does here
                extra = {code for code, _ in touch - own}
                if extra == {_DONE}:  # it is not led elsewhere, but something more is done to it
                    continue
                if not own - touch and not extra & writers:
                    flow.add_edge(("old", other), ("new", kind), weight=int(other != kind))
        flow.add_node("all", demand=total)
        for kind in wanted:  # to have no place costs more than all moves together
            flow.add_edge(("old", kind), "all", weight=total + 1)
        return flow

    def _obstacle(self, touch: Touch, count: int) -> Obstacle:
        """Return what is in the way of ``count`` channels that touch this and have no place."""
        codes = sorted({code for code, _ in touch} - {_DONE})
        layers = {code: layer_of(self.old.axes[code].tensor) for code in codes}
        readers = [layers[code] for code in codes if self.old.roles[code] == "reader"]
        lead = f" lead to {' and '.join(dict.fromkeys(readers))}" if readers else ""
        return Obstacle(
            f"at this width, channels of {layers[codes[0]]} would have no place in the widened "
            f"network: {count} too few{lead}{told_groups((self.old, self.new), codes)}",
            name=layers[codes[0]],
            way_out="Try a somewhat larger width.",
        )

    def _displaced(self, touch: Touch) -> Obstacle:
        """Return what is in the way of channels that no layer writes: none can take the place."""
        codes = sorted({code for code, _ in touch} - {_DONE})
        reader = layer_of(self.old.axes[codes[0]].tensor)
        beside = self._writers_of(self.old.of_axis(codes[0]))
        return Obstacle(
            f"at this width, what {reader} reads beside these channels, and no layer writes, would "
            f"move to another group of it{told_groups((self.old, self.new), codes)}",
            name=next(iter(beside), reader),
            way_out=f"Leave out {listed(beside)}, or try another width." if beside else "",
        )

    def _writers_of(self, channels: IntArray) -> list[str]:
        """Return the layers that write some channels."""
        rows = np.flatnonzero(np.isin(self.old.channel, channels))
        axes = np.unique(self.old.axis_of_row[rows]).tolist()
        written = [axis for axis in axes if self.old.roles[axis] == "writer"]
        return list(dict.fromkeys(layer_of(self.old.axes[axis].tensor) for axis in written))

    def _first_touches(
        self, channels: Channels, codes: Sequence[int], buckets: dict[int, IntArray]
    ) -> dict[int, Touch]:
        """Return what the channels of each signature touch, and what is done to them."""
        firsts = {int(members[0]): kind for kind, members in buckets.items()}
        touches = _touches(channels, codes, list(firsts))
        for done, (_, labels) in zip(self.history, channels.history, strict=False):
            done_to = channels.channel_of_label[labels]
            for channel in set(done_to.tolist()) & touches.keys():
                touches[channel][_DONE, zlib.crc32(done.encode())] += 1
        return {firsts[channel]: touch for channel, touch in touches.items()}


def _touches(
    channels: Channels, axis_codes: Sequence[int], wanted: Sequence[int]
) -> dict[int, Touch]:
    """Return the (axis code, convolution group) pairs that some channels touch."""
    touches: dict[int, Touch] = {channel: Counter() for channel in wanted}
    for row in np.flatnonzero(np.isin(channels.channel, wanted)).tolist():
        code = axis_codes[int(channels.axis_of_row[row])]
        touches[int(channels.channel[row])][code, int(channels.group_of_row[row])] += 1
    return touches


def _has_several(touch: Touch) -> bool:
    """Return whether a channel that touches this has several rows of one axis."""
    axes = [code for code, _ in touch.elements() if code != _DONE]
    return len(set(axes)) < len(axes)
