"""Noise on its way through a network: where it meets channels, one number for each of them.

New channels would get noise of their own, which does not cancel as the channels do. Masks that keep
the mean of what they are multiplied by may be drawn for each channel, as dropout does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._ops import OpOverload

from fxgrow.labels.layers import Layer, support
from fxgrow.labels.operators import COPIES, aten, operator_name
from fxgrow.labels.pins import PinKind
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Drawn, Value
from fxgrow.modules.draws import law_of

# Draws for masks that are none before they have been compared or rounded.
_UNIFORM = aten("rand rand_like uniform")
_BERNOULLI = "aten.bernoulli"
_ROUNDING = aten("floor ceil round trunc")
_SUMS = aten("add sub rsub")
_BY_SIZES = aten("randn_like rand_like randint_like")
_SCALED = aten("mul div neg") | COPIES
_BOTH = aten("mul bitwise_and logical_and")
_CHOSEN = aten("where masked_fill")
# What of several draws tells most of what is made of them.
_ORDER: tuple[Drawn, ...] = ("", "truth", "mask", "choice", "uniform", "noise")


def drawn_by(target: OpOverload) -> Drawn:
    """Return what an operation draws, whatever it is given."""
    law, name = law_of(target), operator_name(target)
    if law != "mask":
        return "noise" if law else ""
    return "uniform" if name in _UNIFORM else "truth" if name == _BERNOULLI else ""


def by_given_chance(target: OpOverload) -> bool:
    """Return whether an operation draws truth values by probabilities in a tensor."""
    drawn = operator_name(target) == _BERNOULLI
    return drawn and target._overloadname in ("default", "Tensor", "out")


def drawn_in(step: Step, inputs: Sequence[Value]) -> Drawn:
    """Return what kind of draw the outputs of an operation are.

    Args:
        step: the operation.
        inputs: what it takes.
    """
    if law_of(step.target):
        return _own(step, inputs)
    given = {value.drawn for value in inputs if value.drawn}
    if not given or not (step.traits.is_movement or step.traits.is_pointwise):
        return ""
    labelled = any(value.drawn and value.layers for value in inputs)
    others = [v for v in inputs if v.shape and not (v.drawn or v.is_uniform)]
    if not all(value.is_weight and (labelled or not value.layers) for value in others):
        return ""
    most = max(given, key=_ORDER.index)
    if most == "noise" or step.traits.is_movement:
        return most
    if most == "uniform":
        return _of_uniform(step)
    return "" if others else _of_masks(step, most, inputs)


def _own(step: Step, inputs: Sequence[Value]) -> Drawn:
    """Return what an operation draws by what it is given."""
    drawn = drawn_by(step.target)
    if by_given_chance(step.target):
        return drawn if all(v.drawn or v.is_uniform for v in inputs) else ""
    if step.traits.name == "aten.uniform":
        low, high = step.argument("from", 0.0), step.argument("to", 1.0)
        if low >= 0 and abs(low + high - 2) < 1e-6:  # a factor that keeps the mean, as a mask does
            return "mask"
    return drawn


def _of_uniform(step: Step) -> Drawn:
    """Return what becomes of uniform numbers."""
    floating = all(tensor.is_floating_point() for tensor in step.outputs)
    if not floating or step.traits.name in _ROUNDING:
        return "truth"
    return "uniform" if step.traits.name in _SCALED | _SUMS else "noise"


def _of_masks(step: Step, most: Drawn, inputs: Sequence[Value]) -> Drawn:
    """Return what becomes of truth values and masks."""
    name = step.traits.name
    if not any(tensor.is_floating_point() for tensor in step.outputs) and name not in _SUMS:
        return "truth"
    if name in COPIES:
        return most
    if name in _SCALED:
        return "mask" if most == "truth" else most
    if name == "aten.rsub" and most == "truth" and 1 in _numbers(step, inputs):
        return "truth"
    if name == "aten.sub" and most == "truth" and inputs[0].number == 1:
        return "truth"
    if name in _CHOSEN and most == "truth":
        return "mask" if 0 in _numbers(step, inputs) else "choice"
    return "choice"


def _numbers(step: Step, inputs: Sequence[Value]) -> list[float]:
    """Return the numbers that an operation is given, as far as they are known."""
    own = (*step.args, *step.kwargs.values())
    given = [x for x in own if isinstance(x, (int, float))]
    return [*given, *(value.number for value in inputs if value.number is not None)]


def is_entrywise(step: Step) -> bool:
    """Return whether an operation draws a number for each entry of what it takes."""
    operand, outputs = step.operands[0], step.outputs
    return bool(law_of(step.target)) and all(x.shape == operand.shape for x in outputs)


def is_shared(step: Step, inputs: Sequence[Value]) -> bool:
    """Return whether an operation draws by sizes alone, among which none is a number of channels.

    Such is noise of the shape of one channel, which is then added to all of them.

    Args:
        step: the operation.
        inputs: what it takes.
    """
    layers = [layer for value in inputs for layer in value.layers]
    return step.traits.name in _BY_SIZES and not any(support(layer) for layer in layers)


def is_masked(step: Step, inputs: Sequence[Value]) -> bool:
    """Return whether an operation gives data that a mask was multiplied by.

    Args:
        step: the operation.
        inputs: what it takes.
    """
    data = [value for value in inputs if not (value.drawn or value.is_uniform) and value.shape]
    if any(value.drawn in ("truth", "mask") for value in inputs):
        return step.traits.name in _BOTH and len(data) == 1
    scaled = step.traits.is_movement or step.traits.name in _SCALED
    return len(data) == 1 and data[0].is_masked and scaled


def pin_drawn(step: Step, inputs: Sequence[Value]) -> None:
    """Pin the channels for each of which an operation draws noise, or makes it of what was drawn.

    Args:
        step: the operation.
        inputs: what it takes.
    """
    if law_of(step.target) == "noise":
        chosen = list(inputs)
    elif by_given_chance(step.target):
        chosen = [value for value in inputs if not (value.drawn or value.is_uniform)]
    elif any(v.drawn == "uniform" for v in inputs) and drawn_in(step, inputs) == "noise":
        chosen = [value for value in inputs if value.drawn]
    else:
        return
    for value in chosen:
        step.pin(value.layers, PinKind.NOISE)


def meets(step: Step, place: int, values: Sequence[Value], layers: Sequence[Layer | None]) -> bool:
    """Return whether an operand of a pointwise operation is noise that joins channels.

    Args:
        step: the operation.
        place: of the operand.
        values: all operands that have dims.
        layers: what each has of the labels of these channels.
    """
    value = values[place]
    if value.drawn == "noise":  # labelled draws are pinned where they are made
        return layers[place] is None and any(not v.drawn for v in values)
    data = [
        v
        for v, own in zip(values, layers, strict=True)
        if own is not None and not (v.drawn or v.is_uniform)
    ]
    if not value.drawn or not data:
        return False
    name = step.traits.name
    if value.drawn != "uniform" and name in _SUMS and any(v.is_masked for v in data):
        return False  # what stands in the place of masked entries, as in alpha dropout
    if value.drawn not in ("truth", "mask") or len(data) > 1:
        return True
    return not (name in _BOTH or (name in _CHOSEN and value.dtype == torch.bool))


def is_on_weights(inputs: Sequence[Value]) -> bool:
    """Return whether what is made of some values is a weight with noise in it."""
    return any(v.is_weight for v in inputs) and all(
        v.is_weight or v.drawn == "noise" for v in inputs
    )


def pin_met(step: Step, merged: Layer, value: Value) -> set[int]:
    """Pin the channels of a layer that noise joins, if it has a number for each.

    Returns:
        The dims of the layer in which the noise has entries.
    """
    offset = merged.ndim - len(value.shape)
    dims = {d for d in support(merged) if d >= offset and value.shape[d - offset] > 1}
    if dims:
        step.pin((merged,), PinKind.NOISE)
    return dims
