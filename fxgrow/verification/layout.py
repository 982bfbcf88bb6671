"""Whether every entry of every tensor is where a plan puts it, told from old and new values alone.

No example reaches all rows of a table, or all experts, so that comparing outputs cannot tell. This
compares the tensors themselves, with code that shares nothing with what carries plans out: old
positions go on with their factors, copies are equal, shares add up to what they are shares of,
twins are equal and read with opposite signs, constants are what they should be, and what was drawn
is finite.

A plan of several steps is read back from its end: what the last step let go on is what the step
before it made, and so forth, until what is left must be the old tensors. What a norm took up in a
step that is not the last is not followed further back; planners make no such steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxgrow.modules.bits import first_difference, pieces, same_bits
from fxgrow.plan.edits import TensorEdit
from fxgrow.plan.names import names_after
from fxgrow.plan.schema import Plan
from fxgrow.verification.normed import parts_of, put_together
from fxgrow.verification.positions import OldPart, TensorCheck, close, refuse, regrouped


@dataclass(frozen=True)
class _Held:
    """A tensor that is known after some step.

    Attributes:
        tensor: its values.
        exact: whether they are as they were made, and not divided by a factor.
        free: new entries have other values than the plan says.
        spread: the sizes of what later steps' shares add up to, of the shape of the tensor.
    """

    tensor: Tensor
    exact: bool = True
    free: bool = False
    spread: Tensor | None = None


def check_layout(
    plan: Plan,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    free: Collection[str] = (),
) -> None:
    """Return if tensors are the old ones as a plan lays them out, in all their entries.

    Args:
        plan: the plan.
        before: the old tensors by name: of a module, or of a state_dict.
        after: the new ones. Others than the plan makes of ``before`` are not looked at.
        free: names of tensors whose new entries were given other values since (statistics of
            data); only their old positions are compared.

    Raises:
        VerificationError: one of them is not; the message names the tensor and the positions.

    Complexity: about one pass over the tensors, one at a time.
    """
    made, became = parts_of(plan, list(before))
    before, after = put_together(before, made), put_together(after, became)
    lengths = {parts.length for parts in became}
    directions = {parts.direction for parts in became}
    names = [list(before)]
    for step in plan.steps:
        names.append([name for name, _, _ in names_after(names[-1], step)])
    held: dict[str, _Held | None] = {
        name: _Held(after[name], exact=name not in directions, free=name in free)
        for name in names[-1]
        if name in after
    } | dict.fromkeys(lengths)
    for index, step in reversed(list(enumerate(plan.steps))):
        held = _StepCheck(step, names[index], before if index == 0 else None).run(held)


@dataclass(frozen=True)
class _StepCheck:
    """The check of one step.

    Attributes:
        step: the step.
        names: of the tensors before it.
        before: those; None where they are to be found from what the step made of them.
    """

    step: Plan
    names: list[str]
    before: Mapping[str, Tensor] | None

    def run(self, after: Mapping[str, _Held | None]) -> dict[str, _Held | None]:
        """Compare what the step made, and return what it was made of where that is not known.

        Args:
            after: what is known of the tensors after the step.

        Raises:
            VerificationError: a tensor is not as the step makes it.
        """
        known, moved = set(self.names), names_after(self.names, self.step)
        found: dict[str, _Held | None] = {}
        if self.before is not None:
            found = {name: _Held(tensor) for name, tensor in self.before.items()}
        moved = sorted(moved, key=lambda entry: entry[2])  # what is new is a copy of what was found
        for name, old, is_new in moved:
            if name not in after:
                refuse(name, "it is missing")
            held, edit = after[name], self._edit_of(name, known)
            if held is None:
                found.setdefault(old, None)
                continue
            source = old if edit is None or not edit.source else edit.source
            part = _part(self.step, name, edit, held)
            if part is not None and (self.before is not None or is_new):
                _check_values(name, edit, held, part, found.get(source), found)
            elif self.before is None and old not in found:
                found[old] = None if part is None else _undone(edit, held, part)
        return found

    def _edit_of(self, name: str, known: Collection[str]) -> TensorEdit | None:
        """Return how a tensor was to change; None if not, or if it is not made of what there is."""
        first = self.step.aliases.get(name, name)
        edit = self.step.tensors.get(first)
        if edit is not None and edit.normed is not None:  # the weight is in its direction's place
            edit = replace(edit, scale=self.step.tensors[edit.normed.length].scale)
        return edit if edit is not None and (edit.source or first) in known else None


def _part(step: Plan, name: str, edit: TensorEdit | None, held: _Held) -> OldPart | None:
    """Return what of a tensor continues an old one; see :meth:`TensorCheck.old_part`."""
    if edit is None:
        return OldPart(held.tensor, held.spread)
    noise = step.request.drawing.noise != 0
    exact = held.exact and not edit.offset
    check = TensorCheck(name, edit, noise=noise, free=held.free, exact=exact)
    part = check.old_part(held.tensor + edit.offset if edit.offset else held.tensor)
    if part is None or held.spread is None or part.spread is not None:
        return part
    same = held.spread.shape == part.tensor.shape
    return replace(part, spread=held.spread if same else held.spread.max().expand_as(part.tensor))


def _check_values(
    name: str,
    edit: TensorEdit | None,
    held: _Held,
    part: OldPart,
    old: _Held | None,
    lookup: Mapping[str, _Held | None],
) -> None:
    """Compare what continues an old tensor with it.

    Raises:
        VerificationError: an entry differs.
    """
    if old is None or old.tensor.is_meta or held.tensor.is_meta:
        return
    base = old.tensor.detach()
    if held.tensor.dtype != base.dtype:
        refuse(name, f"it is {held.tensor.dtype}, and was {base.dtype}")
    base, spread = _expected(name, edit, base, part, lookup)
    if part.tensor.shape != base.shape:
        refuse(name, f"its old part is {tuple(part.tensor.shape)}, not {tuple(base.shape)}")
    if _is_plain(edit) and part.spread is None and held.exact and old.exact:
        if not same_bits(part.tensor, base):
            at = first_difference(part.tensor, base)
            _refuse_entry(name, part.tensor, base, at)
        return
    if not base.ndim:  # a scalar is a row of one
        base, part, spread = base[None], OldPart(part.tensor[None]), None
    for rows in pieces(base):
        have, want = part.tensor[rows].to(held.tensor.dtype), base[rows].double()
        off = ~close(have, want.to(have.device), None if spread is None else spread[rows])
        if bool(off.any()):
            _refuse_entry(name, have, want, off.nonzero()[0].tolist(), rows.start)


def _is_plain(edit: TensorEdit | None) -> bool:
    """Return whether an edit leaves old entries the values that they have."""
    return edit is None or (edit.scale == 1 and edit.absorption is None and not edit.offset)


def _expected(
    name: str,
    edit: TensorEdit | None,
    base: Tensor,
    part: OldPart,
    lookup: Mapping[str, _Held | None],
) -> tuple[Tensor, Tensor | None]:
    """Return what an old tensor becomes where it goes on, and how large the terms of it were.

    Raises:
        VerificationError: it has not the shape that the edit is for.
    """
    spread = part.spread
    if edit is not None:
        base = _fitting(base, edit, name)
        if not _is_plain(edit):
            base, sizes = _changed(base, edit, lookup)
            spread = sizes if spread is None or edit.offset else spread
        base = regrouped(base, edit.groups)
    for dim, places in part.kept:
        base = base.index_select(dim, torch.from_numpy(places).to(base.device))
    return base, spread


def _fitting(base: Tensor, edit: TensorEdit, name: str) -> Tensor:
    """Return an old tensor if it has the shape that the edit is for.

    Raises:
        VerificationError: it has another.
    """
    if tuple(base.shape) != edit.shape:
        refuse(name, f"what it is made from is {tuple(base.shape)}, not {edit.shape}")
    return base


def _refuse_entry(name: str, have: Tensor, want: Tensor, at: Iterable[int], above: int = 0) -> None:
    """Refuse a tensor for one entry of the old that goes on with another value.

    Raises:
        VerificationError: always.
    """
    place = tuple(at)
    shown = [place[0] + above, *place[1:]] if place else []
    refuse(
        name,
        f"the old entry {shown} should go on as {want[place].item():.9g} and is "
        f"{have[place].item():.9g}",
    )


def _changed(
    base: Tensor, edit: TensorEdit, lookup: Mapping[str, _Held | None]
) -> tuple[Tensor, Tensor | None]:
    """Return old values with their factors in float64, and the sizes of what was added up."""
    value, sizes = base.double() + edit.offset, None
    taken = edit.absorption
    if taken is not None:
        variance = lookup.get(taken.variance)
        if taken.part == "running_mean":
            value = value * taken.gain
        elif variance is not None:
            shifted = variance.tensor.detach().double() + taken.eps
            grown = taken.gain**2 * shifted - taken.eps
            if taken.part == "running_var":
                value = grown.clamp(min=0)
                sizes = taken.gain**2 * shifted + taken.eps
            else:
                factor = taken.eps**0.5 / (taken.gain * shifted.sqrt())
                value = torch.where(grown < 0, value * factor, value)
    if edit.offset:  # it rounds by the size of what it was subtracted from
        sizes = (value.abs() if sizes is None else sizes) + abs(edit.offset)
    return value * edit.scale, None if sizes is None else sizes * abs(edit.scale)


def _undone(edit: TensorEdit | None, held: _Held, part: OldPart) -> _Held | None:
    """Return what a step made a tensor of, or None where that cannot be told."""
    if edit is None:
        return held
    if edit.absorption is not None or edit.scale == 0 or part.kept:
        return None
    tensor = _ungrouped(part.tensor, edit)
    exact = held.exact and edit.scale == 1 and part.spread is None and not edit.offset
    if edit.scale != 1 or edit.offset:
        tensor = tensor.double() / edit.scale - edit.offset
    spread = part.spread if part.tensor.shape == tensor.shape else None
    if spread is None and edit.offset:
        spread = part.tensor.abs()
    if spread is not None:
        spread = spread.double() / abs(edit.scale) + abs(edit.offset)
    return _Held(tensor.to(held.tensor.dtype), exact, held.free, spread)


def _ungrouped(tensor: Tensor, edit: TensorEdit) -> Tensor:
    """Return a convolution's weight in the groups that it had; see :func:`.regrouped`."""
    before, after = edit.groups
    if before == after:
        return tensor
    together = -(-before // after)
    rows, width = edit.shape[0] // before, edit.shape[1]
    found = tensor.new_empty(edit.shape)
    for group in range(before):
        left = group % together * width
        own = slice(group * rows, (group + 1) * rows)
        found[own] = tensor[own, left : left + width]
    return found
