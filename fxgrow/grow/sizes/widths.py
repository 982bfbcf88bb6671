"""Which groups grow, and to what width: the reading of ``--width``, globs and ``--where``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeGuard

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.errors import FxgrowError, PlanError, UnsupportedOperationError, UsageError
from fxgrow.labels.pins import PinKind
from fxgrow.modules.tensors import layer_of, named_tensors
from fxgrow.plan.amounts import amount
from fxgrow.plan.by_layer import globs_in
from fxgrow.plan.requests import Widen
from fxgrow.plan.rescaling import check_gain_of_layers
from fxgrow.plan.step import Refusal

Width: TypeAlias = str | int
_FROM_NONE = 'ask for a number ("8", "+8")'
_FREED = (PinKind.NO_RULE, PinKind.FIXED)  # of which a refusal tells how to
_SHOWN = 3  # groups that a message names
_MOST = 1 << 22  # channels of a layer, each of which is followed
_FORMS = 'Give a ratio ("2x", "1.5x"), an increment ("+32") or a width ("256").'


def new_width(
    width: str, old: int, *, multiple_of: int = 1, name: str = "", described: str = ""
) -> int:
    """Return the width that a specification asks for, given the present one.

    Args:
        width: ``"1.5x"``, ``"+32"`` or ``"256"``.
        old: the present width.
        multiple_of: round up to a multiple of this.
        name: the group, for the error message.
        described: its present width, as an inspection tells it, likewise.

    Raises:
        PlanError: the specification is malformed, or asks for less than there is.

    Example:
        >>> new_width("1.5x", 64), new_width("+5", 64), new_width("100", 64, multiple_of=8)
        (96, 69, 104)
    """
    asked = amount(width, old, what="width", way_out=_FORMS)
    if asked > _MOST:
        raise UsageError(f"the width {width!r} is more than any layer has.", way_out=_FORMS)
    if asked < old:
        rows = described if described.endswith("rows") else ""
        raise PlanError(
            f"the width {width!r} asks for {asked} {'rows' if rows else 'channels'} where "
            f"{name or 'the group'} has {old}{f' ({rows})' if rows else ''} already; fxgrow only "
            "widens.",
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
        New width by group name, in the groups' order, and refusals of the groups that a glob named
        and of those that an operation without a rule pins.

    Raises:
        PlanError: a glob matches nothing, a width is malformed or below the present one, or
            nothing is left to widen.
        UnsupportedOperationError: nothing is left, because of an operation without a rule.
    """
    if request.multiple_of < 1:
        raise UsageError(f"multiple_of must be at least 1, not {request.multiple_of}.")
    per_glob = isinstance(request.width, dict)
    globs = request.width if isinstance(request.width, dict) else {"*": request.width}
    for pattern in (*request.include, *request.exclude, *(globs if per_glob else ())):
        must_match_group(pattern, groups)
    chosen: dict[str, int] = {}
    refused: list[Refusal] = []
    passed: list[ChannelGroup] = []
    for group in groups:
        width = _asked_width(group, globs, request)
        if width is None:
            continue
        if group.kind != "pinned" and request.where in ("all", group.kind):
            if not group.width and not new_width(width, 0):
                refused.append(
                    Refusal(group.name, f"{width!r} of no channel is none: {_FROM_NONE}")
                )
                continue
            chosen[group.name] = new_width(
                width, group.width, multiple_of=request.multiple_of, name=group.name,
                described=group.described_width,
            )  # fmt: skip
            continue
        passed.append(group)
        if request.include or (group.pin and (request.where == "all" or _is_unknown(group))):
            reason = group.reason or f"a {group.kind} group; ask for --where all"
            refused.append(Refusal(group.name, reason))
    if not chosen:
        empty = [refusal for refusal in refused if refusal.reason.endswith(_FROM_NONE)]
        if empty:
            raise PlanError(
                f"{empty[0].name} cannot be widened: {empty[0].reason}.", name=empty[0].name
            )
        raise _nothing_selected(len(groups), passed)
    return chosen, tuple(refused)


def asked_by_ratio(groups: Iterable[ChannelGroup], request: Widen) -> frozenset[str]:
    """Return the names of the groups for which a request asks for a multiple of their widths."""
    globs = request.width if isinstance(request.width, dict) else {"*": request.width}
    asked = ((group.name, _asked_width(group, globs, request)) for group in groups)
    return frozenset(name for name, width in asked if width and width.strip().endswith("x"))


def _asked_width(group: ChannelGroup, globs: Mapping[str, str], request: Widen) -> str | None:
    """Return the width that the globs of a request ask for, or None if they leave a group out."""
    included = not request.include or any(matches(group, glob) for glob in request.include)
    if not included or any(matches(group, glob) for glob in request.exclude):
        return None
    return next((width for glob, width in globs.items() if matches(group, glob)), None)


def _is_unknown(group: ChannelGroup) -> bool:
    return group.pin is not None and group.pin.kind is PinKind.NO_RULE


def _ease(group: ChannelGroup) -> int:
    """Return how hard a group is to free: by an option, by another network, not at all."""
    return 0 if group.pin is None else 2 if group.pin.kind is PinKind.OUTPUT else 1


def _nothing_selected(count: int, passed: Sequence[ChannelGroup]) -> FxgrowError:
    """Return the error for a request that selects none of so many groups.

    Args:
        count: the number of groups.
        passed: those that the globs select and that are pinned, or of the other kind.
    """
    order = sorted(passed, key=_ease)
    told = [
        f"{group.name}: {group.reason}"
        if group.kind == "pinned"
        else f"{group.name} is a {'stream' if group.kind == 'stream' else 'hidden group'}: "
        "--where all"
        for group in order[:_SHOWN]
    ]
    if len(order) > _SHOWN:
        told.append(f"and {len(order) - _SHOWN} more")
    why = f" {'; '.join(told)}." if told else ""
    unknown = bool(order) and _is_unknown(order[0])
    pin = order[0].pin if order else None
    how = f"To free it: {pin.remedy}. " if pin and pin.kind in _FREED else ""
    see = "See `fxgrow inspect` for the groups, and --where, --include, --exclude."
    return (UnsupportedOperationError if unknown else PlanError)(
        f"nothing to widen: the request selects none of the {count} channel groups.{why}",
        name=order[0].name if order else "",
        way_out=f"{how}{see}",
    )


def matches(group: ChannelGroup, glob: str) -> bool:
    """Return whether a glob names the group or one of its writers."""
    return any(fnmatchcase(name, glob) for name in (group.name, *group.writers))


def must_match_group(glob: str, groups: Iterable[ChannelGroup]) -> None:
    """Return if a glob names a group or one of its writers.

    Raises:
        PlanError: it names none; the nearest are told.
    """
    must_match(glob, [n for group in groups for n in (group.name, *group.writers)], "channel group")


def must_match(glob: str, names: Iterable[str], kind: str) -> None:
    """Return if a glob matches a name of what it is over.

    Raises:
        PlanError: it matches none; the nearest are told.
    """
    names = list(dict.fromkeys(names))
    if any(fnmatchcase(name, glob) for name in names):
        return
    nearest = difflib.get_close_matches(glob, names, n=3, cutoff=0.3)
    hint = f"Near it: {', '.join(nearest)}." if nearest else "See `fxgrow inspect`."
    raise PlanError(f"the glob {glob!r} matches no {kind}.", name=glob, way_out=hint)


def check_globs(request: Widen, analyses: Sequence[Analysis]) -> None:
    """Return if each glob of a setting by layer matches something of the network.

    Args:
        request: its rescaling, gain and init are by layer, and its pairing by group.
        analyses: of the whole network, or of parts of it.

    Raises:
        PlanError: one matches nothing; the nearest names are told.
        UsageError: a gain has no effect, since no rescaling of its layers takes it.
    """
    groups = [group for part in analyses for group in part.groups]
    for glob in globs_in(request.pairing):
        must_match_group(glob, groups)
    tensors = named_tensors(analyses[0].traced.standin)
    layers = [layer_of(name) for name in tensors]
    for setting in (request.rescaling, request.gain, request.init):
        for glob in globs_in(setting):
            must_match(glob, layers, "layer")
    weighted = [layer_of(name) for name, tensor in tensors.items() if tensor.ndim > 1]
    check_gain_of_layers(request.gain, request.rescaling, weighted)


def nearest_widths(granule: int, wanted: int, present: int, rows: int = 1) -> str:
    """Return the multiples of ``granule`` around ``wanted`` that are above ``present``, as text.

    Where each channel (a head of attention, a unit of an LSTM) has several rows, how many channels
    these are is told too, as an inspection tells it.

    Example:
        >>> nearest_widths(32, 134, 128)
        '160'
        >>> nearest_widths(32, 200, 128)
        '192 or 224'
        >>> nearest_widths(12, 54, 36, rows=12)
        '48 (4 × 12 rows) or 60 (5 × 12 rows)'
    """
    below, above = wanted // granule * granule, -(-wanted // granule) * granule
    widths = [width for width in sorted({below, above}) if width > present]
    told = (f" ({width // rows} × {rows} rows)" if rows > 1 else "" for width in widths)
    return " or ".join(f"{width}{counted}" for width, counted in zip(widths, told, strict=True))


def checked_widths(width: Width | Mapping[str, Width]) -> str | dict[str, str]:
    """Return a width argument as a plan records it: a whole number as that many channels.

    Raises:
        UsageError: neither a string or a whole number, nor a mapping of such.
    """
    if _is_width(width):
        return str(width)
    if isinstance(width, Mapping) and width and all(map(_is_width, width.values())):
        return {str(glob): str(value) for glob, value in width.items()}
    raise UsageError(f"the width {width!r} cannot be read.", way_out=_FORMS)


def _is_width(value: object) -> TypeGuard[Width]:
    return isinstance(value, (str, int)) and not isinstance(value, bool)
