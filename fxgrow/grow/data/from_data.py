"""New weights that were computed from data, for the tensors of one plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fxgrow.errors import PlanError
from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.pairs import LayerPair
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
        strengths: of each group's new channels, by its name: a singular value each.
        gains: likewise, by what each lowers the loss to first order, before any rescaling: per
            learning rate (the squared norm of the gradient of its row) or per amplitude.
        amplitude: what rows, biases and columns hold the square root of.
        notes: what a report should tell.
    """

    edits: Mapping[str, TensorEdit]
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    strengths: Mapping[str, tuple[float, ...]]
    gains: Mapping[str, tuple[float, ...]]
    amplitude: float = 1.0
    notes: tuple[str, ...] = ()

    def for_place(self, place: Place, reference: Tensor | None) -> Init:
        """Return what fills the new entries at one place.

        Raises:
            PlanError: nothing was computed for it.
        """
        del reference
        name = place.name
        values = (self.columns if place.role.startswith("reader") else self.rows).get(name)

        def fill(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
            del reference, fan_in
            if values is None or values.shape != tensor.shape:
                raise PlanError(f"no new weights of {name} were computed for this plan.", name=name)
            tensor.copy_(values)

        return fill

    def scaled(self, amplitude: float) -> FromData:
        """Return the same at another amplitude."""
        root = math.sqrt(amplitude / self.amplitude)
        rows, columns = (
            {name: root * value for name, value in values.items()}
            for values in (self.rows, self.columns)
        )
        return replace(self, rows=rows, columns=columns, amplitude=amplitude)


def from_data(
    made: Plan,
    pairs: Mapping[str, LayerPair],
    chosen: Mapping[str, Directions],
    without_norm: Collection[str],
) -> FromData:
    """Return directions as the new entries of the tensors of a plan.

    They were selected on the old network. Columns take the factor of the reader's old weights, and
    rows that of the writer's unless a norm takes it up, so that what new channels add is rescaled
    with what the old ones do.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}

    def scale(name: str) -> float:
        return made.tensors[name].scale

    for group in made.groups:
        pair, directions = pairs[group.name], chosen[group.name]
        first, second = f"{pair.writer}.weight", f"{pair.reader}.weight"
        plain = group.name in without_norm
        whole = directions.rows * (scale(first) if plain else 1.0)
        rows[first] = _widened(whole, made.tensors[first])
        if directions.biases is not None:
            bias = f"{pair.writer}.bias"
            rows[bias] = directions.biases * (scale(bias) if plain else 1.0)
        columns[second] = directions.columns * scale(second)
    found = {group.name: chosen[group.name] for group in made.groups}
    return FromData(
        edits=made.tensors,
        rows={name: value.cpu() for name, value in rows.items()},
        columns={name: value.cpu() for name, value in columns.items()},
        strengths={name: tuple(d.strengths.tolist()) for name, d in found.items()},
        gains={name: tuple(d.gains.tolist()) for name, d in found.items()},
    )


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
