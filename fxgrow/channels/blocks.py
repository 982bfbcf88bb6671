"""Residual blocks and the conv→norm→act→conv pairs inside them, found on the data-flow graph.

A residual addition is an ``add`` of two activations that part at a common dominator and at least
one of which comes back computed (by a convolution or a matrix product), not only moved. What lies
between dominator and addition is the block: the branch, and the skip path, which is the identity,
a projection (it has a layer of its own) or data movement such as slicing and padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import networkx as nx
import numpy as np
import torch

from fxgrow.channels.channels import Channels
from fxgrow.channels.groups import ChannelGroup, group_of_channel, layer_of
from fxgrow.labels.forest import IntArray
from fxgrow.labels.layers import core, support
from fxgrow.labels.operators import FACTORIES, operator_name
from fxgrow.labels.tape import Operation, Tape

Skip = Literal["identity", "projection", "slice/pad"]

_PRODUCTS = {"convolution", "addmm", "mm", "bmm"}
_NORMS = ("batch_norm", "layer_norm", "group_norm", "rms_norm")


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


def data_flow(tape: Tape) -> nx.DiGraph:
    """Return the operations as a directed graph, with a source node -1 before the inputs.

    Operations on parameters alone are left out: they are not on any path from the input.
    """
    graph = nx.DiGraph()
    graph.add_node(-1)
    for op in tape.operations:
        if operator_name(op.target) in FACTORIES:  # made in the image of data, not of it
            continue
        for value in op.inputs:
            producer = -1 if value.is_input else value.producer
            if producer is not None and producer in graph:
                graph.add_edge(producer, op.index)
    return graph


def residual_additions(tape: Tape) -> list[ResidualBlock]:
    """Return the residual blocks of a run in order of execution, without their pairs.

    Complexity: immediate dominators once, then one backward search per addition that stops at the
    dominator, so about linear in the size of the graph.
    """
    graph = data_flow(tape)
    dominator = nx.immediate_dominators(graph, -1)
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


def _between(graph: nx.DiGraph, fork: int, end: int) -> set[int]:
    """Return the operations after ``fork`` on the way to ``end``, ``end`` included."""
    found: set[int] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node != fork and node not in found:
            found.add(node)
            waiting.extend(graph.predecessors(node))
    return found


def _products(tape: Tape, path: Iterable[int]) -> int:
    return sum(tape.operations[index].name in _PRODUCTS for index in path if index >= 0)


def _is_branch(computed: list[int], first: set[int], second: set[int]) -> bool:
    """Return whether the first path is the branch: the one with more products, then operations."""
    return (computed[0], len(first)) >= (computed[1], len(second))


def _block(tape: Tape, addition: Operation, branch: set[int], skip: set[int]) -> ResidualBlock:
    path = [tape.operations[index] for index in sorted(branch)]
    layers = tuple(dict.fromkeys(layer_of(name) for op in path for name in op.parameters))
    if _products(tape, skip):
        kind: Skip = "projection"
    else:
        moved = any(tape.operations[i].name in ("slice", "constant_pad_nd", "cat") for i in skip)
        kind = "slice/pad" if moved else "identity"
    return ResidualBlock(
        name=common_module(layers) or addition.module or addition.node,
        skip=kind,
        addition=addition.index,
        branch=tuple(sorted(branch)),
        skip_path=tuple(sorted(skip)),
        layers=layers,
        preactivation=_is_preactivation(tape, path),
    )


def _is_preactivation(tape: Tape, path: Sequence[Operation]) -> bool:
    """Return whether a branch ends in a product and a norm or an activation precedes its first."""
    if not path or path[-1].name not in _PRODUCTS:
        return False
    first = path[0]
    if first.name not in _PRODUCTS:
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
    blocks: Iterable[ResidualBlock],
    groups: Sequence[ChannelGroup],
    channels: Channels,
    tape: Tape,
) -> tuple[ResidualBlock, ...]:
    """Return the blocks with the hidden channel groups of their branches as pairs."""
    group_of_label = group_of_channel(channels, groups)[channels.channel_of_label]

    def groups_on(op: Operation) -> set[int]:
        found: set[int] = set()
        for layer in (x for value in op.outputs for x in value.layers):
            carried = group_of_label[core(layer, support(layer)).numpy()].ravel()
            alike = bool((carried == carried[:1]).all())
            found.update((carried[:1] if alike else np.unique(carried)).tolist())
        return found

    found = []
    for block in blocks:
        path = [tape.operations[index] for index in block.branch]
        carried = [groups_on(op) for op in path]
        pairs = []
        for index, group in enumerate(groups):
            if group.kind != "hidden" or group.writers[0] not in block.layers:
                continue
            inside = [op for op, on in zip(path, carried, strict=True) if index in on]
            if not inside:
                continue
            pairs.append(
                Pair(
                    group=group.name,
                    writers=tuple(name for name in group.writers if name in block.layers),
                    norms=_distinct(
                        layer for op in inside if _is_norm(op) for layer in _owners(op)
                    ),
                    activations=_distinct(op.name for op in inside if _is_activation(op)),
                    readers=tuple(name for name in group.readers if name in block.layers),
                )
            )
        found.append(replace(block, pairs=tuple(pairs)))
    return tuple(found)


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _owners(op: Operation) -> Iterable[str]:
    return (layer_of(name) for name in op.parameters)


def _is_norm(op: Operation) -> bool:
    return any(norm in op.name for norm in _NORMS)


def _is_activation(op: Operation) -> bool:
    """Return whether the operation is a pointwise function of one activation."""
    return torch.Tag.pointwise in op.target.tags and len(op.inputs) == 1
