"""Sizes rewritten where the code of a module makes its calls, if there is no graph to do it in."""

from __future__ import annotations

from collections.abc import Sequence

from fxgrow.grow.sizes.literals import CallSite, Repair
from fxgrow.plan.edits import SizeEdit


def edits_in_code(
    repairs: Sequence[Repair], sites: Sequence[CallSite]
) -> tuple[SizeEdit, ...] | None:
    """Return the sizes to be rewritten in the code of modules, line by line.

    Args:
        repairs: the sizes.
        sites: where each call that takes sizes was made, in order.

    Returns:
        None where a line makes calls of several sizes that change in different ways.
    """
    found: dict[CallSite, Repair] = {}
    by_call = {repair.call: repair for repair in repairs}
    for place, site in enumerate(sites):
        repair = by_call.get(place)
        if repair is None:
            if site in found and site.at:
                return None
            continue
        known = found.setdefault(site, repair)
        if not site.at or (known.given, known.wanted) != (repair.given, repair.wanted):
            return None
    untouched = {site for place, site in enumerate(sites) if place not in by_call}
    if untouched & found.keys():
        return None
    return tuple(
        SizeEdit("", repair.function, repair.given, repair.wanted, site.module, site.at)
        for site, repair in found.items()
    )
