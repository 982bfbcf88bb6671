"""How many directions each group gets: by the widths that are asked for, and by a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from fxgrow.channels.groups import ChannelGroup
from fxgrow.errors import PlanError
from fxgrow.grow.data.costs import Costs
from fxgrow.grow.data.directions import Directions
from fxgrow.plan.budget import budgeted
from fxgrow.plan.by_layer import setting_for
from fxgrow.plan.pairing import PAIRINGS
from fxgrow.plan.requests import Widen


@dataclass(frozen=True)
class Room:
    """How far a group may grow.

    Attributes:
        width: its present width.
        asked: the most new channels.
        pairing: how its new channels are laid out.
        multiple_of: of what the new width is to be a multiple.
        wanted: what was asked for, where something else limits it; else 0.
        limit: what that is.
    """

    width: int
    asked: int
    pairing: str
    multiple_of: int
    wanted: int = 0
    limit: str = ""

    def under_copies(self, norm: str) -> Room:
        """Return a room beside a norm over all channels, in which no old channel is copied."""
        most = max(self.width - 1, 0)
        if self.asked <= most:
            return self
        limit = f"before the norm {norm}, fewer new channels than old ones"
        return replace(self, asked=most, wanted=self.asked, limit=limit)

    @property
    def each(self) -> int:
        """How many channels a direction makes: two under a pairing of twins."""
        return channels_each(self.pairing)

    @property
    def most(self) -> int:
        """The most directions."""
        return self.asked // self.each

    def fitting(self, count: int) -> int:
        """Return the most directions, of so many, that make a width which may be."""
        fits = (n for n in range(min(count, self.most), 0, -1) if self._may_be(n))
        return next(fits, 0)

    def after(self, count: int, last: int) -> int | None:
        """Return the next number of directions, up to a last one, that makes such a width."""
        fits = (n for n in range(count + 1, min(last, self.most) + 1) if self._may_be(n))
        return next(fits, None)

    def _may_be(self, count: int) -> bool:
        return (self.width + count * self.each) % self.multiple_of == 0


def channels_each(pairing: str) -> int:
    """Return how many channels a direction makes under a pairing.

    Example:
        >>> channels_each("vv_z_negz"), channels_each("v_zero")
        (2, 1)
    """
    return 2 if len(set(PAIRINGS[pairing](2, 0, "").draws)) == 1 else 1


def rooms_of(
    groups: Iterable[ChannelGroup], widths: Mapping[str, int], request: Widen
) -> dict[str, Room]:
    """Return how far those groups may grow that are to grow at all."""
    asked = {group: widths.get(group.name, group.width) - group.width for group in groups}
    return {
        group.name: Room(
            group.width, more, _pairing_of(group, request.pairing), request.multiple_of
        )
        for group, more in asked.items()
        if more
    }


def _pairing_of(group: ChannelGroup, pairing: str | Mapping[str, str]) -> str:
    """Return the pairing of a group, where it may be told by globs that leave none out."""
    return setting_for(pairing, (group.name, *group.writers), "")


@dataclass(frozen=True)
class Limits:
    """What limits the directions of all groups, besides their widths.

    Attributes:
        keep: the most for each group; None without such a limit.
        threshold: the least strength, as a part of the strongest.
        budget: parameters, as a request has them; "" without such a limit.
        searches: whether an amplitude is searched for afterwards, which takes time.
    """

    keep: int | None
    threshold: float
    budget: str
    searches: bool = False

    def kept(self, room: Room) -> int:
        """Return how many directions a group may get."""
        return room.most if self.keep is None else min(self.keep, room.most)

    def _allowed(self, room: Room) -> int:
        """Return the most directions that make a width which may be."""
        return room.fitting(self.kept(room))

    def too_tight(self, rooms: Mapping[str, Room]) -> dict[str, str]:
        """Return why there is no room for any direction, for the groups where there is none."""
        return {n: self._no_room(room) for n, room in rooms.items() if not self._allowed(room)}

    def _no_room(self, room: Room) -> str:
        """Return why a group has no room for any direction."""
        if not room.most:
            most = (
                f"{room.asked} is the most: {room.limit}"
                if room.limit
                else f"{room.asked} is asked for"
            )
            return f"each direction makes {room.each} channels, and {most}"
        return (
            f"up to {self.kept(room)} directions of {room.each} new channels each make no width "
            f"that is a multiple of {room.multiple_of}"
        )

    @property
    def _why_fewer(self) -> str:
        return "no more are strong enough" if self.threshold else "the batches give no more"

    def told(self, count: int, found: int, room: Room) -> str:
        """Return why a group gets fewer channels than its width asks for; "" if it does not.

        Args:
            count: the directions that it gets.
            found: those that there are, of which a budget may pay for fewer.
            room: how far it may grow.
        """
        channels = count * room.each
        if channels == (asked := room.wanted or room.asked):
            return ""
        if count < self._allowed(room):
            why = f"the budget is {self.budget}" if count < found else self._why_fewer
        elif self.keep is not None and self.keep < room.most:
            why = f"keep is {self.keep}" + (", and each makes two" if room.each > 1 else "")
        else:
            why = room.limit or "each direction makes two"
        return f"{channels} of {asked} new channels: {why}"

    def warnings(
        self,
        chosen: Mapping[str, Directions],
        found: Mapping[str, Directions],
        rooms: Mapping[str, Room],
    ) -> tuple[str, ...]:
        """Return a warning for each group that gets fewer channels, and not by the user's will.

        Args:
            chosen: the directions of each group.
            found: those that there are, of which a budget may pay for fewer.
            rooms: how far each may grow.
        """
        if self.threshold:
            return ()
        most = {name: self._allowed(rooms[name]) for name in chosen}
        return tuple(
            f"{name} gets {len(own) * rooms[name].each} new channels instead of "
            f"{most[name] * rooms[name].each}: {self._why_fewer}"
            for name, own in chosen.items()
            if len(own) == len(found[name]) < most[name]
        )

    def paid(
        self,
        chosen: Mapping[str, Directions],
        rooms: Mapping[str, Room],
        costs: Costs,
        present: int,
    ) -> dict[str, Directions]:
        """Return the directions that the budget pays for, of the groups that get any.

        Args:
            chosen: at least one of each group.
            rooms: of each group.
            costs: what channels cost.
            present: the parameters that there are.

        Raises:
            PlanError: it pays for none.
        """
        parameters = budgeted(self.budget, present)
        paid = spend(chosen, rooms, costs, parameters)
        found = {name: directions for name, directions in paid.items() if len(directions)}
        if not found:
            steps = {name: rooms[name].after(0, len(d)) or 1 for name, d in chosen.items()}
            prices = {n: costs.of(n, count * rooms[n].each, {}) for n, count in steps.items()}
            cheapest = min(prices, key=lambda name: prices[name])
            raise PlanError(
                f"the budget {self.budget} ({parameters} parameters) pays for no new channel: the "
                f"least is {prices[cheapest]} parameters, for {cheapest}.",
                name=cheapest,
                way_out="Give a larger budget.",
            )
        return found


def spend(
    found: Mapping[str, Directions], rooms: Mapping[str, Room], costs: Costs, budget: int
) -> dict[str, Directions]:
    """Return the directions that a budget pays for.

    The next one is always that with the largest gain per parameter, of all groups. Within a group
    those of larger gain come first.

    Args:
        found: the directions to choose from, by the names of the groups.
        rooms: of each group.
        costs: what channels cost; it depends on those that other groups have got.
        budget: parameters.
    """
    ordered = {name: d.chosen(torch.argsort(d.gains, descending=True)) for name, d in found.items()}
    gains = {name: d.gains.tolist() for name, d in ordered.items()}
    taken = dict.fromkeys(ordered, 0)  # directions
    new = dict.fromkeys(ordered, 0)  # channels
    offers: dict[str, tuple[float, int, int] | None] = {}  # gain per parameter, directions, price

    def offer(name: str) -> tuple[float, int, int] | None:
        count = rooms[name].after(taken[name], len(gains[name]))
        if count is None:
            return None
        more = (count - taken[name]) * rooms[name].each
        price = costs.of(name, more, new)
        return sum(gains[name][taken[name] : count]) / max(price, 1), count, price

    while True:
        offers |= {name: offer(name) for name in ordered if name not in offers}
        able = [(name, one) for name, one in offers.items() if one and one[2] <= budget]
        if not able:
            return {name: ordered[name].first(count) for name, count in taken.items()}
        name, (_, count, price) = max(able, key=lambda named: named[1][0])
        taken[name], new[name], budget = count, count * rooms[name].each, budget - price
        for other in {name, *costs.beside(name)}:
            offers.pop(other, None)
