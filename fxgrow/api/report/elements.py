"""Pieces of tables and texts that all reports are laid out with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fxgrow.wording import worded

_STYLES = {
    "exact": "green", "preserved": "green",
    "scaled": "yellow", "as predicted": "yellow", "changed": "yellow", "skipped": "yellow",
    "no": "red", "failed": "red",
}  # fmt: skip


def new_table(*columns: str, right: Collection[str] = ()) -> Table:
    """Return an empty table; ``right`` names the columns of figures, which are never cut."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        whole = name in right or name in ("block", "kind", "verdict", "skip", "form")
        table.add_column(
            name, justify="right" if name in right else "left", no_wrap=whole, overflow="fold"
        )
    return table


def reasons(told: Iterable[tuple[str, str]], most: int = 2) -> Padding:
    """Return pairs of a name and a reason as a list of the reasons, with names where each holds.

    Args:
        told: names and reasons.
        most: so many names of each reason, and one more, are told.
    """
    names: dict[str, list[str]] = {}
    for name, reason in told:
        names.setdefault(reason, []).append(name)
    grid = Table.grid(padding=(0, 2))
    for reason, found in names.items():
        grid.add_row(Text(some(found, most), overflow="fold"), Text(worded(reason)))
    return indented(grid)


def some(names: Sequence[str], most: int) -> str:
    """Return a list of names, cut where it is long.

    Example:
        >>> some(["a", "b", "c", "d"], 2), some(["a", "b"], 2)
        ('a, b, +2 more', 'a, b')
    """
    shown = list(names) if len(names) <= most + 1 else [*names[:most], f"+{len(names) - most} more"]
    return ", ".join(shown)


def verdict_text(verdict: str) -> Text:
    """Return a verdict in its colour."""
    return Text(verdict, style=_STYLES.get(verdict, ""))


def indented(renderable: RenderableType) -> Padding:
    """Return a renderable two columns to the right."""
    return Padding(renderable, (0, 0, 0, 2))
