"""Matrix products: where channels are written and read.

Gain: that of a product is the product of its factors' gains, and a bias that is a parameter takes
it too. Padding: what a weight writes is filled, what it reads is noted, and zero times anything
is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fxgrow.labels.gains import Gain, GainFlow, same
from fxgrow.labels.layers import Layer, Layers, clusters, core, cover, narrowed, support
from fxgrow.labels.padding import Held, PaddingFlow
from fxgrow.labels.rules.arithmetic import product_gain, zero_times
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation, Value

# ── gain ──────────────────────────────────────────────────────────────────────────────────────


def gain_with_bias(
    flow: GainFlow, op: Operation, *, x: int = 1, weight: int = 2, bias: int = 0
) -> Gain:
    """The product of input and weight gains; the bias follows. Arguments are given by position."""
    return with_bias(flow, op, op.args[x], op.args[weight], op.args[bias])


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


# ── padding ───────────────────────────────────────────────────────────────────────────────────


def layer_padding(
    flow: PaddingFlow, op: Operation, *, bias: int | None = None, apart: bool = False
) -> Held:
    """What is written is filled; what is read by any weight is noted; what passes, passes.

    Args:
        flow: the state.
        op: a product, or a look-up.
        bias: position of a bias among its arguments.
        apart: parts of what it writes read different channels, and so do not sum over the same.
    """
    passing = [value for value in flow.carriers(op) if not value.is_weight]
    _note_readers(flow, op, [flow.of(value) for value in passing])
    if not any(map(flow.carries, op.outputs)):
        return Held(None)
    weights = [value for value in flow.carriers(op) if value.is_weight]
    axes = [axis for value in weights for axis in flow.axes_of(value, "writer")]
    if axes:
        return _written(flow, op, axes, weights, None if bias is None else op.args[bias], apart)
    return _passed(flow, op, passing, weights)


def _note_readers(flow: PaddingFlow, op: Operation, states: Sequence[Held]) -> None:
    """Note whether all is zero that the group's readers in an operation read."""
    for value in op.inputs:
        for axis in flow.axes_of(value, "reader"):
            zero = bool(states) and all(held.what == "zero" for held in states)
            flow.free[axis] = flow.free.get(axis, True) and zero
            if not zero:
                why = next((held.why for held in states if held.why), "")
                flow.reasons.setdefault(axis, why or f"{op.place} reads them by themselves")


def _written(
    flow: PaddingFlow,
    op: Operation,
    axes: Sequence[int],
    weights: Sequence[Value],
    bias: object,
    apart: bool,
) -> Held:
    """Have new rows filled, where what they then write is what the rows are."""
    parts = [value for value in (*weights, bias) if isinstance(value, Value)]
    whole = all(flow.is_whole(flow.table.of_axis(axis)) for axis in axes)
    filled = (whole and not apart) or flow.holds == "zero"
    if not (filled and all(flow.of(value).what == flow.holds for value in parts)):
        return flow.lost(op)
    flow.filled.update(axes)
    flow.fill(bias)
    return Held(flow.holds)


def _passed(
    flow: PaddingFlow, op: Operation, passing: Sequence[Value], weights: Sequence[Value]
) -> Held:
    """Return what is held after a product over another dim, or by a kernel for each channel."""
    states = [flow.of(value) for value in passing]
    if len(passing) == 1 and len(op.inputs) == 2 and not weights:
        return states[0]  # another dim is contracted, without a bias
    every = len(passing) + len(weights) == len(op.inputs)
    nothing = zero_times(flow, op, [*passing], states) if every else None
    if nothing is None:
        return next((held for held in states if held.why), flow.lost(op))
    # A depthwise kernel and its bias accompany them, or it is of heads.
    biases = [value for value in weights if value is not op.args[1]]
    if biases and flow.holds != "zero":
        return flow.lost(op)
    for value in biases:
        flow.fill(value)
    return nothing


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
        step.pin(tuple(x for x in lines if x is not None), "multiplied by what is no weight of its")
    else:
        step.space.unify(lines[0], lines[1])
        reader = weights.index(True)
        step.read(lines[reader], step.value((left, right)[reader]))  # type: ignore[arg-type]
    kept = (core(x, (0,)).reshape(-1) for x in step.layers(left) if support(x) == {0})
    return (tuple(kept) if left.ndim > 1 else (),)


@rule("aten.addmm", "aten.baddbmm", gain=gain_with_bias, padding=partial(layer_padding, bias=0))
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
            step.pin((own,), "added to a product of fixed width")
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
        reason = "two activations are multiplied over these channels"
        if weights[0]:
            reason = "two parameters are multiplied over these channels"
        elif None in lines:
            reason = "multiplied by a fixed matrix"
        step.pin(tuple(line for line in lines if line is not None), reason)
        return
    reader, _ = sides[weights.index(True)]
    other, _ = sides[weights.index(False)]
    read = lines[weights.index(True)]
    if lines[0] is not None and lines[1] is not None:
        step.space.unify(lines[0], lines[1])
    elif read is None or not step.value(other).is_uniform:
        # One constant (a first state of zeros) may have any width: what reads new ones cancels.
        step.pin(tuple(x for x in lines if x is not None), "multiplied by a fixed matrix")
    if read is not None:
        step.read(read, step.value(reader))


def _product_by_heads(step: Step, left: Tensor, right: Tensor, batched: list[Layer]) -> Layers:
    """Multiply matrices of their own for each head: a head is one channel with many positions.

    All that a head holds (its queries, keys and values, its row of a table of biases) is unified,
    so that it grows and cancels as a whole, and its size stays what it is. What all heads share (a
    table of relative positions) keeps its size too.
    """
    heads = narrowed(batched[0], (0,))
    out: list[Layer] = []
    for tensor, dim in ((left, left.ndim - 1), (right, right.ndim - 2)):
        if cover(step.layers(tensor), 0) is None and not step.value(tensor).is_uniform:
            step.pin((heads,), "multiplied by matrices of a tensor of fixed width")
        for layer in step.layers(tensor):
            if 0 in support(layer):
                whole = core(layer, support(layer) | {0})
                step.space.unify(heads.expand_as(whole), whole)
            elif dim in support(layer):
                step.pin((layer,), "every head reads these positions alike")
            else:
                out.append(layer.narrow(dim, 0, 1).expand(step.outputs[0].shape))
    step.space.several(heads, f"all its channels are one head ({step.place})")
    return (heads.expand(step.outputs[0].shape), *out)


def _is_transposed_parameter(step: Step, tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter's transpose: what a linear layer multiplies with."""
    value = step.value(tensor)
    return not value.parameter and len(value.origins) == 1 and value.is_view
