"""Convolutions: channels are written and read, or pass through kernels of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from fxgrow.labels.gains import Gain, GainFlow, not_homogeneous
from fxgrow.labels.layers import Layers, along, core, support
from fxgrow.labels.padding import Held, PaddingFlow, layer_padding
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.products import gain_with_bias
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation


def convolution_padding(flow: PaddingFlow, op: Operation) -> Held:
    """As for any layer; the groups of a grouped one read different channels."""
    return layer_padding(flow, op, apart=op.args[8] > 1)


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
    _check_sizes(step, x, weight, bias)
    if not kernel.is_weight:
        return step.give_up(PinKind.KERNEL)
    depthwise = 1 < groups == x.shape[1] == weight.shape[0] and weight.shape[1] == 1
    if groups > 1 and not depthwise:
        if transposed:
            return step.give_up(PinKind.GROUPED, "a transposed one")
        if not kernel.parameter:
            return step.give_up(PinKind.GROUPED, "one whose weight is no plain parameter")
    if groups > 1 and kernel.parameter:
        step.space.convolution_groups[kernel.parameter] = 0 if depthwise else groups
    return (_convolved(step, depthwise=depthwise),)


def _convolved(step: Step, *, depthwise: bool) -> Layers:
    """Return the layers of the output of a convolution that can be followed."""
    x, weight, bias = step.args[:3]
    transposed, groups = bool(step.args[6]), int(step.args[8])
    if depthwise and any(support(layer) == {0, 1} for layer in step.layers(x)):
        return _depthwise_in_heads(step, x, weight, bias)
    still = _untouched(step)
    beside = step.beside(x, (1, *still), PinKind.POSITIONS, "a convolution")
    shape = step.outputs[0].shape
    kept = tuple(core(x, still).expand(shape) for x in beside if support(x) and support(x) <= still)
    incoming = step.line(x, 1)
    if depthwise:  # transposed or not, its weight is (channels, 1, …)
        return (*kept, *_accompanied(step, incoming, weight, bias))
    step.contract(incoming, weight, 0 if transposed else 1, groups)
    return (*kept, *step.write(weight, 1 if transposed else 0, 1, bias))


def _untouched(step: Step) -> frozenset[int]:
    """Return the dims of what comes in along which positions are neither joined nor moved.

    The batch, and each dim along which a kernel has one entry and meets every position once: where
    tokens are the channels of a convolution, the features of a token lie there.
    """
    x, weight, _, stride, padding, _, _, moved = step.args[:8]
    spatial = range(x.ndim - 2)
    each = (_each(setting, x.ndim - 2) for setting in (stride, padding, moved))
    met = [
        dim + 2
        for dim, told in zip(spatial, zip(*each, strict=True), strict=True)
        if weight.shape[dim + 2] == 1 and told == (1, 0, 0)
    ]
    return frozenset({0, *met})


def _each(setting: Sequence[int], dims: int) -> Sequence[int]:
    """Return a setting for each dim; torch takes one for all of them too."""
    return [*setting] * dims if len(setting) == 1 else setting


def _check_sizes(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check what torch does not check of a transposed convolution on meta tensors.

    Raises:
        ValueError: the sizes do not fit.
    """
    taken = weight.shape[0] if step.args[6] else step.args[8] * weight.shape[1]
    if x.shape[1] != taken:
        raise ValueError(f"a convolution of {taken} channels gets {x.shape[1]}")
    if bias is not None and bias.shape[0] != step.outputs[0].shape[1]:
        raise ValueError(f"a convolution of {len(bias)} biases writes {step.outputs[0].shape[1]}")


def _accompanied(
    step: Step, incoming: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Layers:
    """Let kernels, one for each channel, accompany what comes in."""
    kernels = step.line(weight, 0)
    if kernels is not None and incoming is not None:
        step.space.unify(kernels, incoming)
        step.space.mark(kernels, "carrier")
    else:
        alone = tuple(labels for labels in (kernels, incoming) if labels is not None)
        step.pin(alone, PinKind.FIXED, step.met_by("combined with"))
    step.accompany(bias, kernels, "draw")
    return () if kernels is None else (along(kernels, 1, step.outputs[0].shape),)


def _depthwise_in_heads(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None) -> Layers:
    """Filter heads that lie in the batch dim: a kernel for each position in a head, alike for all.

    These kernels are to the heads what the weight of a norm over their positions is.
    """
    found = step.beside(x, (0, 1), PinKind.POSITIONS, "a convolution")
    for layer in found:
        if 1 in support(layer):
            step.accompany_each(weight, layer, 1, "draw")
            step.accompany_each(bias, layer, 1, "draw")
    shape = step.outputs[0].shape
    return tuple(layer.expand(shape) for layer in found)


def deformable_gain(flow: GainFlow, op: Operation) -> Gain:
    """As for any layer, of what it samples; offsets and masks take no gain."""
    if any(flow.of(value).scale != 1.0 for value in op.args[2:4]):
        return not_homogeneous(flow, op)
    return gain_with_bias(flow, op, x=0, weight=1, bias=4)


@rule("torchvision.deform_conv2d", gain=deformable_gain)
def deformable_convolution(step: Step) -> tuple[Layers, ...]:
    """A convolution that samples where its offsets say: these are positions, not channels."""
    x, weight, offset, mask, bias = step.args[:5]
    if not step.value(weight).is_weight:
        return step.give_up(PinKind.KERNEL)
    if (step.argument("groups"), step.argument("offset_groups")) != (1, 1):
        return step.give_up(PinKind.GROUPED, "one that samples by groups")
    for tensor, dims in ((x, (1,)), (offset, ()), (mask, ())):
        step.beside(tensor, dims, PinKind.POSITIONS, "a convolution")
    step.contract(step.line(x, 1), weight, 1)
    return (step.write(weight, 0, 1, bias),)
