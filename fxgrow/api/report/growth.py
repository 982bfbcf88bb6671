"""The table of where a network asks for new channels."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fxgrow.api.report.elements import new_table, reasons
from fxgrow.api.report.tables import size

_DIRECTION = "a direction is one new channel, or two twins"
_MEANING = {
    "GradMax": "gain: the squared norms of the gradients that new rows begin with",
    "Tiny": "gain: what the loss falls by, to first order, per amplitude of the step",
}


def growth_table(found: dict[str, Any]) -> RenderableType:
    """Return the groups that ask for channels, the most per parameter first, and why others not.

    Args:
        found: what :meth:`fxgrow.api.report.data.Growth.to_dict` returned.
    """
    names = ("width", "directions", "gain", "parameters each", "gain per 1000 parameters")
    table = new_table("group", *names, right=names)
    able = [group for group in found["groups"] if group["channels"]]
    for group in sorted(able, key=lambda group: -group["gain_per_thousand"]):
        table.add_row(
            Text(group["name"], overflow="fold"),
            str(group["width"]),
            str(group["channels"]),
            f"{group['gain']:.4g}",
            size(group["parameters"]),
            f"{group['gain_per_thousand']:.4g}",
        )
    parts: list[RenderableType] = [Text(f"new channels by {found['method']}", style="bold")]
    if able:
        parts += [table, Text(_DIRECTION)]
        if found["method"] in _MEANING:
            parts.append(Text(_MEANING[found["method"]]))
    told = [(group["name"], group["reason"]) for group in found["groups"] if group["reason"]]
    if told:
        parts += [Text("none, because:"), reasons(told, len(told))]
    return Group(*parts)
