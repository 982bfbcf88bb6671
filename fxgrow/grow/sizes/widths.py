"""Which groups grow, and to what width: the reading of ``--width``, globs and ``--where``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction

from fxgrow.channels.groups import ChannelGroup
from fxgrow.errors import PlanError, UnsupportedOperationError
from fxgrow.plan.requests import Widen
from fxgrow.plan.step import Refusal

_WIDTH = re.compile(r"(?P<sign>\+?)(?P<number>\d+(\.\d+)?)(?P<ratio>x?)")
_FORMS = 'Give a ratio ("2x", "1.5x"), an increment ("+32") or a width ("256").'


def new_width(width: str, old: int, *, multiple_of: int = 1, name: str = "") -> int:
    """Return the width that a specification asks for, given the present one.

    Args:
        width: ``"1.5x"``, ``"+32"`` or ``"256"``.
        old: the present width.
        multiple_of: round up to a multiple of this.
        name: the group, for the error message.

    Raises:
        PlanError: the specification is malformed, or asks for less than there is.

    Example:
        >>> new_width("1.5x", 64), new_width("+5", 64), new_width("100", 64, multiple_of=8)
        (96, 69, 104)
    """
    match = _WIDTH.fullmatch(width.strip())
    if match is None or (match["sign"] and match["ratio"]):
        raise PlanError(f"the width {width!r} cannot be read.", way_out=_FORMS)
    number = Fraction(match["number"])
    if match["ratio"]:
        wanted = number * old
        asked = (wanted + Fraction(1, 2)).__floor__()
    elif number.denominator != 1:
        raise PlanError(f"the width {width!r} is not a whole number.", way_out=_FORMS)
    else:
        asked = int(number) + (old if match["sign"] else 0)
    if asked < old:
        raise PlanError(
            f"the width {width!r} asks for {asked} channels where {name or 'the group'} has {old} "
            "already; fxgrow only widens.",
            name=name,
            way_out="Ask for more, or leave the group out with --exclude.",
        )
    return asked if asked == old else -(-asked // multiple_of) * multiple_of


def select(
    groups: Sequence[ChannelGroup], request: Widen
) -> tuple[dict[str, int], tuple[Refusal, ...]]:
    """Return the new width of each group that the request selects.

    Args:
        groups: all channel groups of the network.
        request: ``where``, ``include``, ``exclude``, ``width`` and ``multiple_of`` decide.

    Returns:
        New width by group name, in the groups' order, and the pinned groups that a glob named.

    Raises:
        PlanError: a glob matches nothing, a width is malformed or below the present one, or
            nothing is left to widen.
        UnsupportedOperationError: nothing is left, because of an operation without a rule.
    """
    if request.multiple_of < 1:
        raise PlanError(f"multiple_of must be at least 1, not {request.multiple_of}.")
    per_glob = isinstance(request.width, dict)
    globs = request.width if isinstance(request.width, dict) else {"*": request.width}
    for pattern in (*request.include, *request.exclude, *(globs if per_glob else ())):
        _must_match(pattern, groups)
    chosen: dict[str, int] = {}
    refused: list[Refusal] = []
    for group in groups:
        width = next((w for glob, w in globs.items() if matches(group, glob)), None)
        named = any(matches(group, glob) for glob in request.include)
        if width is None or (request.include and not named):
            continue
        if any(matches(group, glob) for glob in request.exclude):
            continue
        if group.kind == "pinned":
            if named or request.where == "all":
                refused.append(Refusal(group.name, group.reason))
            continue
        if request.where not in ("all", group.kind):
            if named:
                refused.append(Refusal(group.name, f"a {group.kind} group; ask for --where all"))
            continue
        chosen[group.name] = new_width(
            width, group.width, multiple_of=request.multiple_of, name=group.name
        )
    if not chosen:
        why = f" {refused[0].name}: {refused[0].reason}." if refused else ""
        unsupported = bool(refused) and refused[0].reason.startswith("no rule for")
        raise (UnsupportedOperationError if unsupported else PlanError)(
            f"nothing to widen: the request selects none of the {len(groups)} channel groups.{why}",
            way_out="See `fxgrow inspect` for the groups, and --where, --include, --exclude.",
        )
    return chosen, tuple(refused)


def matches(group: ChannelGroup, glob: str) -> bool:
    """Return whether a glob names the group or one of its writers."""
    return any(fnmatchcase(name, glob) for name in (group.name, *group.writers))


def _must_match(glob: str, groups: Iterable[ChannelGroup]) -> None:
    names = list(dict.fromkeys(n for group in groups for n in (group.name, *group.writers)))
    if any(fnmatchcase(name, glob) for name in names):
        return
    nearest = difflib.get_close_matches(glob, names, n=3, cutoff=0.3)
    hint = f"Near it: {', '.join(nearest)}." if nearest else "See `fxgrow inspect`."
    raise PlanError(f"the glob {glob!r} matches no channel group.", name=glob, way_out=hint)


def nearest_widths(granule: int, wanted: int, present: int) -> str:
    """Return the multiples of ``granule`` around ``wanted`` that are above ``present``, as text.

    Example:
        >>> nearest_widths(32, 134, 128)
        '160'
        >>> nearest_widths(32, 200, 128)
        '192 or 224'
    """
    below, above = wanted // granule * granule, -(-wanted // granule) * granule
    return " or ".join(str(width) for width in sorted({below, above}) if width > present)


def checked_widths(width: str | Mapping[str, str]) -> str | dict[str, str]:
    """Return a width argument as a plan records it.

    Raises:
        PlanError: neither a string nor a mapping of strings.
    """
    if isinstance(width, str):
        return width
    if isinstance(width, Mapping) and width and all(isinstance(v, str) for v in width.values()):
        return {str(glob): str(value) for glob, value in width.items()}
    raise PlanError(f"the width {width!r} cannot be read.", way_out=_FORMS)
