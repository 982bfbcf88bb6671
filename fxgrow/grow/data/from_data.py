"""New weights that were computed from data, for the tensors of one plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fxgrow.errors import PlanError
from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.held import ROW_POWER, in_twins
from fxgrow.grow.data.pairs import LayerPair, Reader
from fxgrow.plan.deviations import Place
from fxgrow.plan.edits import TensorEdit
from fxgrow.plan.init import Init, PlacedInit
from fxgrow.plan.schema import Plan


@dataclass(frozen=True, eq=False)
class FromData(PlacedInit):
    """New weights that were computed from data, as an init.

    Attributes:
        edits: of the plan they are for, by tensor.
        rows: new rows and biases by the name of the tensor, float64 on the CPU.
        columns: new columns likewise.
        entries: of the carriers between writers and readers (norms) likewise.
        strengths: of each group's new channels, by its name: a singular value each.
        gains: likewise, by what each lowers the loss to first order, before any rescaling: per
            learning rate (the squared norm of the gradient of its rows) or per amplitude.
        amplitude: what rows, biases and columns hold a power of: the root, unless ``powers`` tells.
        powers: by tensor and what is new in it: ``"0.weight rows"``, ``"2.weight columns"``.
        on_mean: tensors whose new rows are what is added to the mean of the old ones.
        notes: what a report should tell.
    """

    edits: Mapping[str, TensorEdit]
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    strengths: Mapping[str, tuple[float, ...]]
    gains: Mapping[str, tuple[float, ...]]
    entries: Mapping[str, Tensor] = field(default_factory=dict)
    amplitude: float = 1.0
    powers: Mapping[str, float] = field(default_factory=dict)
    on_mean: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def for_place(self, place: Place, reference: Tensor | None) -> Init:
        """Return what fills the new entries at one place.

        Raises:
            PlanError: nothing was computed for it.
        """
        name = place.name
        written = dict(self.entries) | dict(self.rows)
        values = (self.columns if place.role.startswith("reader") else written).get(name)

        is_row = not place.role.startswith("reader")
        mean: Tensor | float = 0.0
        if is_row and name in self.on_mean and reference is not None:
            mean = reference.double().mean(place.dim, keepdim=True)

        def fill(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
            del reference, fan_in
            if values is None or values.shape != tensor.shape:
                raise PlanError(f"no new weights of {name} were computed for this plan.", name=name)
            tensor.copy_(values + mean)

        return fill

    def scaled(self, amplitude: float) -> FromData:
        """Return the same at another amplitude."""
        ratio = amplitude / self.amplitude
        rows, columns = (
            {
                name: ratio ** self.powers.get(f"{name} {side}", 0.5) * value
                for name, value in values.items()
            }
            for side, values in (("rows", self.rows), ("columns", self.columns))
        )
        return replace(self, rows=rows, columns=columns, amplitude=amplitude)


def from_data(
    made: Plan,
    pairs: Mapping[str, LayerPair],
    chosen: Mapping[str, Directions],
    stepping: Collection[str],
) -> FromData:
    """Return directions as the new entries of the tensors of a plan.

    They were selected on the old network. Columns take the factor of the reader's old weights, and
    rows that of the writer's unless a norm takes it up, so that what new channels add is rescaled
    with what the old ones do.

    Args:
        made: the plan.
        pairs: the layers around each group.
        chosen: the directions of each group.
        stepping: groups whose new rows are beside the mean of the old ones.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    powers: dict[str, float] = {}
    on_mean: set[str] = set()

    def scale(name: str) -> float:
        return made.tensors[name].scale

    for group in made.groups:
        pair, directions = pairs[group.name], chosen[group.name]
        first = f"{pair.writer}.weight"
        plain = not (pair.norms or pair.over)
        if group.name in stepping:
            directions = in_twins(directions, group, made.tensors[first])
            written = (first, f"{pair.writer}.bias")
            on_mean |= {*written} if pair.holds == "mean" else set()
            powers |= {f"{name} rows": ROW_POWER for name in written}
            powers |= {f"{r.name}.weight columns": 1 - ROW_POWER for r in pair.readers}
        whole = directions.rows * (scale(first) if plain else 1.0)
        rows[first] = _widened(whole, made.tensors[first])
        if directions.biases is not None:
            bias = f"{pair.writer}.bias"
            rows[bias] = directions.biases * (scale(bias) if plain else 1.0)
        sizes = [math.prod(reader.column) for reader in pair.readers]
        for reader, part in zip(pair.readers, torch.split(directions.columns, sizes), strict=True):
            second = f"{reader.name}.weight"
            columns[second] = _columns(reader, part) * scale(second)
    found = {group.name: chosen[group.name] for group in made.groups}
    return FromData(
        edits=made.tensors,
        rows={name: value.cpu() for name, value in rows.items()},
        columns={name: value.cpu() for name, value in columns.items()},
        strengths={name: tuple(d.strengths.tolist()) for name, d in found.items()},
        gains={name: tuple(d.gains.tolist()) for name, d in found.items()},
        powers=powers,
        on_mean=frozenset(on_mean),
    )


def _columns(reader: Reader, columns: Tensor) -> Tensor:
    """Return columns (entries, k) as slices of a reader's weight, (out, slices, *kernel)."""
    whole = columns.reshape(*reader.column, -1)  # (out, *kernel, k) or (out, columns of each, k)
    if reader.columns.shape[1] == 1:
        return whole.movedim(-1, 1)
    by_position = int(reader.columns[0, 1]) != 1
    return (whole if by_position else whole.transpose(1, 2)).flatten(1)


def _widened(rows: Tensor, edit: TensorEdit) -> Tensor:
    """Return new rows with zeros for what the writer does not read yet."""
    axis = next((axis for axis in edit.axes if axis.role == "reader"), None)
    if axis is None:
        return rows
    out = rows.new_zeros(len(rows), edit.new_shape[axis.dim], *rows.shape[2:])
    position = 0
    for run in axis.runs:
        if run.kind == "old":
            out[:, position : position + run.length] = rows[:, run.start : run.start + run.length]
        position += run.length
    return out
