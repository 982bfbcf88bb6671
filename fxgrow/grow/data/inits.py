"""Inits whose new weights come from batches of data: GradMax and TINY.

They decide three things that a plan without data leaves open: which groups they can treat, how
many channels each of these gets, and what the new rows and columns are. The first two go into the
plan as refusals and widths. The last is an init like any other, but for knowing the names of what
it fills.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from fxgrow.channels.analysis import Analysis
from fxgrow.errors import PlanError
from fxgrow.grow.data import directions as algebra
from fxgrow.grow.data import statistics
from fxgrow.grow.data.directions import Directions, Shapes
from fxgrow.grow.data.pairs import LayerPair, find_pair
from fxgrow.grow.data.statistics import Batch, LossFunction, Seen
from fxgrow.grow.sizes.widths import select
from fxgrow.grow.widen.planner import VarianceOf
from fxgrow.grow.widen.submodules import plan_parts
from fxgrow.modules.standin import stand_in
from fxgrow.plan.deviations import Place
from fxgrow.plan.edits import TensorEdit
from fxgrow.plan.init import Init, PlacedInit
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import GroupPlan, Refusal


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


class DataDriven(PlacedInit):
    """An init that computes new weights from batches.

    The object keeps what it computed for the last plan made with it, and that plan is carried out
    with it. The network is run on a copy, in eval mode, several times over the batches.

    Args:
        loss_fn: ``(outputs, targets) -> scalar``, the mean over the samples of a batch.
        batches: pairs of inputs and targets; inputs are a tensor, a tuple of arguments or a dict
            of keyword arguments. All of them are kept.
        keep: at most so many new channels for each group; None as many as the width asks for.
        threshold: leave out new channels weaker than this part of the strongest of all groups,
            from 0 to 1.

    Raises:
        PlanError: there are no batches, or an argument is out of range.
    """

    pairing: ClassVar[str]
    nothing: ClassVar[str]  # what is true of a group that gets no channel

    def __init__(
        self,
        loss_fn: LossFunction,
        batches: Iterable[Batch],
        *,
        keep: int | None = None,
        threshold: float = 0.0,
    ) -> None:
        if not callable(loss_fn):
            raise PlanError(f"the loss function is a {type(loss_fn).__name__}, no function.")
        if keep is not None and not (isinstance(keep, int) and keep > 0):
            raise PlanError(f"keep must be a number of channels, at least 1, not {keep!r}.")
        if not 0.0 <= threshold <= 1.0:
            raise PlanError(f"the threshold must be from 0 to 1, but it is {threshold}.")
        self.loss_fn = loss_fn
        self.batches = statistics.checked_batches(batches)
        self.keep = keep
        self.threshold = threshold
        self._computed: FromData | None = None

    def for_place(self, place: Place, reference: Tensor | None) -> Init:
        """Return what fills the new entries at one place.

        Raises:
            PlanError: nothing was computed yet.
        """
        if self._computed is None:
            raise PlanError(f"{self.name} has not been given a network; use fxgrow.widen.")
        return self._computed.for_place(place, reference)

    def computed_for(self, made: Plan) -> FromData:
        """Return the new weights for a plan that was made with this init.

        Raises:
            PlanError: the last plan that was made with it is another one.
        """
        if self._computed is None or self._computed.edits != made.tensors:
            raise PlanError(
                f"this {self.name} holds no new weights for this plan.",
                way_out="Carry a plan out with the init that it was made with last.",
            )
        return self._computed

    @property
    def name(self) -> str:
        """The method's name."""
        return type(self).__name__

    def paired(self, pairing: str | dict[str, str] | None) -> str:
        """Return the method's own pairing, which goes with none that is asked for.

        Raises:
            PlanError: another one was asked for.
        """
        if pairing not in (None, self.pairing):
            raise PlanError(
                f"{self.name} lays out new channels by itself, not by the pairing {pairing!r}.",
                way_out="Leave the pairing out.",
            )
        return self.pairing

    def plan(
        self,
        model: nn.Module,
        analyses: Sequence[Analysis],
        request: Widen,
        variance_of: VarianceOf,
    ) -> Plan:
        """Compute new weights, and return the plan that makes room for them.

        Args:
            model: the network; only read.
            analyses: of the network, or of the parts of it that are followed.
            request: what is asked for; its widths are the most that is given.
            variance_of: as for :func:`fxgrow.grow.widen.planner.make_plan`.

        Raises:
            PlanError: the request is malformed, no group that it selects can be treated, or the
                batches tell nothing.
        """
        widths, refused = select([g for part in analyses for g in part.groups], request)
        pairs, unfit = self._pairs(model, analyses, widths)
        refused += unfit
        self._check_some(pairs, refused)
        network = stand_in(model, {}).eval()
        asked = {name: widths[name] - pair.width for name, pair in pairs.items()}
        found = self._directions(network, pairs)
        most = {name: self._most(pairs[name], asked[name], request.multiple_of) for name in pairs}
        chosen = self._chosen(network, pairs, found, most, request.multiple_of)
        why = f"{self.name}: {self.nothing}"
        refused += tuple(Refusal(name, why) for name in pairs if name not in chosen)
        self._check_some(chosen, refused)
        grown = {name: str(pairs[name].width + len(found)) for name, found in chosen.items()}
        own = replace(request, width=grown, include=tuple(grown), exclude=(), where="all")
        made = plan_parts(analyses, replace(own, multiple_of=1), variance_of)
        made = replace(
            made,
            request=request,
            refused=refused + made.refused,
            groups=tuple(
                self._told(group, chosen[group.name], asked[group.name], most[group.name])
                for group in made.groups
            ),
            warnings=made.warnings + self._warnings(made.groups, most),
        )
        self._computed = self._fitted(network, made, _from_data(made, pairs, chosen))
        return made

    def _pairs(
        self, model: nn.Module, analyses: Sequence[Analysis], widths: Mapping[str, int]
    ) -> tuple[dict[str, LayerPair], tuple[Refusal, ...]]:
        """Return the pairs of layers around the groups that shall grow, and who has none."""
        pairs: dict[str, LayerPair] = {}
        unfit: list[Refusal] = []
        for part in analyses:
            for group in part.groups:
                if widths.get(group.name, group.width) == group.width:
                    continue
                pair = find_pair(part, group, model)
                reason = pair.reason if isinstance(pair, Refusal) else self._problem(pair, model)
                if isinstance(pair, Refusal) or reason:
                    unfit.append(Refusal(group.name, f"{self.name}: {reason}"))
                else:
                    pairs[group.name] = pair
        return pairs, tuple(unfit)

    def _check_some(self, names: Collection[str], refused: Sequence[Refusal]) -> None:
        """Return if there is a group left to grow.

        Raises:
            PlanError: there is none.
        """
        if not names:
            why = f" {refused[-1].name}: {refused[-1].reason}." if refused else ""
            raise PlanError(
                f"{self.name} can grow none of the groups that the request selects.{why}",
                way_out="See `fxgrow inspect` for the groups, or choose another init.",
            )

    def _most(self, pair: LayerPair, asked: int, multiple_of: int) -> int:
        """Return how many new channels a group may get."""
        if self.keep is None or self.keep >= asked:
            return asked
        return (pair.width + self.keep) // multiple_of * multiple_of - pair.width

    def _chosen(
        self,
        network: nn.Module,
        pairs: Mapping[str, LayerPair],
        found: Mapping[str, Directions],
        most: Mapping[str, int],
        multiple_of: int,
    ) -> dict[str, Directions]:
        """Return the directions that are grown, of the groups that have any."""
        strong = algebra.above(list(found.values()), self.threshold)
        chosen = {n: d.first(most[n]) for n, d in zip(found, strong, strict=True)}
        chosen = self._gaining(network, pairs, chosen)
        for name, directions in chosen.items():
            if len(directions) < most[name]:  # which makes such a multiple
                width = pairs[name].width
                wanted = (width + len(directions)) // multiple_of * multiple_of
                chosen[name] = directions.first(wanted - width)
        return {name: directions for name, directions in chosen.items() if len(directions)}

    def _told(self, group: GroupPlan, found: Directions, asked: int, most: int) -> GroupPlan:
        """Return the plan of a group with a word on how many channels it gets."""
        if len(found) == asked:
            return group
        why = f"keep is {self.keep}" if len(found) == most else self._why_fewer
        told = f"{len(found)} of {asked} new channels: {why}"
        return replace(group, reason=f"{group.reason}; {told}" if group.reason else told)

    def _warnings(self, groups: Iterable[GroupPlan], most: Mapping[str, int]) -> tuple[str, ...]:
        """Return a warning for each group that gets fewer channels, and not by the user's will."""
        counts = {group.name: group.width[1] - group.width[0] for group in groups}
        return tuple(
            f"{name} gets {found} new channels instead of {most[name]}: {self._why_fewer}"
            for name, found in counts.items()
            if found < most[name] and not self.threshold
        )

    @property
    def _why_fewer(self) -> str:
        return "no more are strong enough" if self.threshold else "the batches give no more"

    def _problem(self, pair: LayerPair, model: nn.Module) -> str:
        """Return why the method cannot treat a pair of layers of a network; "" if it can."""
        del pair, model
        return ""

    def _gaining(
        self, network: nn.Module, pairs: Mapping[str, LayerPair], chosen: Mapping[str, Directions]
    ) -> dict[str, Directions]:
        """Return those of the directions that do what they are for."""
        del network, pairs
        return dict(chosen)

    def _fitted(self, network: nn.Module, made: Plan, found: FromData) -> FromData:
        """Return the new weights as they go into the network."""
        del network, made
        return found

    def averages(
        self,
        network: nn.Module,
        pairs: Mapping[str, LayerPair],
        function: Callable[[str, Seen], tuple[Tensor, ...]],
    ) -> dict[str, tuple[Tensor, ...]]:
        """Return averages over the samples; see :func:`fxgrow.grow.data.statistics.averages`."""
        return statistics.averages(network, [*pairs.values()], self.loss_fn, self.batches, function)

    @abc.abstractmethod
    def _directions(
        self, network: nn.Module, pairs: Mapping[str, LayerPair]
    ) -> dict[str, Directions]:
        """Return all directions of each pair of layers."""


def shapes_of(network: nn.Module, pair: LayerPair) -> Shapes:
    """Return the shapes of a row and of a column."""
    first = network.get_parameter(f"{pair.writer}.weight")
    second = network.get_parameter(f"{pair.reader}.weight")
    column = (second.shape[0], *second.shape[2:])
    return Shapes(tuple(first.shape[1:]), column, pair.has_bias, first.dtype)


def _from_data(
    made: Plan, pairs: Mapping[str, LayerPair], chosen: Mapping[str, Directions]
) -> FromData:
    """Return directions as the new entries of the tensors of a plan."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for group in made.groups:
        pair, directions = pairs[group.name], chosen[group.name]
        first, second = f"{pair.writer}.weight", f"{pair.reader}.weight"
        rows[first] = _widened(directions.rows, made.tensors[first])
        if directions.biases is not None:
            rows[f"{pair.writer}.bias"] = directions.biases
        columns[second] = directions.columns * made.tensors[second].scale
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
