"""The names of tensors and of modules before and after a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fxgrow.plan.edits import Rearrangement
from fxgrow.plan.schema import Plan


class NameOrigin(NamedTuple):
    """Where a name after some steps of a plan comes from.

    Attributes:
        name: the one before them; for what they brought, that of what it is like.
        new: whether they brought it.
    """

    name: str
    new: bool


def tensor_origins(names: Iterable[str], steps: Iterable[Plan]) -> dict[str, NameOrigin]:
    """Return the origin of every tensor after some steps, by its name then.

    Args:
        names: of tensors before, in the order of the modules.
        steps: of a plan, in order.
    """
    found = {name: NameOrigin(name, False) for name in names}
    for step in steps:
        found = _carried(found, names_after(found, step))
    return found


def module_origins(names: Iterable[str], steps: Iterable[Plan]) -> dict[str, NameOrigin]:
    """Return the origin of every module after some steps, by its name then.

    Args:
        names: of modules before, in their order.
        steps: of a plan, in order.
    """
    found = {name: NameOrigin(name, False) for name in names}
    for step in steps:
        found = _carried(found, new_names(found, step.rearrangements))
    return found


def _carried(
    before: Mapping[str, NameOrigin], moved: Iterable[tuple[str, str, bool]]
) -> dict[str, NameOrigin]:
    """Return origins after one more step: what is like something new is new."""
    return {name: NameOrigin(before[old].name, new or before[old].new) for name, old, new in moved}


def new_names(
    names: Iterable[str], rearrangements: Sequence[Rearrangement]
) -> list[tuple[str, str, bool]]:
    """Return every name after a rearrangement, with the name it comes from and whether it is new.

    Args:
        names: of tensors (or modules) before, in the order of the modules.
        rearrangements: in any order; none is in a module that another one renames.

    Returns:
        (name after, name before, new) in the order of the modules after; for what is new, the name
        before is that of what it is like.
    """
    found = [(name, name, False) for name in names]
    for edit in rearrangements:
        prefix = f"{edit.container}." if edit.container else ""
        held = {child.source for child in edit.children}
        own: list[tuple[str, str, bool]] = []  # tensors of the container itself
        children: dict[str, list[tuple[str, str, bool]]] = {}
        for entry in found:
            if entry[0].startswith(prefix):
                local = entry[0].removeprefix(prefix).partition(".")[0]
                (children.setdefault(local, []) if local in held else own).append(entry)
        moved = [
            (
                f"{prefix}{child.name}{name.removeprefix(prefix + child.source)}",
                old,
                new or child.new,
            )
            for child in edit.children
            for name, old, new in children.get(child.source, ())
        ]
        first = next((i for i, e in enumerate(found) if e[0].startswith(prefix)), len(found))
        rest = [entry for entry in found if not entry[0].startswith(prefix)]
        found = [*rest[:first], *own, *moved, *rest[first:]]
    return found


def names_after(names: Iterable[str], step: Plan) -> list[tuple[str, str, bool]]:
    """Return every name after one step of a plan: (name after, name before, new).

    Args:
        names: of tensors before, in the order of the modules.
        step: the step.
    """
    if not step.names:
        moved = new_names(names, step.rearrangements)
        return _with_untied(moved, step) if step.untied else moved
    known, found = set(names), []
    for after, before in step.names.items():
        edit = step.tensors.get(step.aliases.get(after, after))
        like = before or (edit.source if edit is not None else "")
        if like in known:
            found.append((after, like, not before))
    return found


def _with_untied(moved: list[tuple[str, str, bool]], step: Plan) -> list[tuple[str, str, bool]]:
    """Return names with those of the copies that a step unties, as new; some files lack these."""
    copies = dict(step.untied)
    copies |= {n: step.untied[first] for n, first in step.aliases.items() if first in step.untied}
    held = {name for name, _, _ in moved}
    found = [(n, copies.get(n, old), new or n in copies) for n, old, new in moved]
    return found + [(n, source, True) for n, source in copies.items() if n not in held]
