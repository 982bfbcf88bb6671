"""Gain propagation: the scalar by which each activation of the grown network differs.

A factor on a layer's weights is not the end, nor is a statistic over more channels than before.
It travels on as a *gain*: products multiply gains, positively homogeneous operations pass them on,
a norm absorbs them, and wherever none of this holds (two unequal gains at an addition, a gain that
reaches a sigmoid, or the output) the function changes. Such a place is a
:class:`~fxgrow.labels.gains.Mismatch`: the grown network computes there what the old one would
compute with a multiplier on that edge, which is the prediction that verification holds it to, and
what ``compensate`` undoes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType

from fxgrow.channels.tied import Silenced
from fxgrow.labels.gains import GainFlow, Mismatch
from fxgrow.labels.interpreter import interpret
from fxgrow.labels.tape import Tape


def propagate_gains(
    tape: Tape,
    factors: Mapping[str, float],
    with_eps: Mapping[str, Mapping[str, float]],
    statistics: Mapping[int, float],
    undone: Set[str],
    *,
    owed: Mapping[str, float] = MappingProxyType({}),
    passed: Set[str] = frozenset(),
    numbers: Mapping[int, float] = MappingProxyType({}),
) -> GainFlow:
    """Carry the factors of the weights through a run; see :class:`GainFlow` for the arguments.

    Factors and statistics equal to 1 have no effect.
    """
    acting = {name: factor for name, factor in factors.items() if factor != 1.0}
    cancelled = any(factors.get(name) == 1.0 for name in undone)
    if statistics and cancelled:  # where a number's factor and η cancel, readers still take η
        undone = undone | {tape.operations[index].module for index in numbers}
    flow = GainFlow(acting, with_eps, statistics, undone, owed, passed, numbers)
    if not (acting or statistics or owed or numbers):
        return flow
    interpret(tape.read, flow)
    for value in tape.outputs:
        gain = flow.of(value)
        if gain.scale != 1.0 and value.producer is not None:
            reason = f"the output of the network is scaled by {gain.scale:.6g}"
            flow.mismatches.append(
                Mismatch(value.producer, -1, gain.scale, "scaled", reason, gain.sources)
            )
    return flow


def owed_for(
    silenced: Iterable[Silenced], factors: Mapping[str, float], owed: Mapping[str, float]
) -> dict[str, float]:
    """Return the factors of norms' weights, so that tables with a factor read what they did.

    Args:
        silenced: the tables that write and read, and the norms between.
        factors: by weight.
        owed: what such weights take besides.
    """
    found = dict(owed)
    for each in silenced:
        factor = factors.get(each.tensor, 1.0)
        for weight in each.weights:
            if factor != 1.0:
                found[weight] = found.get(weight, 1.0) / factor
    return found
