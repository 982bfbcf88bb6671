"""Products with a matrix for each group of rows: a mixture of experts in one operation."""

from __future__ import annotations

from functools import partial

from fxgrow.labels.layers import Layers, support
from fxgrow.labels.padding import layer_padding
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.arithmetic import product_gain
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step


@rule(
    "aten._grouped_mm",
    "transformers.grouped_mm_fallback",
    gain=partial(product_gain, reads=True),
    padding=layer_padding,
)
def grouped_product(step: Step) -> tuple[Layers, ...]:
    """``(N, K) @ (E, K, M)``: rows up to an offset by one matrix, those up to the next by another.

    All matrices read and write the same channels.
    """
    x, weight, *others = step.operands
    if x.ndim != 2 or weight.ndim != 3:
        return step.give_up(PinKind.NO_RULE, str(step.target))
    for tensor in others:  # offsets, and what is added
        step.pin(step.layers(tensor), PinKind.FIXED, step.met_by("combined with"))
    rows = tuple(layer for layer in step.layers(x) if 0 in support(layer))
    step.pin(rows, PinKind.POSITIONS, "a product for each group")
    step.contract(step.line(x, 1), weight, 1)
    return (step.write(weight, 2, 1),)
