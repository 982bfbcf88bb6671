"""Noise on its way through a network: where it meets channels, one number for each of them.

New channels would get noise of their own, which does not cancel as the channels do. Masks that keep
the mean of what they are multiplied by may be drawn for each channel, as dropout does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch._ops import OpOverload

from fxgrow.labels.layers import Layer, support
from fxgrow.labels.operators import operator_name
from fxgrow.labels.pins import PinKind
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Drawn, Value
from fxgrow.modules.draws import law_of

# Draws for masks that are none before they have been compared or rounded.
_UNIFORM = frozenset(("aten.rand", "aten.rand_like", "aten.uniform"))
_ROUNDING = frozenset(("aten.floor", "aten.ceil", "aten.round", "aten.trunc", "aten.sign"))
_SUMS = frozenset(("aten.add", "aten.sub", "aten.rsub"))


def drawn_by(target: OpOverload) -> Drawn:
    """Return what an operation draws, whatever it is given."""
    law, name = law_of(target), operator_name(target)
    if law != "mask":
        return law
    return "uniform" if name in _UNIFORM else "mask" if name == "aten.bernoulli" else ""


def drawn_in(step: Step, inputs: Sequence[Value]) -> Drawn:
    """Return what kind of draw the outputs of an operation are.

    Args:
        step: the operation.
        inputs: what it takes.
    """
    if law_of(step.target):
        own = drawn_by(step.target)
        return own if own != "mask" or all(v.drawn or v.is_uniform for v in inputs) else ""
    given = {value.drawn for value in inputs if value.drawn}
    if not given or not (step.traits.is_movement or step.traits.is_pointwise):
        return ""
    labelled = any(value.drawn and value.layers for value in inputs)
    others = [v for v in inputs if v.shape and not (v.drawn or v.is_uniform)]
    if not all(value.is_weight and (labelled or not value.layers) for value in others):
        return ""
    if "noise" in given:
        return "noise"
    floating = all(tensor.is_floating_point() for tensor in step.outputs)
    if "uniform" in given and floating and step.traits.name not in _ROUNDING:
        return "uniform"
    return "" if others else "mask"


def is_entrywise(step: Step) -> bool:
    """Return whether an operation draws a number for each entry of what it takes."""
    operand, outputs = step.operands[0], step.outputs
    return bool(law_of(step.target)) and all(x.shape == operand.shape for x in outputs)


def pin_drawn(step: Step) -> None:
    """Pin the channels for each of which an operation draws noise."""
    if law_of(step.target) == "noise":
        for tensor in step.operands:
            step.pin(step.layers(tensor), PinKind.NOISE)


def meets(step: Step, value: Value, own: Layer | None) -> bool:
    """Return whether an operand of a pointwise operation is noise that joins channels.

    Args:
        step: the operation.
        value: the operand.
        own: what it has of the labels of these channels; draws like them are pinned as such.
    """
    if value.drawn == "uniform":  # what is multiplied by it keeps its mean, up to a factor
        return step.traits.name in _SUMS
    return value.drawn == "noise" and own is None


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
