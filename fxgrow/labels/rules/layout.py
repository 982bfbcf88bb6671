"""Operations that lay tensors out, where the labels need more than the operation itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgrow.labels.gains import Gain, GainFlow, agree, same
from fxgrow.labels.layers import Layer, Layers, along, clusters, compact, core, support
from fxgrow.labels.padding import Held, PaddingFlow, joined
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.record import RULES, OpRule, rule
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation, Value


@rule("aten._conj", "aten._neg_view")
def marked(step: Step) -> tuple[Layers, ...]:
    """What torch only marks, until it is read, has its channels where they were."""
    return (step.layers(step.args[0]),)


@rule("aten.cat", gain=agree, padding=joined)
def concatenate(step: Step) -> tuple[Layers, ...]:
    """Join the layers of each tensor.

    Tensors joined along a dim that holds no channels (a class token before its patches) carry the
    same channels: their layers are unified.
    """
    shape = step.outputs[0].shape
    dim = step.argument("dim", 0) % len(shape)
    same_rank = [tensor for tensor in step.args[0] if tensor.ndim == len(shape)]
    tensors = [tensor for tensor in same_rank if tensor.shape[dim]] or same_rank[:1]
    out: list[Layer] = []
    empty = [x for x in same_rank if not x.shape[dim] and step.value(x).producer is None]
    for members in clusters([step.layers(tensor) for tensor in tensors]):
        dims = frozenset().union(*(support(m) for m in members if m is not None))
        if dim not in dims:
            out.append(_same_channels(step, tensors, members).expand(shape))
            for tensor in empty:  # nothing joins, of a fixed width
                step.join_fixed(out[-1], tensor, shape)
            continue
        joined = compact(side_by_side(tensors, members, dims, dim).expand(shape))
        if support(joined) == {dim}:
            line = core(joined, (dim,)).reshape(-1)
            if step.space.is_twice(line):
                own = step.space.places(line, [tensor.shape[dim] for tensor in tensors])
                joined = along(own, dim, shape)
        out.append(joined)
    return (tuple(out),)


@rule("aten.view_as_complex")
def complex_of_pairs(step: Step) -> tuple[Layers, ...]:
    """Make one number of each pair along the last dim: both parts are one channel."""
    x = step.args[0]
    kept = [step.flat(layer, set(range(x.ndim - 1))).select(-1, 0) for layer in step.layers(x)]
    return (tuple(layer.expand(step.outputs[0].shape) for layer in kept),)


@rule("aten.view_as_real")
def pairs_of_complex(step: Step) -> tuple[Layers, ...]:
    """Part each number into two along a new last dim."""
    shape = step.outputs[0].shape
    return (tuple(layer.unsqueeze(-1).expand(shape) for layer in step.layers(step.args[0])),)


def side_by_side(
    tensors: list[Tensor], members: list[Layer | None], dims: frozenset[int], dim: int
) -> Tensor:
    """Return layers joined along a dim, 0 standing in where a tensor has none."""
    blank = torch.zeros((), dtype=torch.int32)
    pieces = [
        core(blank.expand(tensor.shape) if layer is None else layer, dims)
        for tensor, layer in zip(tensors, members, strict=True)
    ]
    sizes = [max(found) for found in zip(*(piece.shape for piece in pieces), strict=True)]
    sizes[dim] = -1
    return torch.cat([piece.expand(sizes) for piece in pieces], dim)


def _same_channels(step: Step, tensors: list[Tensor], members: list[Layer | None]) -> Tensor:
    """Unify the layers of tensors that are joined along another dim; return one of them."""
    first, *others = (core(layer, support(layer)) for layer in members if layer is not None)
    for other in others:
        shape = torch.broadcast_shapes(first.shape, other.shape)  # type: ignore[no-untyped-call]
        step.space.unify(first.expand(shape), other.expand(shape))
    for tensor, layer in zip(tensors, members, strict=True):
        if layer is None and not step.value(tensor).is_uniform:
            fixed = [dim for dim in support(first) if tensor.shape[dim] > 1]
            step.space.fix(first, fixed, step.met_by("joined with"))
    return first


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
    return (step.layers(x),) if same else step.give_up(PinKind.LAYOUT, str(step.target))


@rule("aten.tril", "aten.triu", "aten.diagonal")
def triangle(step: Step) -> tuple[Layers, ...]:
    """What picks entries by comparing two dims passes labels along the others."""
    x, is_diagonal = step.args[0], step.target._opname == "diagonal"
    first = step.argument("dim1", 0) % x.ndim if is_diagonal else x.ndim - 2
    second = step.argument("dim2", 1) % x.ndim if is_diagonal else x.ndim - 1
    kept = set(range(x.ndim)) - {first, second}
    layers = step.beside(x, kept, PinKind.LOOKED_UP, "comparing two dims")
    if is_diagonal:
        layers = tuple(layer.diagonal(0, first, second) for layer in layers)
    return (tuple(x.expand(step.outputs[0].shape) for x in layers if support(x)),)


def copy_gain(flow: GainFlow, op: Operation) -> Gain:
    """That of what is written; what is written into a part of a tensor must agree with the rest."""
    destination, source = op.args[:2]
    gain = flow.of(source) if isinstance(source, Value) else Gain()
    rest = flow.of(destination)
    if destination.is_view and not same(gain.scale, rest.scale):
        ratio = Gain(gain.scale / rest.scale, gain.sources | rest.sources)
        flow.part_ways(op, source, ratio, "no", f"written into a part of a tensor ({op.place})")
        return rest
    return gain


def copy_padding(flow: PaddingFlow, op: Operation) -> Held:
    """What is written; what is written into a part of new channels leaves them neither."""
    destination, source = op.args[:2]
    if destination.is_view and flow.carries(destination):
        return flow.refuse(f"they are written into in part ({op.place})")
    carried = isinstance(source, Value) and flow.carries(source)
    return flow.of(source) if carried else flow.lost(op)


@rule("aten.copy", gain=copy_gain, padding=copy_padding)
def copy(step: Step) -> tuple[Layers, ...]:
    """Written over: the destination's channels are the source's."""
    destination, source = step.args[:2]
    shape = destination.shape
    mine, theirs = step.layers(destination), step.stretched(source, shape)
    if not theirs:
        if not step.value(source).is_uniform:
            for layer in mine:
                step.join_fixed(layer, source, shape)
        return (mine,)
    if not mine:
        if not step.value(destination).is_uniform:
            for layer in theirs:
                step.join_fixed(layer, destination, shape)
        return (theirs,)
    pairs = clusters([mine, theirs])
    if any(None in pair for pair in pairs):
        return step.give_up(PinKind.OVERWRITTEN)
    out: list[Layer] = []
    for mine_along, theirs_along in pairs:
        if mine_along is not None and theirs_along is not None:
            dims = support(mine_along) | support(theirs_along)
            old, new = core(mine_along, dims), core(theirs_along, dims)
            step.space.unify(old.contiguous(), new.contiguous())
            out.append(torch.where(new != 0, new, old).expand(shape))
    return (tuple(out),)


RULES.register("aten.stack")(OpRule(gain=agree, padding=joined))
