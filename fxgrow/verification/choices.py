"""Choices between numbers: the same in two networks, where rounding alone would make them differ.

Which of two scores is the larger, which boxes overlap, which integer a number is nearest to: there
rounding decides between near ties, and what follows is something else altogether. What one network
chose is therefore noted with the numbers that it chose by, and another one chooses the same where
its own numbers are these but for rounding. Where they are not, it chooses by itself, and is judged
by what comes of that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor
from torch._ops import OpOverload

from fxgrow.modules import in_double
from fxgrow.modules.calling import map_tensors, tensors_in
from fxgrow.modules.dispatch import DispatchMode
from fxgrow.verification.findings import gap_between, scale_of

Key: TypeAlias = tuple[str, tuple[tuple[int, ...], ...]]
_MOST = 1 << 22  # entries that a choice is noted of, and …
_MOST_IN_ALL = 1 << 26  # … those of a run
# What rounds numbers to numbers.
_ROUNDING = frozenset((
    "floor", "ceil", "round", "trunc", "sign", "frac", "fmod", "remainder", "floor_divide",
))  # fmt: skip
# Integers and truth values that tell nothing of numbers, or that only some layers look at.
_NONE = frozenset((
    "empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones",
    "new_full", "view", "isnan", "isinf", "isfinite", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "fractional_max_pool2d", "fractional_max_pool3d", "_embedding_bag",
    "_embedding_bag_forward_only",
))  # fmt: skip


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        key: the operation and the shapes of the numbers that it chose by.
        numbers: these.
        result: what it returned.
    """

    key: Key
    numbers: tuple[Tensor, ...]
    result: Any


class Choosing(DispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that notes choices, and makes those of another run where they agree.

    Args:
        others: the choices of the other run.
        tolerance: how far, of the largest number, the numbers that are chosen by may be apart.

    Attributes:
        made: the choices of this run, in order.
        parted: how many of them would have been others by rounding alone, by operation.
    """

    def __init__(self, others: Sequence[Choice] = (), tolerance: float = 0.0) -> None:
        super().__init__()
        self.made: list[Choice] = []
        self.parted: Counter[str] = Counter()
        self._others, self._tolerance = others, tolerance
        self._next = 0
        self._entries = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, and choose as the other run did."""
        kwargs = kwargs or {}
        name = func._opname.rstrip("_")
        given = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        entries = sum([tensor.numel() for tensor in given])
        if not given or name in _NONE or entries > _MOST:
            return in_double.run(func, args, kwargs)
        rounds = name in _ROUNDING or bool(kwargs.get("rounding_mode"))
        if rounds:  # it may write over what it rounds
            given = [tensor.clone() for tensor in given]
        result = in_double.run(func, args, kwargs)
        if not rounds and not _is_chosen(result):
            return result
        if self._entries + entries > _MOST_IN_ALL:
            return result
        self._entries += entries
        shapes = tuple(tuple(tensor.shape) for tensor in given)
        own = Choice((func._name, shapes), tuple(tensor.clone() for tensor in given), result)
        result = self._as_other(own, name, rounds=rounds)
        kept = map_tensors(Tensor.clone, result)
        self.made.append(own._replace(result=kept))
        return result

    def _as_other(self, own: Choice, name: str, *, rounds: bool) -> Any:
        """Return what the other run chose, if it differs by rounding alone; else the own choice."""
        places = range(self._next, len(self._others))
        found = next((i for i in places if self._others[i].key == own.key), None)
        if found is None:
            return own.result
        self._next = found + 1
        other = self._others[found]
        if _same(own.result, other.result, rounds=rounds):
            return own.result
        pairs = zip(own.numbers, other.numbers, strict=True)
        if not all(_near(mine, theirs, self._tolerance) for mine, theirs in pairs):
            return own.result
        if not isinstance(own.result, float):  # one that is read out always differs by rounding
            self.parted[name] += 1
        return _taken(own.result, other.result, rounds=rounds)


def _is_chosen(result: object) -> bool:
    """Return whether there are integers, truth values or plain numbers among what was returned."""
    if isinstance(result, (bool, int, float)):
        return True
    return any(not (t.is_floating_point() or t.is_complex()) for t in tensors_in(result))


def _same(own: Any, other: Any, *, rounds: bool) -> bool:
    """Return whether two runs chose the same."""
    if isinstance(own, (bool, int, float)):
        return bool(own == other)
    return all(
        mine.shape == theirs.shape
        and ((mine.is_floating_point() and not rounds) or bool((mine == theirs).all()))
        for mine, theirs in zip(tensors_in(own), tensors_in(other), strict=True)
    )


def _near(own: Tensor, other: Tensor, tolerance: float) -> bool:
    """Return whether numbers are the same but for rounding."""
    mine, theirs = own.double(), other.double()
    gap = gap_between(theirs, mine)
    return not gap.numel() or float(gap.max()) <= tolerance * scale_of(theirs, gap)


def _taken(own: Any, other: Any, *, rounds: bool) -> Any:
    """Return the other run's choice; the numbers that were chosen are this run's own."""
    if isinstance(own, (bool, int, float)):
        return other
    mine, theirs = tensors_in(own), tensors_in(other)
    alike = all(a.shape == b.shape for a, b in zip(mine, theirs, strict=True))
    chosen = iter(theirs)

    def choose(tensor: Tensor) -> Tensor:
        found = next(chosen)
        if alike and tensor.is_floating_point() and not rounds:
            return tensor
        if alike:  # where the operation wrote over it, too
            return tensor.copy_(found)
        return found.to(tensor.device, tensor.dtype)

    return map_tensors(choose, own)


def decided_on(runs: Sequence[Sequence[Choice]]) -> list[list[Tensor]]:
    """Return, for each of some runs, the numbers that it chose by, as far as all did alike."""
    counts = [Counter(choice.key for choice in run) for run in runs]
    common = {key for key, count in counts[0].items() if all(c[key] == count for c in counts)}
    return [[t for choice in run if choice.key in common for t in choice.numbers] for run in runs]
