"""What new channels have in the norms and slopes that they pass between a writer and its readers.

A plan without data fills these by itself: weight 1, variance 1. Here they come from the init, as
new rows do, so that a new channel is at its reader what it was computed to be.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxgrow.grow.data.calibration import identity_entries
from fxgrow.grow.data.pairs import LayerPair
from fxgrow.plan.edits import AxisEdit, Run, TensorEdit
from fxgrow.plan.schema import Plan


def opened(made: Plan, pairs: Mapping[str, LayerPair], stepping: Collection[str]) -> Plan:
    """Return a plan in which the init fills the new entries of carriers, slice by slice as rows.

    Args:
        made: the plan.
        pairs: the layers around each group.
        stepping: groups whose rows the init fills, where the plan has means or zeros.
    """
    tensors = dict(made.tensors)
    for group in made.groups:
        pair = pairs[group.name]
        rows = next(a for a in tensors[f"{pair.writer}.weight"].axes if a.role == "writer")
        runs = _drawn(rows)
        written = (f"{pair.writer}.weight", f"{pair.writer}.bias")
        more = [n for n in written if n in tensors] if group.name in stepping else []
        for name in (*pair.carriers, *more):
            edit = tensors[name]
            axes = (replace(a, runs=runs) if a.role != "reader" else a for a in edit.axes)
            tensors[name] = replace(edit, axes=tuple(axes))
    return replace(made, tensors=tensors)


def _drawn(rows: AxisEdit) -> tuple[Run, ...]:
    """Return the runs of new rows with zeros and means as slices that are drawn, one by one."""
    runs, drawn = [], 0
    for run in rows.runs:
        if run.kind in ("zero", "mean"):
            run, drawn = Run("new", drawn, run.length), drawn + run.length
        runs.append(run)
    return tuple(runs)


def entries_of(
    made: Plan, pairs: Mapping[str, LayerPair], norms: Callable[[LayerPair], Mapping[str, float]]
) -> dict[str, Tensor]:
    """Return what the init fills into carriers, by tensor.

    Args:
        made: the plan, opened.
        pairs: the layers around each group.
        norms: returns the entries of each tensor of the batch norms of a pair.
    """
    found: dict[str, Tensor] = {}
    for group in made.groups:
        pair = pairs[group.name]
        values = {n: v * made.tensors[n].scale for n, v in pair.carried.items()} | {**norms(pair)}
        for name in pair.carriers:
            edit = made.tensors[name]
            shape = list(edit.shape)
            for axis in edit.axes:
                shape[axis.dim] = len(_positions(edit))
            value = torch.as_tensor(values[name], dtype=torch.float64)
            found[name] = value.expand(shape).clone()
    return found


def _positions(edit: TensorEdit) -> list[int]:
    """Return the position of each slice that is drawn for a carrier: the first, of twins."""
    (axis,) = edit.axes
    found: dict[int, int] = {}
    position = 0
    for run in axis.runs:
        if run.kind == "new":
            for offset in range(run.length):
                found.setdefault(run.start + offset, position + offset)
        position += run.length
    return [found[drawn] for drawn in sorted(found)]


def identities(
    grown: nn.Module,
    made: Plan,
    pairs: Mapping[str, LayerPair],
    batches: Sequence[object],
) -> dict[str, Tensor]:
    """Return entries of batch norms that make them the identity on new channels, by tensor.

    With m and v the mean and the biased variance of each new channel over all batches: running_mean
    is m, running_var is v, weight is √(v + eps) and bias is m. So nothing changes in eval mode, and
    in train mode no more than what tells a batch from the data.

    Args:
        grown: the grown network in eval mode, in which they are the identity already.
        made: its plan, opened.
        pairs: the layers around each group.
        batches: inputs: each a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        PlanError: a norm is not run.
    """
    names = dict.fromkeys(norm for group in made.groups for norm in pairs[group.name].norms)
    if not names:
        return {}
    places = {norm: torch.tensor(_positions(made.tensors[f"{norm}.running_var"])) for norm in names}
    return {
        f"{norm}.{part}": value.cpu()
        for norm, values in identity_entries(grown, places, batches).items()
        for part, value in values.items()
    }
