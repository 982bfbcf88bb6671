"""Why a layer's channels are what they are: chains of unions from the layer to the cause.

Two positions of parameter axes are one channel because operations said so, one union at a time.
The shortest path over these unions (networkx), from a layer to what pins its channels, to the
addition that makes them a stream, or to another layer that must change width with it, is a chain
of operations that anyone can check in the network's code.
"""

from __future__ import annotations

import difflib
import itertools
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.channels import Channels
from fxgrow.channels.groups import ChannelGroup, Kind, group_of_channel
from fxgrow.errors import PlanError
from fxgrow.labels.forest import IntArray
from fxgrow.labels.layers import core, support
from fxgrow.labels.operators import place_of
from fxgrow.labels.space import Role
from fxgrow.modules.tensors import layer_of

if TYPE_CHECKING:
    import networkx as nx

ONE_PARAMETER = "one parameter"  # the place of a link between two positions of one axis
_SHOWN = 12
Paths: TypeAlias = dict[int, list[int]]


@dataclass(frozen=True)
class Station:
    """An axis of a parameter on a chain.

    Attributes:
        tensor: fully qualified name of the parameter or buffer.
        dim: the dim of that tensor.
        role: what the axis is to its channels.
        label: the label of the position that the chain passes.
    """

    tensor: str
    dim: int
    role: Role
    label: int

    @property
    def layer(self) -> str:
        """The layer that owns the parameter."""
        return layer_of(self.tensor)

    def __str__(self) -> str:
        part = {0: "rows", 1: "columns"}.get(self.dim, f"dim {self.dim}")
        if self.role == "carrier":
            return self.tensor
        return f"{self.tensor.removesuffix('.weight')} {part}"


@dataclass(frozen=True)
class Chain:
    """The shortest way along unions from a layer to something.

    Attributes:
        stations: the axes it passes, from the layer on; at least one.
        places: the operation that unified each station with the next, or :data:`ONE_PARAMETER`.
        end: what the last station meets: the reason it is pinned for, or a residual addition; ""
            where the chain leads to that station itself.
    """

    stations: tuple[Station, ...]
    places: tuple[str, ...]
    end: str = ""

    def __str__(self) -> str:
        links = (f" – ({p}) – {s}" for p, s in zip(self.places, self.stations[1:], strict=True))
        return "".join((str(self.stations[0]), *links, f": {self.end}" if self.end else ""))


@dataclass(frozen=True)
class Side:
    """The channels of one group on one axis of the layer.

    Attributes:
        station: the axis.
        size: how many of the axis' positions belong to the group.
        group: the group's name, "" if no parameter writes these channels.
        width: the group's width, as :attr:`ChannelGroup.described_width`.
        kind: the group's kind.
        reason: why it is pinned, "" otherwise.
        remedy: what would be needed to free it, "" otherwise.
        cause: the chain to what pins it, or to the residual addition that makes it a stream.
        partners: a chain to each further writer and reader, the shortest first.
    """

    station: Station
    size: int
    group: str = ""
    width: str = ""
    kind: Kind = "pinned"
    reason: str = ""
    remedy: str = ""
    cause: Chain | None = None
    partners: tuple[Chain, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Why the channels of a layer are what they are.

    Attributes:
        layer: the name that was asked for.
        sides: each axis of the layer, once for each group it takes part in.
    """

    layer: str
    sides: tuple[Side, ...]

    def __str__(self) -> str:
        return self.text()

    def text(self, *, every: bool = False, width: int = 100) -> str:
        """Return the explanation for people.

        Args:
            every: show the chains to all other layers, not to the nearest of each side alone.
            width: columns to fit.
        """
        lines = [self.layer]
        for side in self.sides:
            lines += _side_lines(side, len(side.partners) if every else _SHOWN)
        return "\n".join(line for text in lines for line in _wrapped(text, width))


def explain(analysis: Analysis, name: str) -> Explanation:
    """Trace why a layer's channels are what they are.

    Args:
        analysis: what is known of the network.
        name: a layer by its module path, a parameter by its name, or a channel group.

    Returns:
        Each side of the layer with its group and the chains that couple it.

    Raises:
        PlanError: the network has no such layer, or it has no channels.
    """
    channels = analysis.channels
    wanted = _axes_of(analysis, name)
    sides: dict[tuple[str, Role], Side] = {}
    for axis in wanted:
        for found in _sides(analysis, axis):
            # A bias goes with the rows: the first axis in each role tells for the others.
            role: Role = "writer" if channels.roles[axis] == "carrier" else channels.roles[axis]
            sides.setdefault((found.group, role), found)
    return Explanation(name, tuple(sides.values()))


def _axes_of(analysis: Analysis, name: str) -> list[int]:
    """Return the axes of a layer or a parameter, writers first.

    Raises:
        PlanError: there are none; the nearest names are offered.
    """
    channels = analysis.channels
    order: tuple[Role, ...] = ("writer", "carrier", "reader")
    found = [i for i, x in enumerate(channels.axes) if name in (x.tensor, layer_of(x.tensor))]
    if found:
        return sorted(found, key=lambda axis: order.index(channels.roles[axis]))
    layers = list(dict.fromkeys(layer_of(axis.tensor) for axis in channels.axes))
    inside = [layer for layer in layers if layer.startswith(f"{name}.")]
    if inside:
        shown = ", ".join(inside[:5]) + (", …" if len(inside) > 5 else "")
        raise PlanError(f"{name} holds several layers.", name=name, way_out=f"Ask for {shown}.")
    near = difflib.get_close_matches(name, layers, 3, 0.5) or layers[:3]
    raise PlanError(
        f"there is no layer {name!r} with channels.",
        name=name,
        way_out=f"Near it: {', '.join(near)}.",
    )


def _sides(analysis: Analysis, axis: int) -> Iterator[Side]:
    """Yield the groups that an axis takes part in, in the order of its positions."""
    channels = analysis.channels
    members = channels.of_axis(axis)
    group_of = group_of_channel(channels, analysis.groups)
    _, first = np.unique(group_of[members], return_index=True)
    for position in np.sort(first).tolist():
        owner = int(group_of[members[position]])
        size = int((group_of[members] == owner).sum())
        if owner < 0:
            yield Side(_station(channels, channels.axes[axis].start + position), size)
        else:
            yield _side(analysis, axis, analysis.groups[owner], size)


def _side(analysis: Analysis, axis: int, group: ChannelGroup, size: int) -> Side:
    channels = analysis.channels
    found = _ShortestPaths(channels, axis, group)
    cause: Chain | None = None
    if group.kind == "pinned":
        ends = [(labels, str(pin)) for labels, pin in channels.pinned if pin == group.pin]
        cause = found.chain_to(ends)
    elif group.kind == "stream":
        cause = found.chain_to(_additions(analysis))
    others = [
        other
        for other in group.axes
        if other != axis and channels.roles[other] in ("writer", "reader")
    ]
    partners = [found.chain_to([(_labels_of(channels, other), "")]) for other in others]
    start = channels.axes[axis].start
    position = int(np.isin(channels.of_axis(axis), group.channels).argmax())
    return Side(
        station=_station(channels, start + position),
        size=size,
        group=group.name,
        width=group.described_width,
        kind=group.kind,
        reason=group.reason,
        remedy=group.pin.remedy if group.pin else "",
        cause=cause,
        partners=tuple(sorted((c for c in partners if c), key=lambda chain: len(chain.places))),
    )


def _additions(analysis: Analysis) -> list[tuple[IntArray, str]]:
    """Return the labels that each residual addition adds, and its place."""
    found = []
    for addition in analysis.additions:
        op = analysis.tape.operations[addition]
        layers = [layer for value in op.inputs for layer in value.layers]
        labels = [core(layer, support(layer)).numpy().ravel() for layer in layers]
        if labels:
            place = place_of(op.target, op.node, op.module)
            found.append((np.unique(np.concatenate(labels)), f"the residual addition {place}"))
    return found


class _ShortestPaths:
    """Shortest paths along unions from one axis, over the labels of one group.

    The labels of one channel of the axis suffice for most; those of the whole group, in which the
    positions of a writer hang together, are looked through where they do not.

    Args:
        channels: the resolved channels.
        axis: where the paths begin.
        group: the group they stay in.
    """

    def __init__(self, channels: Channels, axis: int, group: ChannelGroup) -> None:
        self._channels = channels
        self._axis = axis
        self._group = group
        members = channels.of_axis(axis)
        shared = members[np.isin(members, group.channels)]
        guilty = (c for c in shared.tolist() if channels.pins.get(c) == group.pin)
        self._first = int(next(guilty, shared[0]))
        self._graphs: dict[bool, tuple[nx.Graph, Paths]] = {}

    def chain_to(self, ends: Iterable[tuple[IntArray, str]]) -> Chain | None:
        """Return the shortest chain to one of the ends, the first where several are as near.

        Args:
            ends: labels, of which any will do, and what they meet.
        """
        ends = list(ends)
        for whole in (False, True):
            graph, paths = self._paths(whole)
            near = [
                (len(paths[label]), index, label)
                for index, (labels, _) in enumerate(ends)
                for label in np.intersect1d(labels, np.array([*paths])).tolist()
            ]
            if near:
                _, index, label = min(near)
                return self._chain(graph, paths[label], ends[index][1])
        return None

    def _paths(self, whole: bool) -> tuple[nx.Graph, Paths]:
        """Return the graph of unions and the shortest path from the axis to each label."""
        if whole not in self._graphs:
            wanted = self._group.channels if whole else np.array([self._first])
            graph = union_graph(self._channels, wanted)
            start = _labels_of(self._channels, self._axis)
            start = start[np.isin(self._channels.channel_of_label[start], wanted)]
            graph.add_edges_from((0, label) for label in start.tolist())  # 0 is nobody's label
            if whole:
                for axis in self._group.axes:
                    if self._channels.roles[axis] == "writer":
                        labels = _labels_of(self._channels, axis).tolist()
                        graph.add_edges_from((-1 - axis, label) for label in labels)
            from networkx import single_source_shortest_path

            self._graphs[whole] = (graph, single_source_shortest_path(graph, 0))
        return self._graphs[whole]

    def _chain(self, graph: nx.Graph, path: list[int], end: str) -> Chain:
        labels = [label for label in path if label > 0]
        owned = [_has_station(self._channels, label) for label in labels]
        places = [
            graph.edges[pair]["place"] if graph.has_edge(*pair) else ONE_PARAMETER
            for pair in itertools.pairwise(labels)
        ]
        stations = (_station(self._channels, label) for label in itertools.compress(labels, owned))
        return Chain(tuple(stations), tuple(itertools.compress(places, owned[1:])), end)


def union_graph(channels: Channels, wanted: IntArray) -> nx.Graph:
    """Return the labels of some channels as a graph of the unions between them.

    Args:
        channels: the resolved channels.
        wanted: the channels.

    Returns:
        A graph over labels; ``place`` of an edge is the operation that unified them first.
    """
    inside = np.zeros(channels.count + 1, dtype=bool)  # one more, for channel -1
    inside[wanted] = True
    of_label = channels.channel_of_label
    from networkx import Graph  # late: it takes long to load, and few ask why

    graph = Graph()
    graph.add_nodes_from(np.flatnonzero(inside[of_label]).tolist())
    for left, right, place in reversed(channels.unions):
        kept = inside[of_label[left]]
        pairs = zip(left[kept].tolist(), right[kept].tolist(), strict=True)
        graph.add_edges_from(pairs, place=place)
    return graph


def _labels_of(channels: Channels, axis: int) -> IntArray:
    found = channels.axes[axis]
    return np.arange(found.start, found.start + found.size, dtype=np.int64)


def _has_station(channels: Channels, label: int) -> bool:
    """Return whether a label is of a parameter's axis, and not of a place in activations."""
    return any(axis.start <= label < axis.start + axis.size for axis in channels.axes)


def _station(channels: Channels, label: int) -> Station:
    starts = [axis.start for axis in channels.axes]
    index = int(np.searchsorted(starts, label, side="right")) - 1
    axis = channels.axes[index]
    return Station(axis.tensor, axis.dim, channels.roles[index], label)


def _side_lines(side: Side, most: int) -> list[str]:
    """Return the lines on one side; leading blanks say how far a line is indented."""
    if not side.group:
        return [
            f"  {side.station}: {side.size} that belong to no group, because no parameter writes "
            "them (an input of the network, or data of fixed width)"
        ]
    lines = [f"  {side.station}: {side.kind} group {side.group}, width {side.width}"]
    if side.kind == "pinned":
        lines += [f"    pinned: {side.reason}", f"    needed: {side.remedy}"]
    if side.cause is not None:
        lines += [f"    {'stream' if side.kind == 'stream' else 'how'}: {side.cause}"]
    if not side.partners:
        return [*lines, "    changes width with no other layer"]
    lines.append("    changes width with, and through what:")
    shown = side.partners[:most]
    lines += _tree_lines(shown, "      ")
    left = len(side.partners) - len(shown)
    return [*lines, f"      … and {left} more"] if left else lines


def _tree_lines(chains: Iterable[Chain], indent: str) -> list[str]:
    """Return chains as a tree: each station below the one it is unified with, and where."""
    branches: dict[str, list[Chain]] = {}
    for chain in chains:
        if chain.places:
            place, station = chain.places[0], chain.stations[1]
            text = f"{station} ({place.removesuffix(f' at {station.layer}')})"
            branches.setdefault(text, []).append(Chain(chain.stations[1:], chain.places[1:]))
    lines: list[str] = []
    for text, rest in branches.items():
        lines += [indent + text, *_tree_lines(rest, indent + "  ")]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
