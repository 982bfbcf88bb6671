"""The plan that makes room for directions that were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fxgrow.channels.analysis import Analysis
from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.selection import Room
from fxgrow.grow.widen.planner import VarianceOf
from fxgrow.grow.widen.submodules import plan_parts
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan


def laid_out(
    analyses: Sequence[Analysis],
    request: Widen,
    variance_of: VarianceOf,
    chosen: Mapping[str, Directions],
    rooms: Mapping[str, Room],
) -> Plan:
    """Return the plan that rescales old weights and makes room for what was chosen."""
    grown = {
        name: str(rooms[name].width + rooms[name].each * len(directions))
        for name, directions in chosen.items()
    }
    own = replace(
        request,
        width=grown,
        include=tuple(grown),
        exclude=(),
        where="all",
        pairing={name: rooms[name].pairing for name in grown},
    )
    made = plan_parts(analyses, replace(own, multiple_of=1), variance_of)
    return replace(made, request=request)
