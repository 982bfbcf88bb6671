"""Lay the dims of one tensor out anew, by the runs of their edits: old, drawn and other entries.

Numbers that are drawn or summed are computed on the CPU, so that they are the same to the bit
whichever device a tensor is on.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fxgrow.errors import PlanError
from fxgrow.labels.forest import IntArray
from fxgrow.plan.deviations import Place, deviation_of
from fxgrow.plan.drawing import draw
from fxgrow.plan.edits import AxisEdit, Run, RunKind, TensorEdit
from fxgrow.plan.init import (
    Init,
    chosen_init,
    copy_normal,
    copy_uniform,
    normal_rows,
    standard_normal,
    zeros,
)

_MOST_RUNS = 8  # of columns, beyond which they are taken all at once by their indices


@dataclass(frozen=True)
class Draws:
    """Where the new numbers of one tensor come from.

    Attributes:
        name, seed: what they depend on, with the role of what is drawn.
        fan_in: of the layer after growth.
        fill: the init.
        noise: standard deviation of noise on new columns, relative to theirs.
        split_noise: likewise on the shares of copied ones.
        between: what stands between convolution groups that become one.
        once: no other tensor gets what is drawn, so that it need not be kept.
    """

    name: str
    seed: int
    fan_in: int
    fill: Init
    noise: float = 0.0
    split_noise: float = 0.0
    between: Init = zeros
    once: bool = True
    _drawn: dict[str, Tensor] = field(default_factory=dict)

    def fresh(
        self, shape: tuple[int, ...], like: Tensor, place: Place, room: Tensor | None
    ) -> Tensor:
        """Return new weights by the init that was asked for: in ``room``, where that will do."""
        return self._draw(shape, like, place, self.fill, room)

    def noise_on(self, new: Tensor, place: Place) -> Tensor:
        """Return normal noise for new columns, with their own deviation, that of all together."""
        deviation = deviation_of(new.cpu())
        return deviation * self._draw(tuple(new.shape), new, place, standard_normal)

    def between_shares(self, shape: tuple[int, ...], like: Tensor, place: Place) -> Tensor:
        """Return normal noise for shares of columns, with the deviation of each output's entries.

        Under ``copy_uniform``, whose plans may be older than that law, with that of ``like``.
        """
        whole = chosen_init(self.fill, replace(place, role="reader")) is copy_uniform
        return self._draw(shape, like, place, copy_normal if whole else normal_rows)

    def _draw(
        self,
        shape: tuple[int, ...],
        like: Tensor,
        place: Place,
        law: Init,
        room: Tensor | None = None,
    ) -> Tensor:
        """Return what was drawn for this role before, so that every tensor gets the same."""
        found = self._drawn.get(place.role)
        if found is None:
            room = room if self.once else None
            found = draw(shape, like, law, self.fan_in, seed=self.seed, place=place, room=room)
            if not self.once:
                self._drawn[place.role] = found
        return found.to(like)


def extended(tensor: Tensor, edit: TensorEdit, draws: Draws) -> Tensor:
    """Return a tensor with all its dims laid out as an edit says, one after the other.

    Where a later dim keeps its old positions in front, those are written to where they end up.
    """
    if not edit.axes:
        return tensor
    whole = tensor.new_empty(edit.new_shape)
    sizes = tuple(tensor.shape)
    for index, axis in enumerate(edit.axes):
        later = edit.axes[index + 1 :]
        out = None
        if all(_keeps_front(after, sizes[after.dim]) for after in later):
            out = whole
            for after in later:
                out = out.narrow(after.dim, 0, sizes[after.dim])
        tensor = _extend(tensor, axis, out, _outputs(edit, axis), draws)
    _cancel_in_new_rows(tensor, edit.axes)
    return tensor


def _keeps_front(edit: AxisEdit, size: int) -> bool:
    """Return whether the old positions of a dim stay where they are, before all others."""
    return edit.groups == 1 and edit.runs[:1] == (Run("old", 0, size),)


def _outputs(edit: TensorEdit, axis: AxisEdit) -> tuple[int, ...]:
    """Return the dim whose index tells the output that an entry of a reader contributes to.

    The fan_in tells which it is: the first but the reader's own whose size is all entries over it.
    """
    if axis.role != "reader":
        return ()
    total, sizes = math.prod(edit.new_shape), enumerate(edit.new_shape)
    others = [(dim, size * edit.fan_in == total) for dim, size in sizes if dim != axis.dim]
    return tuple(dim for dim, _ in sorted(others, key=lambda other: not other[1])[:1])


def _extend(
    tensor: Tensor, edit: AxisEdit, out: Tensor | None, outputs: tuple[int, ...], draws: Draws
) -> Tensor:
    """Return ``tensor`` with one dim grown: in ``out``, where that is given."""
    place = Place(draws.name, f"{edit.role}{edit.dim}", edit.dim, outputs)
    if edit.groups == 1:
        return _extend_dim(tensor, edit, out, place, draws)
    # (G·O, I, …) -> (G, O, I, …) -> (G·I, O, …): the axis becomes the first dim
    split = _unflatten(tensor, edit.groups).transpose(1, 2).flatten(0, 1)
    place = replace(place, dim=0, outputs=(1,) if outputs else (), groups=edit.groups)
    flat = _unflatten(_extend_dim(split, edit, None, place, draws), edit.groups).transpose(1, 2)
    return flat.flatten(0, 1) if out is None else out.copy_(flat.reshape(out.shape))


def _unflatten(tensor: Tensor, groups: int) -> Tensor:
    """Return ``tensor`` with its first dim split into (groups, rest)."""
    return tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def _extend_dim(
    tensor: Tensor, edit: AxisEdit, out: Tensor | None, place: Place, draws: Draws
) -> Tensor:
    """Return ``tensor`` with the dim of a place laid out as an edit's runs say."""
    dim, shape = place.dim, list(tensor.shape)
    shape[dim] = sum(run.length for run in edit.runs)
    if out is None:
        out = tensor.new_empty(shape)
    # What was laid out before may be there already: see :func:`extended`.
    in_place = tensor.data_ptr() == out.data_ptr()
    fresh: Tensor | None = None
    slices = [run.start + run.length for run in edit.runs if run.kind in ("new", "minus")]
    if slices:
        shape[dim] = max(slices)
        told = replace(place, group_of=_groups_of_slices(edit, max(slices)))
        fresh = draws.fresh(tuple(shape), tensor, told, _room(out, edit, dim, max(slices)))
    shares = _shares(tensor, edit, place, draws)
    position = shared = 0
    for run in edit.runs:
        target = out.narrow(dim, position, run.length)
        if run.kind == "share":
            target.copy_(shares.narrow(dim, shared, run.length))
            shared += run.length
        elif not (in_place and run.kind == "old" and run.start == position):
            _fill_run(target, run, tensor, fresh, dim)
        position += run.length
    if draws.noise and edit.role == "reader" and not out.is_meta:
        _add_noise(out, edit, place, draws)
    return out


def _add_noise(out: Tensor, edit: AxisEdit, place: Place, draws: Draws) -> None:
    """Add noise to the new columns of a reader, in place."""
    ends = itertools.accumulate((run.length for run in edit.runs), initial=0)
    new = [
        at
        for run, start in zip(edit.runs, ends, strict=False)
        if run.kind not in ("old", "share")
        for at in range(start, start + run.length)
    ]
    if new:
        index = torch.tensor(new, device=out.device)
        columns = out.index_select(place.dim, index)
        noise = draws.noise_on(columns, replace(place, role=f"noise{edit.dim}"))
        out.index_copy_(place.dim, index, columns + draws.noise * noise)


def _room(out: Tensor, edit: AxisEdit, dim: int, count: int) -> Tensor | None:
    """Return where all drawn slices come first, in their order; None if there is no such place."""
    position = 0
    for run in edit.runs:
        if run == Run("new", 0, count):
            return out.narrow(dim, position, count)
        position += run.length
    return None


def _groups_of_slices(edit: AxisEdit, count: int) -> tuple[int, ...]:
    """Return the convolution group that each drawn slice is first read in; () without groups."""
    if edit.groups == 1:
        return ()
    size = sum(run.length for run in edit.runs) // edit.groups
    found = np.zeros(count, dtype=np.int64)
    for kind in ("minus", "new"):  # where a slice is of both, it is of what comes last
        start, at = positions_of(edit, kind)[::-1].T
        found[start] = at // size
    return tuple(found.tolist())


def _shares(tensor: Tensor, edit: AxisEdit, place: Place, draws: Draws) -> Tensor:
    """Return old columns split unequally over their copies, one after the other along a dim.

    The noise that makes the shares of one column unequal sums to zero, so that the function is
    kept and yet copies part at the first step; equal shares would stay tied for ever.
    """
    sources = [
        s for r in edit.runs if r.kind == "share" for s in range(r.start, r.start + r.length)
    ]
    if not sources:
        return tensor
    dim, device = place.dim, tensor.device
    index = torch.tensor(sources)
    counts = torch.bincount(index, minlength=tensor.shape[dim]).to(tensor.dtype)
    shape = [1] * tensor.ndim
    shape[dim] = -1
    shares = tensor.index_select(dim, index.to(device)) / counts[index].view(shape).to(device)
    if draws.split_noise and not tensor.is_meta:
        size = max(tensor.shape[dim] // edit.groups, 1)
        groups = tuple(source // size for source in sources) if edit.groups > 1 else ()
        told = replace(place, role=f"split{dim}", group_of=groups)
        drawn = draws.between_shares(tuple(shares.shape), tensor, told)
        noise = draws.split_noise * drawn.cpu()
        total = torch.zeros_like(tensor, device="cpu").index_add_(dim, index, noise)
        shares += (noise - (total / counts.clamp(min=1).view(shape)).index_select(dim, index)).to(
            device
        )
    return shares


def _fill_run(target: Tensor, run: Run, old: Tensor, fresh: Tensor | None, dim: int) -> None:
    """Write one run of positions."""
    if run.kind == "zero":
        target.zero_()
    elif run.kind == "one":
        target.fill_(1)
    elif run.kind == "mean":
        target.copy_((old if old.is_meta else old.cpu()).mean(dim, keepdim=True))
    elif run.kind in ("old", "borrowed"):
        target.copy_(old.narrow(dim, run.start, run.length))
    elif fresh is None:
        raise PlanError("the plan reads a drawn slice that it never draws.")
    else:
        source = fresh.narrow(dim, run.start, run.length)
        if run.kind != "new":
            torch.neg(source, out=target)
        elif source.data_ptr() != target.data_ptr() or target.is_meta:
            target.copy_(source)


def _cancel_in_new_rows(tensor: Tensor, axes: tuple[AxisEdit, ...]) -> None:
    """Let new rows read twins with opposite signs, in place, as old rows do by Z, −Z.

    Otherwise new channels would feed new ones, and since no fresh norm holds them down, they would
    grow exponentially with depth and bury the old channels in the rounding of twins.
    """
    readers, writers = ([a for a in axes if a.role == role] for role in ("reader", "writer"))
    for reader, writer in itertools.product(readers, writers):
        new, minus = (positions_of(reader, kind) for kind in ("new", "minus"))
        rows = positions_of(writer, "new")[:, 1]
        if not (len(new) and len(minus) and len(rows)):
            continue
        plus = np.full(max(new[:, 0].max(), minus[:, 0].max()) + 1, -1)
        plus[new[:, 0]] = new[:, 1]
        twins = np.stack([plus[minus[:, 0]], minus[:, 1]], 1)
        twins = twins[twins[:, 0] >= 0]
        table = tensor.movedim((writer.dim, reader.dim), (0, 1))
        height, width = table.shape[0] // reader.groups, table.shape[1]
        for group in range(reader.groups):
            # Rows of a group read its columns alone.
            own = twins[twins[:, 1] // width == group] % width
            for first, count in _successive(rows[rows // height == group][:, None]):
                _cancel(table.narrow(0, first[0], count), own)


def _successive(positions: IntArray) -> list[tuple[list[int], int]]:
    """Return the runs in which all columns of positions rise by one: where each begins, how long.

    Args:
        positions: shape (positions, columns).
    """
    if not len(positions):
        return []
    breaks = np.flatnonzero((np.diff(positions, axis=0) != 1).any(1)) + 1
    bounds = itertools.pairwise([0, *breaks.tolist(), len(positions)])
    return [(positions[low].tolist(), high - low) for low, high in bounds]


def _cancel(rows: Tensor, twins: IntArray) -> None:
    """Let rows read pairs of columns with opposite signs, in place."""
    runs = _successive(twins)
    if len(runs) > _MOST_RUNS:
        source, target = torch.from_numpy(twins).to(rows.device).unbind(1)
        rows[:, target] = -rows[:, source]
        return
    for (source_at, target_at), count in runs:
        torch.neg(rows.narrow(1, source_at, count), out=rows.narrow(1, target_at, count))


def positions_of(edit: AxisEdit, kind: RunKind) -> IntArray:
    """Return the drawn slice and the position of all that is of one kind, shape (count, 2)."""
    ends = itertools.accumulate((run.length for run in edit.runs), initial=0)
    found = [
        np.arange(run.length)[:, None] + (run.start, position)
        for run, position in zip(edit.runs, ends, strict=False)
        if run.kind == kind
    ]
    return np.concatenate(found) if found else np.zeros((0, 2), dtype=np.int64)
