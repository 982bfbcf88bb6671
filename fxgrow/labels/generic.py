"""What most operations do, without a rule each: move data, or combine it pointwise.

A movement is applied to the layers themselves: whatever ``cat``, ``roll`` or ``permute`` does to
the data, it does to the labels. A pointwise operation (``torch.Tag.pointwise``) unifies the labels
of its operands where they broadcast together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.labels.layers import Layer, Layers, clusters, compact, core, support
from fxgrow.labels.rules import Step
from fxgrow.labels.tape import map_tensors, tensors_in


def aten(names: str) -> frozenset[str]:
    """Return operator names from a list of them in words."""
    return frozenset(f"aten.{name}" for name in names.split())


# The same elements in the same places.
COPIES = aten("clone contiguous _to_copy lift_fresh lift_fresh_copy detach alias")
# The same elements in other places; views are recognised by their schema.
MOVEMENTS = COPIES | aten(
    "stack roll index_select repeat flip pixel_shuffle pixel_unshuffle "
    "channel_shuffle native_channel_shuffle _unsafe_view _reshape_alias"
)
# Tensors made in the image of another: as uniform as a scalar, as wide as their model.
LIKENESSES = aten("zeros_like ones_like full_like empty_like rand_like randn_like bernoulli")
# Tensors of given sizes that take nothing but dtype and device from another.
FACTORIES = aten("new_zeros new_ones new_empty new_full new_empty_strided")
# Tensors with one value everywhere.
UNIFORM = aten("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full zero")
# Pointwise operations that torch does not tag as such.
UNTAGGED = aten("hardswish hardtanh hardsigmoid relu6 _prelu_kernel tril triu fill zero")
# A layer is expanded, hence not contiguous: where the data could be viewed, its labels are copied.
_ON_LABELS: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


def is_movement(step: Step) -> bool:
    """Return whether the operation only moves data."""
    return step.target.is_view or operator_name(step.target) in MOVEMENTS


def is_pointwise(step: Step) -> bool:
    """Return whether the operation acts on corresponding elements."""
    name = operator_name(step.target)
    return torch.Tag.pointwise in step.target.tags or name in LIKENESSES or name in UNTAGGED


def is_factory(step: Step) -> bool:
    """Return whether the operation makes a tensor of its own."""
    return operator_name(step.target) in FACTORIES


def is_uniform(step: Step) -> bool:
    """Return whether the operation makes a tensor with one value everywhere."""
    return operator_name(step.target) in UNIFORM


def operator_name(target: OpOverload) -> str:
    """Return the namespace and the name without overload and in-place mark: ``"aten.relu"``."""
    return f"{target.namespace}.{target._opname.rstrip('_')}"


def place_of(target: OpOverload, node: str, module: str) -> str:
    """Return where an operation ran, as reasons and chains name it: ``"aten.add at layer1.0"``."""
    return f"{operator_name(target)} at {module or node or 'the top level'}"


def movement(step: Step) -> tuple[Layers, ...]:
    """Apply the operation to each layer of its tensors, 0 standing in where one has none."""
    operands = list(tensors_in((step.args, step.kwargs)))
    if operator_name(step.target) in COPIES:
        return (step.layers(operands[0]),)
    kwargs = {k: v for k, v in step.kwargs.items() if k not in ("dtype", "device")}
    move = _ON_LABELS.get(step.target, step.target)
    out: list[list[Layer]] = [[] for _ in step.outputs]
    for cluster in clusters([step.layers(tensor) for tensor in operands]):
        layers = [
            torch.zeros((), dtype=torch.int32).expand(tensor.shape) if layer is None else layer
            for tensor, layer in zip(operands, cluster, strict=True)
        ]
        storages = {layer.untyped_storage().data_ptr() for layer in layers}
        queue = iter(layers)

        def next_layer(_: Tensor, queue: Iterator[Layer] = queue) -> Layer:
            return next(queue)

        args, moved = map_tensors(next_layer, (step.args, kwargs))
        for index, layer in enumerate(tensors_in(move(*args, **moved))):
            copied = layer.untyped_storage().data_ptr() not in storages
            out[index].append(compact(layer) if copied else layer)
    return tuple(tuple(layers) for layers in out)


def pointwise(step: Step) -> tuple[Layers, ...]:
    """Unify the labels of all operands where they broadcast to one element."""
    shape = step.outputs[0].shape
    operands = [t for t in tensors_in((step.args, step.kwargs)) if t.ndim]
    weights = [step.value(tensor).is_weight for tensor in operands]
    expanded = [_broadcast(step, tensor, shape) for tensor in operands]
    out: list[Layer] = []
    for cluster in clusters(expanded):
        first, *others = (layer for layer in cluster if layer is not None)
        merged = functools.reduce(functools.partial(_merge, step), others, first)
        free = set(support(merged))
        for tensor, own, is_weight in zip(operands, cluster, weights, strict=True):
            if own is None and step.value(tensor).is_uniform:
                step.value(tensor).taken.append(_as_small(merged, tensor))
            elif own is None:
                free -= _fix(step, merged, tensor, shape)
            elif own is not None and is_weight and not all(weights):
                step.space.mark(core(own, support(own)), "carrier", "copy")
        if free or not support(merged):
            out.append(merged)
    return tuple(tuple(out) for _ in step.outputs)


def _broadcast(step: Step, tensor: Tensor, shape: torch.Size) -> Layers:
    """Return the layers of ``tensor`` expanded to ``shape``; a broadcast channel is pinned."""
    layers = step.layers(tensor)
    if tensor.shape == shape:
        return layers
    aligned = shape[len(shape) - tensor.ndim :]
    stretched = any(
        size == 1 and full > 1 for size, full in zip(tensor.shape, aligned, strict=True)
    )
    kept = []
    for layer in layers:
        if stretched and not support(layer):
            step.pin((layer,), "a width of one is broadcast here")
        else:
            kept.append(layer.expand(shape))
    return tuple(kept)


def _as_small(layer: Layer, tensor: Tensor) -> Layer:
    """Return a layer of the shape of a tensor that is broadcast to the layer's own."""
    for _ in range(layer.ndim - tensor.ndim):
        layer = layer.select(0, 0)
    for dim, size in enumerate(tensor.shape):
        layer = layer.narrow(dim, 0, size)
    return layer


def _fix(step: Step, layer: Layer, tensor: Tensor, shape: torch.Size) -> set[int]:
    """Record that ``layer`` keeps its size along the dims in which ``tensor`` has entries.

    Returns these dims. A layer with no other dim stands for no channels that could grow.
    """
    offset = len(shape) - tensor.ndim
    dims = support(layer)
    fixed = {dim for dim in dims if dim >= offset and tensor.shape[dim - offset] > 1}
    if fixed:
        reason = f"combined with a tensor of fixed width ({step.place})"
        step.space.fix(core(layer, dims), sorted(fixed), reason)
    return fixed


def _merge(step: Step, left: Layer, right: Layer) -> Layer:
    """Unify two layers element by element and return one that stands for both."""
    dims = support(left) | support(right)
    a, b = core(left, dims), core(right, dims)
    shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
    a, b = a.expand(shape), b.expand(shape)
    step.space.unify(a, b)
    lonely = (a == 0) != (b == 0)
    if bool(lonely.any()):
        alone = torch.where(lonely, torch.maximum(a, b), 0)
        step.space.pin(alone, f"combined with constants in part of its channels ({step.place})")
        return torch.maximum(a, b).expand(left.shape)
    smaller = min((left, right), key=lambda layer: len(support(layer)))
    return smaller.expand(left.shape)
