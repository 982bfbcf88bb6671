"""Pooling, resampling, mirrored padding and sliding windows: what mixes positions."""

from __future__ import annotations

from fxgrow.labels.layers import Layers, compact, core, cover, support
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step


@rule(
    "aten.max_pool2d_with_indices",
    "aten.max_pool3d_with_indices",
    "aten.avg_pool2d",
    "aten.avg_pool3d",
    "aten._adaptive_avg_pool2d",
    "aten._adaptive_avg_pool3d",
    "aten.adaptive_max_pool2d",
    "aten.adaptive_max_pool3d",
    "aten.upsample_nearest1d",
    "aten.upsample_nearest2d",
    "aten.upsample_nearest3d",
    "aten._upsample_nearest_exact2d",
    "aten.upsample_linear1d",
    "aten.upsample_bilinear2d",
    "aten.upsample_bicubic2d",
    "aten.upsample_trilinear3d",
    "aten._upsample_bilinear2d_aa",
    "aten._upsample_bicubic2d_aa",
    "aten.reflection_pad1d",
    "aten.reflection_pad2d",
    "aten.reflection_pad3d",
    "aten.replication_pad1d",
    "aten.replication_pad2d",
    "aten.replication_pad3d",
    "aten.grid_sampler_2d",
    "aten.grid_sampler_3d",
    "aten.max_unpool2d",
    "aten.max_unpool3d",
    "aten.fractional_max_pool2d",
    "aten.fractional_max_pool3d",
    "torchvision.roi_align",
)
def spatial(step: Step) -> tuple[Layers, ...]:
    """Pooling, resampling, mirrored padding: the spatial dims are mixed, the leading ones pass."""
    x = step.args[0]
    name = step.target._opname
    spatial_dims = 3 if "3d" in name else 1 if "1d" in name else 2
    leading = range(x.ndim - spatial_dims)
    shape = step.outputs[0].shape
    kept = step.beside(x, leading, f"{name} over these positions")
    if name == "roi_align":  # boxes take the place of samples
        kept = tuple(core(layer, (1,)) for layer in kept if 1 in support(layer))
    return tuple(tuple(layer.expand(shape) for layer in kept) for _ in step.outputs)


@rule("aten.im2col", "aten.col2im")
def unfold(step: Step) -> tuple[Layers, ...]:
    """Patches as columns: each channel of (N, C·k·k, L) has its k·k positions side by side."""
    x = step.args[0]
    area = 1
    for size in step.argument("kernel_size"):
        area *= size
    step.beside(x, (0, 1), f"{step.target._opname} over these positions")
    channels = step.line(x, 1)
    if channels is None:
        return ((),)
    shape = step.outputs[0].shape
    if step.target._opname == "im2col":
        channels = channels.repeat_interleave(area)
    else:
        patches = channels.view(-1, area)
        step.space.unify(patches[:, :1].expand_as(patches), patches)
        channels = patches[:, 0]
    view = [1] * len(shape)
    view[1] = -1
    return ((channels.reshape(view).expand(shape),),)


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
