"""Pooling, resampling, mirrored padding and sliding windows: what mixes positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fxgrow.labels.gains import Gain, GainFlow, not_homogeneous
from fxgrow.labels.layers import Layer, Layers, along, clusters, compact, core, cover, support
from fxgrow.labels.operators import aten
from fxgrow.labels.padding import Held, PaddingFlow
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation


@rule(
    *aten(
        "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d "
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
        "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d grid_sampler_2d "
        "grid_sampler_3d max_unpool2d max_unpool3d"
    )
)
def spatial(step: Step) -> tuple[Layers, ...]:
    """Pooling, resampling, mirrored padding: the spatial dims are mixed, the leading ones pass."""
    x, *others = step.operands
    name = step.target._opname
    spatial_dims = 3 if "3d" in name else 1 if "1d" in name else 2
    leading = range(x.ndim - spatial_dims)
    shape = step.outputs[0].shape
    kept = step.beside(x, leading, PinKind.POSITIONS, name)
    for other in others:
        kept = _placed(step, kept, other, leading, name)
    return tuple(tuple(layer.expand(shape) for layer in kept) for _ in step.outputs)


@rule("aten.fractional_max_pool2d", "aten.fractional_max_pool3d")
def spatial_by_chance(step: Step) -> tuple[Layers, ...]:
    """The same, over positions that are drawn for each channel."""
    x = step.args[0]
    leading = range(x.ndim - len(step.argument("kernel_size")))
    kept = step.beside(x, leading, PinKind.POSITIONS, step.target._opname)
    return tuple(tuple(layer.expand(out.shape) for layer in kept) for out in step.outputs)


def _placed(step: Step, kept: Layers, other: Tensor, leading: Sequence[int], name: str) -> Layers:
    """Return the layers that pass where another tensor says which positions to look at.

    Positions are told for each sample (a grid), or for each channel (indices of a pooling).
    """
    shared = range(1) if name.startswith("grid_sampler") else leading
    apart = [theirs for theirs in step.layers(other) if support(theirs) - set(shared)]
    step.pin(tuple(apart), PinKind.POSITIONS, name)
    told = tuple(theirs for theirs in step.layers(other) if support(theirs) <= set(shared))
    out: list[Layer] = []
    for own, theirs in clusters([kept, told]):
        members = tuple(labels for labels in (own, theirs) if labels is not None)
        dims = frozenset().union(*map(support, members))
        if own is not None and dims.isdisjoint(shared):
            out.append(own)
        elif own is not None and theirs is not None and support(own) == support(theirs):
            step.space.unify(core(own, dims).contiguous(), core(theirs, dims).contiguous())
            out.append(own)
        elif len(members) < 2 and any(other.shape[dim] > 1 for dim in dims):
            step.pin(members, PinKind.FIXED, step.met_by("combined with"))
        else:
            step.pin(members, PinKind.POSITIONS, name)
    return tuple(out)


def boxes_gain(flow: GainFlow, op: Operation) -> Gain:
    """Homogeneous in the map that boxes are of."""
    scaled = any(flow.of(value).scale != 1.0 for value in op.inputs[1:])
    return not_homogeneous(flow, op) if scaled else flow.of(op.inputs[0])


def boxes_padding(flow: PaddingFlow, op: Operation) -> Held:
    """Zeros pass; and the mean, where what is in a box is averaged."""
    held = flow.of(op.inputs[0])
    passes = held.what == "zero" or op.name == "roi_align"
    return held if passes or held.why else flow.lost(op)


@rule("torchvision.roi_align", "torchvision.roi_pool", gain=boxes_gain, padding=boxes_padding)
def boxes(step: Step) -> tuple[Layers, ...]:
    """Pool the inside of boxes, which take the place of samples: the channels pass."""
    x, others = step.operands[0], step.operands[1:]
    name, shape = step.target._opname, step.outputs[0].shape
    kept = step.beside(x, (1,), PinKind.POSITIONS, name)
    for other in others:
        step.pin(step.layers(other), PinKind.POSITIONS, name)
    layers = tuple(own.expand(shape) for own in kept if support(own))
    return tuple(layers for _ in step.outputs)


@rule("aten.im2col", "aten.col2im")
def unfold(step: Step) -> tuple[Layers, ...]:
    """Patches as columns: each channel of (N, C·k·k, L) has its k·k positions side by side."""
    x, is_apart = step.args[0], step.target._opname == "im2col"
    area = math.prod(step.argument("kernel_size"))
    channel = x.ndim - (3 if is_apart else 2)
    found = step.beside(x, range(channel + 1), PinKind.POSITIONS, step.target._opname)
    channels = step.line(x, channel)
    shape = step.outputs[0].shape
    samples = tuple(
        core(own, (0,)).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        for own in found
        if channel and support(own) == {0}
    )
    if channels is None:
        return (samples,)
    if is_apart:
        channels = channels.repeat_interleave(area)
    else:
        patches = channels.view(-1, area)
        step.space.unify(patches[:, :1].expand_as(patches), patches)
        channels = patches[:, 0]
    return ((*samples, along(channels.contiguous(), channel, shape)),)


@rule("aten.unfold")
def windows(step: Step) -> tuple[Layers, ...]:
    """Sliding windows along one dim, as a last dim of their own."""
    x = step.args[0]
    dim = step.argument("dimension") % x.ndim
    out = []
    layer_along = cover(step.layers(x), dim)
    for layer in step.layers(x):
        if layer is layer_along:
            moved = layer.unfold(dim, step.argument("size"), step.argument("step"))
            out.append(compact(moved.clone()))
        else:
            out.append(layer.narrow(dim, 0, 1).unsqueeze(-1).expand(step.outputs[0].shape))
    return (tuple(out),)
