"""The rules of the operations that compute across a dim.

A rule gets a :class:`Step` (one ATen operation, its arguments and result) and returns the layers
of each output tensor. It may unify labels, mark the roles of parameter axes, and pin what it
cannot reason about. Data movement and pointwise operations need no rule of their own: see
:mod:`fxgrow.labels.generic`. An operation nobody knows pins what it touches.

Register a rule for an operator of your own with ``@rule("mylib.myop")``: the operator's name is
its namespace and its name without overload (``"aten.convolution"``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.labels.layers import Layer, Layers, along, clusters, core, cover, line, support
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Value, tensors_in
from fxgrow.registry import Registry


@dataclass(frozen=True)
class Step:
    """One operation on its way through the labeller.

    Attributes:
        space: where labels are made, unified and pinned.
        target: the ATen operator.
        args, kwargs: its arguments (meta tensors).
        outputs: the tensors it returned.
        value: the recorded value of a tensor argument.
        place: where it ran, for reasons: ``"aten.cumsum at layer1.0"``.
    """

    space: LabelSpace
    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    value: Callable[[Tensor], Value]
    place: str

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def layers(self, tensor: Tensor) -> Layers:
        """Return the label layers of a tensor argument."""
        return self.value(tensor).layers

    def pin(self, layers: Layers, reason: str) -> None:
        """Pin every channel of ``layers``; the reason is completed with the place."""
        for layer in layers:
            self.space.pin(core(layer, support(layer)), f"{reason} ({self.place})")

    def give_up(self, reason: str) -> tuple[Layers, ...]:
        """Pin all that goes in and return unlabelled outputs."""
        for tensor in tensors_in((self.args, self.kwargs)):
            self.pin(self.layers(tensor), reason)
        return tuple(() for _ in self.outputs)


Rule: TypeAlias = Callable[[Step], tuple[Layers, ...]]
RULES: Registry[Rule] = Registry("operation rule")


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Return a decorator that registers a rule for operators such as ``"aten.addmm"``."""
    return RULES.register(*operators)


@rule("aten.convolution")
def convolution(step: Step) -> tuple[Layers, ...]:
    """Contract input channels with the weight's input axis; write its output axis."""
    x, weight, bias = step.args[:3]
    transposed, groups = bool(step.args[6]), int(step.args[8])
    kernel = step.value(weight)
    if not kernel.is_weight:
        return step.give_up("a convolution whose kernel is computed from data")
    if groups > 1 and (transposed or not kernel.parameter):
        return step.give_up("a grouped convolution whose weight is not a plain parameter")
    if any(support(layer) - {0, 1} for layer in step.layers(x)):
        return step.give_up("a convolution over positions that belong to different channels")
    layer = cover(step.layers(x), 1)
    incoming = None if layer is None else line(layer, 1)
    if layer is not None and incoming is None:
        return step.give_up("channels that differ from sample to sample")

    rows, columns = (1, 0) if transposed else (0, 1)
    depthwise = groups > 1 and groups == weight.shape[0] == x.shape[1]
    if groups > 1:
        step.space.convolution_groups[kernel.parameter] = 0 if depthwise else groups
    outgoing = _line_of(kernel.layers, rows)
    if depthwise:
        if outgoing is not None and incoming is not None:
            step.space.unify(outgoing, incoming)
            step.space.mark(outgoing, "carrier")
    else:
        if groups > 1:
            columns_read: Tensor | None = step.space.axis(
                kernel.parameter, 1, groups * weight.shape[1], groups
            )
        else:
            columns_read = _line_of(kernel.layers, columns)
        if columns_read is not None:
            step.space.mark(columns_read, "reader")
            if incoming is not None:
                step.space.unify(columns_read, incoming)
        if outgoing is not None:
            step.space.mark(outgoing, "writer")
    if bias is not None and outgoing is not None:
        _accompany(step, bias, outgoing, "draw")
    shape = step.outputs[0].shape
    out = [core(kept, (0,)).expand(shape) for kept in step.layers(x) if support(kept) == {0}]
    if outgoing is not None:
        out.append(along(outgoing, 1, shape))
    return (tuple(out),)


def _line_of(layers: Layers, dim: int) -> Tensor | None:
    """Return the 1-D labels along ``dim``, or None if there are none or they vary elsewhere."""
    layer = cover(layers, dim)
    return None if layer is None else line(layer, dim)


def _accompany(step: Step, vector: Tensor | None, channels: Tensor, fill: Any) -> None:
    """Unify a per-channel vector (bias, norm weight, statistic) with the channels it serves."""
    if vector is None:
        return
    layer = cover(step.layers(vector), vector.ndim - 1)
    if layer is not None:
        step.space.unify(core(layer, (vector.ndim - 1,)), channels)
        step.space.mark(core(layer, support(layer)), "carrier", fill)


def _matrix_product(step: Step, left: Tensor, right: Tensor) -> tuple[Layers, Tensor | None]:
    """Contract (…, M, K) with (…, K, N); return the layers and the labels written along N."""
    sides = ((left, left.ndim - 1), (right, right.ndim - 2))
    weights = [step.value(tensor).is_weight for tensor, _ in sides]
    contracted = [cover(step.layers(tensor), dim) for tensor, dim in sides]
    lines = [_line_of(step.layers(tensor), dim) for tensor, dim in sides]
    reason = ""
    if any(
        layer is not None and found is None for layer, found in zip(contracted, lines, strict=True)
    ):
        reason = "a product over positions that belong to different channels"
    elif all(weights):
        reason = "two parameters are multiplied over these channels"
    elif not any(weights):
        reason = "two activations are multiplied over these channels"
    if reason:
        for layer in contracted:
            if layer is not None:
                step.pin((layer,), reason)
    else:
        if lines[0] is not None and lines[1] is not None:
            step.space.unify(lines[0], lines[1])
        read = lines[weights.index(True)]
        if read is not None:
            step.space.mark(read, "reader")

    shape = step.outputs[0].shape
    out: list[Layer] = []
    written: Tensor | None = None
    for (tensor, dim), layer in zip(sides, contracted, strict=True):
        for kept in step.layers(tensor):
            if kept is layer:
                continue
            out.append(kept.narrow(dim, 0, 1).expand(shape))
            if tensor is right and support(kept) == {right.ndim - 1}:
                written = core(kept, support(kept)).reshape(-1)
    if written is not None and weights == [False, True]:
        step.space.mark(written, "writer")
    return tuple(out), written


@rule("aten.mm", "aten.bmm")
def matrix_product(step: Step) -> tuple[Layers, ...]:
    """``(M, K) @ (K, N)``, with a batch dim for ``bmm``."""
    layers, _ = _matrix_product(step, step.args[0], step.args[1])
    return (layers,)


@rule("aten.addmm")
def matrix_product_with_bias(step: Step) -> tuple[Layers, ...]:
    """``bias + (M, K) @ (K, N)``: what ``nn.Linear`` runs."""
    bias, left, right = step.args[:3]
    layers, written = _matrix_product(step, left, right)
    if written is not None:
        _accompany(step, bias, written, "draw")
    return (layers,)


@rule(
    "aten.native_batch_norm",
    "aten.cudnn_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
)
def batch_norm(step: Step) -> tuple[Layers, ...]:
    """Per-channel: the channels pass through, with four vectors for company."""
    x = step.args[0]
    layer = cover(step.layers(x), 1)
    channels = None if layer is None else line(layer, 1)
    if layer is not None and channels is None:
        return step.give_up("a batch norm over positions that belong to different channels")
    if channels is not None:
        for position, fill in ((1, "one"), (2, "zero"), (3, "zero"), (4, "one")):
            vector = step.argument(position, "")
            if isinstance(vector, Tensor):
                _accompany(step, vector, channels, fill)
    return (step.layers(x), *(() for _ in step.outputs[1:]))


@rule("aten.native_layer_norm")
def layer_norm(step: Step) -> tuple[Layers, ...]:
    """Mean and variance over the last dim: a mixer that the channels pass through."""
    x, normalized = step.args[:2]
    last = x.ndim - 1
    layer = cover(step.layers(x), last)
    channels = None if layer is None else line(layer, last)
    others = [kept for kept in step.layers(x) if kept is not layer]
    outer = set(range(x.ndim - len(normalized)))
    if (layer is not None and channels is None) or any(not support(k) <= outer for k in others):
        return step.give_up("a layer norm over positions that belong to different channels")
    if channels is not None:
        if len(normalized) > 1:
            return step.give_up("a layer norm over more than the channels")
        step.space.mix(channels, step.place)
        _accompany(step, step.argument(2, "weight"), channels, "one")
        _accompany(step, step.argument(3, "bias"), channels, "zero")
    return (step.layers(x), *(() for _ in step.outputs[1:]))


@rule("aten.native_group_norm")
def group_norm(step: Step) -> tuple[Layers, ...]:
    """Mean and variance over each group of channels: a mixer inside each group."""
    x, weight, bias = step.args[:3]
    groups = int(step.args[6])
    layer = cover(step.layers(x), 1)
    channels = None if layer is None else line(layer, 1)
    if any(support(kept) - {0, 1} for kept in step.layers(x)) or (layer is not None) != (
        channels is not None
    ):
        return step.give_up("a group norm over positions that belong to different channels")
    if channels is not None:
        named = step.value(weight).parameter if isinstance(weight, Tensor) else ""
        if not named:
            return step.give_up("a group norm without a weight, whose groups cannot be told")
        step.space.norm_groups[named] = groups
        step.space.mix(channels, step.place)
        _accompany(step, weight, channels, "one")
        _accompany(step, bias, channels, "zero")
    return (step.layers(x), *(() for _ in step.outputs[1:]))


@rule(
    "aten.max_pool2d_with_indices",
    "aten.max_pool3d_with_indices",
    "aten.avg_pool2d",
    "aten.avg_pool3d",
    "aten._adaptive_avg_pool2d",
    "aten._adaptive_avg_pool3d",
    "aten.adaptive_max_pool2d",
    "aten.upsample_nearest2d",
    "aten.upsample_bilinear2d",
)
def spatial(step: Step) -> tuple[Layers, ...]:
    """Pooling and resampling: sample and channel dims (the first two) pass, the rest is mixed."""
    x = step.args[0]
    leading = x.ndim - (3 if "3d" in step.target._opname else 2)
    kept: list[Layer] = []
    for layer in step.layers(x):
        if support(layer) <= set(range(leading)):
            kept.append(core(layer, range(leading)))
        else:
            step.pin((layer,), "pooling over positions that belong to different channels")
    return tuple(tuple(layer.expand(out.shape) for layer in kept) for out in step.outputs)


@rule("aten.cat")
def concatenate(step: Step) -> tuple[Layers, ...]:
    """Join the layers of each tensor; what is constant along the other dims stays so."""
    tensors = step.args[0]
    dim = step.argument(1, "dim", 0) % tensors[0].ndim
    shape = step.outputs[0].shape
    out: list[Layer] = []
    for members in clusters([step.layers(tensor) for tensor in tensors]):
        dims = frozenset({dim}).union(*(support(m) for m in members if m is not None))
        blank = torch.zeros((), dtype=torch.int32)
        pieces = [
            core(blank.expand(tensor.shape) if layer is None else layer, dims)
            for tensor, layer in zip(tensors, members, strict=True)
        ]
        out.append(torch.cat(pieces, dim).expand(shape))
    return (tuple(out),)


@rule("aten.constant_pad_nd")
def pad(step: Step) -> tuple[Layers, ...]:
    """Padding between a channel's own positions is that channel's; padding beside it is none's."""
    x, amounts = step.args[:2]
    shape = step.outputs[0].shape
    out: list[Layer] = []
    for layer in step.layers(x):
        dims = support(layer)
        kept = [
            amount if x.ndim - 1 - index // 2 in dims else 0 for index, amount in enumerate(amounts)
        ]
        out.append(torch.nn.functional.pad(core(layer, dims), kept).expand(shape))
    return (tuple(out),)


@rule("aten.as_strided")
def as_strided(step: Step) -> tuple[Layers, ...]:
    """Other strides for the dims of size one alone change nothing; anything else is opaque."""
    x, sizes, strides = step.args[:3]
    same = tuple(sizes) == step.value(x).shape and all(
        size == 1 or stride == x.stride(dim)
        for dim, (size, stride) in enumerate(zip(sizes, strides, strict=True))
    )
    return (step.layers(x),) if same else step.give_up("memory is viewed through other strides")


@rule("aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.var", "aten.var_mean")
def reduction(step: Step) -> tuple[Layers, ...]:
    """A reduction keeps the labels along the dims it leaves alone."""
    x = step.args[0]
    dims = step.argument(1, "dim")
    reduced = set(range(x.ndim)) if not dims else {d % x.ndim for d in _as_sequence(dims)}
    keepdim = bool(step.argument(2, "keepdim", False))
    kept: list[Layer] = []
    for layer in step.layers(x):
        if support(layer) & reduced:
            if step.target._opname in _INVARIANT_UNDER_COPIES and support(layer) <= reduced:
                step.space.mix(core(layer, support(layer)), step.place)
            else:
                step.pin((layer,), f"{step.target._opname} over the channels mixes all of them")
            continue
        for dim in sorted(reduced, reverse=True):
            layer = layer.narrow(dim, 0, 1) if keepdim else layer.select(dim, 0)
        kept.append(layer)
    return tuple(tuple(kept) for _ in step.outputs)


# Sums and unbiased variances change with the number of copies; these do not.
_INVARIANT_UNDER_COPIES = {"mean", "amax", "amin"}


def _as_sequence(dims: int | Sequence[int]) -> Sequence[int]:
    return (dims,) if isinstance(dims, int) else dims
