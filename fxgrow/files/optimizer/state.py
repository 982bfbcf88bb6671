"""Grow what an optimizer keeps for one parameter, so that it fits the grown parameter.

The grown network computes what the old one did, f'(w') = f(w), so its gradients follow from the old
ones by the chain rule:

- A weight multiplied by c has 1/c times the gradient: an average of gradients m becomes m / c, an
  average of their squares v becomes v / c². So does a norm's weight that takes up a gain.
- Where a channel was copied, its value reaches the readers through all copies, whose shares add up
  to 1: a copy with share a has rows with a times the old gradient, so a·m and a²·v. Unequal shares
  differ from column to column, so their mean is taken, one over the number of copies.
- A reader's columns meet the values they met before: their gradients stay, however the weights
  were split. So does every gradient beside twins or zero columns, which cancel out of it.
- New entries have no past: m is 0, and v the mean of the old tensor's, because ``step`` stays.

Weights are laid out by their edit. A buffer is laid out by the same edit with other meanings of its
runs: whatever continues an old position continues it here.

The rules are approximate where the function is not quite the old one: where a plan changes it
(``scaled`` or ``no``), and at a LayerNorm over channels that carry the mean of the old ones, whose
gradients the old ones share in.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from fxgrow.apply.tensors import Lookup, absorbed, lay_out
from fxgrow.errors import PlanError
from fxgrow.files.optimizer.buffers import BUFFERS, Buffer, State, is_counter, shape_by
from fxgrow.plan.edits import Run, TensorEdit
from fxgrow.plan.init import Init, zeros


def grow_state(edit: TensorEdit, state: State, lookup: Lookup) -> dict[str, object]:
    """Return what an optimizer would keep for a grown parameter.

    Args:
        edit: of the parameter.
        state: what the optimizer keeps for the old parameter, by the names of its buffers.
        lookup: returns an old parameter or buffer of the network by name.

    Raises:
        PlanError: a buffer is of no known kind; it is named.
    """
    factor, share, layout = _factor(edit, lookup), _share(edit), _layout(edit)
    grown: dict[str, object] = {}
    for key, value in state.items():
        if is_counter(value):
            grown[key] = value
            continue
        buffer = _buffer(state, key, edit)
        fill: Init = zeros if buffer.fresh == "zero" else _mean
        try:
            values = buffer.values * _power(factor, -buffer.degree, buffer.values)
            values = lay_out(layout, values, fill)
            values *= _power(share, buffer.degree, values)
        except (NotImplementedError, RuntimeError) as error:  # of a dtype without arithmetic
            raise PlanError(f"{key} is {buffer.values.dtype}, which has no arithmetic") from error
        grown[key] = buffer.stored(values)
    return grown


def _buffer(state: State, key: str, edit: TensorEdit) -> Buffer:
    """Return a buffer of an old parameter.

    Raises:
        PlanError: it is of no known kind, or of another shape than the parameter.
    """
    if key not in BUFFERS or not isinstance(state[key], Tensor):
        raise PlanError(f"{key} is of no known kind", name=key)
    if shape_by(state, key) != edit.shape:
        raise PlanError(f"{key} has another shape than the parameter", name=key)
    return BUFFERS[key](state, key)


def _mean(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """Fill new entries with the mean of the old ones, zero where there are none: an init."""
    del fan_in
    if reference is not None:
        tensor.copy_(reference.mean() if reference.numel() else reference.new_zeros(()))


def _factor(edit: TensorEdit, lookup: Lookup) -> Tensor:
    """Return what the old weights are multiplied by, broadcastable to their shape."""
    factor = torch.tensor(edit.scale, dtype=torch.float64)
    if edit.absorption is None:
        return factor
    ones = lookup(edit.absorption.variance).new_ones(edit.shape, dtype=torch.float64)
    return factor * absorbed(edit, ones, lookup)


def _share(edit: TensorEdit) -> Tensor:
    """Return the share of the old gradient that each new position has, broadcastable."""
    share = torch.ones((1,) * len(edit.new_shape), dtype=torch.float64)
    for axis in edit.axes:
        if axis.role == "reader":
            continue
        sources = [
            run.start + i if run.kind == "old" else None
            for run in axis.runs
            for i in range(run.length)
        ]
        copies = Counter(sources)
        shares = [1.0 if source is None else 1 / copies[source] for source in sources]
        shape = [1] * len(edit.new_shape)
        shape[axis.dim] = -1
        share = share * torch.tensor(shares, dtype=torch.float64).view(shape)
    return share


def _power(factor: Tensor, degree: int, like: Tensor) -> Tensor:
    return factor.pow(degree).to(like)


def _layout(edit: TensorEdit) -> TensorEdit:
    """Return the edit that lays a parameter's buffers out."""
    axes = tuple(replace(axis, runs=tuple(map(_continued, axis.runs))) for axis in edit.axes)
    return replace(edit, scale=1.0, axes=axes, absorption=None, offset=0.0, normed=None)


def _continued(run: Run) -> Run:
    """Return a run that continues old positions where a weight's does, and is new elsewhere."""
    if run.kind in ("old", "share"):
        return replace(run, kind="old")
    return Run("new", 0, run.length)
