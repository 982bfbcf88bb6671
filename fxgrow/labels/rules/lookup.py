"""Positions looked up in a tensor, and rows of a table."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgrow.labels.gains import Gain, GainFlow, agree, not_homogeneous
from fxgrow.labels.layers import Layer, Layers, clusters, core, support
from fxgrow.labels.operators import aten
from fxgrow.labels.padding import Held, PaddingFlow, joined
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation, Value


@rule("aten.index")
def index(step: Step) -> tuple[Layers, ...]:
    """Look positions up in some dims: labels along the others pass."""
    x, indices = step.args[:2]
    shape = step.outputs[0].shape
    looked_up = [dim for dim, found in enumerate(indices) if found is not None]
    width = max(indices[dim].ndim for dim in looked_up)
    for tensor in indices:
        if tensor is not None:
            step.pin(step.layers(tensor), PinKind.LOOKED_UP, "index")
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


@rule("aten.index_select")
def index_select(step: Step) -> tuple[Layers, ...]:
    """Look positions up along one dim: labels along the others pass."""
    x, dim, indices = step.args
    step.pin(step.layers(indices), PinKind.LOOKED_UP, "index")
    return (_along_others(step, x, dim),)


def _along_others(step: Step, x: Tensor, dim: int) -> Layers:
    """Return the layers of a tensor that is looked up along a dim."""
    out: list[Layer] = []
    for layer in step.layers(x):
        if dim % max(x.ndim, 1) in support(layer):
            step.pin((layer,), PinKind.LOOKED_UP, "index")
        else:
            out.append(core(layer, support(layer)).expand(step.outputs[0].shape))
    return tuple(out)


@rule("aten.gather")
def gather(step: Step) -> tuple[Layers, ...]:
    """Look positions up along one dim, others of them in each place along the others.

    Indices that are alike along a dim (one entry, expanded or repeated) serve any channels there.
    """
    x, dim, indices = step.args[:3]
    shape = step.outputs[0].shape
    alike = step.value(indices).repeated | {d for d, n in enumerate(indices.stride()) if not n}
    out: list[Layer] = []
    for layer, own in clusters([step.layers(x), step.layers(indices)]):
        members = tuple(labels for labels in (layer, own) if labels is not None)
        dims = frozenset().union(*map(support, members))
        whole = dim % x.ndim not in dims and all(x.shape[d] == shape[d] for d in dims)
        if layer is None or not whole or (own is None and dims - alike):
            step.pin(members, PinKind.LOOKED_UP, "index")
            continue
        if own is not None:
            step.space.unify(core(own, dims).contiguous(), core(layer, dims).contiguous())
        out.append(core(layer, dims).expand(shape))
    return (tuple(out),)


def reduced_gain(flow: GainFlow, op: Operation) -> Gain | tuple[Gain, ...]:
    """As all operands have it; a number written beside them, or a product of them, has none."""
    scaled = isinstance(op.args[3], Value) or op.args[3] == 0
    return agree(flow, op) if scaled and "prod" not in op.args[4:5] else not_homogeneous(flow, op)


def reduced_padding(flow: PaddingFlow, op: Operation) -> Held:
    """As all operands hold it, where what is written is a sum, a mean, or one of them."""
    number = not isinstance(op.args[3], Value) and op.args[3] != 0
    curved = {*op.args[4:5]} & ({"amax", "amin"} if flow.holds == "mean" else {"prod"})
    return flow.lost(op) if number or curved else joined(flow, op)


@rule(
    *aten("index_add index_copy scatter_add scatter scatter_reduce index_reduce index_fill"),
    gain=reduced_gain,
    padding=reduced_padding,
)
def accumulate(step: Step) -> tuple[Layers, ...]:
    """Write or add at positions of one dim: along the others, operands have the same channels."""
    x, dim, positions, added = step.args[:4]
    dim %= max(x.ndim, 1)
    if not isinstance(added, Tensor) or not added.ndim:
        return (_written_over(step, x, dim, positions),)
    step.pin(step.layers(positions), PinKind.LOOKED_UP, "index")
    out: list[Layer] = []
    for mine, theirs in clusters([step.layers(x), step.layers(added)]):
        layers = tuple(layer for layer in (mine, theirs) if layer is not None)
        dims = frozenset().union(*map(support, layers))
        apart = dim in dims or any(x.shape[d] != added.shape[d] for d in dims)
        begun = mine is not None or step.value(x).is_uniform
        if apart or theirs is None or not begun:
            step.pin(layers, PinKind.LOOKED_UP, "index")
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


def _written_over(step: Step, x: Tensor, dim: int, positions: Tensor) -> Layers:
    """Return the layers of a tensor in which a number is written at positions of one dim."""
    for tensor in step.operands[1:]:
        step.pin(step.layers(tensor), PinKind.LOOKED_UP, "index")
    kept: list[Layer] = []
    for layer in step.layers(x):
        own = [d for d in support(layer) if positions.ndim == x.ndim and positions.stride(d)]
        if dim in support(layer) or own:  # positions of their own for each channel
            step.pin((layer,), PinKind.LOOKED_UP, "index")
        else:
            kept.append(layer)
    return tuple(kept)


@rule("aten.masked_scatter", gain=agree, padding=joined)
def masked_scatter(step: Step) -> tuple[Layers, ...]:
    """Write rows where a mask is set, the same for all channels: these are those of the rows."""
    x, mask, rows = step.args[:3]
    last = x.ndim - 1
    alike = mask.shape[-1:] == (1,) or not mask.stride(-1) or last in step.value(mask).repeated
    lines = step.line(x, last), step.line(rows, rows.ndim - 1) if rows.ndim else None
    fits = mask.ndim and rows.ndim and rows.shape[-1] == x.shape[-1]
    within = all(support(layer) <= {tensor.ndim - 1}
                 for tensor in (x, rows) for layer in step.layers(tensor))  # fmt: skip
    if not (alike and fits and within) or step.layers(mask):
        return step.give_up(PinKind.LOOKED_UP, "a mask")
    step.unify(*lines)
    return (step.layers(x) if None not in lines else (),)


@rule("aten.bucketize")
def bucketize(step: Step) -> tuple[Layers, ...]:
    """Tell between which of some bounds each entry lies: the bounds are no channels of its own."""
    *entries, bounds = step.operands
    step.pin(step.layers(bounds), PinKind.LOOKED_UP, "index")
    return (step.layers(entries[0]) if entries else (),)


def bag_padding(flow: PaddingFlow, op: Operation) -> Held:
    """As for a look-up, where rows are summed; the largest of means is no mean."""
    is_largest = len(op.args) > 4 and op.args[4] == 2
    return flow.lost(op) if is_largest and flow.holds == "mean" else flow.generic(op)


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only", padding=bag_padding)
def embedding_bag(step: Step) -> tuple[Layers, ...]:
    """Sums of rows of a table: its columns are what it writes."""
    layers, *_ = embedding(step)
    return (layers, *(() for _ in step.outputs[1:]))


@rule("aten.embedding")
def embedding(step: Step) -> tuple[Layers, ...]:
    """Look rows of a table up: its columns are what it writes."""
    weight, *others = step.operands
    for tensor in others:
        step.pin(step.layers(tensor), PinKind.LOOKED_UP, "index")
    rows = tuple(x for x in step.layers(weight) if 1 not in support(x))
    step.pin(rows, PinKind.LOOKED_UP, "index")
    return (step.write(weight, 1, step.outputs[0].ndim - 1),)
