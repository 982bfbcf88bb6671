"""Carry one edit out: an old tensor in, a new one out. Nothing is decided here.

Weights are laid out by :func:`grow_tensor`, and what goes with a weight without being one (an
average that an optimizer keeps) by :func:`lay_out`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from fxgrow.errors import PlanError, shown
from fxgrow.modules.standin import first_line
from fxgrow.plan.edits import AxisEdit, Run, RunKind, TensorEdit
from fxgrow.plan.init import Init, copy_normal, draw, identity_, init_of_plan, zeros
from fxgrow.plan.schema import Plan

Lookup: TypeAlias = Callable[[str], Tensor]


@dataclass(frozen=True)
class _Draws:
    """Where the new numbers of one tensor come from."""

    name: str
    seed: int
    fan_in: int
    fill: Init
    noise: float = 0.0
    split_noise: float = 0.0
    between: Init = zeros  # what stands between convolution groups that become one
    _drawn: dict[str, Tensor] = field(default_factory=dict)

    def fresh(self, shape: tuple[int, ...], like: Tensor, role: str) -> Tensor:
        """Return new weights by the init that was asked for."""
        return self._draw(shape, like, role, self.fill)

    def normal(self, shape: tuple[int, ...], like: Tensor, role: str) -> Tensor:
        """Return normal noise with the standard deviation of ``like``."""
        return self._draw(shape, like, role, copy_normal)

    def _draw(self, shape: tuple[int, ...], like: Tensor, role: str, law: Init) -> Tensor:
        """Return what was drawn for this role before, so that every tensor gets the same."""
        if role not in self._drawn:
            self._drawn[role] = draw(
                shape, like, law, self.fan_in, seed=self.seed, name=self.name, role=role
            )
        return self._drawn[role].to(like)


def grow_tensor(
    plan: Plan,
    name: str,
    lookup: Lookup,
    init: Init | None = None,
    like: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the new tensor of an edited name; computed on the old tensor's device and dtype.

    Args:
        plan: the plan.
        name: a key of ``plan.tensors``.
        lookup: returns an old tensor by name.
        init: what fills new weights; None takes the registered init that the plan names.
        like: other old weights by name, whose new weights these get too: a moving average gets
            those of the model that it follows.

    Raises:
        PlanError: there is no such old tensor, it has another shape than the plan expects, or it
            cannot hold what the plan makes of it.
    """
    edit, drawing = plan.tensors[name], plan.request.drawing
    fill = init
    if fill is None:  # on the meta device nothing is drawn, so a plan's own code is not asked for
        old = _looked_up(lookup, edit.source or name)
        fill = copy_normal if old.is_meta else init_of_plan(drawing.init)
    draws = _Draws(name, drawing.seed, edit.fan_in, fill, drawing.noise, drawing.split_noise)
    if like is not None:
        _grow(edit, like.__getitem__, draws)
    return _grow(edit, lookup, draws)


def lay_out(edit: TensorEdit, old: Tensor, fill: Init) -> Tensor:
    """Return a tensor as an edit lays it out: for what is no weight itself but goes with one.

    Args:
        edit: without an absorption.
        old: the old values.
        fill: what new entries get; it must not depend on chance.

    Raises:
        PlanError: the old tensor has another shape than the edit expects.
    """
    return _grow(edit, lambda _: old, _Draws("", 0, edit.fan_in, fill, between=fill))


def _looked_up(lookup: Lookup, name: str) -> Tensor:
    """Return an old tensor.

    Raises:
        PlanError: there is none of that name.
    """
    try:
        return lookup(name)
    except KeyError as error:
        raise PlanError(
            f"there is no tensor {shown(name)}, which the plan takes up.",
            name=name,
            way_out="Apply the plan to the network it was made for.",
        ) from error


def _grow(edit: TensorEdit, lookup: Lookup, draws: _Draws) -> Tensor:
    """Return a tensor as an edit makes it.

    Raises:
        PlanError: it cannot be made so.
    """
    name = draws.name
    old = _looked_up(lookup, edit.source or name).detach()
    if tuple(old.shape) != edit.shape:
        raise PlanError(
            f"{shown(name)} has shape {tuple(old.shape)}, the plan expects {edit.shape}.",
            name=name,
            way_out="Apply the plan to the network it was made for.",
        )
    try:
        return _made(edit, old, lookup, draws)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, ArithmeticError, TypeError, ValueError) as error:
        raise PlanError(
            f"{shown(name)} cannot be made as the plan says: {first_line(error)}.", name=name
        ) from error


def _made(edit: TensorEdit, old: Tensor, lookup: Lookup, draws: _Draws) -> Tensor:
    """Return what an edit makes of an old tensor."""
    if edit.fill == "identity":
        return identity_(old.new_zeros(edit.new_shape))
    if edit.fill == "constant":
        return old.new_full(edit.new_shape, edit.scale)
    tensor = absorbed(edit, old, lookup) if edit.absorption else old
    if edit.scale != 1.0:
        tensor = tensor * edit.scale
    tensor = regroup(tensor, edit.groups, draws.between)
    for axis in edit.axes:
        tensor = _extend(tensor, axis, draws)
    _cancel_in_new_rows(tensor, edit.axes)
    if tensor is old:
        tensor = old.clone()
    return _laid_out(tensor.to(old.dtype))


def regroup(tensor: Tensor, groups: tuple[int, int], between: Init = zeros) -> Tensor:
    """Return a convolution's weight in another number of groups, made of as few as will do each.

    Args:
        tensor: the weight, shape ``(rows, columns of a group, *kernel)``. That of a transposed
            convolution has inputs for rows and outputs for columns.
        groups: how many there are and are to be. Where the first is no multiple of the second, the
            last groups have places, and rows, for groups that do not exist.
        between: what fills the entries that are in no old group.
    """
    before, after = groups
    if before == after:
        return tensor
    times, (height, width, *kernel) = -(-before // after), tensor.shape
    rows = height // before
    grouped = tensor.new_empty((after * times, rows, times, width, *kernel))
    between(grouped, tensor, 1)
    blocks = tensor.reshape(before, rows, width, *kernel)
    for place in range(times):
        grouped[place:before:times, :, place] = blocks[place::times]
    return grouped.reshape(after * times * rows, times * width, *kernel)


def _laid_out(tensor: Tensor) -> Tensor:
    """Return a tensor with the strides of a new one.

    A convolution takes the strides of its weight, even of dims of size one, for a memory format.
    """
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def absorbed(edit: TensorEdit, old: Tensor, lookup: Lookup) -> Tensor:
    """Return a norm's tensor after it took up a gain; see :class:`Absorption`."""
    absorption = edit.absorption
    if absorption is None or old.device.type == "meta":
        return old
    gain, eps = absorption.gain, absorption.eps
    if absorption.part == "running_mean":
        return old * gain
    shifted = _looked_up(lookup, absorption.variance).detach().double() + eps
    grown = gain * gain * shifted - eps
    if absorption.part == "running_var":
        return grown.clamp(min=0.0).to(old.dtype)
    correction = torch.where(grown < 0, eps**0.5 / (gain * shifted.sqrt()), 1.0)
    return (old.double() * correction).to(old.dtype)


def _extend(tensor: Tensor, edit: AxisEdit, draws: _Draws) -> Tensor:
    """Return ``tensor`` with one dim grown."""
    if edit.groups == 1:
        return _extend_dim(tensor, edit.dim, edit, draws)
    # (G·O, I, …) -> (G, O, I, …) -> (G·I, O, …): the axis becomes the first dim
    split = _unflatten(tensor, edit.groups).transpose(1, 2)
    flat = _extend_dim(split.flatten(0, 1), 0, edit, draws)
    return _unflatten(flat, edit.groups).transpose(1, 2).flatten(0, 1)


def _unflatten(tensor: Tensor, groups: int) -> Tensor:
    """Return ``tensor`` with its first dim split into (groups, rest)."""
    return tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def _extend_dim(tensor: Tensor, dim: int, edit: AxisEdit, draws: _Draws) -> Tensor:
    """Return ``tensor`` with ``dim`` laid out as the edit's runs say."""
    shape = list(tensor.shape)
    shape[dim] = sum(run.length for run in edit.runs)
    out = tensor.new_empty(shape)
    fresh: Tensor | None = None
    slices = [run.start + run.length for run in edit.runs if run.kind in ("new", "minus")]
    if slices:
        shape[dim] = max(slices)
        fresh = draws.fresh(tuple(shape), tensor, f"{edit.role}{edit.dim}")
    shares = _shares(tensor, dim, edit, draws)
    position = shared = 0
    for run in edit.runs:
        target = out.narrow(dim, position, run.length)
        position += run.length
        if run.kind == "share":
            target.copy_(shares.narrow(dim, shared, run.length))
            shared += run.length
        else:
            _fill_run(target, run, tensor, fresh, dim)
        if draws.noise and edit.role == "reader" and run.kind not in ("old", "share"):
            role = f"noise{edit.dim}@{position}"
            target += draws.noise * draws.normal(tuple(target.shape), tensor, role)
    return out


def _shares(tensor: Tensor, dim: int, edit: AxisEdit, draws: _Draws) -> Tensor:
    """Return old columns split unequally over their copies, one after the other along ``dim``.

    The noise that makes the shares of one column unequal sums to zero, so that the function is
    kept and yet copies part at the first step; equal shares would stay tied for ever.
    """
    sources = [
        s for r in edit.runs if r.kind == "share" for s in range(r.start, r.start + r.length)
    ]
    if not sources:
        return tensor
    index = torch.tensor(sources)
    counts = torch.bincount(index, minlength=tensor.shape[dim]).to(tensor)
    index = index.to(tensor.device)
    shape = [1] * tensor.ndim
    shape[dim] = -1
    whole = tensor.index_select(dim, index)
    shares = whole / counts[index].view(shape)
    if draws.split_noise:
        noise = draws.split_noise * draws.normal(tuple(whole.shape), tensor, f"split{dim}")
        total = torch.zeros_like(tensor).index_add_(dim, index, noise)
        shares += noise - (total / counts.clamp(min=1).view(shape)).index_select(dim, index)
    return shares


def _fill_run(target: Tensor, run: Run, old: Tensor, fresh: Tensor | None, dim: int) -> None:
    """Write one run of positions."""
    if run.kind == "zero":
        target.zero_()
    elif run.kind == "one":
        target.fill_(1)
    elif run.kind == "mean":
        target.copy_(old.mean(dim, keepdim=True))
    elif run.kind in ("old", "borrowed"):
        target.copy_(old.narrow(dim, run.start, run.length))
    elif fresh is None:
        raise PlanError("the plan reads a drawn slice that it never draws.")
    else:
        source = fresh.narrow(dim, run.start, run.length)
        if run.kind == "new":
            target.copy_(source)
        else:
            torch.neg(source, out=target)


def _cancel_in_new_rows(tensor: Tensor, axes: tuple[AxisEdit, ...]) -> None:
    """Let new rows read twins with opposite signs, in place, as old rows do by Z, −Z.

    Otherwise new channels would feed new ones, and since no fresh norm holds them down, they would
    grow exponentially with depth and bury the old channels in the rounding of twins.
    """
    readers, writers = ([a for a in axes if a.role == role] for role in ("reader", "writer"))
    for reader, writer in itertools.product(readers, writers):
        plus = dict(_positions(reader, "new"))
        twins = [(plus[draw], at) for draw, at in _positions(reader, "minus") if draw in plus]
        table = tensor.movedim((writer.dim, reader.dim), (0, 1))
        height, width = table.shape[0] // reader.groups, table.shape[1]
        rows: dict[int, list[list[int]]] = {}  # by the group whose columns alone they read
        columns: dict[int, list[tuple[int, int]]] = {}
        for plus_at, minus_at in twins:
            columns.setdefault(minus_at // width, []).append((plus_at % width, minus_at % width))
        for _, at in _positions(writer, "new") if columns else ():
            rows.setdefault(at // height, []).append([at])
        for group in rows.keys() & columns.keys():
            index = torch.tensor(rows[group], device=tensor.device)
            source, target = torch.tensor(columns[group], device=tensor.device).unbind(1)
            table[index, target] = -table[index, source]


def _positions(edit: AxisEdit, kind: RunKind) -> Iterator[tuple[int, int]]:
    """Yield the drawn slice and the position of all that is of one kind."""
    position = 0
    for run in edit.runs:
        if run.kind == kind:
            yield from ((run.start + i, position + i) for i in range(run.length))
        position += run.length
