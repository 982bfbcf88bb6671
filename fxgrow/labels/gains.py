"""Gains: the scalar by which each activation of a grown network differs, and who takes it up.

A factor on a layer's weights travels on: a product multiplies gains, what is homogeneous passes
them on to some power, a norm absorbs them, and where gains differ that must agree, or one reaches
what is not homogeneous, the function changes. :class:`GainFlow` is the state that the rules of the
operations read and write; an operation without a rule is asked (:mod:`fxgrow.labels.ask`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fxgrow.labels import ask
from fxgrow.labels.operators import traits_of
from fxgrow.labels.tape import Operation, Value

_ROUNDED = 2.0**-23  # relative, of a number in float32

Verdict = Literal["exact", "scaled", "no"]


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
        owed: for the weights of norms, what they take on account of what comes behind.
        passed: those of these that do so for what is far behind: weights without a factor of their
            own let it pass.
        numbers: for operations (tape indices), by what they multiply more than they did.
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
    owed: Mapping[str, float] = field(default_factory=dict)
    passed: Set[str] = frozenset()
    numbers: Mapping[int, float] = field(default_factory=dict)
    vectors: dict[str, float] = field(default_factory=dict)
    absorbed: dict[str, Absorbed] = field(default_factory=dict)
    norms: dict[str, Gain] = field(default_factory=dict)
    mismatches: list[Mismatch] = field(default_factory=list)
    part: ClassVar[Literal["gain"]] = "gain"
    is_over: ClassVar[bool] = False
    _gains: dict[int, Gain] = field(default_factory=dict)
    _bound: set[str] = field(default_factory=set)  # parameters that keep their values
    _whose: dict[str, frozenset[str]] = field(default_factory=dict)  # sources of the vectors' gains

    def concerns(self, op: Operation) -> bool:
        """Return whether an operation changes a gain, or gets one: all may, until asked."""
        return True

    def generic(self, op: Operation) -> Gain | tuple[Gain, ...]:
        """Return the gains after an operation without a rule, which is asked for powers."""
        traits = traits_of(op.target)
        if traits.is_uniform or traits.is_likeness:
            return Gain()
        if traits.is_movement and not op.is_rounded:
            return agree(self, op)
        if not all(out.is_weight and not out.is_curved for out in op.outputs):
            for value in op.inputs:
                self._bind(op, value)
        scaled = [v for v in dict.fromkeys(op.inputs) if self.of(v).scale != 1.0]
        return self._powers(op, scaled) if scaled else Gain()

    def _bind(self, op: Operation, value: Value) -> None:
        """Know that a parameter keeps its values, for an operation that takes them as they are."""
        if not value.is_weight:
            return
        self._bound.update(value.origins)
        taken = self.taken_by(value)
        if taken.scale != 1.0 and value.parameter not in self.factors:
            why = f"{value.parameter or op.place} takes a gain elsewhere, and is used here as well"
            self.part_ways(op, value, taken, "no", why)

    def _powers(self, op: Operation, scaled: list[Value]) -> Gain | tuple[Gain, ...]:
        """Return the gain of each output of an operation that is homogeneous in what is scaled.

        In each operand by itself, or in all of its data together, if they are scaled alike.
        """
        found: list[Gain] = []
        each = [ask.degrees(op, [value]) for value in scaled]
        if any(None in powers for powers in each):
            first = self.of(scaled[0])
            alike = all(same(self.of(value).scale, first.scale) for value in scaled)
            each = [ask.degrees(op, scaled)] if alike else []
        for place, _ in enumerate(op.outputs):
            total = Gain()
            for value, powers in zip(scaled, each, strict=False):
                power = powers[place] if place < len(powers) else None
                if power is None:
                    return not_homogeneous(self, op)
                gain = self.of(value)
                total = total.times(Gain(gain.scale**power, gain.sources))
            found.append(total)
        return tuple(found) if each else not_homogeneous(self, op)

    def record(self, op: Operation, fact: Gain | tuple[Gain, ...]) -> None:
        """Record the gains of an operation's outputs; a single one is that of the first."""
        if isinstance(fact, Gain):
            fact = (fact,) * (len(op.outputs) if traits_of(op.target).is_movement else 1)
        if op.index in self.numbers:
            number = Gain(self.numbers[op.index], frozenset({op.module}))
            fact = tuple(gain.times(number) for gain in fact)
        for value, gain in zip(op.outputs, fact, strict=False):
            self.set(value, gain)

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
        keeps = (self.factors.keys() | self._bound) & {*vector.origins}
        if keeps or not all(same(x, gain.scale) for x in taken):
            return False
        self.vectors |= dict.fromkeys(vector.origins, gain.scale)
        for name in vector.origins:
            self._whose.setdefault(name, gain.sources)
        return True

    def undo(self, weight: object, gain: Gain) -> Gain:
        """Let a weight take the inverse of a gain that should go no further; return what goes on.

        A weight that is used twice has taken one and the same factor in both places. What a norm's
        weight took is for those behind it that have a factor; all others take it up.
        """
        if not (isinstance(weight, Value) and len(weight.origins) == 1):
            return gain
        undone = gain.sources & self.undone
        if weight.origins[0] not in self.factors:
            undone |= gain.sources & (self.owed.keys() - self.passed)
        wanted = gain.scale != 1.0 and undone
        taken = self.vectors.setdefault(weight.origins[0], 1.0 / gain.scale if wanted else 1.0)
        return gain.times(Gain(taken, frozenset(weight.origins)))

    def paid(self, weight: object) -> Gain:
        """Return what a norm's weight takes for what comes behind it."""
        if not (isinstance(weight, Value) and len(weight.origins) == 1):
            return Gain()
        return Gain(self.owed.get(weight.origins[0], 1.0), frozenset(weight.origins))

    def taken_by(self, vector: object) -> Gain:
        """Return the gain that a parameter has taken already; that of one if it is none."""
        if not (isinstance(vector, Value) and len(vector.origins) == 1):
            return Gain()
        name = vector.origins[0]
        if name in self.factors:
            return self.of(vector)
        return Gain(self.vectors.get(name, 1.0), self._whose.get(name, frozenset()))

    def taken_before(self, layer: str, gain: Gain) -> Gain | None:
        """Return what a norm took up where it was used before, or None at its first use.

        It took up nothing if the first gain was one, or if it has nothing to absorb a gain with.
        """
        first = self.norms.get(layer)
        if first is None:
            self.norms[layer] = gain
            return None
        absorbed = self.absorbed.get(layer)
        return Gain(1.0 if absorbed is None else absorbed.gain, first.sources)

    def eps_of(self, layer: str, eps: float) -> tuple[str, float] | None:
        """Return the attribute of a layer that holds its eps, and its value; None if none does.

        Args:
            layer: its name.
            eps: as it is computed with, which may be rounded to float32.
        """
        held = self.with_eps.get(layer, {}).items()
        return next((one for one in held if math.isclose(one[1], eps, rel_tol=_ROUNDED)), None)

    def part_ways(
        self, op: Operation, value: Value, gain: Gain, verdict: Verdict, why: str
    ) -> None:
        """Record a mismatch on the edge from ``value`` to ``op``."""
        producer = -1 if value.producer is None else value.producer
        self.mismatches.append(Mismatch(producer, op.index, gain.scale, verdict, why, gain.sources))


def same(first: float, second: float) -> bool:
    """Return whether two scales are equal but for rounding."""
    return math.isclose(first, second, rel_tol=1e-12)


def not_homogeneous(flow: GainFlow, op: Operation) -> Gain:
    """Return what comes out of an operation for which any gain that comes in is a mismatch."""
    for value in op.inputs:
        gain = flow.of(value)
        if gain.scale != 1.0:
            where = f" at {op.module}" if op.module else ""
            why = f"a gain of {gain.scale:.6g} reaches {op.name}{where}, which is not homogeneous"
            flow.part_ways(op, value, gain, "no", why)
    return Gain()


def agree(flow: GainFlow, op: Operation, *, constant: str = "") -> Gain:
    """Return the gain of what is joined: all must agree, parameters follow, others part.

    Args:
        flow: the state.
        op: the operation.
        constant: what is added besides, if it is a number that nothing can make follow.
    """
    joins = constant or "another path"
    data = [value for value in op.inputs if not value.is_weight]
    if not data:
        return flow.of(op.inputs[0]) if op.inputs else Gain()
    gains = [flow.of(value) for value in data]
    unscaled = any(gain.scale == 1.0 for gain in gains)
    common = Gain() if constant or unscaled else gains[0]
    taken = _taken_by_weights(flow, op, common)
    if not same(taken.scale, common.scale):
        common, joins = taken, "a constant or shared parameter"
    where = f" at {op.module}" if op.module else ""
    for value, gain in zip(data, gains, strict=True):
        if not same(gain.scale, common.scale):
            why = f"scaled by {gain.scale:.6g} where it joins {joins} ({op.name}{where})"
            ratio = Gain(gain.scale / common.scale, gain.sources | common.sources)
            flow.part_ways(op, value, ratio, "no" if constant else "scaled", why)
    return common


def _taken_by_weights(flow: GainFlow, op: Operation, common: Gain) -> Gain:
    """Return the gain that parameters take which are joined: another one where they have it."""
    for value in (value for value in op.inputs if value.is_weight):
        taken = common if flow.follow(value, common) else flow.taken_by(value)
        if not same(taken.scale, common.scale):  # where it is used as well
            common = Gain(taken.scale, common.sources | taken.sources)
    return common
