"""Pooling, reductions and what else runs along a dim."""

from __future__ import annotations

from fxgrow.labels.layers import Layer, Layers, compact, core, cover, support
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.step import Step, rule


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
    kept = step.beside(x, leading, PinKind.POSITIONS, name)
    if name == "roi_align":  # boxes take the place of samples
        kept = tuple(core(layer, (1,)) for layer in kept if 1 in support(layer))
    return tuple(tuple(layer.expand(shape) for layer in kept) for _ in step.outputs)


@rule(
    "aten.mean",
    "aten.sum",
    "aten.prod",
    "aten.amax",
    "aten.amin",
    "aten.max",
    "aten.min",
    "aten.any",
    "aten.all",
    "aten.var",
    "aten.var_mean",
    "aten.std",
    "aten.std_mean",
    "aten.argmax",
    "aten.argmin",
    "aten.logsumexp",
    "aten.linalg_vector_norm",
    "aten.norm",
)
def reduction(step: Step) -> tuple[Layers, ...]:
    """A reduction keeps the labels along the dims it leaves alone.

    One over all of a layer's dims mixes the channels; one over a part of them (the positions
    inside a head) makes what it reduces one channel.
    """
    x = step.args[0]
    given = step.argument("dim")
    dims = range(x.ndim) if given is None or given == [] else _sequence(given)
    reduced = {dim % x.ndim for dim in dims}
    keepdim = bool(step.argument("keepdim", False))
    kept: list[Layer] = []
    for layer in step.layers(x):
        if support(layer) and support(layer) <= reduced:
            if _is_invariant_under_copies(step):
                step.space.mix(core(layer, support(layer)), step.place)
            else:
                step.pin((layer,), PinKind.MIXED, step.target._opname)
            continue
        left = step.flat(layer, set(range(x.ndim)) - reduced)
        for dim in sorted(reduced, reverse=True):
            left = left.narrow(dim, 0, 1) if keepdim else left.select(dim, 0)
        kept.append(left)
    return tuple(tuple(layer.expand(out.shape) for layer in kept) for out in step.outputs)


def _sequence(dims: int | list[int]) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


def _is_invariant_under_copies(step: Step) -> bool:
    """Return whether k copies of everything leave the result as it is."""
    name = step.target._opname
    if name in ("var", "var_mean", "std", "std_mean"):  # sums of squares over n, not over n − 1
        return step.argument("correction", 1) == 0 or step.argument("unbiased", True) is False
    if name in ("linalg_vector_norm", "norm"):
        return step.argument("ord", step.argument("p", 2)) in (float("inf"), float("-inf"))
    return name in ("mean", "amax", "amin", "max", "min", "any", "all")


@rule(
    "aten._softmax",
    "aten._log_softmax",
    "aten._safe_softmax",
    "aten.cumsum",
    "aten.cumprod",
    "aten.sort",
    "aten.topk",
)
def along_a_dim(step: Step) -> tuple[Layers, ...]:
    """What mixes the positions of one dim passes labels along the others.

    Positions of one dim that belong to a channel with others (the branches of a split attention)
    are mixed inside the channel.
    """
    x = step.args[0]
    given = step.argument("dim", step.argument("dims", -1))
    dims = {dim % x.ndim for dim in _sequence(given)}
    kept: list[Layer] = []
    for layer in step.layers(x):
        if support(layer) and support(layer) <= dims:
            step.pin((layer,), PinKind.MIXED, step.target._opname)
        else:
            kept.append(step.flat(layer, support(layer) - dims))
    return tuple(tuple(layer.expand(out.shape) for layer in kept) for out in step.outputs)


@rule("aten.glu")
def gated_half(step: Step) -> tuple[Layers, ...]:
    """``a · sigmoid(b)`` of the two halves of a dim: both halves are one set of channels."""
    x = step.args[0]
    dim = step.argument("dim", -1) % x.ndim
    out: list[Layer] = []
    for layer in step.layers(x):
        if dim in support(layer):
            half = x.shape[dim] // 2
            first, second = layer.narrow(dim, 0, half), layer.narrow(dim, half, half)
            step.space.unify(core(first, support(layer)), core(second, support(layer)))
            out.append(first)
        else:
            out.append(layer.narrow(dim, 0, x.shape[dim] // 2))
    return (tuple(out),)


@rule("aten.im2col", "aten.col2im")
def unfold(step: Step) -> tuple[Layers, ...]:
    """Patches as columns: each channel of (N, C·k·k, L) has its k·k positions side by side."""
    x = step.args[0]
    area = 1
    for size in step.argument("kernel_size"):
        area *= size
    step.beside(x, (0, 1), PinKind.POSITIONS, step.target._opname)
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
