"""What most operations do, without a rule each: move data, or combine it pointwise.

A movement is applied to the layers themselves: whatever ``cat``, ``roll`` or ``permute`` does to
the data, it does to the labels. A pointwise operation (``torch.Tag.pointwise``) unifies the labels
of its operands where they broadcast together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.labels import ask, composed, noise
from fxgrow.labels.layers import Layer, Layers, clusters, compact, core, support
from fxgrow.labels.operators import COPIES
from fxgrow.labels.pins import PinKind
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Value
from fxgrow.modules.calling import map_tensors, tensors_in

# A layer is expanded, hence not contiguous: where the data could be viewed, its labels are copied.
_ON_LABELS: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


def _on_labels(step: Step) -> Callable[..., Any]:
    """Return what does to layers what an operation does to data.

    What turns a tensor in place must not turn the layers that other values share.
    """
    if step.traits.is_mutable:
        functional: Callable[..., Any] = getattr(torch.ops.aten, step.target._opname.rstrip("_"))
        return functional
    return _ON_LABELS.get(step.target, step.target)


def alters(step: Step) -> str:
    """Return the name of what the operation does to values, "" if it only lays them out.

    Numbers that a pointwise operation computes with belong to the name: they may stem from a width.
    """
    traits = step.traits
    if traits.is_layout:
        return ""
    if not traits.is_pointwise:
        return traits.name
    return " ".join((traits.name, *(f"{x:.12g}" for x in numbers_of(step))))


def numbers_of(step: Step, known: Mapping[int, float] = MappingProxyType({})) -> tuple[float, ...]:
    """Return the numbers that an operation computes with, in the order of its arguments.

    Args:
        step: the operation.
        known: what is told of constants that have no values of their own, by the id of a tensor.
    """
    given = (*step.args, *step.kwargs.values())
    numbers = [_number(x, known) if isinstance(x, Tensor) else x for x in given]
    return tuple(x for x in numbers if isinstance(x, (int, float)) and not isinstance(x, bool))


def _number(tensor: Tensor, known: Mapping[int, float]) -> object:
    """Return the one number in a constant without dims, None if it is none."""
    return tensor.item() if not tensor.ndim and not tensor.is_meta else known.get(id(tensor))


def is_curved(step: Step, weights: Sequence[Value]) -> bool:
    """Return whether an operation on weights alone is not linear in each parameter, or one was."""
    if any(value.is_curved for value in weights):
        return True
    if step.traits.is_movement:
        return False
    if step.is_curved is not None:
        return step.is_curved
    numbers = [v for v in weights if v.dtype.is_floating_point or v.dtype.is_complex]
    origins = dict.fromkeys(name for value in numbers for name in value.origins)
    return any(
        not ask.is_linear(step.call, [value for value in numbers if name in value.origins])
        for name in origins
    )


def movement(step: Step) -> tuple[Layers, ...]:
    """Apply the operation to each layer of its tensors, 0 standing in where one has none."""
    operands = step.operands
    if step.traits.name in COPIES:
        return (step.layers(operands[0]),)
    layers_of = [step.layers(tensor) for tensor in operands]
    for cluster in clusters(layers_of):
        _join_beside(step, cluster)
    return tuple(_apart(step, layers) for layers in moved(step, layers_of))


def moved(step: Step, layers_of: Sequence[Layers]) -> list[list[Layer]]:
    """Return what an operation that moves data makes of layers of its operands, by output.

    Args:
        step: the operation.
        layers_of: the layers of each operand.

    Raises:
        RuntimeError: it does not take integers.
    """
    if step.traits.name in COPIES:
        return [[*layers_of[0]]]
    kwargs = {k: v for k, v in step.kwargs.items() if k not in ("dtype", "device")}
    move = _on_labels(step)
    out: list[list[Layer]] = [[] for _ in step.outputs]
    for cluster in clusters([*layers_of]):
        blank = torch.zeros((), dtype=torch.int32)
        layers = [
            blank.expand(tensor.shape) if layer is None else layer
            for tensor, layer in zip(step.operands, cluster, strict=True)
        ]
        most = max(len(support(layer)) for layer in layers)
        storages = {layer.untyped_storage().data_ptr() for layer in layers}
        queue = iter(layers)

        def next_layer(_: Tensor, queue: Iterator[Layer] = queue) -> Layer:
            return next(queue)

        args, named = map_tensors(next_layer, (step.args, kwargs))
        for index, layer in enumerate(tensors_in(move(*args, **named))):
            copied = layer.untyped_storage().data_ptr() not in storages
            parted = len(support(layer)) > most  # one dim for all samples' heads may become two
            out[index].append(compact(layer) if copied or parted else layer)
    return out


def _join_beside(step: Step, cluster: list[Layer | None]) -> None:
    """Let tensors of fixed width be stacked beside channels."""
    for tensor, own in zip(step.operands, cluster, strict=True):
        if own is None and not step.value(tensor).is_uniform:
            for other in (layer for layer in cluster if layer is not None):
                step.join_fixed(other, tensor, tensor.shape)


def repeated(step: Step, value: Value) -> frozenset[int]:
    """Return the dims of the output in which entries are the same because there was one.

    Args:
        step: the operation.
        value: its only operand.
    """
    x, out, known = step.operands[0], step.outputs[0], value.repeated
    name = step.traits.name
    if name in ("aten.expand", "aten.repeat"):
        added = out.ndim - x.ndim
        single = {d for d, size in enumerate((*[1] * added, *x.shape)) if size == 1}
        return frozenset(single | {dim + added for dim in known})
    if name == "aten.transpose":
        first, second = (step.argument(dim) % max(x.ndim, 1) for dim in ("dim0", "dim1"))
        turned = {first: second, second: first}
        return frozenset(turned.get(dim, dim) for dim in known)
    if step.target in _ON_LABELS:
        return _across_view(x, out, known)
    kept = name in COPIES or (step.traits.is_pointwise and x.shape == out.shape)
    return known if kept else frozenset()


def _across_view(x: Tensor, out: Tensor, dims: frozenset[int]) -> frozenset[int]:
    """Return dims of a tensor as those of its view, where only dims of one entry come and go."""
    before, after = ([d for d, size in enumerate(t.shape) if size > 1] for t in (x, out))
    if [x.shape[d] for d in before] != [out.shape[d] for d in after]:
        return frozenset()
    return frozenset(b for a, b in zip(before, after, strict=True) if a in dims)


def runs(step: Step, value: Value) -> int:
    """Return how many matrices in a row are the same, where a view made one dim of two.

    Args:
        step: the operation.
        value: its only operand.
    """
    if step.target not in _ON_LABELS:
        return 1
    x, out = step.operands[0], step.outputs[0]
    merged = x.ndim > 1 and out.shape == (x.shape[0] * x.shape[1], *x.shape[2:])
    return x.shape[1] if merged and 1 in value.repeated else 1


def _apart(step: Step, layers: list[Layer]) -> Layers:
    """Return the layers without those that share a dim with one before; these are pinned.

    A view that makes one dim of heads and of positions that all heads share brings them together.
    """
    kept: list[Layer] = []
    for layer in layers:
        if any(support(layer) & support(other) for other in kept):
            step.pin((layer,), PinKind.ONE_DIM)
        else:
            kept.append(layer)
    return tuple(kept)


def pointwise(step: Step) -> tuple[Layers, ...]:
    """Unify the labels of all operands where they broadcast to one element."""
    shape = step.outputs[0].shape
    if len(step.operands) == 1 and step.operands[0].shape == shape:
        return tuple(step.layers(step.operands[0]) for _ in step.outputs)
    operands = [tensor for tensor in step.operands if tensor.ndim]
    expanded = [step.stretched(tensor, shape) for tensor in operands]
    out: list[Layer] = []
    values = [step.value(tensor) for tensor in operands]
    padded = [value.is_padded for value in values]
    composed_of = len(step.operands) > 1 and all(step.value(x).is_weight for x in step.operands)
    step.is_curved = False if composed_of else None
    for cluster in clusters(expanded):
        _fill_padding(step, operands, cluster, padded)
        own = [layer for layer in cluster if layer is not None]
        first, *others = composed.linear_first(step, values, cluster) if composed_of else own
        merged = functools.reduce(functools.partial(_merge, step), others, first)
        fixed = _join_operands(step, merged, operands, cluster)
        if support(merged) - fixed or not support(merged):
            out.append(merged)
    return tuple(tuple(out) for _ in step.outputs)


def _join_operands(
    step: Step, merged: Layer, operands: Sequence[Tensor], cluster: Sequence[Layer | None]
) -> set[int]:
    """Mark what accompanies channels; return the dims that keep their size for other tensors."""
    fixed: set[int] = set()
    values = [step.value(tensor) for tensor in operands]
    for place, (tensor, value, own) in enumerate(zip(operands, values, cluster, strict=True)):
        if value.drawn and noise.meets(step, place, values, cluster):
            pinned = noise.pin_met(step, merged, value)
            if not noise.is_on_weights(values):  # in a weight they are still those that it reads
                fixed |= pinned
        elif own is None and (value.is_uniform or value.drawn not in ("", "noise")):
            continue  # one constant may have any width, and so may what is drawn alike
        elif own is None:
            fixed |= step.join_fixed(merged, tensor, merged.shape)
        elif value.is_weight and not all(value.is_weight for value in values):
            step.space.mark(core(own, support(own)), "carrier", "copy")
    return fixed


def _fill_padding(
    step: Step, operands: Sequence[Tensor], cluster: list[Layer | None], padded: Sequence[bool]
) -> None:
    """Let padding carry the labels of what it is combined with, in place.

    It is the same constant for all of these channels, so new ones may have it too.
    """
    if not any(padded):
        return
    whole = [layer for layer, gaps in zip(cluster, padded, strict=True) if not gaps]
    other = next((x for x in whole if x is not None and bool(core(x, support(x)).all())), None)
    for place, (own, gaps) in enumerate(zip(cluster, padded, strict=True)):
        if gaps and own is not None and other is not None and support(own) == support(other):
            a, b = core(own, support(own)), core(other, support(own))
            if not bool(a.all()):
                cluster[place] = torch.where(a == 0, b, a).expand(own.shape)
                step.value(operands[place]).taken.append(other)


def is_joined_by_constants(step: Step, inputs: Sequence[Value]) -> bool:
    """Return whether channels are laid side by side with one constant, as padding beside them."""
    return step.traits.name == "aten.cat" and any(
        value.is_uniform and not value.layers for value in inputs
    )


def _merge(step: Step, left: Layer, right: Layer) -> Layer:
    """Unify two layers element by element and return one that stands for both."""
    dims = support(left) | support(right)
    a, b = core(left, dims), core(right, dims)
    shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
    a, b = a.expand(shape), b.expand(shape)
    smaller, larger = sorted((left, right), key=lambda layer: len(support(layer)))
    lonely = (a == 0) != (b == 0)
    if support(smaller) and support(smaller) < support(larger) and not bool(lonely.any()):
        whole, part = (a, b) if larger is left else (b, a)
        step.space.share(whole, part, sorted(support(smaller)))
        return larger.expand(left.shape)
    step.space.unify(a, b)
    if bool(lonely.any()):
        alone = torch.where(lonely, torch.maximum(a, b), 0)
        step.space.pin(alone, PinKind.CONSTANTS)
        return torch.maximum(a, b).expand(left.shape)
    return smaller.expand(left.shape)
