"""Inits whose new weights come from batches of data: GradMax and TINY.

They decide three things that a plan without data leaves open: which groups they can treat, how
many channels each of these gets, and what the new rows and columns are. The first two go into the
plan as refusals and widths; the last is an init that knows the names of what it fills.

The order is: select directions by their strength on the network as it is, rescale old weights, lay
out by the pairing what was selected.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, overload

from torch import Tensor, nn

from fxgrow.channels.analysis import Analysis
from fxgrow.errors import PlanError, UsageError
from fxgrow.grow.data import directions as algebra
from fxgrow.grow.data import statistics
from fxgrow.grow.data.batches import Batch, LossFunction, checked_batches
from fxgrow.grow.data.carriers import entries_of, opened
from fxgrow.grow.data.costs import Costs
from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.effort import Effort, first_run, measured, most_held
from fxgrow.grow.data.from_data import FromData, from_data
from fxgrow.grow.data.held import over_entries
from fxgrow.grow.data.laid_out import laid_out, twinned
from fxgrow.grow.data.pairs import LayerPair, find_pair
from fxgrow.grow.data.passages import ask, norm_entries
from fxgrow.grow.data.selection import Limits, Room, rooms_of
from fxgrow.grow.data.skipped import frozen_copy
from fxgrow.grow.data.statistics import Seen, Sum
from fxgrow.grow.sizes.widths import select
from fxgrow.grow.widen.planner import VarianceOf
from fxgrow.modules.calling import arguments_of
from fxgrow.plan.deviations import Place
from fxgrow.plan.init import Init, PlacedInit
from fxgrow.plan.pairing import PAIRINGS, Layout, cancels
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import GroupPlan, Refusal, told_refusals

_LONG = 5.0  # seconds, from which on they are told


class DataDriven(PlacedInit):
    """An init that computes new weights from batches.

    The object keeps what it computed for the last plan made with it, and that plan is carried out
    with it. The network is run on a copy, in eval mode, several times over the batches.

    Args:
        loss_fn: ``(outputs, targets) -> scalar``, the mean over the samples of a batch.
        batches: pairs of inputs and targets; inputs are a tensor, a tuple of arguments or a dict
            of keyword arguments. All of them are kept.
        keep: at most so many directions for each group; None as many as the width asks for. Each
            makes one channel, but under a pairing of twins two.
        threshold: leave out directions weaker than this part of the strongest of all groups, from
            0 to 1.

    Raises:
        PlanError: there are no batches, or an argument is out of range.
    """

    pairing: ClassVar[str]
    nothing: ClassVar[str]  # what is true of a group that gets no channel
    runs: ClassVar[int]  # over the batches, for the directions
    forwards: ClassVar[int] = 0  # runs over the batches for an amplitude
    drops: ClassVar[bool] = False  # whether computed directions may be left out
    fits: ClassVar[bool]  # whether old weights are fitted by least squares

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
        if keep is not None and not (type(keep) is int and keep > 0):
            raise UsageError(f"keep must be a number of directions, at least 1, not {keep!r}.")
        if not isinstance(threshold, (int, float)) or not 0.0 <= threshold <= 1.0:
            raise UsageError(f"the threshold must be from 0 to 1, but it is {threshold!r}.")
        self.loss_fn = loss_fn
        self.batches = checked_batches(batches)
        self.keep = keep
        self.threshold = threshold
        self._computed: FromData | None = None
        self._effort = Effort(0.0, {}, {}, {})
        self._is_asked = False  # whether a pairing is

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

    @overload
    def paired(self, pairing: str | None) -> str: ...

    @overload
    def paired(self, pairing: Mapping[str, str]) -> dict[str, str]: ...

    def paired(self, pairing: str | Mapping[str, str] | None) -> str | dict[str, str]:
        """Return how new channels are laid out: as asked for (also by group), or in the own way.

        Raises:
            PlanError: what the method selects cannot be laid out so.
        """
        self._is_asked = pairing is not None
        if pairing is None:
            return self.pairing
        if not isinstance(pairing, str):
            for name in pairing.values():
                self.paired(name)
            return {**pairing} if "*" in pairing else {**pairing, "*": self.pairing}
        layout = PAIRINGS[pairing](2, 1, "")
        if layout.copies or layout.row_copies:
            why = f"the pairing {pairing!r} copies old channels and takes no new weights"
        else:
            why = self._unpaired(layout)
        if why:
            raise PlanError(
                f"{self.name} cannot be laid out so: {why}.",
                name=pairing,
                way_out=f"Leave the pairing out, which means {self.pairing!r}, or use 'vv_z_negz'.",
            )
        return pairing

    def _unpaired(self, layout: Layout) -> str:
        """Return why two new channels of the method cannot be laid out so; "" if they can."""
        del layout
        return ""

    def plan(
        self,
        model: nn.Module,
        analyses: Sequence[Analysis],
        request: Widen,
        variance_of: VarianceOf,
        progress: Callable[[str], object] = lambda step: None,
    ) -> Plan:
        """Compute new weights, and return the plan that makes room for them.

        Args:
            model: the network; only read.
            analyses: of the network, or of the parts of it that are followed.
            request: what is asked for; its widths are the most that is given.
            variance_of: as for :func:`fxgrow.grow.widen.planner.make_plan`.
            progress: told what is being computed, and about how long it takes.

        Raises:
            PlanError: the request is malformed, no group that it selects can be treated, or the
                batches tell nothing.
        """
        groups = [group for part in analyses for group in part.groups]
        widths, refused = select(groups, request)
        network, asked = frozen_copy(model), rooms_of(groups, widths, request)
        searches = not all(cancels(room.pairing) for room in asked.values())
        limits = Limits(self.keep, self.threshold, request.budget, searches)
        kept = (name for name in widths if name not in asked)
        refused += tuple(Refusal(n, f"it has the {widths[n]} channels asked for") for n in kept)
        pairs, unfit = self.pairs(network, analyses, asked)
        rooms = self.rooms(asked, pairs)
        stepping = {n for n, p in pairs.items() if p.over and not cancels(asked[n].pairing)}
        tight = limits.too_tight(rooms)
        refused += unfit + tuple(Refusal(n, f"{self.name}: {why}") for n, why in tight.items())
        pairs = {name: pair for name, pair in pairs.items() if name not in tight}
        self._check_some(pairs, refused)
        found = self.selected(network, pairs, rooms, limits, progress)
        chosen = {name: directions for name, directions in found.items() if len(directions)}
        refused += self._without(found, chosen, self.nothing)
        self._check_some(chosen, refused)
        if request.budget:
            present = sum(parameter.numel() for parameter in network.parameters())
            paid = limits.paid(chosen, rooms, Costs(analyses), present)
            elsewhere = "the budget goes to groups that gain more per parameter"
            refused += self._without(chosen, paid, elsewhere)
            chosen = paid
        made = laid_out(analyses, request, variance_of, chosen, rooms, stepping)
        why = {n: limits.told(len(d), len(found[n]), rooms[n]) for n, d in chosen.items()}
        told = [self._told(g, chosen[g.name], why[g.name]) for g in made.groups]
        notes = made.warnings + limits.warnings(chosen, found, rooms)
        made = replace(made, refused=refused + made.refused, groups=tuple(told), warnings=notes)
        made = opened(made, pairs, stepping)
        entries = entries_of(made, pairs, self._norm_entries)
        computed = replace(from_data(made, pairs, chosen, stepping), entries=entries)
        computed = self._scaled(network, made, computed)
        self._computed = self._settled(network, made, pairs, computed)
        return made

    def rooms(self, asked: Mapping[str, Room], pairs: Mapping[str, LayerPair]) -> dict[str, Room]:
        """Return how far each group with a pair may grow, as the method lays new channels out."""
        twins = [] if self._is_asked else [n for n, p in pairs.items() if self._needs_twins(p)]
        return twinned(asked, pairs, twins)

    def _needs_twins(self, pair: LayerPair) -> bool:
        """Return whether new channels must be twins to keep the function."""
        del pair
        return False

    def _norm_entries(self, pair: LayerPair) -> dict[str, float]:
        """Return new channels' entries in batch norms, by tensor: they make these the identity."""
        found: dict[str, float] = {}
        for norm, eps in pair.norms.items():
            found |= norm_entries(norm, weight=1.0, bias=0.0, mean=0.0, variance=1.0 - eps)
        return found | over_entries(pair, 0.0)

    def _settled(
        self, network: nn.Module, made: Plan, pairs: Mapping[str, LayerPair], found: FromData
    ) -> FromData:
        """Return new weights with the entries of norms as they go into the network."""
        del network, made, pairs
        return found

    def _scaled(self, network: nn.Module, made: Plan, found: FromData) -> FromData:
        """Return the new weights at their amplitude, which is 1 where they keep the function."""
        if all(cancels(group.pairing) for group in made.groups):
            return found
        return self._fitted(network, made, found)

    def _without(
        self, before: Mapping[str, Directions], after: Collection[str], why: str
    ) -> tuple[Refusal, ...]:
        """Return refusals of the groups that have no directions any more."""
        told = {n: found.none or why for n, found in before.items() if n not in after}
        return tuple(Refusal(n, f"{self.name}: {reason}") for n, reason in told.items())

    def pairs(
        self,
        network: nn.Module,
        analyses: Sequence[Analysis],
        rooms: Mapping[str, Room],
    ) -> tuple[dict[str, LayerPair], tuple[Refusal, ...]]:
        """Return the pairs of layers around groups that shall grow, and which groups have none.

        Args:
            network: in eval mode; a copy that may be run.
            analyses: of the network, or of the parts of it that are followed.
            rooms: of the groups.
        """
        run = first_run(network, self.batches[0])
        found: dict[str, LayerPair] = {}
        unfit: dict[str, str] = {}
        for part in analyses:
            for group in (group for group in part.groups if group.name in rooms):
                if isinstance(around := find_pair(part, group, network), Refusal):
                    unfit[group.name] = around.reason
                else:
                    found[group.name] = around
        self._effort = measured(network, found, self.batches, run, fits=self.fits)
        unfit |= self._effort.too_large()
        pairs: dict[str, LayerPair] = {}
        for name in (name for name in found if name not in unfit):
            pair = self._asked(found[name], network, rooms[name])
            if isinstance(pair, str):
                unfit[name] = pair
            else:
                pairs[name] = pair
        return pairs, tuple(Refusal(n, f"{self.name}: {unfit[n]}") for n in rooms if n in unfit)

    def _asked(self, found: LayerPair, network: nn.Module, room: Room) -> LayerPair | str:
        """Return layers with what lies between them told, or why the method cannot treat them."""
        begun = time.perf_counter()
        pair = ask(network, found, arguments_of(self.batches[0][0]))
        if isinstance(pair, str):
            return pair
        self._effort = self._effort.asked(pair, time.perf_counter() - begun)
        return self._problem(pair, network) or self._asleep(pair, room) or pair

    def _asleep(self, pair: LayerPair, room: Room) -> str:
        """Return why new channels would never learn as they are laid out; "" if they would."""
        twins = self._needs_twins(pair)
        if pair.over and room.pairing == "v_zero":
            return f"new rows leave {pair.over} as it is, and with zeros as columns never learn"
        are_zeros = bool(pair.over) or PAIRINGS[room.pairing](2, 1, "").writes_zeros
        are_raised = twins and (bool(pair.over) or not self._is_asked)
        if are_raised or not are_zeros or not cancels(room.pairing):
            return ""
        if pair.flat or (not twins and any(reader.slope for reader in pair.readers)):
            return pair.flat
        return (
            f"what lies between {pair.writer} and {pair.reader} has slope 0 at 0 as torch "
            "differentiates it, so new rows of zeros would never learn"
        )

    def _check_some(self, names: Collection[str], refused: Sequence[Refusal]) -> None:
        """Raise a PlanError if there is no group left to grow."""
        if not names:
            why = told_refusals(refused)
            raise PlanError(
                f"{self.name} can grow none of the groups that the request selects. {why}".rstrip(),
                way_out="See `fxgrow inspect` for the groups, or choose another "
                f"{'pairing or ' * self._is_asked}init.",
            )

    def selected(
        self,
        network: nn.Module,
        pairs: Mapping[str, LayerPair],
        rooms: Mapping[str, Room],
        limits: Limits,
        progress: Callable[[str], object] = lambda step: None,
    ) -> dict[str, Directions]:
        """Return the directions of each group that may be grown: all, some or none.

        Args:
            network: in eval mode; a copy that may be run.
            pairs: the layers around each group.
            rooms: how far each may grow.
            limits: what else limits them.
            progress: told what is being computed, and about how long it takes.
        """
        names, found = list(pairs), dict[str, Directions]()
        seconds = self._effort.total(names, self.runs, self.forwards if limits.searches else 0)
        begun = f"computing growth of {len(names)} group{'' if len(names) == 1 else 's'}"
        progress(f"{begun}: about {seconds:.0f} s" if seconds >= _LONG else begun)
        for part in self._effort.parts(names):

            def told(name: str, first: int = len(found), part: list[str] = part) -> None:
                progress(f"{name} ({first + part.index(name) + 1} of {len(names)})")

            some = {name: pairs[name] for name in part}
            kept = {name: limits.kept(rooms[name]) for name in part}
            most = {n: most_held(network, some[n], kept[n], spare=self.drops) for n in part}
            found |= self._directions(network, some, most, told)
        strong = zip(found, algebra.above(list(found.values()), limits.threshold), strict=True)
        gaining = self._gaining(network, pairs, dict(strong))
        counts = {name: min(len(d), limits.kept(rooms[name])) for name, d in gaining.items()}
        return {name: d.first(rooms[name].fitting(counts[name])) for name, d in gaining.items()}

    def _told(self, group: GroupPlan, found: Directions, told: str) -> GroupPlan:
        """Return the plan of a group with a word on how many channels it gets."""
        del found
        return replace(group, reason="; ".join(filter(None, (group.reason, told))))

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
        """Return the new weights as they go into the network, where they move what it computes."""
        del network, made
        return found

    def averages(
        self,
        network: nn.Module,
        pairs: Mapping[str, LayerPair],
        function: Callable[[str, Seen], tuple[Sum, ...]],
    ) -> dict[str, tuple[Sum, ...]]:
        """Return averages over the samples; see :func:`fxgrow.grow.data.statistics.averages`."""
        return statistics.averages(network, [*pairs.values()], self.loss_fn, self.batches, function)

    @abc.abstractmethod
    def _directions(
        self,
        network: nn.Module,
        pairs: Mapping[str, LayerPair],
        most: Mapping[str, int],
        progress: Callable[[str], object],
    ) -> dict[str, Directions]:
        """Return directions of each pair of layers, at most so many, telling which it comes to."""
