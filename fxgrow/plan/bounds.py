"""What the single entries of a plan may be: numbers, names, and edits that fit together.

:mod:`fxgrow.plan.checks` says what a plan can do as a whole, and why it is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

import torch

from fxgrow.errors import PlanError, shown
from fxgrow.labels.sizes import SIZED
from fxgrow.plan.edits import AxisEdit, ModuleEdit, Multiplier, Run, SizeEdit, TensorEdit

_MOST_ENTRIES = 1 << 20  # of a list or a mapping
MOST_GLOBS = 1 << 12  # of a setting; each tensor is tried against them
_MOST_TOLD = 1 << 16  # groups of all steps of a plan, and the like: each is looked at
_OF_STEPS = (
    "groups", "blocks", "kernels", "refused", "scopes", "modules", "sizes", "multipliers",
    "prediction", "rearrangements",
)  # fmt: skip
_MOST_SIZE = 1 << 31  # of a dim, or an attribute
_MOST_COUNT = 1 << 64  # of parameters and operations; a seed
_MOST_PARTS = 100  # of a name: modules in modules
_MOST_LEVELS = 16  # of lists in lists; a run of an edit of a step lies 8 deep
_FACTORS = (1e-30, 1e30)
_WORD = re.compile(r"[\w.+-]*")  # whoever registers more need not be there when a plan is read
_INIT = re.compile(r"[\w.+-]+(:[\w.<>]+)?")
_FROM_OLD = ("old", "share", "borrowed")
_DRAWN = ("new", "minus")
_FRACTIONS = frozenset({"share", "mean", *_DRAWN})  # what whole numbers cannot hold


def refuse(place: str, why: str) -> NoReturn:
    """Refuse a plan.

    Args:
        place: the field.
        why: what is wrong with it, as a sentence without its full stop.

    Raises:
        PlanError: always.
    """
    raise PlanError(f"the plan's {shown(place)} is wrong: {shown(why)}.", name=shown(place))


def is_name(text: str) -> bool:
    """Return whether torch takes a text for the name of a module or tensor in a network.

    Example:
        >>> is_name("layers.3x3-conv.weight"), is_name(""), is_name("layers..weight")
        (True, False, False)
    """
    parts = text.split(".")
    return all(parts) and len(parts) <= _MOST_PARTS


def check_extent(data: object, place: str = "", depth: int = 0) -> None:
    """Check, before anything else, that data is as deep, as long and of such numbers as occur.

    Raises:
        PlanError: it is not.
    """
    parts: Iterable[tuple[object, object]] = ()
    if isinstance(data, int) and abs(data) > _MOST_COUNT:
        refuse(place, "the number is too large")
    if isinstance(data, (dict, list, tuple)):
        if depth > _MOST_LEVELS:
            refuse(place, "it is nested too deeply")
        is_asked = "request" in place.split(".")
        most = MOST_GLOBS if is_asked else _MOST_ENTRIES
        if len(data) > most:
            refuse(place, f"it has {len(data)} entries, and there can be {most}")
        parts = data.items() if isinstance(data, dict) else enumerate(data)
    for key, part in parts:
        if not isinstance(part, (str, float)):
            check_extent(part, f"{place}.{key}" if place else str(key), depth + 1)


def check_number(data: Mapping[str, object]) -> None:
    """Check that a plan has no more groups and the like, in all its steps, than any network has.

    Args:
        data: a plan as JSON, of any schema.

    Raises:
        PlanError: it has; reading it would take minutes.
    """
    before = data.get("after")
    steps = (*(before if isinstance(before, list) else ()), data)
    for name in _OF_STEPS:
        found = (step.get(name) for step in steps if isinstance(step, Mapping))
        count = sum(len(entries) for entries in found if isinstance(entries, (list, dict)))
        if count > _MOST_TOLD:
            refuse(name, f"it has {count} entries in all steps, and there can be {_MOST_TOLD}")


def check_init(name: str, place: str) -> None:
    """Check the name of an init, be it registered or code that is never run for it.

    Raises:
        PlanError: it is none.
    """
    if not _INIT.fullmatch(name):
        refuse(place, f"{name!r} is no name of an init")


def check_word(text: str, place: str) -> None:
    """Check the name of a pairing, a method or the like, of which there may be more elsewhere.

    Raises:
        PlanError: it is none.
    """
    if not _WORD.fullmatch(text):
        refuse(place, f"{text!r} is no name")


def check_factor(factor: float, place: str) -> None:
    """Check a factor, of either sign.

    Raises:
        PlanError: it is zero, or of no size that occurs.
    """
    low, high = _FACTORS
    if not low <= abs(factor) <= high:
        refuse(place, f"{factor} is no factor between {low} and {high}")


def check_amount(amount: float, place: str) -> None:
    """Check a number that may be zero.

    Raises:
        PlanError: it is negative or too large.
    """
    if not 0 <= amount <= _FACTORS[1]:
        refuse(place, f"{amount} is not between 0 and {_FACTORS[1]}")


def check_shape(shape: Iterable[int], place: str) -> None:
    """Check the sizes of a tensor.

    Raises:
        PlanError: one is negative or too large.
    """
    if not all(0 <= size <= _MOST_SIZE for size in shape):
        refuse(place, f"a size is not between 0 and {_MOST_SIZE}")


def check_tensor(edit: TensorEdit, dtype: torch.dtype, place: str) -> None:
    """Check that what an edit says of a tensor fits together.

    Raises:
        PlanError: it does not.
    """
    check_shape(edit.new_shape, f"{place}new_shape")
    if edit.fill != "constant":
        check_factor(edit.scale, f"{place}scale")
    check_amount(abs(edit.offset), f"{place}offset")
    if edit.offset and not dtype.is_floating_point:
        refuse(f"{place}offset", f"{dtype} cannot hold what it is subtracted from")
    if edit.fan_in < 0:
        refuse(f"{place}fan_in", "it is negative")
    if edit.absorption is not None:
        check_factor(edit.absorption.gain, f"{place}absorption.gain")
        check_amount(edit.absorption.eps, f"{place}absorption.eps")
    if not edit.fill:
        _check_axes(edit, dtype, place)
    elif edit.axes or (edit.fill == "identity" and len(edit.new_shape) < 2):
        refuse(f"{place}fill", "it says all of the tensor, or has no diagonal")


def _check_axes(edit: TensorEdit, dtype: torch.dtype, place: str) -> None:
    """Check that the dims that are laid out anew make the new shape, of what the dtype holds."""
    shape = _regrouped(edit, f"{place}groups")
    if len({axis.dim for axis in edit.axes}) < len(edit.axes):
        refuse(f"{place}axes", "a dim is named twice")
    kinds = {run.kind for axis in edit.axes for run in axis.runs}
    inexact = dtype.is_floating_point or dtype.is_complex
    if not inexact and (edit.absorption is not None or not _FRACTIONS.isdisjoint(kinds)):
        refuse(f"{place}axes", f"{dtype} cannot hold what is drawn or divided")
    for index, axis in enumerate(edit.axes):
        shape = _grown(shape, axis, f"{place}axes.{index}.")
    if shape != edit.new_shape:
        refuse(f"{place}new_shape", f"the axes make {list(shape)}")


def _regrouped(edit: TensorEdit, place: str) -> tuple[int, ...]:
    """Return the shape of a tensor in its new number of convolution groups."""
    before, after = edit.groups
    if not 1 <= min(before, after) <= max(before, after) <= _MOST_SIZE:
        refuse(place, f"{before} and {after} are no numbers of groups")
    if before == after:
        return edit.shape
    if len(edit.shape) < 2 or edit.shape[0] % before:
        refuse(place, f"{list(edit.shape)} has not {before}")
    times, (rows, columns, *kernel) = -(-before // after), edit.shape
    return (after * times * (rows // before), times * columns, *kernel)


def _grown(shape: tuple[int, ...], axis: AxisEdit, place: str) -> tuple[int, ...]:
    """Return the shape of a tensor of which one dim is laid out anew."""
    if not 0 <= axis.dim < len(shape):
        refuse(f"{place}dim", f"{list(shape)} has no dim {axis.dim}")
    if axis.groups < 1 or (axis.groups > 1 and (axis.dim != 1 or shape[0] % axis.groups)):
        refuse(f"{place}groups", f"{list(shape)} has not {axis.groups}")
    old, new = shape[axis.dim] * axis.groups, sum(run.length for run in axis.runs)
    for index, run in enumerate(axis.runs):
        if run.start < 0 or run.length < 0 or run.start + run.length > _offered(run, old, new):
            refuse(f"{place}runs.{index}", "it takes positions that there are not")
    if new % axis.groups:
        refuse(f"{place}runs", f"{new} positions do not divide among {axis.groups} groups")
    return (*shape[: axis.dim], new // axis.groups, *shape[axis.dim + 1 :])


def _offered(run: Run, old: int, new: int) -> int:
    """Return how many positions a run can take from, in an axis of old and new ones."""
    if run.kind in _FROM_OLD:
        return old
    return new if run.kind in _DRAWN else run.start + run.length  # no more are drawn than are used


def check_attribute(edit: ModuleEdit, place: str, *, unties: bool = False) -> None:
    """Check an attribute's name and its values.

    Args:
        edit: the edit.
        place: what its fields are called before their names.
        unties: whether the step unties tensors; only then a flag is cleared.

    Raises:
        PlanError: no planner would set it so.
    """
    if edit.module and not is_name(edit.module):
        refuse(f"{place}module", f"{edit.module!r} is no name of a module")
    parts = edit.attribute.split(".")
    plain = all(part.isidentifier() and not part.startswith("__") for part in parts)
    if not plain or len(parts) > 2:
        refuse(f"{place}attribute", f"{edit.attribute!r} is no name of a plain attribute")
    if isinstance(edit.before, bool) or isinstance(edit.after, bool):
        tells = parts[-1] == "tie_word_embeddings" and edit.before is True and edit.after is False
        if not (unties and tells):
            refuse(f"{place}after", "no planner sets this flag")
        return
    if not _may_become(edit.before, edit.after):
        refuse(f"{place}after", f"{edit.before!r} cannot become {edit.after!r}")


def _may_become(before: object, after: object) -> bool:
    """Return whether a planner gives an attribute of one value the other."""
    if isinstance(before, tuple) and isinstance(after, tuple):
        if any(isinstance(item, str) for item in after):  # a kind for each of more blocks
            return {*after} <= {*before}
        return len(after) == len(before) and all(map(_may_become, before, after))
    if isinstance(before, str) or isinstance(after, str):
        return _is_padding(before) and _is_padding(after)
    if isinstance(after, (int, float)):
        return type(before) is type(after) and abs(after) <= _MOST_SIZE
    return False


def _is_padding(value: object) -> bool:
    """Return whether a value says how a convolution pads."""
    if isinstance(value, tuple):
        return all(isinstance(size, int) for size in value)
    return value in ("same", "valid")


def check_sizes(edit: SizeEdit, place: str) -> None:
    """Check the sizes of a call.

    Raises:
        PlanError: it takes none, or the new ones do not go with the old ones.
    """
    if not edit.at:
        _check_node(edit.node, f"{place}node")
    elif edit.node or not re.fullmatch(rf".*:{re.escape(edit.function)}(#\d+)?", edit.at):
        refuse(f"{place}at", f"{edit.at!r} is no line that makes such a call")
    if edit.function not in SIZED:
        refuse(f"{place}function", f"{edit.function!r} takes no sizes")
    if [size is None for size in edit.before] != [size is None for size in edit.after]:
        refuse(f"{place}after", "it has other sizes than before")
    if any(abs(size) > _MOST_SIZE for size in edit.after if size is not None):
        refuse(f"{place}after", "a size is too large")


def check_multiplier(multiplier: Multiplier, place: str) -> None:
    """Check a factor and the edge that it is for.

    Raises:
        PlanError: one of them is none.
    """
    _check_node(multiplier.producer, f"{place}producer")
    _check_node(multiplier.consumer, f"{place}consumer")
    check_factor(multiplier.factor, f"{place}factor")


def _check_node(name: str, place: str) -> None:
    """Check the name of a node of an fx graph."""
    if not name.isidentifier():
        refuse(place, f"{name!r} is no name of a node")
