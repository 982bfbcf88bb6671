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
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.errors import PlanError
from fxgrow.grow.data import directions as algebra
from fxgrow.grow.data import statistics
from fxgrow.grow.data.carriers import entries_of, opened
from fxgrow.grow.data.directions import Directions, Shapes
from fxgrow.grow.data.from_data import FromData, from_data
from fxgrow.grow.data.pairs import LayerPair, find_pair
from fxgrow.grow.data.passages import ask, norm_entries
from fxgrow.grow.data.statistics import Batch, LossFunction, Seen
from fxgrow.grow.sizes.widths import select
from fxgrow.grow.widen.planner import VarianceOf
from fxgrow.grow.widen.submodules import plan_parts
from fxgrow.modules.calling import arguments_of
from fxgrow.modules.standin import stand_in
from fxgrow.plan.deviations import Place
from fxgrow.plan.init import Init, PlacedInit
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import GroupPlan, Refusal


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

    def paired(self, pairing: str, default: str) -> str:
        """Return the method's own pairing, which goes with none that is asked for.

        Raises:
            PlanError: one that is not the default was asked for.
        """
        if pairing not in (default, self.pairing):
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
        network = stand_in(model, {}).eval()
        pairs, unfit = self._pairs(network, analyses, widths)
        refused += unfit
        self._check_some(pairs, refused)
        request = replace(request, pairing=self._pairing_for(pairs.values()))
        each = 2 if request.pairing == "vv_z_negz" else 1  # channels of one direction
        asked = {name: widths[name] - pair.width for name, pair in pairs.items()}
        found = self._directions(network, pairs)
        most = {
            name: self._most(pairs[name], asked[name] // each, request.multiple_of, each)
            for name in pairs
        }
        chosen = self._chosen(network, pairs, found, most, request.multiple_of, each)
        why = f"{self.name}: {self.nothing}"
        refused += tuple(Refusal(name, why) for name in pairs if name not in chosen)
        self._check_some(chosen, refused)
        grown = {name: str(pairs[name].width + each * len(one)) for name, one in chosen.items()}
        own = replace(request, width=grown, include=tuple(grown), exclude=(), where="all")
        made = plan_parts(analyses, replace(own, multiple_of=1), variance_of)
        made = replace(
            opened(made, pairs),
            request=request,
            refused=refused + made.refused,
            groups=tuple(
                self._told(group, chosen[group.name], asked[group.name] // each, most[group.name])
                for group in made.groups
            ),
            warnings=made.warnings + self._warnings(made.groups, most),
        )
        entries = entries_of(made, pairs, self._norm_entries)
        computed = replace(from_data(made, pairs, chosen), entries=entries)
        computed = self._fitted(network, made, computed)
        self._computed = self._settled(network, made, pairs, computed)
        return made

    def _pairing_for(self, pairs: Iterable[LayerPair]) -> str:
        """Return how the new channels of all groups are laid out."""
        return "vv_z_negz" if any(map(self._needs_twins, pairs)) else self.pairing

    def _needs_twins(self, pair: LayerPair) -> bool:
        """Return whether new channels must be twins to keep the function."""
        del pair
        return False

    def _norm_entries(self, pair: LayerPair) -> dict[str, float]:
        """Return new channels' entries in batch norms, by tensor: they make these the identity."""
        found: dict[str, float] = {}
        for norm, eps in pair.norms.items():
            found |= norm_entries(norm, weight=1.0, bias=0.0, mean=0.0, variance=1.0 - eps)
        return found

    def _settled(
        self, network: nn.Module, made: Plan, pairs: Mapping[str, LayerPair], found: FromData
    ) -> FromData:
        """Return new weights with the entries of norms as they go into the network."""
        del network, made, pairs
        return found

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
                pair = self._pair(part, group, model)
                if isinstance(pair, str):
                    unfit.append(Refusal(group.name, f"{self.name}: {pair}"))
                else:
                    pairs[group.name] = pair
        return pairs, tuple(unfit)

    def _pair(self, part: Analysis, group: ChannelGroup, model: nn.Module) -> LayerPair | str:
        """Return the layers around a group, or why the method cannot treat them."""
        found = find_pair(part, group, model)
        if isinstance(found, Refusal):
            return found.reason
        pair = ask(model, found, arguments_of(self.batches[0][0]))
        return pair if isinstance(pair, str) else self._problem(pair, model) or pair

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

    def _most(self, pair: LayerPair, asked: int, multiple_of: int, each: int) -> int:
        """Return how many directions a group may get, each of so many channels."""
        if each == 1 and (self.keep is None or self.keep >= asked):
            return asked
        return _fitting(pair.width, min(asked, self.keep or asked), multiple_of, each)

    def _chosen(
        self,
        network: nn.Module,
        pairs: Mapping[str, LayerPair],
        found: Mapping[str, Directions],
        most: Mapping[str, int],
        multiple_of: int,
        each: int,
    ) -> dict[str, Directions]:
        """Return the directions that are grown, of the groups that have any."""
        strong = algebra.above(list(found.values()), self.threshold)
        chosen = {n: d.first(most[n]) for n, d in zip(found, strong, strict=True)}
        chosen = self._gaining(network, pairs, chosen)
        for name, directions in chosen.items():
            if len(directions) < most[name]:  # which makes such a multiple
                count = _fitting(pairs[name].width, len(directions), multiple_of, each)
                chosen[name] = directions.first(count)
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


def _fitting(width: int, count: int, multiple_of: int, each: int) -> int:
    """Return the most directions, up to a count, whose channels make a width that may be."""
    fits = (n for n in range(count, 0, -1) if (width + n * each) % multiple_of == 0)
    return next(fits, 0)


def shapes_of(network: nn.Module, pair: LayerPair) -> Shapes:
    """Return the shapes of a row and of a column over all readers."""
    weight = network.get_parameter(f"{pair.writer}.weight")
    entries = sum(math.prod(reader.column) for reader in pair.readers)
    return Shapes(tuple(weight.shape[1:]), (entries,), pair.has_bias, weight.dtype)
