"""Positions looked up in a tensor, and rows of a table."""

from __future__ import annotations

import torch

from fxgrow.labels.gains import agree
from fxgrow.labels.layers import Layer, Layers, clusters, core, support
from fxgrow.labels.padding import joined
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step


@rule("aten.index")
def index(step: Step) -> tuple[Layers, ...]:
    """Look positions up in some dims: labels along the others pass."""
    x, indices = step.args[:2]
    shape = step.outputs[0].shape
    looked_up = [dim for dim, found in enumerate(indices) if found is not None]
    width = max(indices[dim].ndim for dim in looked_up)
    boolean = any(indices[dim].dtype in (torch.bool, torch.uint8) for dim in looked_up)
    apart = looked_up[-1] - looked_up[0] != len(looked_up) - 1
    if boolean or apart:
        return step.give_up(PinKind.LOOKED_UP, "a mask or in dims apart")
    out: list[Layer] = []
    for layer in step.layers(x):
        if support(layer) & set(looked_up):
            step.pin((layer,), PinKind.LOOKED_UP, "index")
            continue
        for dim in reversed(looked_up):
            layer = layer.select(dim, 0)
        for _ in range(width):
            layer = layer.unsqueeze(looked_up[0])
        out.append(layer.expand(shape))
    return (tuple(out),)


@rule("aten.gather", "aten.index_select", "aten.take_along_dim")
def gather(step: Step) -> tuple[Layers, ...]:
    """Look positions up along one dim: labels along the others pass."""
    x, dim = step.args[0], step.args[1] % max(step.args[0].ndim, 1)
    out: list[Layer] = []
    for layer in step.layers(x):
        if dim in support(layer):
            step.pin((layer,), PinKind.LOOKED_UP, "index")
        else:
            out.append(core(layer, support(layer)).expand(step.outputs[0].shape))
    return (tuple(out),)


@rule("aten.index_add", "aten.scatter_add", gain=agree, padding=joined)
def accumulate(step: Step) -> tuple[Layers, ...]:
    """Add at positions of one dim: along the others, both operands have the same channels."""
    x, dim, positions, added = step.args[:4]
    dim %= max(x.ndim, 1)
    out: list[Layer] = []
    for mine, theirs in clusters([step.layers(x), step.layers(added)]):
        layers = [layer for layer in (mine, theirs) if layer is not None]
        dims = frozenset().union(*map(support, layers))
        begins = mine is None and step.value(x).is_uniform and theirs is not None
        if dim in dims or theirs is None or not (mine is not None or begins):
            step.pin(tuple(layers), PinKind.LOOKED_UP, "index")
            continue
        labels = core(theirs, dims)
        if mine is None:
            step.value(x).taken.append(labels.expand(x.shape))
        else:
            step.space.unify(core(mine, dims), labels)
        own = [d for d in sorted(dims) if positions.ndim == x.ndim and positions.stride(d)]
        if own:  # positions of their own for each channel
            step.space.fix(labels, own, "added at positions")
        out.append(labels.expand(x.shape))
    return (tuple(out),)


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(step: Step) -> tuple[Layers, ...]:
    """Sums of rows of a table: its columns are what it writes."""
    layers, *_ = embedding(step)
    return (layers, *(() for _ in step.outputs[1:]))


@rule("aten.embedding")
def embedding(step: Step) -> tuple[Layers, ...]:
    """Look rows of a table up: its columns are what it writes."""
    weight = step.args[0]
    return (step.write(weight, 1, step.outputs[0].ndim - 1),)
