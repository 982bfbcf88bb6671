"""Who takes the η of padding channels: the deviation that a norm divides by becomes η of it.

Either every writer of the group is multiplied by 1/η, and eps stays what it was, so that the
weights fit a network of the stock architecture; or eps becomes η²·eps. In both cases the norm's
weight is multiplied by η, or that of the norm's readers where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fxgrow.channels.tied import Silenced
from fxgrow.grow.norms.gains import owed_for, propagate_gains
from fxgrow.grow.norms.padding import Padding
from fxgrow.labels.gains import GainFlow
from fxgrow.labels.tape import Tape


@dataclass(frozen=True)
class Eta:
    """What goes into the propagation of gains on account of padding channels.

    Attributes:
        factors: factor by weight name: 1/η for writers, unless eps takes it.
        statistics: η² by operation.
        undone: sources of gains that the next weight takes up.
        owed: factor by name of the weights of norms before tables that are writers, too.
    """

    factors: dict[str, float] = field(default_factory=dict)
    statistics: dict[int, float] = field(default_factory=dict)
    undone: frozenset[str] = frozenset()
    owed: dict[str, float] = field(default_factory=dict)


def eta_of(
    tape: Tape,
    padding: Mapping[str, Padding],
    *,
    scale_writers: bool,
    silenced: Collection[Silenced] = (),
) -> Eta:
    """Return what padding channels bring about.

    Args:
        tape: a run of the network at its old sizes.
        padding: by group name.
        scale_writers: multiply the groups' writers by 1/η.
        silenced: the tables that are readers, too, and the norms before these.
    """
    scaled = {
        writer: 1.0 / math.sqrt(found.ratio)
        for found in padding.values()
        for writer in found.writers
        if scale_writers
    }
    statistics = {index: found.ratio for found in padding.values() for index in found.statistics}
    layers = {tape.operations[index].module for index in statistics}
    undone = frozenset(layers | scaled.keys())
    return Eta(scaled, statistics, undone, owed_for(silenced, scaled, {}))


def settle(
    tape: Tape,
    padding: Mapping[str, Padding],
    with_eps: Mapping[str, Mapping[str, float]],
    *,
    scale_writers: bool,
    silenced: Collection[Silenced] = (),
) -> tuple[Eta, dict[str, str]]:
    """Return how η is taken up, and for each group whose η cannot be, the reason.

    Args:
        tape: a run of the network at its old sizes.
        padding: by group name.
        with_eps: for each layer the attributes that may be its eps.
        scale_writers: whether writers may be multiplied by 1/η: they are if that is exact.
        silenced: the tables that are readers, too, and the norms before these.
    """

    def flow(eta: Eta) -> GainFlow:
        return propagate_gains(
            tape, eta.factors, with_eps, eta.statistics, eta.undone, owed=eta.owed
        )

    if not padding:
        return Eta(), {}
    if scale_writers and all(found.sole for found in padding.values()):
        eta = eta_of(tape, padding, scale_writers=True, silenced=silenced)
        result = flow(eta)
        if not result.mismatches and not result.absorbed:
            return eta, {}
    eta = eta_of(tape, padding, scale_writers=False)
    unsettled = flow(eta).mismatches
    if not unsettled:
        return eta, {}
    problems = {}
    sources = frozenset[str]().union(*(mismatch.sources for mismatch in unsettled))
    for name, found in padding.items():
        alone = eta_of(tape, {name: found}, scale_writers=False)
        mismatches = flow(alone).mismatches if alone.undone & sources else ()
        if mismatches:
            problems[name] = _untaken(mismatches[0].reason)
    together = _untaken(unsettled[0].reason)
    return eta, problems or dict.fromkeys(padding, together)


def _untaken(reason: str) -> str:
    return (
        "channels beyond whole copies change the standard deviation in a norm over them, which "
        f"nothing makes up for: {reason}; possible: a whole multiple of the width"
    )
