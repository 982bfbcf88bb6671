"""Residual blocks and the conv→norm→act→conv pairs inside them, found on the data-flow graph.

A residual addition is an ``add`` of two activations that part at a common dominator and at least
one of which comes back computed (by a convolution or a matrix product), not only moved. What lies
between dominator and addition is the block: the branch, and the skip path, which is the identity,
a projection (it has a layer of its own) or data movement such as slicing and padding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fxgrow.channels.channels import Channels
from fxgrow.channels.groups import ChannelGroup, group_of_channel
from fxgrow.labels.forest import IntArray
from fxgrow.labels.layers import core, support
from fxgrow.labels.operators import traits_of
from fxgrow.labels.tape import Operation, Tape
from fxgrow.modules.tensors import layer_of

Skip = Literal["identity", "projection", "slice/pad"]


@dataclass(frozen=True)
class Pair:
    """A hidden channel group inside a branch: what writes it, what it passes, what reads it.

    Attributes:
        group: the channel group's name.
        writers, norms, activations, readers: in order of execution; layers by name, activations
            by operator (``relu``).
    """

    group: str
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    activations: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class ResidualBlock:
    """What lies between a fork and the addition that joins it again.

    Attributes:
        name: the module that holds the branch (``layer1.0``), or the addition's node.
        skip: what the skip path does.
        addition: index of the addition on the tape.
        branch, skip_path: operations (tape indices) on either path, in order.
        layers: the layers of the branch.
        pairs: the hidden groups inside the branch.
        preactivation: whether norm and activation come before each product, as in ResNet v2,
            and not after it.
    """

    name: str
    skip: Skip
    addition: int
    branch: tuple[int, ...]
    skip_path: tuple[int, ...]
    layers: tuple[str, ...]
    preactivation: bool
    pairs: tuple[Pair, ...] = ()


def data_flow(tape: Tape) -> dict[int, list[int]]:
    """Return, for each operation on data, those that made what it gets; −1 stands for the inputs.

    Operations on parameters alone are left out: they are not on any path from the input.
    """
    sources: dict[int, list[int]] = {-1: []}
    for op in tape.operations:
        if traits_of(op.target).is_factory:  # made in the image of data, not of it
            continue
        made_by = dict.fromkeys(-1 if value.is_input else value.producer for value in op.inputs)
        found = [index for index in made_by if index is not None and index in sources]
        if found:
            sources[op.index] = found
    return sources


def immediate_dominators(sources: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Return, for each node, the last one before it that every path to it leads through.

    Args:
        sources: for each node its predecessors, all of which have smaller numbers and come before
            it; the first has none.

    Source: Cooper, Harvey and Kennedy, A Simple, Fast Dominance Algorithm (2001). In this order,
    once through the nodes is enough.

    Example:
        >>> immediate_dominators({-1: [], 0: [-1], 1: [0], 2: [0, 1]})
        {-1: -1, 0: -1, 1: 0, 2: 0}
    """
    dominator: dict[int, int] = {}
    for node, before in sources.items():
        fork = before[0] if before else node
        for other in before[1:]:
            while fork != other:
                if fork > other:
                    fork = dominator[fork]
                else:
                    other = dominator[other]
        dominator[node] = fork
    return dominator


def residual_additions(tape: Tape) -> list[ResidualBlock]:
    """Return the residual blocks of a run in order of execution, without their pairs.

    Complexity: immediate dominators once, then one backward search per addition that stops at the
    dominator, so about linear in the size of the graph.
    """
    graph = data_flow(tape)
    dominator = immediate_dominators(graph)
    blocks = []
    for op in tape.operations:
        operands = [v for v in op.inputs if v.producer in graph and not v.is_weight and v.layers]
        if op.name != "add" or len(operands) != 2 or op.index not in graph:
            continue
        fork = dominator[op.index]
        first, second = (
            _between(graph, fork, value.producer)
            for value in operands
            if value.producer is not None
        )
        computed = [
            _products(tape, path - shared) for path, shared in ((first, second), (second, first))
        ]
        if not any(computed):
            continue
        branch, skip = (first, second) if _is_branch(computed, first, second) else (second, first)
        blocks.append(_block(tape, op, branch - skip, skip - branch))
    return blocks


def recurrent_blocks(blocks: Sequence[ResidualBlock], tape: Tape) -> set[int]:
    """Return the additions among these that update a state, step by step, and close no block.

    What a loop adds depends on what the same layers gave in the step before; the first step, which
    begins with zeros, runs these layers too. And a sum of two products of data is what gates make.
    """
    looped: set[str] = set()
    for block in blocks:
        path = [tape.operations[index] for index in {*block.branch, *block.skip_path} if index >= 0]
        times = Counter(name for op in path if op.is_product for name in op.parameters)
        looped.update(layer_of(name) for name, count in times.items() if count > 1)
    return {
        block.addition
        for block in blocks
        if (block.layers and looped.issuperset(block.layers)) or _is_gated(block, tape)
    }


def _is_gated(block: ResidualBlock, tape: Tape) -> bool:
    """Return whether both that are added are products of two activations."""
    addition = tape.operations[block.addition]
    made = [tape.operations[v.producer] for v in addition.inputs if v.producer is not None]
    return len(made) == 2 and all(
        op.name == "mul" and sum(not v.is_weight and len(v.shape) > 0 for v in op.inputs) == 2
        for op in made
    )


def _between(graph: Mapping[int, Sequence[int]], fork: int, end: int) -> set[int]:
    """Return the operations after ``fork`` on the way to ``end``, ``end`` included."""
    found: set[int] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node != fork and node not in found:
            found.add(node)
            waiting.extend(graph[node])
    return found


def _products(tape: Tape, path: Iterable[int]) -> int:
    return sum(tape.operations[index].is_product for index in path if index >= 0)


def _is_branch(computed: list[int], first: set[int], second: set[int]) -> bool:
    """Return whether the first path is the branch: the one with more products, then operations."""
    return (computed[0], len(first)) >= (computed[1], len(second))


def _block(tape: Tape, addition: Operation, branch: set[int], skip: set[int]) -> ResidualBlock:
    path = [tape.operations[index] for index in sorted(branch)]
    layers = tuple(dict.fromkeys(layer_of(name) for op in path for name in op.parameters))
    if _products(tape, skip):
        kind: Skip = "projection"
    else:
        resized = any(_is_resizing(tape.operations[index]) for index in skip if index >= 0)
        kind = "slice/pad" if resized else "identity"
    return ResidualBlock(
        name=common_module(layers) or addition.module or addition.node,
        skip=kind,
        addition=addition.index,
        branch=tuple(sorted(branch)),
        skip_path=tuple(sorted(skip)),
        layers=layers,
        preactivation=_is_preactivation(tape, path),
    )


def _is_resizing(op: Operation) -> bool:
    """Return whether an operation moves data and leaves some out, or puts some beside."""
    traits = traits_of(op.target)
    if not (traits.is_layout or traits.is_padding):
        return False
    return math.prod(op.inputs[0].shape) != math.prod(op.outputs[0].shape)


def _is_preactivation(tape: Tape, path: Sequence[Operation]) -> bool:
    """Return whether a branch ends in a product and a norm or an activation precedes its first."""
    if not path or not path[-1].is_product:
        return False
    first = path[0]
    if not first.is_product:
        return True
    while first.inputs[0].producer is not None:  # norm and activation may lie before the fork
        first = tape.operations[first.inputs[0].producer]
        if not _is_activation(first):
            return _is_norm(first)
    return False


def common_module(layers: Iterable[str]) -> str:
    """Return the innermost module that holds all the layers.

    Example:
        >>> common_module(["layer1.0.conv1", "layer1.0.bn1"])
        'layer1.0'
    """
    paths = [layer.split(".")[:-1] for layer in layers]
    shared: list[str] = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def stream_channels(channels: Channels, tape: Tape, blocks: Iterable[ResidualBlock]) -> IntArray:
    """Return the channels that the residual additions carry, sorted."""
    sums = (tape.operations[block.addition].outputs[0] for block in blocks)
    return channels.of_layers(layer for value in sums for layer in value.layers)


def find_pairs(
    blocks: Iterable[ResidualBlock], groups: Sequence[ChannelGroup], channels: Channels, tape: Tape
) -> tuple[ResidualBlock, ...]:
    """Return the blocks with the hidden channel groups of their branches as pairs."""
    group_of_label = group_of_channel(channels, groups)[channels.channel_of_label]
    written: dict[str, list[int]] = {}  # by each layer, the hidden groups that it is first to write
    for index, group in enumerate(groups):
        if group.kind == "hidden":
            written.setdefault(group.writers[0], []).append(index)
    found = []
    known: dict[int, set[int]] = {}  # groups by layers, of which operations pass most on
    for block in blocks:
        path = [tape.operations[index] for index in block.branch]
        carried = [_groups_on(op, group_of_label, known) for op in path]
        pairs = []
        for index in sorted(i for layer in block.layers for i in written.get(layer, ())):
            inside = [op for op, on in zip(path, carried, strict=True) if index in on]
            if inside:
                pairs.append(_pair(groups[index], block.layers, inside))
        found.append(replace(block, pairs=tuple(pairs)))
    return tuple(found)


def _groups_on(op: Operation, group_of_label: IntArray, known: dict[int, set[int]]) -> set[int]:
    """Return the groups whose channels an operation puts out."""
    found: set[int] = set()
    for layer in (x for value in op.outputs for x in value.layers):
        groups = known.get(id(layer))
        if groups is None:
            carried = group_of_label[core(layer, support(layer)).numpy()].ravel()
            alike = bool((carried == carried[:1]).all())
            groups = {*(carried[:1] if alike else np.unique(carried)).tolist()}
            known[id(layer)] = groups
        found |= groups
    return found


def _pair(group: ChannelGroup, layers: Sequence[str], inside: Sequence[Operation]) -> Pair:
    """Return a hidden group of a branch with these layers, given the operations on its channels."""
    norms = (op for op in inside if _is_norm(op))
    return Pair(
        group=group.name,
        writers=tuple(name for name in group.writers if name in layers),
        norms=_distinct(layer_of(name) for op in norms for name in op.parameters),
        activations=_distinct(op.name for op in inside if _is_activation(op)),
        readers=tuple(name for name in group.readers if name in layers),
    )


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _is_norm(op: Operation) -> bool:
    """Return whether an operation is a norm: it takes a weight and an eps."""
    return {"weight", "eps"} <= traits_of(op.target).places.keys()


def _is_activation(op: Operation) -> bool:
    """Return whether the operation is a pointwise function of one activation."""
    return traits_of(op.target).is_pointwise and len(op.inputs) == 1
