"""Matrix products: where channels are written and read.

Gain: that of a product is the product of its factors' gains, and a bias that is a parameter takes
it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fxgrow.labels.gains import Gain, GainFlow, same
from fxgrow.labels.layers import Layer, Layers, clusters, core, cover, narrowed, support
from fxgrow.labels.padding import layer_padding
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.arithmetic import product_gain
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation, Value

# ── gain ──────────────────────────────────────────────────────────────────────────────────────


def gain_with_bias(
    flow: GainFlow, op: Operation, *, x: int = 1, weight: int = 2, bias: int = 0
) -> Gain:
    """The product of input and weight gains; the bias follows. Arguments are given by position."""
    added = None if op.kwargs.get("beta") == 0 else op.args[bias]
    return with_bias(flow, op, op.args[x], op.args[weight], added)


def with_bias(flow: GainFlow, op: Operation, x: Value, weight: Value, bias: object) -> Gain:
    """Return the gain of a product plus a bias, which takes it, or parts from it."""
    gain = flow.undo(weight, flow.of(x)).times(flow.of(weight))
    if bias is None or flow.follow(bias, gain):
        return gain
    # The sum is what the old one would be for an input times gain / own, all of it times own.
    taken = flow.taken_by(bias)
    if isinstance(bias, Value) and not bias.is_weight:
        taken = flow.of(bias)
        if same(taken.scale, gain.scale):
            return gain
    sources = gain.sources | taken.sources
    why = f"the bias of {op.module} cannot take a gain of {gain.scale:.6g}"
    if not same(taken.scale, 1.0):
        why += f", having taken one of {taken.scale:.6g} where it is used as well"
    flow.part_ways(op, x, Gain(gain.scale / taken.scale, sources), "no", why)
    return Gain(taken.scale, sources)


# ── labels ────────────────────────────────────────────────────────────────────────────────────


@rule("aten.mm", "aten.bmm", gain=partial(product_gain, reads=True), padding=layer_padding)
def matrix_product(step: Step) -> tuple[Layers, ...]:
    """``(M, K) @ (K, N)``, with a batch dim for ``bmm``."""
    return (_product(step, step.args[0], step.args[1]),)


@rule("aten.mv", "aten.dot", "aten.vdot")
def matrix_vector_product(step: Step) -> tuple[Layers, ...]:
    """``(M, K) @ (K,)`` or ``(K,) @ (K,)``: read by, or reading, a vector."""
    left, right = step.args[:2]
    lines = [step.line(left, left.ndim - 1), step.line(right, 0)]
    weights = [step.value(tensor).is_weight for tensor in (left, right)]
    if lines[0] is None or lines[1] is None or weights[0] == weights[1]:
        _pin_contracted(step, lines, weights)
    else:
        step.space.unify(lines[0], lines[1])
        reader = weights.index(True)
        step.read(lines[reader], step.value((left, right)[reader]))  # type: ignore[arg-type]
    kept = (core(x, (0,)).reshape(-1) for x in step.layers(left) if support(x) == {0})
    return (tuple(kept) if left.ndim > 1 else (),)


@rule("aten.addmm", "aten.baddbmm", gain=gain_with_bias, padding=layer_padding)
def matrix_product_with_bias(step: Step) -> tuple[Layers, ...]:
    """``bias + (M, K) @ (K, N)``: what ``nn.Linear`` runs."""
    bias, left, right = step.args[:3]
    layers = _product(step, left, right)
    shape, added = step.outputs[0].shape, step.value(bias)
    for product, own in clusters([layers, step.stretched(bias, shape)]):
        if own is None:
            if product is not None and not added.is_uniform:
                step.join_fixed(product, bias, shape)
        elif product is None:
            step.pin((own,), PinKind.FIXED, "added to a product")
        else:
            dims = support(product) | support(own)
            whole = torch.Size([size if dim in dims else 1 for dim, size in enumerate(shape)])
            step.space.unify(core(own, dims).expand(whole), core(product, dims).expand(whole))
            if added.is_weight:
                step.space.mark(core(own, support(own)).reshape(-1), "carrier", "draw")
    return (layers,)


def _product(step: Step, left: Tensor, right: Tensor) -> Layers:
    """Contract (…, M, K) with (…, K, N); return the layers."""
    sides = ((left, left.ndim - 1), (right, right.ndim - 2))
    batched = [
        layer
        for tensor, _ in sides
        for layer in step.layers(tensor)
        if tensor.ndim > 2 and 0 in support(layer)
    ]
    if batched:
        return _product_by_heads(step, left, right, batched)
    weights = [step.value(tensor).is_weight for tensor, _ in sides]
    if all(weights) and _is_transposed_parameter(step, right):
        weights = [False, True]  # a linear layer of a table or of learned tokens
    _contract(step, sides, weights)
    shape = step.outputs[0].shape
    out: list[Layer] = []
    for tensor, dim in sides:
        contracted = cover(step.layers(tensor), dim)
        rows = tensor.ndim - 1 if tensor is right else tensor.ndim - 2
        for kept in (layer for layer in step.layers(tensor) if layer is not contracted):
            out.append(kept.narrow(dim, 0, 1).expand(shape))
            if support(kept) == {rows} and weights == [tensor is left, tensor is right]:
                step.space.mark(core(kept, {rows}).reshape(-1), "writer")
    return tuple(out)


def _contract(step: Step, sides: Sequence[tuple[Tensor, int]], weights: Sequence[bool]) -> None:
    """Unify what is contracted and mark it as read by the weight; pin it if neither is one."""
    lines = [step.line(tensor, dim) for tensor, dim in sides]
    if weights[0] == weights[1]:
        _pin_contracted(step, lines, weights)
        return
    reader, _ = sides[weights.index(True)]
    other, _ = sides[weights.index(False)]
    read = lines[weights.index(True)]
    if lines[0] is not None and lines[1] is not None:
        step.space.unify(lines[0], lines[1])
    elif read is None or not step.value(other).is_uniform:
        # One constant (a first state of zeros) may have any width: what reads new ones cancels.
        _pin_contracted(step, [_unmade(step, other, line) for line in lines], weights)
    if read is not None:
        step.read(read, step.value(reader))


def _unmade(step: Step, other: Tensor, line: Tensor | None) -> Tensor | None:
    """Return the labels of a line that read no constant of some width, 0 in place of others."""
    made = cover(step.value(other).made, 1) if other.ndim == 2 else None
    if line is None or made is None or made.shape[1] != len(line):
        return line
    return torch.where(narrowed(made, {1}).reshape(-1) == 0, line, 0)


def _pin_contracted(step: Step, lines: Sequence[Tensor | None], weights: Sequence[bool]) -> None:
    """Pin channels that a product sums over and that no parameter of their own reads."""
    found = tuple(line for line in lines if line is not None)
    if all(weights):
        step.pin(found, PinKind.PARAMETERS)
    elif len(found) == 2:
        step.pin(found, PinKind.ACTIVATIONS)
    else:
        step.pin(found, PinKind.FIXED, step.met_by("multiplied by"))


def _product_by_heads(step: Step, left: Tensor, right: Tensor, batched: list[Layer]) -> Layers:
    """Multiply matrices of their own for each head: a head is one channel with many positions.

    All that a head holds (its queries, keys and values, its row of a table of biases) is unified,
    so that it grows and cancels as a whole, and its size stays what it is. What all heads share (a
    table of relative positions) keeps its size too.
    """
    heads = narrowed(batched[0], (0,))
    out: list[Layer] = []
    for tensor, dim in ((left, left.ndim - 1), (right, right.ndim - 2)):
        alone = cover(step.layers(tensor), 0) is None
        if alone and not _is_alike_for_heads(step.value(tensor), heads):
            step.pin((heads,), PinKind.FIXED, step.met_by("multiplied by matrices of"))
        for layer in step.layers(tensor):
            if 0 in support(layer):
                whole = core(layer, support(layer) | {0})
                step.space.unify(heads.expand_as(whole), whole)
            elif dim in support(layer):
                _pin_shared(step, layer, tensor, right if tensor is left else left)
            else:
                out.append(layer.narrow(dim, 0, 1).expand(step.outputs[0].shape))
                other = right if tensor is left else left
                if step.value(tensor).is_weight and not step.value(other).is_weight:
                    step.space.mark(core(layer, support(layer)).reshape(-1), "writer")
    step.space.several(heads)
    return (heads.expand(step.outputs[0].shape), *out)


def _pin_shared(step: Step, layer: Layer, tensor: Tensor, other: Tensor) -> None:
    """Pin what each matrix of a batch sums over, for what all of them have in common.

    Args:
        step: the product.
        layer: labels of ``tensor``, which vary along what is summed over.
        tensor: a factor.
        other: the other one.
    """
    if step.value(tensor).is_weight and not step.layers(other):
        step.pin((layer,), PinKind.FIXED, step.met_by("multiplied by"))
    else:
        step.pin((layer,), PinKind.EVERY_HEAD)


def _is_alike_for_heads(value: Value, heads: Tensor) -> bool:
    """Return whether the matrices of a value, along dim 0, are the same for all heads of a sample.

    Args:
        value: of shape (samples · heads, …).
        heads: labels, a head for each of these.
    """
    labels = heads.reshape(-1)
    if value.is_uniform or 0 in value.repeated:
        return True
    samples = labels.view(-1, value.runs) if labels.numel() % value.runs == 0 else labels[:0]
    return value.runs > 1 and bool(samples.numel()) and bool((samples == samples[:1]).all())


def _is_transposed_parameter(step: Step, tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter's transpose: what a linear layer multiplies with."""
    value = step.value(tensor)
    return not value.parameter and len(value.origins) == 1 and value.is_view


@rule("aten._trilinear", gain=partial(product_gain, reads=True))
def trilinear(step: Step) -> tuple[Layers, ...]:
    """The sum over some dims of a product of three, broadcast: what ``nn.Bilinear`` runs."""
    *factors, expand1, expand2, expand3, summed = step.args[:7]
    weights = [step.value(tensor).is_weight for tensor in factors]
    if weights != [False, True, False]:  # only the middle one has both dims that are summed
        return step.give_up(PinKind.PARAMETERS if any(weights) else PinKind.ACTIVATIONS)
    names = [_places(x, dims) for x, dims in zip(factors, (expand1, expand2, expand3), strict=True)]
    out: list[Layer] = []
    wide = len(step.outputs[0].shape) + len(summed)
    rest = [dim for dim in range(wide) if dim not in summed]
    weight, places = factors.pop(1), names.pop(1)
    for dim in range(wide):
        pairs = zip(factors, names, strict=True)
        beside = [step.line(tensor, known.index(dim)) for tensor, known in pairs if dim in known]
        if dim not in places or dim not in summed:
            step.pin(tuple(x for x in beside if x is not None), PinKind.ACTIVATIONS)
        else:
            for line in beside:
                step.contract(line, weight, places.index(dim))
        if dim in places and dim not in summed:
            out.extend(step.write(weight, places.index(dim), rest.index(dim)))
    return (tuple(out),)


def _places(tensor: Tensor, expanded: Sequence[int]) -> list[int]:
    """Return where each dim of a tensor lies after dims of one entry were put between them."""
    return [dim for dim in range(tensor.ndim + len(expanded)) if dim not in expanded]
