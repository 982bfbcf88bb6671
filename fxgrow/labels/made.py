"""Constants of given sizes that a forward makes: what their sizes stand for.

A first state ``zeros(batch, self.hidden)`` holds no channels, and yet it must have as many entries
as what it meets. So each position of each of its dims gets a number. Numbers go where data is
moved, as labels do; where they meet labels, that is noted, and tells the constant's new sizes
(:mod:`fxgrow.grow.sizes.literals`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fxgrow.labels import generic
from fxgrow.labels.layers import Layer, Layers, along, clusters, core, cover, narrowed, support
from fxgrow.labels.rules.layout import side_by_side
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.step import Step

# What is summed over by a product: which argument is the weight, and the dims of data and weight.
_REDUCING = frozenset(
    f"aten.{name}" for name in ("sum", "mean", "prod", "amax", "amin", "max", "min", "any", "all")
)
_READ = {"aten.mm": (0, 1), "aten.addmm": (1, 2)}


def numbered(space: LabelSpace, shape: Sequence[int], like: Layers = ()) -> Layers:
    """Return numbers for the positions of a new constant, a layer for each dim.

    Args:
        space: where numbers are given out.
        shape: of the constant.
        like: the numbers of what it is as large as, which it has, too.
    """
    found, taken = [*like], {dim for layer in like for dim in support(layer)}
    for dim, size in enumerate(shape):
        if size > 1 and dim not in taken:  # a width of one may be broadcast
            first = space.numbered + 1
            space.numbered += size
            found.append(along(torch.arange(first, first + size, dtype=torch.int32), dim, shape))
    return tuple(found)


def expanded(space: LabelSpace, step: Step, made: Layers) -> Layers:
    """Return the numbers of what is expanded, or repeated: one constant where it had one entry.

    Args:
        space: where numbers are given out.
        step: an expansion, or repetition, of data that holds no channels: a mask for all heads.
        made: the numbers of that data.
    """
    x, out = step.operands[0], step.outputs[0]
    added = out.ndim - x.ndim
    sizes = (*[1] * added, *x.shape)
    wide = [full if size == 1 else 1 for size, full in zip(sizes, out.shape, strict=True)]
    fresh = (layer.expand(out.shape) for layer in numbered(space, wide))
    kept = generic.moved(step, [made])[0] if made else ()
    return (*(layer.expand(out.shape) for layer in kept), *fresh)


def follow(step: Step, made: Sequence[Layers], labels: Sequence[Layers]) -> list[Layers]:
    """Return the numbers of each output of an operation, and note which labels they meet.

    Args:
        step: the operation.
        made: the numbers of its operands.
        labels: the labels of its outputs.
    """
    name = step.traits.name
    if name == "aten.cat":
        return _joined(step, made, labels)
    if step.traits.is_movement:
        try:
            return [tuple(layers) for layers in generic.moved(step, made)]
        except RuntimeError:  # what suits data need not suit integers
            return [()] * len(step.outputs)
    if step.traits.is_pointwise or name == "aten.copy":
        return [_combined(step, made)] * len(step.outputs)
    if name in _REDUCING:
        return _reduced(step, made)
    if name in _READ:
        data, weight = (step.args[place] for place in _READ[name])
        reads = step.value(weight).is_weight
        _contract(step, made, data, 1, step.layers(weight), 0, by_weight=reads)
        _contract(step, made, weight, 0, step.layers(data), 1, by_weight=False)
    elif name == "aten.convolution":
        _convolve(step, made)
    return [()] * len(step.outputs)


def _reduced(step: Step, made: Sequence[Layers]) -> list[Layers]:
    """Return the numbers along the dims that a reduction leaves alone: zeros add up to zeros."""
    x, out = step.args[0], step.outputs[0]
    given = step.argument("dim")
    dims = range(x.ndim) if given is None or given == [] else given
    reduced = {dim % x.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    kept: list[Layer] = []
    for layer in made[0]:
        if not support(layer) & reduced:
            for dim in sorted(reduced, reverse=True):
                keeps = out.ndim == x.ndim
                layer = layer.narrow(dim, 0, 1) if keeps else layer.select(dim, 0)
            kept.append(layer)
    return [tuple(layer.expand(out.shape) for layer in kept)] * len(step.outputs)


def _convolve(step: Step, made: Sequence[Layers]) -> None:
    """Let the columns of a kernel tell what they read."""
    x, weight = step.args[:2]
    transposed, groups = bool(step.args[6]), int(step.args[8])
    kernel = step.value(weight)
    if groups == 1:
        _contract(step, made, x, 1, kernel.layers, 0 if transposed else 1)
    elif kernel.parameter and not transposed and weight.shape[1] > 1:
        columns = step.space.axis(kernel.parameter, 1, groups * weight.shape[1], groups)
        _contract(step, made, x, 1, (columns,), 0)
    elif weight.shape[1] == 1:
        _contract(step, made, x, 1, kernel.layers, 0)


def _contract(
    step: Step,
    made: Sequence[Layers],
    data: Tensor,
    dim: int,
    columns: Layers,
    along_dim: int,
    *,
    by_weight: bool = True,
) -> None:
    """Note which columns, or channels, read a constant along a dim."""
    place = next(i for i, tensor in enumerate(step.operands) if tensor is data)
    layer, read = cover(made[place], dim), cover(columns, along_dim)
    if layer is not None and read is not None:
        step.space.meet(
            narrowed(layer, {dim}),
            narrowed(read, {along_dim}),
            read=by_weight,
        )


def _combined(step: Step, made: Sequence[Layers]) -> Layers:
    """Note what meets entry by entry; what meets neither labels nor data goes on."""
    shape = step.outputs[0].shape
    data = [
        {dim + len(shape) - tensor.ndim for dim, size in enumerate(tensor.shape) if size > 1}
        - {dim + len(shape) - tensor.ndim for layer in own for dim in support(layer)}
        for tensor, own in zip(step.operands, made, strict=True)
    ]
    labels = [
        layer.expand(shape)
        for tensor in step.operands
        if tensor.ndim
        for layer in step.layers(tensor)
        if support(layer)
    ]
    kept: list[Layer] = []
    for own in made:
        for layer in own:
            wide = layer.expand(shape)
            met = [other for other in labels if support(other) & support(wide)]
            _meet(step.space, wide, met)
            taken = any(support(wide) & support(other) for other in kept)
            taken |= any(support(wide) & dims for dims in data)
            if not met and not taken and support(wide):
                kept.append(wide)
    return tuple(kept)


def _joined(step: Step, made: Sequence[Layers], labels: Sequence[Layers]) -> list[Layers]:
    """Lay numbers side by side as the data is."""
    shape = step.outputs[0].shape
    dim = step.argument("dim", 0) % len(shape)
    pairs = [
        (tensor, own)
        for tensor, own in zip(step.operands, made, strict=True)
        if tensor.ndim == len(shape) and tensor.shape[dim]
    ]
    tensors = [tensor for tensor, _ in pairs]
    out: list[Layer] = []
    for members in clusters([own for _, own in pairs]):
        dims = frozenset().union(*(support(m) for m in members if m is not None))
        if dim in dims:
            wide = side_by_side(tensors, members, dims, dim).expand(shape)
        else:  # another constant beside this one is as wide
            wide = next(core(m, dims) for m in members if m is not None).expand(shape)
        _meet(step.space, wide, labels[0])
        out.append(wide)
    return [tuple(out)]


def _meet(space: LabelSpace, made: Layer, labels: Iterable[Layer]) -> None:
    """Note which labels lie where numbers do."""
    for other in labels:
        dims = support(made) | support(other)
        a, b = core(made, dims), core(other, dims)
        if support(made) & support(other):
            shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
            space.meet(a.expand(shape), b.expand(shape))
