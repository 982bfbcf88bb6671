"""The plan that makes room for directions that were chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from fxgrow.channels.analysis import Analysis
from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.pairs import LayerPair
from fxgrow.grow.data.selection import Room
from fxgrow.grow.widen.planner import VarianceOf
from fxgrow.grow.widen.submodules import plan_parts
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan


def twinned(
    rooms: Mapping[str, Room], pairs: Mapping[str, LayerPair], needing: Collection[str]
) -> dict[str, Room]:
    """Return how far each group with a pair may grow, in twins where these are needed.

    Args:
        rooms: as was asked for.
        pairs: the layers around each group.
        needing: groups whose new channels must be twins to keep the function. Those with a norm
            over all channels are, and get fewer than there are: from whole copies on, the norm
            would have old ones copied.
    """
    found: dict[str, Room] = {}
    for name, pair in pairs.items():
        room = rooms[name]
        if pair.over or name in needing:
            room = replace(room, pairing="vv_z_negz")
        found[name] = room.under_copies(pair.over) if pair.over else room
    return found


def laid_out(
    analyses: Sequence[Analysis],
    request: Widen,
    variance_of: VarianceOf,
    chosen: Mapping[str, Directions],
    rooms: Mapping[str, Room],
    stepping: Collection[str],
) -> Plan:
    """Return the plan that rescales old weights and makes room for what was chosen.

    Args:
        analyses: of the network, or of the parts of it that are followed.
        request: what is asked for.
        variance_of: as for :func:`fxgrow.grow.widen.planner.make_plan`.
        chosen: the directions of each group.
        rooms: how each is laid out.
        stepping: groups in twins whose rows are not left at what cancels.
    """
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
    groups = (
        replace(group, preserves="no", pairing="none") if group.name in stepping else group
        for group in made.groups
    )
    return replace(made, request=request, groups=tuple(groups))
