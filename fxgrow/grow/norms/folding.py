"""Weights that undo what rescaling does to the function, so that no multiplier need be inserted.

A multiplier on an edge can go into what writes the value there: the weight of a norm, a layer
scale, or a layer whose weights are not among those that are rescaled. Behind the rescaled layers,
which keep their weights, it goes to what comes before them, if what lies between lets it pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from fxgrow.grow.norms.payers import Payers, Payment
from fxgrow.labels.gains import GainFlow, Mismatch
from fxgrow.labels.tape import Tape
from fxgrow.modules.tensors import layer_of

_MOST = 8  # ways that are tried for one edge
Edges: TypeAlias = frozenset[tuple[int, int]]


@dataclass(frozen=True)
class Fold:
    """A factor that was taken up.

    Attributes:
        sources: the weights that made the gain.
        taken: factor by name of the weights that take it.
    """

    sources: frozenset[str]
    taken: dict[str, float]

    def __str__(self) -> str:
        taken = {layer_of(name): factor for name, factor in self.taken.items()}
        told = ", ".join(f"{layer} (× {factor:.6g})" for layer, factor in taken.items())
        return f"compensated by the weight{'s' if len(taken) > 1 else ''} of {told}"


def folded(
    tape: Tape,
    kept: Collection[str],
    first: GainFlow,
    flow_with: Callable[[Payment], GainFlow],
) -> tuple[GainFlow, Payment, tuple[Fold, ...]]:
    """Return the gains after weights took up what they can, these weights, and what they undo.

    Args:
        tape: the operations.
        kept: weights that take nothing.
        first: the gains when nothing is taken up.
        flow_with: returns the gains when something is.
    """
    payers = Payers(tape, kept=kept)
    flow, paid, folds = first, Payment(), list[Fold]()
    for mismatch in first.mismatches:
        if mismatch.producer < 0 or _edge(mismatch) not in _edges(flow):
            continue
        gain = next(m.gain for m in flow.mismatches if _edge(m) == _edge(mismatch))
        op = tape.operations[mismatch.producer]
        for way in islice(payers.directly(op, 1.0 / gain), _MOST):
            together = paid.times(way)
            after = flow_with(together)
            if _edges(after) < _edges(flow):
                flow, paid = after, together
                folds.append(Fold(mismatch.sources, way.factors | way.owed))
                break
    return flow, paid, tuple(folds)


def _edge(mismatch: Mismatch) -> tuple[int, int]:
    return mismatch.producer, mismatch.consumer


def _edges(flow: GainFlow) -> Edges:
    return frozenset(map(_edge, flow.mismatches))
