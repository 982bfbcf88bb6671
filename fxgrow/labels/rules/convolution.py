"""Convolutions: channels are written and read, or pass through kernels of their own."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fxgrow.labels.layers import Layers, along, core, support
from fxgrow.labels.padding import Held, PaddingFlow
from fxgrow.labels.rules.products import gain_with_bias, layer_padding
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation


def convolution_padding(flow: PaddingFlow, op: Operation) -> Held:
    """As for any layer; the groups of a grouped one read different channels."""
    return layer_padding(flow, op, bias=2, apart=op.args[8] > 1)


@rule(
    "aten.convolution",
    gain=partial(gain_with_bias, x=0, weight=1, bias=2),
    padding=convolution_padding,
)
def convolution(step: Step) -> tuple[Layers, ...]:
    """Contract input channels with the weight's input axis; write its output axis."""
    x, weight, bias = step.args[:3]
    transposed, groups = bool(step.args[6]), int(step.args[8])
    kernel = step.value(weight)
    taken = weight.shape[0] if transposed else groups * weight.shape[1]
    if x.shape[1] != taken:  # which a transposed one on meta tensors does not check
        raise ValueError(f"a convolution of {taken} channels gets {x.shape[1]}")
    if bias is not None and bias.shape[0] != step.outputs[0].shape[1]:
        raise ValueError(f"a convolution of {len(bias)} biases writes {step.outputs[0].shape[1]}")
    if not kernel.is_weight:
        return step.give_up("a convolution whose kernel is computed from data")
    depthwise = 1 < groups == x.shape[1] == weight.shape[0] and weight.shape[1] == 1
    if groups > 1 and not depthwise and (transposed or not kernel.parameter):
        kind = "a transposed one" if transposed else "one whose weight is no plain parameter"
        return step.give_up(f"a grouped convolution, {kind}")
    if groups > 1 and kernel.parameter:
        step.space.convolution_groups[kernel.parameter] = 0 if depthwise else groups
    if depthwise and any(support(layer) == {0, 1} for layer in step.layers(x)):
        return _depthwise_in_heads(step, x, weight, bias)
    beside = step.beside(x, (0, 1), "a convolution over these positions")
    # A depthwise weight is (channels, 1, …), transposed or not.
    outgoing = step.line(weight, 1 if transposed and not depthwise else 0)
    if depthwise:
        _accompany(step, step.line(x, 1), outgoing)
    else:
        _read(step, step.line(x, 1), weight, 0 if transposed else 1, groups)
        if outgoing is not None:
            step.space.mark(outgoing, "writer")
    step.accompany(bias, outgoing, "draw")
    shape = step.outputs[0].shape
    out = [core(kept, (0,)).expand(shape) for kept in beside if support(kept) == {0}]
    if outgoing is not None:
        out.append(along(outgoing, 1, shape))
    return (tuple(out),)


def _read(step: Step, incoming: Tensor | None, weight: Tensor, dim: int, groups: int) -> None:
    """Let the columns of a weight read the channels that come in."""
    kernel = step.value(weight)
    if groups > 1:
        size = groups * weight.shape[1]
        read: Tensor | None = step.space.axis(kernel.parameter, 1, size, groups)
    else:
        read = step.line(weight, dim)
    if read is not None:
        step.read(read, kernel)
        if incoming is not None:
            step.space.unify(read, incoming)
    elif incoming is not None:
        step.pin((incoming,), "convolved with a kernel of fixed width")


def _accompany(step: Step, incoming: Tensor | None, kernels: Tensor | None) -> None:
    """Let kernels, one for each channel, accompany these."""
    if kernels is not None and incoming is not None:
        step.space.unify(kernels, incoming)
        step.space.mark(kernels, "carrier")
        return
    alone = tuple(labels for labels in (kernels, incoming) if labels is not None)
    step.pin(alone, "combined with kernels of fixed width, or they with others")


def _depthwise_in_heads(
    step: Step, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Layers, ...]:
    """Filter heads that lie in the batch dim: a kernel for each position in a head, alike for all.

    These kernels are to the heads what the weight of a norm over their positions is.
    """
    found = step.beside(x, (0, 1), "a convolution over these positions")
    for layer in found:
        if 1 in support(layer):
            step.accompany_each(weight, layer, 1, "draw")
            step.accompany_each(bias, layer, 1, "draw")
    shape = step.outputs[0].shape
    return (tuple(layer.expand(shape) for layer in found),)
