"""Where each position of an old tensor is in the grown one: the edits of one tensor, read back.

The axes are looked at from the last that grew to the first. At each, what the plan says of the new
positions is compared (copies, twins, negatives, zeros, means), and then the positions that
continue old ones are kept. What is left in the end has the shape of the old tensor.

Nothing here is shared with what carries plans out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from fxgrow.errors import VerificationError, shown
from fxgrow.modules.bits import same_bits
from fxgrow.plan.edits import AxisEdit, TensorEdit
from fxgrow.verification.places import (
    AxisPlaces,
    Places,
    TwinColumns,
    along,
    back,
    first_of,
    old_size,
    take,
    twin_columns,
    wrong_along,
)

_UNITS = 32  # rounding units of what was summed
_SHORT = 16  # numbers in a row
_FEW = 4  # rounding units of what was multiplied


def refuse(name: str, how: str) -> NoReturn:
    """Refuse a tensor that is not as the plan lays it out.

    Raises:
        VerificationError: always.
    """
    raise VerificationError(
        f"{shown(name)} is not as the plan lays it out: {how}.",
        name=name,
        way_out="That is a fault of fxgrow, or of what changed the tensor since: please report it.",
    )


@dataclass(frozen=True)
class OldPart:
    """What of a grown tensor continues the old one.

    Attributes:
        tensor: in the shape of the old tensor (after its convolution groups were put together), but
            for positions that do not go on.
        spread: sums of the sizes of what was added up for each entry; None where nothing was.
        kept: for a dim of which not all old positions go on, those that do.
    """

    tensor: Tensor
    spread: Tensor | None = None
    kept: tuple[tuple[int, Places], ...] = ()


@dataclass(frozen=True)
class TensorCheck:
    """The check of one tensor.

    Attributes:
        name: of the tensor, for messages.
        edit: what was to happen to it.
        noise: new columns carry noise, so that they are neither zero nor twins.
        free: new entries were given other values since, such as statistics of data.
        exact: the tensor is as it was written; otherwise it was divided by a factor.
    """

    name: str
    edit: TensorEdit
    noise: bool = False
    free: bool = False
    exact: bool = True

    def old_part(self, tensor: Tensor) -> OldPart | None:
        """Return what continues the old tensor, or None if nothing does or that cannot be told.

        Args:
            tensor: the grown tensor.

        Raises:
            VerificationError: its shape or something new in it is not what the plan says.
        """
        if tuple(tensor.shape) != self.edit.new_shape:
            self._refuse(f"its shape is {tuple(tensor.shape)}, not {self.edit.new_shape}")
        if self.edit.fill:
            self._check_filled(tensor)
            return None
        self._check_cancelling(tensor)
        part = OldPart(tensor)
        for axis in reversed(self.edit.axes):
            found = self._before(part, axis)
            if found is None:
                return None
            part = found
        return part

    def _before(self, part: OldPart, axis: AxisEdit) -> OldPart | None:
        """Return what an axis had before it grew, after what is new along it was compared."""
        if axis.groups > 1 and part.kept:  # rows of groups that did not exist are gone
            return None
        tensor, dim = along(part.tensor, axis)
        places = AxisPlaces(axis, old_size(self.edit, axis))
        self._check_new(tensor, dim, axis, places)
        goes_on = places.goes_on
        if not len(goes_on) or (axis.groups > 1 and len(goes_on) < places.size):
            return None
        base = places.before(tensor, dim)
        self._check_old(tensor, dim, axis, places, base)
        spread = part.spread
        if spread is not None or len(places.share[0]):
            sizes = tensor.abs() if spread is None else along(spread, axis)[0]
            spread = back(places.before(sizes, dim), axis)
            if part.spread is None:
                spread = spread + _largest(part.tensor, axis)
        lost = len(goes_on) < places.size
        if lost and not self.edit.source and self.edit.groups[0] == self.edit.groups[1]:
            gone = np.setdiff1d(np.arange(places.size), goes_on)
            self._refuse(f"old positions {gone[:3].tolist()} along dim {axis.dim} do not go on")
        kept = (*part.kept, (axis.dim, goes_on)) if lost else part.kept
        return OldPart(back(base, axis), spread, kept)

    def _check_new(self, tensor: Tensor, dim: int, axis: AxisEdit, places: AxisPlaces) -> None:
        """Compare what was drawn, and constants."""
        if self.free:
            return
        new, draws = places.of("new")
        minus, negated = places.of("minus")
        for at in (new, minus):
            if len(at) and not bool(torch.isfinite(take(tensor, dim, at)).all()):
                self._refuse(f"new entries along dim {axis.dim} are not finite")
        if self.noise and axis.role == "reader":
            return
        for kind, value in (("zero", 0), ("one", 1)):
            at, _ = places.of(kind)  # type: ignore[arg-type]
            wrong = take(tensor, dim, at) != value
            if len(at) and bool(wrong.any()):
                self._refuse_at(at[wrong_along(wrong, dim)], axis, f"should be {kind}")
        whole = self._without_cancelling(tensor, axis)
        most = max(int(draws.max(initial=-1)), int(negated.max(initial=-1)))
        first = first_of(draws, new, most + 1)
        self._check_twins(whole, dim, axis, new, first[draws], negative=False)
        drawn = first[negated] >= 0
        self._check_twins(whole, dim, axis, minus[drawn], first[negated[drawn]], negative=True)
        lone, lone_draws = minus[~drawn], negated[~drawn]
        again = first_of(lone_draws, lone, len(first))
        self._check_twins(whole, dim, axis, lone, again[lone_draws], negative=False)

    def _check_old(
        self, tensor: Tensor, dim: int, axis: AxisEdit, places: AxisPlaces, base: Tensor
    ) -> None:
        """Compare further copies of old positions, and means of them."""
        copies, sources = places.of("old")
        self._check_twins(tensor, dim, axis, copies, places.first[sources], negative=False)
        both = np.intersect1d(sources, places.share[1])
        if len(both):
            at = np.searchsorted(places.goes_on, both)
            sums, spread = (take(places.sums(t, dim), dim, at) for t in (tensor, tensor.abs()))
            want, size = take(base, dim, at), spread + tensor.abs().max()
            if not bool(close(sums.to(tensor.dtype), want, size).all()):
                self._refuse_at(places.share[0], axis, "should add up to what they are shares of")
        if self.free or (self.noise and axis.role == "reader"):
            return
        borrowed, sources = places.of("borrowed")
        if len(borrowed):
            found = np.searchsorted(places.goes_on, sources)
            known = places.goes_on[found % len(places.goes_on)] == sources
            own, theirs = take(tensor, dim, borrowed[known]), take(base, dim, found[known])
            if not len(places.share[0]):
                self._compare(own, theirs.to(tensor.dtype), dim, axis, borrowed[known])
            elif not bool(close(own, theirs, tensor.abs().max().expand_as(own)).all()):
                self._refuse_at(borrowed[known], axis, "should be copies of old positions")
        mean, _ = places.of("mean")
        if len(mean) and len(places.goes_on) == places.size:
            exact = base.double()
            want, size = exact.mean(dim, keepdim=True), exact.abs().mean(dim, keepdim=True)
            off = (take(tensor, dim, mean).double() - want).abs()
            if bool((off > _UNITS * _unit(tensor.dtype) * size + _least(tensor.dtype)).any()):
                self._refuse_at(mean, axis, "should be the mean of the old positions")

    def _check_twins(
        self, tensor: Tensor, dim: int, axis: AxisEdit, at: Places, like: Places, *, negative: bool
    ) -> None:
        """Compare positions with those that they should be equal to, or the negatives of."""
        others = at != like
        at, like = at[others], like[others]
        if len(at):
            want = take(tensor, dim, like)
            want = torch.neg(want) if negative else want
            self._compare(take(tensor, dim, at), want, dim, axis, at)

    def _compare(self, have: Tensor, want: Tensor, dim: int, axis: AxisEdit, at: Places) -> None:
        """Compare slices along a dim."""
        if same_bits(have, want):
            return
        if self.exact:
            wrong = ~((have == want) | (have.isnan() & want.isnan()))
        else:
            wrong = ~close(have, want.double())
        wrong_at = at[wrong_along(wrong, dim)]
        if len(wrong_at):
            self._refuse_at(wrong_at, axis, "should be equal to others, or their negatives")

    def _check_filled(self, tensor: Tensor) -> None:
        """Compare a tensor that the plan fills without runs."""
        if self.free:
            return
        if self.edit.fill == "constant":
            value = torch.tensor(self.edit.scale, dtype=tensor.dtype, device=tensor.device)
            if not bool((tensor == value).all()):
                self._refuse(f"it should be {self.edit.scale:g} everywhere")
            return
        rows = torch.arange(tensor.shape[0], device=tensor.device)
        middle = tensor
        for size in tensor.shape[2:]:
            middle = middle.select(2, size // 2)
        ones = middle[rows, rows % tensor.shape[1]]
        if not bool((ones == 1).all()) or int(tensor.count_nonzero()) != len(rows):
            self._refuse("it should be the identity")

    @cached_property
    def _cancelling(self) -> list[tuple[AxisEdit, AxisEdit, TwinColumns]]:
        """The writers whose new rows read twins of a reader with opposite signs."""
        readers = [axis for axis in self.edit.axes if axis.role == "reader"]
        writers = [axis for axis in self.edit.axes if axis.role == "writer"]
        found = [(r, w, twin_columns(r, old_size(self.edit, r))) for r in readers for w in writers]
        return [(r, w, twins) for r, w, twins in found if len(twins.targets)]

    def _check_cancelling(self, tensor: Tensor) -> None:
        """Compare what new rows read of twins."""
        if self.free:
            return
        for reader, writer, twins in self._cancelling:
            if writer.groups > 1:
                continue
            rows, _ = AxisPlaces(writer, 0).of("new")
            table = tensor.movedim((writer.dim, reader.dim), (0, 1))
            height = table.shape[0] // reader.groups
            for group, (plus, minus) in twins.pairs.items():
                own = rows[rows // height == group]
                part = take(table, 0, own) if len(own) else table[:0]
                have, want = take(part, 1, minus), torch.neg(take(part, 1, plus))
                if not same_bits(have, want) and not bool((have == want).all()):
                    wrong = own[wrong_along(have != want, 0)]
                    self._refuse_at(wrong, writer, "should read twins with opposite signs")

    def _without_cancelling(self, tensor: Tensor, axis: AxisEdit) -> Tensor:
        """Return a tensor without the columns in which twin rows differ from group to group."""
        for reader, writer, twins in self._cancelling:
            if writer is axis and not twins.same_for_all and writer.groups == 1:
                width = tensor.shape[reader.dim]
                tensor = take(tensor, reader.dim, np.setdiff1d(np.arange(width), twins.targets))
        return tensor

    def _refuse_at(self, at: Places, axis: AxisEdit, how: str) -> NoReturn:
        where = ", ".join(map(str, at[:3].tolist())) + (" and others" if len(at) > 3 else "")
        self._refuse(f"new positions {where} along dim {axis.dim} {how}")

    def _refuse(self, how: str) -> NoReturn:
        refuse(self.name, how)


def close(have: Tensor, want: Tensor, spread: Tensor | None = None) -> Tensor:
    """Return which entries are as wanted up to rounding, of ``have`` and of what was added up.

    Args:
        have: of any floating-point dtype.
        want: in float64.
        spread: sums of the sizes of what was added up for each entry.
    """
    tolerance = _FEW * want.abs()
    if spread is not None:
        tolerance = tolerance + _UNITS * spread.double()
    off = (have.double() - want).abs()
    same = (have == want.to(have.dtype)) | (have.isnan() & want.isnan())
    return same | (off <= _unit(have.dtype) * tolerance + _least(have.dtype))


def _largest(tensor: Tensor, axis: AxisEdit) -> Tensor:
    """Return the largest size of a number in each row, or in all where rows are short.

    Noise that parts the shares of a column may be larger than they are, and rounds by its own size.
    """
    sizes = tensor.abs()
    if axis.dim == 0 or sizes[0].numel() < _SHORT:
        return sizes.max()
    return sizes.amax(tuple(range(1, sizes.ndim)), keepdim=True)


def regrouped(tensor: Tensor, groups: tuple[int, int]) -> Tensor:
    """Return a convolution's weight with its groups put into fewer or more, zeros between them."""
    before, after = groups
    if before == after:
        return tensor
    together = -(-before // after)
    rows, width = tensor.shape[0] // before, tensor.shape[1]
    found = tensor.new_zeros((after * together * rows, together * width, *tensor.shape[2:]))
    for group in range(before):
        left = group % together * width
        own = slice(group * rows, (group + 1) * rows)
        found[own, left : left + width] = tensor[own]
    return found


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def _least(dtype: torch.dtype) -> float:
    """Return how far off the smallest numbers may be."""
    return 4 * torch.finfo(dtype).smallest_normal * _unit(dtype) if _unit(dtype) else 0.0
