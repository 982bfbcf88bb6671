"""Carry one edit out: an old tensor in, a new one out. Nothing is decided here.

Weights are laid out by :func:`grow_tensor`, and what goes with a weight without being one (an
average that an optimizer keeps) by :func:`lay_out`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from fxgrow.apply.axes import Draws, extended
from fxgrow.apply.normed import length_of, means_in, pointing, ratio_of
from fxgrow.errors import PlanError, shown
from fxgrow.modules.standin import first_line
from fxgrow.plan.absorption import absorbed_mean, absorbed_variance, absorbed_weight
from fxgrow.plan.edits import TensorEdit
from fxgrow.plan.init import Init, copy_normal, identity_, zeros
from fxgrow.plan.inits_by_side import init_for
from fxgrow.plan.schema import Plan

Lookup: TypeAlias = Callable[[str], Tensor]


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
        fill = copy_normal if old.is_meta else init_for(drawing)
    draws = Draws(
        name, drawing.seed, edit.fan_in, fill, drawing.noise, drawing.split_noise,
        once=like is None,
    )  # fmt: skip
    if edit.normed is not None:
        return _grown_part(plan, name, lookup, draws, like)
    if like is not None:
        _grow(edit, like.__getitem__, draws)
    return _grow(edit, lookup, draws)


def _grown_part(
    plan: Plan, name: str, lookup: Lookup, draws: Draws, like: Mapping[str, Tensor] | None
) -> Tensor:
    """Return the new direction or the new length of a weight; see :mod:`fxgrow.apply.normed`.

    Raises:
        PlanError: it cannot be made so.
    """
    parts = plan.tensors[name].normed
    if parts is None:
        raise PlanError(f"{shown(name)} is no part of a weight.", name=name)
    direction, length = (plan.tensors[part] for part in (parts.direction, parts.length))
    whole = replace(direction, scale=1.0, normed=None)
    own = replace(draws, name=parts.direction, fan_in=direction.fan_in)
    if like is not None:
        _grow(whole, like.__getitem__, own)
    made = _grow(whole, lookup, own)
    before = [
        _looked_up(lookup, edit.source or part).detach()
        for edit, part in ((direction, parts.direction), (length, parts.length))
    ]
    ratio = ratio_of(parts, *before)
    kept = replace(length, scale=1.0, normed=None)
    ratio = _grow(kept, lambda _: ratio, replace(draws, name=parts.length, noise=0.0))
    made, ratio = means_in(parts, direction, made, ratio)
    if name == parts.direction:
        return pointing(parts, made)
    return length_of(parts, made, ratio * length.scale, before[1].dtype)


def lay_out(edit: TensorEdit, old: Tensor, fill: Init) -> Tensor:
    """Return a tensor as an edit lays it out: for what is no weight itself but goes with one.

    Args:
        edit: without an absorption.
        old: the old values.
        fill: what new entries get; it must not depend on chance.

    Raises:
        PlanError: the old tensor has another shape than the edit expects.
    """
    return _grow(edit, lambda _: old, Draws("", 0, edit.fan_in, fill, between=fill))


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


def _grow(edit: TensorEdit, lookup: Lookup, draws: Draws) -> Tensor:
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


def _made(edit: TensorEdit, old: Tensor, lookup: Lookup, draws: Draws) -> Tensor:
    """Return what an edit makes of an old tensor."""
    if edit.fill == "identity":
        return identity_(old.new_zeros(edit.new_shape))
    if edit.fill == "constant":
        return old.new_full(edit.new_shape, edit.scale)
    tensor = absorbed(edit, old, lookup) if edit.absorption else old
    if edit.offset:
        tensor = tensor.double() + edit.offset  # a coarser dtype would lose most of what is small
    if edit.scale != 1.0:
        tensor = tensor * edit.scale
    tensor = regroup(tensor, edit.groups, draws.between)
    tensor = extended(tensor, edit, draws)
    if edit.offset:
        tensor = tensor - edit.offset
    if tensor is old:
        tensor = old.clone()
    return _laid_out(tensor.to(old.dtype), memory_format_of(old))


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


def _laid_out(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return a tensor with the strides of a new one in a memory format.

    A convolution takes the strides of its weight, even of dims of size one, for a memory format.
    """
    fresh = torch.empty(tensor.shape, device="meta", memory_format=memory_format)
    if tensor.stride() == fresh.stride():
        return tensor
    return torch.empty_like(tensor, memory_format=memory_format).copy_(tensor)


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return the memory format that a tensor has by its strides: channels last, or contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is not None and tensor.numel():
        plain, other = (
            torch.empty(tensor.shape, device="meta", memory_format=fmt).stride()
            for fmt in (torch.contiguous_format, last)
        )
        if tensor.stride() == other != plain:
            return last
    return torch.contiguous_format


def absorbed(edit: TensorEdit, old: Tensor, lookup: Lookup) -> Tensor:
    """Return a norm's tensor after it took up a gain; see :class:`Absorption`."""
    absorption = edit.absorption
    if absorption is None or old.device.type == "meta":
        return old
    gain, eps = absorption.gain, absorption.eps
    if absorption.part == "running_mean":
        return absorbed_mean(old, gain)
    variance = _looked_up(lookup, absorption.variance)
    if absorption.part == "running_var":
        return absorbed_variance(variance, gain, eps).to(old.dtype)
    return absorbed_weight(old, variance, gain, eps)
