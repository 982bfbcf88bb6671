"""Weights that are computed of several parameters, entry by entry: a sum, a mask, noise times σ.

New columns cancel in such a weight if they do so in what it is linear in, along that axis, and are
copies in all else: in ``mu + sigma * eps`` those of ``mu`` and ``sigma`` cancel, and twins have one
``eps``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fxgrow.labels import ask
from fxgrow.labels.layers import Layer, core, support
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Value

_MOST = 4  # operands of a pointwise operation that are tried together


def linear_first(
    step: Step, values: Sequence[Value], cluster: Sequence[Layer | None]
) -> list[Layer]:
    """Return the layers that operands have along an axis of a weight, those it is linear in first.

    What they are to each other is recorded, for the roles of their axes; if the operation is linear
    in none of them, so is that.

    Args:
        step: a pointwise operation on weights alone.
        values: its operands that have dims.
        cluster: for each, its layer along the axis, None where it has none.
    """
    pairs = [(v, layer) for v, layer in zip(values, cluster, strict=True) if layer is not None]
    linear = _linear_in(step, [value for value, _ in pairs])
    if not linear:
        step.is_curved = True
    signed = [layer for value, layer in pairs if value in linear]
    others = [layer for value, layer in pairs if value not in linear]
    first = (signed or others)[0]
    for place, layer in enumerate((signed + others)[1:], 1):
        dims = support(first) | support(layer)
        step.space.compose(core(first, dims), core(layer, dims), alike=place < len(signed))
    return signed + others


def _linear_in(step: Step, values: Sequence[Value]) -> Sequence[Value]:
    """Return as many operands as the operation is linear in together, parameters sooner.

    Nothing that these are made of may be in any other operand too.
    """
    trained = step.space.trained
    distinct = [v for v in dict.fromkeys(values) if v.dtype.is_floating_point or v.dtype.is_complex]
    distinct.sort(key=lambda value: trained.isdisjoint(value.origins))
    if len(distinct) > _MOST:
        return ()
    for size in range(len(distinct), 0, -1):
        for some in itertools.combinations(distinct, size):
            own = {name for value in some for name in value.origins}
            rest = [value for value in map(step.value, step.operands) if value not in some]
            apart = all(own.isdisjoint(value.origins) for value in rest)
            if apart and ask.is_linear(step.call, some):
                return some
    return ()
