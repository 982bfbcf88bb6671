"""The state of a gain propagation: what each activation is scaled by, and who takes it up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from fxgrow.labels.tape import Operation, Value
from fxgrow.plan.step import Verdict


@dataclass(frozen=True)
class Gain:
    """A scalar and the weights whose factors made it."""

    scale: float = 1.0
    sources: frozenset[str] = frozenset()

    def times(self, other: Gain) -> Gain:
        """Return the product; factors that cancel leave no trace."""
        scale = self.scale * other.scale
        return Gain() if same(scale, 1.0) else Gain(scale, self.sources | other.sources)


@dataclass(frozen=True)
class Mismatch:
    """An edge on which the grown network's function parts from the old one's.

    Attributes:
        producer, consumer: operations (tape indices) at the ends; -1 is the network's output.
        gain: the value on this edge relative to the old network's.
        verdict: ``scaled``, or ``no`` where what follows is not homogeneous.
        reason: in words.
        sources: the weights whose factors made the gain.
    """

    producer: int
    consumer: int
    gain: float
    verdict: Verdict
    reason: str
    sources: frozenset[str]


@dataclass(frozen=True)
class Absorbed:
    """A norm that takes up a gain s: in its running statistics, or by eps' = s²·eps.

    Attributes:
        layer: its name.
        gain, sources: what it takes up.
        eps: its eps.
        weight, running_mean, running_var: names of its tensors; "" for a norm that keeps no
            statistics and changes its eps instead.
        attribute: that holds its eps.
    """

    layer: str
    gain: float
    eps: float
    sources: frozenset[str]
    weight: str = ""
    running_mean: str = ""
    running_var: str = ""
    attribute: str = "eps"


@dataclass
class GainFlow:
    """The state of one propagation, and its result.

    Attributes:
        factors: factor by weight name.
        with_eps: for each layer with a constant for its eps, the attribute and its value.
        statistics: for operations (tape indices) that average squares over channels, by what the
            result differs because there are more of these.
        undone: sources of gains (weights, layers) that the next weight takes up, so that they go
            no further.
        vectors: scale that each bias-like parameter takes so as to keep in step.
        absorbed: norms that take up a gain, by layer.
        norms: the gain of each norm's first input, by layer.
        mismatches: where the function changes, in order.
    """

    factors: Mapping[str, float]
    with_eps: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    statistics: Mapping[int, float] = field(default_factory=dict)
    undone: Set[str] = frozenset()
    vectors: dict[str, float] = field(default_factory=dict)
    absorbed: dict[str, Absorbed] = field(default_factory=dict)
    norms: dict[str, Gain] = field(default_factory=dict)
    mismatches: list[Mismatch] = field(default_factory=list)
    _gains: dict[int, Gain] = field(default_factory=dict)
    _whose: dict[str, frozenset[str]] = field(default_factory=dict)  # sources of the vectors' gains

    def of(self, value: Value) -> Gain:
        """Return the gain of a value."""
        if value.parameter in self.factors:
            return Gain(self.factors[value.parameter], frozenset({value.parameter}))
        return self._gains.get(value.index, Gain())

    def set(self, value: Value, gain: Gain) -> None:
        """Record the gain of an output."""
        if gain.scale != 1.0:
            self._gains[value.index] = gain

    def follow(self, vector: object, gain: Gain) -> bool:
        """Let a parameter take a gain, and return whether it could.

        It can if it is a parameter with no factor of its own that has taken no other gain, or is
        made of such by what is linear (a concatenation).
        """
        if not isinstance(vector, Value) or not vector.origins or vector.is_curved:
            return False
        if len(vector.origins) == 1 and vector.origins[0] in self.factors:
            return same(self.of(vector).scale, gain.scale)
        taken = [self.vectors.get(name, gain.scale) for name in vector.origins]
        if self.factors.keys() & vector.origins or not all(same(x, gain.scale) for x in taken):
            return False
        self.vectors |= dict.fromkeys(vector.origins, gain.scale)
        for name in vector.origins:
            self._whose.setdefault(name, gain.sources)
        return True

    def undo(self, weight: object, gain: Gain) -> Gain:
        """Let a weight take the inverse of a gain that should go no further; return what goes on.

        A weight that is used twice has taken one and the same factor in both places.
        """
        if not (isinstance(weight, Value) and len(weight.origins) == 1):
            return gain
        wanted = gain.scale != 1.0 and gain.sources & self.undone
        taken = self.vectors.setdefault(weight.origins[0], 1.0 / gain.scale if wanted else 1.0)
        return gain.times(Gain(taken, frozenset(weight.origins)))

    def taken_by(self, vector: object) -> Gain:
        """Return the gain that a parameter has taken already; that of one if it is none."""
        if not (isinstance(vector, Value) and len(vector.origins) == 1):
            return Gain()
        name = vector.origins[0]
        if name in self.factors:
            return self.of(vector)
        return Gain(self.vectors.get(name, 1.0), self._whose.get(name, frozenset()))

    def part(self, op: Operation, value: Value, gain: Gain, verdict: Verdict, why: str) -> None:
        """Record a mismatch on the edge from ``value`` to ``op``."""
        producer = -1 if value.producer is None else value.producer
        self.mismatches.append(Mismatch(producer, op.index, gain.scale, verdict, why, gain.sources))


def same(first: float, second: float) -> bool:
    """Return whether two scales are equal but for rounding."""
    return math.isclose(first, second, rel_tol=1e-12)
