"""One record for each operation: all that is known of it and cannot be asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from fxgrow.labels.gains import Gain, GainFlow
from fxgrow.labels.layers import Layers
from fxgrow.labels.padding import Held, PaddingFlow
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation
from fxgrow.registry import Registry

LabelRule: TypeAlias = Callable[[Step], tuple[Layers, ...]]
GainRule: TypeAlias = Callable[[GainFlow, Operation], Gain | tuple[Gain, ...]]
PaddingRule: TypeAlias = Callable[[PaddingFlow, Operation], Held]


@dataclass(frozen=True)
class OpRule:
    """What an operation does, where running it on numbers cannot tell; None is for what can.

    Attributes:
        labels: from the labels of the operands to those of each output. Without it, data movement
            is applied to the labels themselves, pointwise operations unify what meets, and any
            other operation pins what it touches.
        gain: from the gains of the operands to those of the outputs, or to that of the first.
            Without it, the operation is asked whether it is homogeneous, and to which power.
        padding: what new channels hold after it that held zeros, or the mean of the old ones.
            Without it, the operation is asked whether it keeps that.
    """

    labels: LabelRule | None = None
    gain: GainRule | None = None
    padding: PaddingRule | None = None


RULES: Registry[OpRule] = Registry("operation rule")


def rule(
    *operators: str, gain: GainRule | None = None, padding: PaddingRule | None = None
) -> Callable[[LabelRule], LabelRule]:
    """Return a decorator that registers what a function says of the labels of some operators.

    Args:
        operators: by namespace and name without overload: ``"aten.addmm"``.
        gain: as in :class:`OpRule`.
        padding: as in :class:`OpRule`.

    Raises:
        ValueError: one of them has a rule already.
    """

    def register(labels: LabelRule) -> LabelRule:
        RULES.register(*operators)(OpRule(labels, gain, padding))
        return labels

    return register
