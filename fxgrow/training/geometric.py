"""Widths, depths and lengths of stages that grow by one rate (Yuan et al. 2023).

C_t = C_{t−1} + round-to-even(p·C_{t−1}); the lengths are T_t = T_0·(1 + p)^t, summed up before they
are rounded to whole epochs: compounded, T_0 = 1 would never grow by a half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import accumulate, pairwise
from math import lcm

from fxgrow.errors import UsageError, shown
from fxgrow.training.plateau import refuse


@dataclass(frozen=True)
class Unit:
    """Channel groups that grow by one ratio.

    Attributes:
        lead: the width that counts, at full size.
        step: what that can be a multiple of.
        widths: the full width of each group, by name.
        least: what the width that counts has at least: a channel by itself cannot be told from what
            is broadcast, nor a convolution of one in each group from a depthwise one.
        whole: whether it only grows by whole copies of what there is, so that each width is a
            multiple of the one before.
    """

    lead: int
    step: int
    widths: dict[str, int]
    least: int = 2
    whole: bool = False

    def at(self, width: int) -> dict[str, int]:
        """Return the width of each group where the leading one is so wide."""
        return {name: full * width // self.lead for name, full in self.widths.items()}


def check_parts(initial: object, rate: object) -> None:
    """Return if two numbers can be the first part of a width and the rate by which it grows.

    Raises:
        UsageError: they cannot.
    """
    given = (initial, rate)
    numbers = [x for x in given if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if len(numbers) < len(given) or not 0 < numbers[0] <= 1 or not 0 < numbers[1] <= 4:
        raise UsageError(
            f"initial={shown(repr(initial))} and rate={shown(repr(rate))} are no parts of a width.",
            way_out="Give 0 < initial ≤ 1 and 0 < rate ≤ 4.",
        )


def checked_blocks(blocks: Mapping[str, tuple[int, int]] | None) -> dict[str, tuple[int, int]]:
    """Return the first and the last number of blocks of each list, as whole numbers.

    Raises:
        UsageError: something else was given.
    """
    if not isinstance(blocks, Mapping | None):
        refuse("blocks", f"a {type(blocks).__name__} is no mapping")
    found: dict[str, tuple[int, int]] = {}
    for name, given in (blocks or {}).items():
        pair = tuple(given) if isinstance(given, (tuple, list)) else ()
        if len(pair) != 2 or any(type(number) is not int for number in pair):
            refuse("blocks", f'{str(name)[:80]!r} has no two numbers: {{"layer1": (1, 3)}}')
        found[name] = (pair[0], pair[1])
    return found


def widths_by_stage(
    units: Sequence[Unit], initial: float, rate: float, multiple_of: int, most: int
) -> list[dict[str, int]]:
    """Return the width of each channel group by stage, up to the full ones.

    Args:
        units: what grows together.
        initial: the first width, of the full one.
        rate: p.
        multiple_of: of what widths are; what grows together may ask for more.
        most: how many stages there can be; the last has the full widths.

    Example:
        >>> found = widths_by_stage([Unit(64, 1, {"conv": 64})], 0.25, 0.2, 2, 64)
        >>> [widths["conv"] for widths in found]
        [16, 20, 24, 28, 34, 40, 48, 58, 64]
    """
    # Where a full width is no such multiple, it is reached from the last one below.
    steps = [lcm(unit.step, multiple_of) for unit in units]
    steps = [s if s <= u.lead else u.step for s, u in zip(steps, units, strict=True)]
    present = [
        min(u.lead, max(s, s * -(-u.least // s), s * round(initial * u.lead / s)))
        for s, u in zip(steps, units, strict=True)
    ]
    found = [present]
    full = [unit.lead for unit in units]
    while present != full and len(found) < most:
        present = [
            min(u.lead, now + max(s, s * round(rate * now / s)))
            for now, s, u in zip(present, steps, units, strict=True)
        ]
        found.append(present)
    if present != full:
        found[-1] = full
    return [
        {
            name: width
            for unit, now in zip(units, each, strict=True)
            for name, width in unit.at(_whole_copies(unit, now) if unit.whole else now).items()
        }
        for each in found
    ]


def _whole_copies(unit: Unit, width: int) -> int:
    """Return the largest width up to one, of those that each are a multiple of the one before."""
    found = unit.lead
    while found > width:
        below = [
            found // by
            for by in range(2, found // unit.step + 1)
            if found % by == 0 and found // by % unit.step == 0 and found // by >= unit.least
        ]
        if not below:
            break
        found = below[0]
    return found


def depths_by_stage(blocks: Mapping[str, tuple[int, int]], count: int) -> list[dict[str, str]]:
    """Return the numbers of blocks that change, by stage; all of them in the first.

    Raises:
        UsageError: fewer blocks at last than at first, or none.

    Example:
        >>> depths_by_stage({"layer1": (1, 3)}, 5)
        [{'layer1': '1'}, {}, {'layer1': '2'}, {}, {'layer1': '3'}]
    """
    for name, (first, last) in blocks.items():
        if not 0 < first <= last:
            raise UsageError(
                f"{name} cannot grow from {first} to {last} blocks.",
                name=name,
                way_out='Give the first and the last number of blocks: {"layer1": (1, 3)}.',
            )
    found: list[dict[str, str]] = []
    known: dict[str, int] = {}
    for stage in range(count):
        part = stage / (count - 1) if count > 1 else 1.0
        now = {n: first + int((last - first) * part + 1e-9) for n, (first, last) in blocks.items()}
        found.append({name: str(n) for name, n in now.items() if known.get(name) != n})
        known = now
    return found


def lengths(epochs: int | None, count: int, rate: float, first: int | None = None) -> list[int]:
    """Return how many epochs each stage has, T_0·(1 + p)^t, and the last one what is left.

    A stage ends at the whole epoch that is nearest to the sum of the lengths up to it.

    Args:
        epochs: in all.
        count: how many stages.
        rate: p, by which they become longer.
        first: T_0. None is the one for which the last stage's length follows the rule too, as a
            whole number if that leaves the last stage within a quarter of that length.

    Raises:
        UsageError: nothing is left for the last stage.

    Example:
        >>> lengths(160, 9, 0.2)  # T_0 = 8, as in the paper
        [8, 10, 11, 14, 17, 19, 24, 29, 28]
        >>> lengths(16, 5, 0.5), lengths(16, 5, 0.5, 1)
        ([1, 2, 3, 4, 6], [1, 2, 2, 3, 8])
    """
    if epochs is None:
        raise UsageError(
            "the schedule does not say how many epochs there are in all.",
            way_out="Give epochs=; or plateau=Plateau(…) without first=.",
        )
    if type(epochs) is not int or not count <= epochs:
        raise UsageError(
            f"{epochs} epochs are not enough for {count} stages.",
            way_out="Give more epochs, a greater rate, or fewer stages=.",
        )
    sums = [*accumulate((1 + rate) ** stage for stage in range(count))]
    if first is not None and (type(first) is not int or first < 1):
        raise UsageError(f"a first stage of {first} epochs cannot be.", way_out="Give a number.")
    share = _share(epochs, sums) if first is None else float(first)
    before = _rounded(share * sums[-2]) if count > 1 else 0
    if first is not None and before >= epochs:
        raise UsageError(
            f"the stages before the last take {before} of {epochs} epochs.",
            way_out="Give more epochs, a shorter first stage, or fewer stages=.",
        )
    ends = [0]
    for stage, part in enumerate(sums[:-1]):
        end = max(ends[-1] + 1, _rounded(share * part))
        ends.append(min(end, epochs - (count - 1 - stage)))  # one epoch for each that follows
    found, rest = sorted(after - before for before, after in pairwise(ends)), epochs - ends[-1]
    return [*found, rest] if share.is_integer() else sorted([*found, rest])


def _share(epochs: int, sums: Sequence[float]) -> float:
    """Return T_0 for some epochs in all.

    Args:
        epochs: in all.
        sums: of the lengths up to each stage, of T_0.
    """
    exact = epochs / sums[-1]
    whole, before = _rounded(exact), sums[-2] if len(sums) > 1 else 0.0
    by_rule, left = exact * (sums[-1] - before), epochs - whole * before
    return float(whole) if abs(left - by_rule) <= by_rule / 4 else exact


def _rounded(number: float) -> int:
    return math.floor(number + 0.5)


def changes(
    widths: Sequence[Mapping[str, int]], depths: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    """Return which groups have another width than in the stage before, or are new in it."""
    known: dict[str, int] = {}
    counts: dict[str, int] = {}
    found: list[dict[str, str]] = []
    for width, depth in zip(widths, depths, strict=True):
        counts |= {name: int(text) for name, text in depth.items()}
        there = {name: n for name, n in width.items() if not _is_to_come(name, counts)}
        changed = {name: str(n) for name, n in there.items() if known.get(name) != n}
        found.append({escape(name): text for name, text in changed.items()})
        known |= there
    return found


def _is_to_come(name: str, counts: Mapping[str, int]) -> bool:
    """Return whether a layer is in a block that is not there yet."""
    for container, count in counts.items():
        inside = name.removeprefix(f"{container}.")
        number = inside.partition(".")[0]
        if inside != name and number.isdecimal() and int(number) >= count:
            return True
    return False
