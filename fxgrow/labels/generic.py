"""What most operations do, without a rule each: move data, or combine it pointwise.

A movement is applied to the layers themselves: whatever ``cat``, ``roll`` or ``permute`` does to
the data, it does to the labels. A pointwise operation (``torch.Tag.pointwise``) unifies the labels
of its operands where they broadcast together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxgrow.labels.layers import Layer, Layers, compact, core, support
from fxgrow.labels.rules import Step
from fxgrow.labels.tape import tensors_in

# Copies and rearrangements; views are recognised by their schema.
MOVEMENTS = frozenset(
    f"aten.{name}"
    for name in (
        "cat stack roll constant_pad_nd index_select clone contiguous _to_copy repeat flip "
        "lift_fresh lift_fresh_copy detach alias pixel_shuffle pixel_unshuffle channel_shuffle "
        "native_channel_shuffle _unsafe_view _reshape_alias copy"
    ).split()
)
# Tensors made in the image of another: as uniform as a scalar, as wide as their model.
LIKENESSES = frozenset(
    f"aten.{name}"
    for name in "zeros_like ones_like full_like empty_like rand_like randn_like bernoulli".split()
)
# Pointwise operations that torch does not tag as such.
UNTAGGED = frozenset(
    f"aten.{name}" for name in "hardswish hardtanh hardsigmoid relu6 _prelu_kernel".split()
)
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


def operator_name(target: OpOverload) -> str:
    """Return the namespace and the name without overload and in-place mark: ``"aten.relu"``."""
    return f"{target.namespace}.{target._opname.rstrip('_')}"


def movement(step: Step) -> tuple[Layers, ...]:
    """Apply the operation to each layer of its tensors, 0 standing in where one has none."""
    operands = list(tensors_in((step.args, step.kwargs)))
    count = len(step.outputs)
    out: list[list[Layer]] = [[] for _ in range(count)]
    for cluster in _clusters([step.layers(tensor) for tensor in operands]):
        substitutes = iter(
            torch.zeros((), dtype=torch.int32).expand(tensor.shape) if layer is None else layer
            for tensor, layer in zip(operands, cluster, strict=True)
        )
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda _, layers=substitutes: next(layers), (step.args, step.kwargs)
        )
        kwargs = {k: v for k, v in kwargs.items() if k not in ("dtype", "device", "memory_format")}
        moved = _ON_LABELS.get(step.target, step.target)(*args, **kwargs)
        for index, layer in enumerate(tensors_in(moved)):
            if 0 not in layer.stride() or layer.untyped_storage().nbytes() > 4 * layer.shape[-1]:
                layer = compact(layer)
            out[index].append(layer)
    return tuple(tuple(layers) for layers in out)


def _clusters(layers_of: list[Layers]) -> list[list[Layer | None]]:
    """Group the layers of several tensors that vary along a common dim, one per tensor."""
    clusters: list[tuple[set[int], list[Layer | None]]] = []
    for index, layers in enumerate(layers_of):
        for layer in layers:
            dims = set(support(layer))
            for known, members in clusters:
                if members[index] is None and (known & dims or not (known or dims)):
                    known |= dims
                    members[index] = layer
                    break
            else:
                fresh: list[Layer | None] = [None] * len(layers_of)
                fresh[index] = layer
                clusters.append((dims, fresh))
    return [members for _, members in clusters]


def pointwise(step: Step) -> tuple[Layers, ...]:
    """Unify the labels of all operands where they broadcast to one element."""
    shape = step.outputs[0].shape
    operands = [t for t in tensors_in((step.args, step.kwargs)) if t.ndim]
    weights = [step.value(tensor).is_weight for tensor in operands]
    expanded = [_broadcast(step, tensor, shape) for tensor in operands]
    out: list[Layer] = []
    for cluster in _clusters(expanded):
        present = [layer for layer in cluster if layer is not None]
        merged = present[0]
        for layer in present[1:]:
            merged = _merge(step, merged, layer)
        for tensor, layer, is_weight in zip(operands, cluster, weights, strict=True):
            if layer is None:
                if _varies(tensor, shape, support(merged)):
                    step.pin((merged,), "combined with a tensor of fixed width")
            elif is_weight and not all(weights):
                step.space.mark(core(layer, support(layer)), "carrier", "copy")
        out.append(merged)
    return tuple(tuple(out) for _ in step.outputs)


def _broadcast(step: Step, tensor: Tensor, shape: torch.Size) -> Layers:
    """Return the layers of ``tensor`` expanded to ``shape``; a broadcast channel is pinned."""
    layers = step.layers(tensor)
    if tensor.shape == shape:
        return layers
    stretched = any(
        size == 1 and full > 1 for size, full in zip(reversed(tensor.shape), reversed(shape))
    )
    kept = []
    for layer in layers:
        if stretched and not support(layer):
            step.pin((layer,), "a width of one is broadcast here")
        else:
            kept.append(layer.expand(shape))
    return tuple(kept)


def _varies(tensor: Tensor, shape: torch.Size, dims: frozenset[int]) -> bool:
    """Return whether ``tensor`` has more than one entry along one of the dims of ``shape``."""
    offset = len(shape) - tensor.ndim
    return any(dim >= offset and tensor.shape[dim - offset] > 1 for dim in dims)


def _merge(step: Step, left: Layer, right: Layer) -> Layer:
    """Unify two layers element by element and return one that stands for both."""
    dims = support(left) | support(right)
    a, b = core(left, dims), core(right, dims)
    a, b = torch.broadcast_tensors(a, b)
    step.space.unify(a, b)
    lonely = (a == 0) != (b == 0)
    if bool(lonely.any()):
        alone = torch.where(lonely, torch.maximum(a, b), 0)
        step.space.pin(alone, f"combined with constants in part of its channels ({step.place})")
        a = torch.maximum(a, b)
    return a.expand(left.shape)
