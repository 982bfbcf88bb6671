"""One plan for several parts of a network that were followed each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fxgrow.channels.analysis import Analysis
from fxgrow.errors import PlanError
from fxgrow.grow.sizes.widths import select
from fxgrow.grow.widen.planner import VarianceOf, make_plan
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import Refusal


def plan_parts(analyses: Sequence[Analysis], request: Widen, variance_of: VarianceOf) -> Plan:
    """Return one plan for all parts of a network.

    Args:
        analyses: of the whole network, or of parts that have no module in common.
        request: what is asked for; its globs are over the groups of all parts.
        variance_of: as for :func:`fxgrow.grow.widen.planner.make_plan`.

    Raises:
        PlanError: the request is malformed, or nothing that it selects can grow in any part.
    """
    if len(analyses) == 1:
        return make_plan(analyses[0], request, variance_of)
    widths, refused = select([group for part in analyses for group in part.groups], request)
    made: list[Plan] = []
    problems: list[PlanError] = []
    for part in analyses:
        mine = {g.name: str(widths[g.name]) for g in part.groups if g.name in widths}
        if not mine:
            continue
        own = replace(request, width=mine, include=tuple(mine), exclude=(), where="all")
        try:
            made.append(make_plan(part, own, variance_of))
        except PlanError as error:
            problems.append(error)
            refused += tuple(Refusal(name, error.message.rstrip(".")) for name in mine)
    if not made:
        raise problems[0]
    refused += tuple(refusal for plan in made for refusal in plan.refused)
    return replace(merged(made), request=request, refused=refused)


def merged(plans: Sequence[Plan]) -> Plan:
    """Return plans for different parts of one network as one plan; all name the whole's tensors."""
    before = plans[0].parameters[0]
    added = sum(plan.parameters[1] - before for plan in plans)
    parts = ("groups", "modules", "multipliers", "prediction", "sizes", "scopes", "kernels")
    joined: dict[str, Any] = {
        part: tuple(item for plan in plans for item in getattr(plan, part)) for part in parts
    }
    return replace(
        plans[0],
        tensors={name: edit for plan in plans for name, edit in plan.tensors.items()},
        parameters=(before, before + added),
        flops=(sum(plan.flops[0] for plan in plans), sum(plan.flops[1] for plan in plans)),
        warnings=tuple(dict.fromkeys(text for plan in plans for text in plan.warnings)),
        **joined,
    )
