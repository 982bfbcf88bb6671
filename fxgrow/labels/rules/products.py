"""Convolutions, matrix products and look-ups: where channels are written and read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxgrow.labels.layers import Layer, Layers, along, core, cover, narrowed, support
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.step import Step, rule


@rule("aten.convolution")
def convolution(step: Step) -> tuple[Layers, ...]:
    """Contract input channels with the weight's input axis; write its output axis."""
    x, weight, bias = step.args[:3]
    transposed, groups = bool(step.args[6]), int(step.args[8])
    kernel = step.value(weight)
    taken = weight.shape[0] if transposed else groups * weight.shape[1]
    if x.shape[1] != taken:  # which a transposed one on meta tensors does not check
        raise ValueError(f"a convolution of {taken} channels gets {x.shape[1]}")
    if not kernel.is_weight:
        return step.give_up(PinKind.KERNEL)
    depthwise = groups > 1 and groups == x.shape[1] and weight.shape[0] == groups
    depthwise = depthwise and weight.shape[1] == 1
    if groups > 1 and not depthwise and (transposed or not kernel.parameter):
        kind = "a transposed one" if transposed else "one whose weight is no plain parameter"
        return step.give_up(PinKind.GROUPED, kind)
    if depthwise and any(support(layer) == {0, 1} for layer in step.layers(x)):
        return _depthwise_in_heads(step, x, weight, bias)
    beside = step.beside(x, (0, 1), PinKind.POSITIONS, "a convolution")
    incoming = step.line(x, 1)

    rows, columns = (1, 0) if transposed else (0, 1)
    if depthwise:
        rows = 0  # transposed or not, a depthwise weight is (channels, 1, …)
    if groups > 1 and kernel.parameter:
        step.space.convolution_groups[kernel.parameter] = 0 if depthwise else groups
    outgoing = step.line(weight, rows)
    if depthwise:
        if outgoing is not None and incoming is not None:
            step.space.unify(outgoing, incoming)
            step.space.mark(outgoing, "carrier")
    else:
        if groups > 1:
            size = groups * weight.shape[1]
            read: Tensor | None = step.space.axis(kernel.parameter, 1, size, groups)
        else:
            read = step.line(weight, columns)
        if read is not None:
            step.read(read, kernel)
            if incoming is not None:
                step.space.unify(read, incoming)
        elif incoming is not None:
            step.pin((incoming,), PinKind.FIXED, "convolved with a kernel")
        if outgoing is not None:
            step.space.mark(outgoing, "writer")
    if bias is not None and outgoing is not None:
        step.accompany(bias, outgoing, "draw")
    shape = step.outputs[0].shape
    out = [core(kept, (0,)).expand(shape) for kept in beside if support(kept) == {0}]
    if outgoing is not None:
        out.append(along(outgoing, 1, shape))
    return (tuple(out),)


def _depthwise_in_heads(
    step: Step, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Layers, ...]:
    """Filter heads that lie in the batch dim: a kernel for each position in a head, alike for all.

    These kernels are to the heads what the weight of a norm over their positions is.
    """
    found = step.beside(x, (0, 1), PinKind.POSITIONS, "a convolution")
    step.space.convolution_groups[step.value(weight).parameter] = 0
    for layer in found:
        if 1 in support(layer):
            step.accompany_each(weight, layer, 1, "draw")
            step.accompany_each(bias, layer, 1, "draw")
    shape = step.outputs[0].shape
    return (tuple(layer.expand(shape) for layer in found),)


@rule("aten.mm", "aten.bmm")
def matrix_product(step: Step) -> tuple[Layers, ...]:
    """``(M, K) @ (K, N)``, with a batch dim for ``bmm``."""
    layers, _ = _product(step, step.args[0], step.args[1])
    return (layers,)


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


@rule("aten.addmm", "aten.baddbmm")
def matrix_product_with_bias(step: Step) -> tuple[Layers, ...]:
    """``bias + (M, K) @ (K, N)``: what ``nn.Linear`` runs."""
    bias, left, right = step.args[:3]
    layers, written = _product(step, left, right)
    if written is not None:
        step.accompany(bias, written, "draw")
    elif step.layers(bias):
        step.pin(step.layers(bias), PinKind.FIXED, "added to a product")
    elif not step.value(bias).is_uniform:
        for layer in layers:
            dims = [d for d in sorted(support(layer)) if bias.shape[d - layer.ndim] > 1]
            step.space.fix(core(layer, support(layer)), dims, "added to a tensor")
    return (layers,)


def _product(step: Step, left: Tensor, right: Tensor) -> tuple[Layers, Tensor | None]:
    """Contract (…, M, K) with (…, K, N); return the layers and the labels written along N."""
    sides = ((left, left.ndim - 1), (right, right.ndim - 2))
    contracted = [cover(step.layers(tensor), dim) for tensor, dim in sides]
    batched = [
        layer
        for tensor, _ in sides
        for layer in step.layers(tensor)
        if tensor.ndim > 2 and 0 in support(layer)
    ]
    shape = step.outputs[0].shape
    if batched:
        return _product_by_heads(step, left, right, batched), None
    weights = [step.value(tensor).is_weight for tensor, _ in sides]
    if all(weights) and _is_transposed_parameter(step, right):
        weights = [False, True]  # a linear layer of a table or of learned tokens
    lines = [step.line(tensor, dim) for tensor, dim in sides]
    if weights[0] == weights[1]:
        _pin_contracted(step, lines, weights)
    else:
        if lines[0] is not None and lines[1] is not None:
            step.space.unify(lines[0], lines[1])
        elif lines[weights.index(True)] is None or not _is_uniform(step, sides, weights):
            _pin_contracted(step, lines, weights)
        read = lines[weights.index(True)]
        if read is not None:
            step.read(read, step.value(sides[weights.index(True)][0]))
    out: list[Layer] = []
    written: Tensor | None = None
    for (tensor, dim), layer in zip(sides, contracted, strict=True):
        for kept in step.layers(tensor):
            if kept is layer:
                continue
            out.append(kept.narrow(dim, 0, 1).expand(shape))
            if tensor is right and support(kept) == {right.ndim - 1}:
                written = core(kept, support(kept)).reshape(-1)
            elif tensor is left and weights == [True, False] and support(kept) == {left.ndim - 2}:
                step.space.mark(core(kept, support(kept)).reshape(-1), "writer")
    if written is not None and weights == [False, True]:
        step.space.mark(written, "writer")
    return tuple(out), written


def _pin_contracted(step: Step, lines: Sequence[Tensor | None], weights: list[bool]) -> None:
    """Pin channels that a product sums over without a parameter of their own to read them."""
    found = tuple(line for line in lines if line is not None)
    if all(weights):
        step.pin(found, PinKind.PARAMETERS)
    elif len(found) == 2:
        step.pin(found, PinKind.ACTIVATIONS)
    else:
        step.pin(found, PinKind.FIXED, "multiplied by a matrix")


def _is_uniform(step: Step, sides: tuple[tuple[Tensor, int], ...], weights: list[bool]) -> bool:
    """Return whether the data of a product is one constant (a first state of zeros).

    Any number of channels may have this value, since what reads new ones cancels.
    """
    return step.value(sides[weights.index(False)][0]).is_uniform


def _product_by_heads(step: Step, left: Tensor, right: Tensor, batched: list[Layer]) -> Layers:
    """Multiply matrices of their own for each head: a head is one channel with many positions.

    All that a head holds (its queries, keys and values, its row of a table of biases) is unified,
    so that it grows and cancels as a whole, and its size stays what it is. What all heads share (a
    table of relative positions) keeps its size too.
    """
    heads = narrowed(batched[0], (0,))
    out: list[Layer] = []
    for tensor, dim in ((left, left.ndim - 1), (right, right.ndim - 2)):
        for layer in step.layers(tensor):
            if 0 in support(layer):
                whole = core(layer, support(layer) | {0})
                step.space.unify(heads.expand_as(whole), whole)
            elif dim in support(layer):
                step.pin((layer,), PinKind.EVERY_HEAD)
            else:
                out.append(layer.narrow(dim, 0, 1).expand(step.outputs[0].shape))
    step.space.several(heads)
    return (heads.expand(step.outputs[0].shape), *out)


def _is_transposed_parameter(step: Step, tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter's transpose: what a linear layer multiplies with."""
    value = step.value(tensor)
    return not value.parameter and len(value.origins) == 1 and value.is_view


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(step: Step) -> tuple[Layers, ...]:
    """Sums of rows of a table: its columns are what it writes."""
    layers, *_ = embedding(step)
    return (layers, *(() for _ in step.outputs[1:]))


@rule("aten.embedding")
def embedding(step: Step) -> tuple[Layers, ...]:
    """Look rows of a table up: its columns are what it writes."""
    weight = step.args[0]
    columns = step.line(weight, 1)
    if columns is None:
        return ((),)
    step.space.mark(columns, "writer")
    shape = step.outputs[0].shape
    return ((along(columns, len(shape) - 1, shape),),)
