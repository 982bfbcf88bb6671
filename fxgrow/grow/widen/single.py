"""Widths that work out, with groups of no channel and of one among those that may grow.

Those are followed at another width if they grow, and as they are if they stay
(:mod:`fxgrow.grow.sizes.narrow`), so that which of them do decides what is known of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from fxgrow.channels.analysis import Analysis
from fxgrow.errors import PlanError
from fxgrow.grow.sizes.narrow import at_other_widths
from fxgrow.grow.widen.feasible import Attempts, Feasible, feasible
from fxgrow.plan.step import Refusal

_LEFT_EMPTY = "it lies beside a layer of no channel or of one, which would have to grow too"

_HAS_ONE = "it has one channel already; ask for more"


def worked_out(
    analysis: Analysis, attempts_for: Callable[[Analysis], Attempts], widths: Mapping[str, int]
) -> tuple[Analysis, Feasible]:
    """Return sizes that work out, and the analysis that they are for.

    Args:
        analysis: of the network, with all its groups of no channel and of one.
        attempts_for: what makes something of widths, for an analysis.
        widths: wanted width by group name.

    Raises:
        PlanError: nothing is left to grow; the first reason is told.
    """
    told: dict[str, str] = {}
    while True:
        analysis, widths = _only(analysis, widths, told)
        asked = _single(analysis) & widths.keys()
        try:
            found = feasible(attempts_for(analysis), widths)
        except PlanError as error:
            if not asked or asked >= widths.keys():
                raise
            refused = dict.fromkeys(sorted(asked), error.message.rstrip("."))
        else:
            stuck = asked - found.sizes.widths.keys()
            if not stuck:
                refusals = tuple(Refusal(name, reason) for name, reason in told.items())
                return analysis, replace(found, refused=refusals + found.refused)
            refused = {x.name: x.reason for x in found.refused if x.name in stuck}
        told |= refused
        widths = {name: width for name, width in widths.items() if name not in refused}


def _single(analysis: Analysis) -> set[str]:
    """Return the names of the groups that were followed at another width."""
    return {group.name for group in analysis.groups if group.followed_at is not None}


def _only(
    analysis: Analysis, widths: Mapping[str, int], told: dict[str, str]
) -> tuple[Analysis, Mapping[str, int]]:
    """Return an analysis in which those alone are at other widths that grow, and the rest of them.

    Args:
        analysis: with more of them.
        widths: wanted width by group name.
        told: why groups cannot grow; those that are not known without others are put there.

    Raises:
        PlanError: none is left.
    """
    for group in analysis.groups:
        if group.width == 1 == widths.get(group.name) and group.followed_at is not None:
            told[group.name] = _HAS_ONE
            widths = {other: width for other, width in widths.items() if other != group.name}
    while staying := _single(analysis) - widths.keys():
        analysis = _without(analysis, staying)
        known = {group.name: group for group in analysis.groups if group.kind != "pinned"}
        for name in widths.keys() - known.keys():
            told[name] = _LEFT_EMPTY
        widths = {name: width for name, width in widths.items() if name in known}
    if not widths:
        name, reason = next(iter(told.items()))
        raise PlanError(f"{name} cannot be widened: {reason}.", name=name)
    return analysis, widths


def _without(analysis: Analysis, staying: Collection[str]) -> Analysis:
    """Return an analysis in which some groups are at their own widths."""
    leaving = {group.name for group in analysis.groups if group.followed_at is None}
    for group in analysis.groups:
        if group.name in staying:
            leaving |= {group.name, *group.writers}
    return at_other_widths(analysis.plain or analysis, leaving)
