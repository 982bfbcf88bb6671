"""What an inspection found as tables that are read in a minute, whatever the network's depth.

Deep networks repeat themselves. Entries that differ in the numbers of their names alone share a
row, one for each stage, with ``*`` for the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxgrow.api.report.elements import new_table, reasons, some
from fxgrow.api.report.tables import size, within
from fxgrow.channels.blocks import common_module

T = TypeVar("T")
Entry: TypeAlias = dict[str, Any]  # a group or a block, as Inspection.to_dict() has it
_KINDS = ("hidden", "stream", "pinned")
_COLUMN = 22  # characters in a line of a cell, where names allow it
_DIGITS = re.compile(r"(\d+)")


def inspection_table(found: Entry, *, every: bool = False) -> RenderableType:
    """Return the residual blocks with their pairs, the channel groups and the pins.

    Args:
        found: the findings, as :meth:`Inspection.to_dict` returns them.
        every: give every block and group a row of its own.
    """
    origin = "inferred" if found["inputs_inferred"] else "given"
    inputs = ", ".join(found["inputs"])
    head = f"run on an input of {inputs} ({origin}), traced by {found['tracer']}"
    parts: list[RenderableType] = [Text(head)]
    if found["modules"]:
        parts.append(Text(f"submodules followed: {', '.join(found['modules'])}"))
    parts += [Text(warning, style="yellow") for warning in found["warnings"]]
    if found["untraceable"]:
        parts.append(Text(f"no torch.fx graph: {found['untraceable']}", style="yellow"))
    if found["blocks"]:
        blocks = folded(found["blocks"], _same_block, every=every)
        parts += [Text(), Text("residual blocks", style="bold"), _blocks_table(blocks)]
    groups = folded(found["groups"], same_group, every=every)
    parts += [Text(), Text("channel groups", style="bold"), _groups_table(groups)]
    pins = [members for members in groups if members[0]["kind"] == "pinned"]
    if pins:
        parts += [Text(), Text("pinned, because"), reasons(_told_pins(pins))]
    return Group(*parts, Text(), Text(_summary(found)))


def folded(
    entries: Iterable[Entry], likeness: Callable[[Entry], Hashable], *, every: bool = False
) -> list[list[Entry]]:
    """Return entries in lists that share a row, in order of the first of each.

    Args:
        entries: each with a ``name``.
        likeness: equal for entries that may share a row.
        every: let none share.
    """
    rows: dict[Hashable, list[Entry]] = {}
    for index, entry in enumerate(entries):
        rows.setdefault(index if every else likeness(entry), []).append(entry)
    return [part for members in rows.values() for part in _by_stage(members, _name_of)]


def _name_of(entry: Entry) -> str:
    return str(entry["name"])


def _by_stage(members: Sequence[T], name_of: Callable[[T], str]) -> list[list[T]]:
    """Split what differs in several numbers of its name by the outermost of these.

    ``layer1.0`` and ``layer2.1`` are of different stages; ``layer.0`` and ``layer.1`` are not.
    """
    numbers = [_DIGITS.findall(name_of(member)) for member in members]
    varying = [len(set(column)) > 1 for column in zip(*numbers, strict=True)]
    if sum(varying) < 2:
        return [list(members)]
    stages: dict[str, list[T]] = {}
    for member, found in zip(members, numbers, strict=True):
        stages.setdefault(found[varying.index(True)], []).append(member)
    return [*stages.values()]


def skeleton(name: str) -> str:
    """Return a name without the numbers that count repetitions.

    A number in the last part of a name tells layers of one module apart, unless it is all of it.

    Example:
        >>> skeleton("layer1.0.conv2"), skeleton("features.3")
        ('layer*.*.conv2', 'features.*')
    """
    head, dot, last = name.rpartition(".")
    return _DIGITS.sub("*", head) + dot + ("*" if last.isdigit() else last)


def patterns(names: Iterable[str]) -> list[str]:
    """Return names that differ in numbers alone as one pattern for each stage.

    Example:
        >>> patterns(["conv1", "layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2"])
        ['conv1', 'layer1.*.conv2', 'layer2.0.conv2']
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(skeleton(name), []).append(name)
    return [
        _pattern(part) for members in alike.values() for part in _by_stage(members, lambda n: n)
    ]


def _pattern(names: Sequence[str]) -> str:
    """Return names of one skeleton as one, with ``*`` for the numbers that differ."""
    columns = zip(*(_DIGITS.split(name) for name in names), strict=True)
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in columns)


def same_group(group: Entry) -> Hashable:
    """Return what groups that share a row agree in: all but the numbers in names."""
    layers = (frozenset(map(skeleton, group[part])) for part in ("writers", "readers"))
    names = (skeleton(group["name"]), _DIGITS.sub("*", group["block"] or ""))
    reason = _DIGITS.sub("*", group["reason"])
    return (group["kind"], group["described_width"], *names, *layers, reason)


def _same_block(block: Entry) -> Hashable:
    return (_DIGITS.sub("*", block["name"]), tuple(_block_cells(block)))


def _groups_table(rows: Iterable[Sequence[Entry]]) -> Table:
    table = new_table(
        "block or module", "group", "×", "width", "kind", "written by", "read by",
        right=("×", "width"),
    )  # fmt: skip
    for members in rows:
        name = _pattern([_name_of(group) for group in members])
        layers = {
            part: patterns(dict.fromkeys(layer for group in members for layer in group[part]))
            for part in ("writers", "readers")
        }
        inside = members[0]["block"] is not None
        block = _pattern([group["block"] for group in members]) if inside else ""
        block = block or common_module([*layers["writers"], *layers["readers"]])
        writers, readers = (
            some([within(layer, block) for layer in layers[part]], 3) or "–" for part in layers
        )
        writers = "itself" if layers["writers"] == [name] else writers
        cells = [within(name, block), str(len(members)), members[0]["described_width"]]
        cells += [members[0]["kind"], writers, readers]
        table.add_row(*(_cell(cell) for cell in (block or "–", *cells)))
    return table


def _cell(text: str) -> Text:
    """Return a cell whose lines break between names, and after a dot where a name is long."""
    lines = [""]
    for name in text.split(", "):
        cut = len(lines[-1] + name) > _COLUMN
        for piece in re.split(r"(?<=\.)", name) if len(name) > _COLUMN else [name]:
            if lines[-1] and (cut or len(lines[-1] + piece) > _COLUMN):
                lines.append("")
            lines[-1] += piece
            cut = False
        lines[-1] += ", "
    return Text("\n".join(line.rstrip() for line in lines).removesuffix(","), overflow="fold")


def _blocks_table(rows: Iterable[Sequence[Entry]]) -> Table:
    table = new_table("block", "×", "skip", "form", "pairs", right=("×",))
    for members in rows:
        name = _pattern([_name_of(block) for block in members])
        skip, form, *chains = _block_cells(members[0])
        table.add_row(name, str(len(members)), skip, form, Text("\n".join(chains), overflow="fold"))
    return table


def _block_cells(block: Entry) -> list[str]:
    form = "pre-activation" if block["preactivation"] else "post-activation"
    chains = [_chain(pair, block["name"]) for pair in block["pairs"]]
    return [block["skip"], form, *(chains or ["–"])]


def _chain(pair: Entry, block: str) -> str:
    """Return a pair as ``conv1 → bn1 → relu → conv2``."""
    stations = (pair[part] for part in ("writers", "norms", "activations", "readers"))
    return " → ".join(
        " + ".join(within(name, block) for name in names) for names in stations if names
    )


def _told_pins(rows: Iterable[Sequence[Entry]]) -> Iterator[tuple[str, str]]:
    """Yield the names of pinned groups with the reason, and what would be needed."""
    for members in rows:
        reason, needed = members[0]["reason"], members[0]["needed"]
        for name in patterns(group["name"] for group in members):
            yield name, f"{reason}\nneeded: {needed}" if needed else reason


def _summary(found: Entry) -> str:
    kinds = [group["kind"] for group in found["groups"]]
    hidden, stream, pinned = (kinds.count(kind) for kind in _KINDS)
    return (
        f"{len(kinds)} groups: {hidden} hidden and {stream} stream can grow, {pinned} pinned; "
        f"{len(found['blocks'])} residual blocks; {size(found['parameters'])} parameters"
    )
