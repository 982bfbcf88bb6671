"""What grows when: a schedule as callbacks of trainers take it, checked without the network."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fxgrow.api.deepen import deepen
from fxgrow.api.widen import widen
from fxgrow.errors import PlanError, UsageError, shown
from fxgrow.grow.identity.stages import new_blocks
from fxgrow.grow.sizes.widths import new_width
from fxgrow.training.rates import check_rule
from fxgrow.training.schedule import GrowthSchedule

Schedule: TypeAlias = Mapping[int, object] | GrowthSchedule

_OPTIONS = {  # of each kind of growth
    deepens: {"lr", *inspect.signature(grow).parameters} - {"model"}
    for deepens, grow in ((False, widen), (True, deepen))
}
_OF_NO_WEIGHT = ("example_inputs", "progress", "strict", "verify")  # may differ in a resumed run


@dataclass(frozen=True, slots=True)
class Due:
    """One growth of a schedule.

    Attributes:
        at: the epoch, or the number of steps, before which the network grows, from 0.
        deepens: whether it becomes deeper, not wider.
        options: of :func:`fxgrow.training.grow_`, or :func:`fxgrow.training.deepen_`.
    """

    at: int
    deepens: bool
    options: Mapping[str, Any]

    def __str__(self) -> str:
        """Return the growth as text, the same in every process."""
        told = {key: value for key, value in self.options.items() if key not in _OF_NO_WEIGHT}
        options = json.dumps(told, sort_keys=True, default=lambda value: type(value).__name__)
        return f"{'deeper' if self.deepens else 'wider'} at {self.at}: {options}"


def mapping_of(schedule: Schedule) -> Mapping[int, object]:
    """Return a schedule by its epochs.

    Where a metric decides when it grows, that is by stages, from 0.
    """
    if isinstance(schedule, GrowthSchedule) and schedule.plateau is not None:
        told = {stage: schedule.growths_of(stage) for stage in range(1, len(schedule.stages))}
        return {stage: growths for stage, growths in told.items() if growths}
    return schedule.growths() if isinstance(schedule, GrowthSchedule) else schedule


def growths_of(schedule: Schedule, shared: Mapping[str, Any]) -> tuple[Due, ...]:
    """Return the growths of a schedule, in order.

    Args:
        schedule: for each epoch or number of steps, a width (``"1.5x"``), options of
            :func:`fxgrow.widen` with ``width`` among them, those of :func:`fxgrow.deepen` with
            ``deepen`` for the blocks, or several of these in a list; or a
            :class:`fxgrow.training.GrowthSchedule` of epochs.
        shared: options for all that do not say otherwise.

    Raises:
        UsageError: it is none.
    """
    schedule = mapping_of(schedule)
    if not isinstance(schedule, Mapping) or not schedule:
        raise UsageError(
            "a schedule says for each epoch or step how the network grows.",
            way_out='Give {10: "1.5x", 20: {"width": "2x", "where": "all"}}.',
        )
    found = []
    for at, growths in schedule.items():
        if not isinstance(at, int) or isinstance(at, bool) or at < 0:
            raise UsageError(f"a schedule's epochs and steps are whole numbers from 0, not {at!r}.")
        several = growths if isinstance(growths, (list, tuple)) else [growths]
        found += [_growth(at, one, shared) for one in several]
    return tuple(sorted(found, key=lambda growth: growth.at))


def _growth(at: int, given: object, shared: Mapping[str, Any]) -> Due:
    """Return one growth of a schedule."""
    options = {"width": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or ("width" in options) == ("deepen" in options):
        raise UsageError(
            f"what happens at {at} says not whether the network becomes wider or deeper.",
            way_out='Give "1.5x", {"width": "1.5x", …}, {"deepen": {"layer3": "+1"}, …}, or a list '
            "of such.",
        )
    deepens, asked = "deepen" in options, dict(options)
    if deepens:
        asked["blocks"] = asked.pop("deepen")
    _check(at, deepens, asked)
    for name in shared.keys() - _OPTIONS[False] - _OPTIONS[True]:
        raise _unknown(name, "the options for all growths")
    if deepens:
        shared = {key: value for key, value in shared.items() if key in _OPTIONS[True]}
    every = {**shared, **asked}
    check_rule(every.get("lr", "none"))
    return Due(at, deepens, every)


def _check(at: int, deepens: bool, asked: Mapping[str, Any]) -> None:
    """Return if what is asked for can be read, as far as that shows without the network.

    Raises:
        UsageError: it cannot.
    """
    for name in asked.keys() - _OPTIONS[deepens]:
        raise _unknown(name, f"what happens at {at}")
    sizes = asked["blocks" if deepens else "width"]
    each = sizes.values() if isinstance(sizes, Mapping) else [sizes]
    if not each or (deepens and not isinstance(sizes, Mapping)):
        raise UsageError(
            f"what happens at {at} names no blocks or no widths.",
            way_out='Give {"deepen": {"layer3": "+1"}} or {"width": {"layer3.*": "2x"}}.',
        )
    for size in each:
        if not isinstance(size, str):
            raise UsageError(
                f"the size {shown(repr(size))} at {at} is no text.",
                way_out='Give "2x", "+16" or "256".',
            )
        try:
            _ = new_blocks(size, 0) if deepens else new_width(size, 1)
        except UsageError:
            raise
        except PlanError:
            continue  # of a form that can be read, and what there is shows when it is carried out


def _unknown(name: str, where: str) -> UsageError:
    """Return what refuses an option that no growth has."""
    return UsageError(
        f"{where} names {shown(repr(name))}, which growth has no option for.",
        name=shown(str(name)),
        way_out="Give options of fxgrow.widen or fxgrow.deepen, and lr; inputs and averages are "
        "arguments of the callback.",
    )
