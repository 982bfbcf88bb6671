"""Positions looked up in a tensor, and rows of a table."""

from __future__ import annotations

import torch

from fxgrow.labels.layers import Layer, Layers, along, core, support
from fxgrow.labels.rules.products import layer_padding
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
        return step.give_up("looked up by a mask or in dims apart")
    out: list[Layer] = []
    for layer in step.layers(x):
        if support(layer) & set(looked_up):
            step.pin((layer,), "looked up by index")
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
            step.pin((layer,), "looked up by index")
        else:
            out.append(core(layer, support(layer)).expand(step.outputs[0].shape))
    return (tuple(out),)


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(step: Step) -> tuple[Layers, ...]:
    """Sums of rows of a table: its columns are what it writes."""
    layers, *_ = embedding(step)
    return (layers, *(() for _ in step.outputs[1:]))


@rule("aten.embedding", padding=layer_padding)
def embedding(step: Step) -> tuple[Layers, ...]:
    """Look rows of a table up: its columns are what it writes."""
    weight = step.args[0]
    columns = step.line(weight, 1)
    if columns is None:
        return ((),)
    step.space.mark(columns, "writer")
    shape = step.outputs[0].shape
    return ((along(columns, len(shape) - 1, shape),),)
