"""Where a network asks for new channels: what each group's would gain to first order, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.grow.data.costs import Costs
from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.inits import DataDriven
from fxgrow.grow.data.selection import Limits, Room
from fxgrow.grow.data.skipped import sharing
from fxgrow.grow.sizes.widths import select
from fxgrow.plan.requests import Widen

_MOST = 1 << 20  # channels, more than any group has directions


@dataclass(frozen=True)
class GroupGrowth:
    """What new channels of one group would gain.

    Attributes:
        name: of the group.
        width: its present width.
        strengths: a singular value for each direction that lowers the loss, the largest first. A
            direction is one new channel, or two twins.
        gains: what each lowers the loss by, to first order: per learning rate (GradMax) or per
            amplitude of the step (Tiny). Two twins count with both.
        parameters: that a direction brings, with all of its channels, at present widths.
        reason: why there is none; "" if there are any.
    """

    name: str
    width: int
    strengths: tuple[float, ...]
    gains: tuple[float, ...]
    parameters: int
    reason: str = ""

    @property
    def gain(self) -> float:
        """The gain of all new channels together."""
        return sum(self.gains)

    @property
    def gain_per_thousand(self) -> float:
        """The gain per 1000 parameters, of all new channels together."""
        count = len(self.gains) * self.parameters
        return 1000 * self.gain / count if count else 0.0


def expected_growth(
    init: DataDriven,
    model: nn.Module,
    analyses: Sequence[Analysis],
    request: Widen | None = None,
    progress: Callable[[str], object] = lambda step: None,
) -> tuple[GroupGrowth, ...]:
    """Return what new channels would gain, for each group that is not pinned.

    Args:
        init: how they are computed; its ``keep`` and ``threshold`` count, and no width does.
        model: the network; only read.
        analyses: of the network, or of the parts of it that are followed.
        request: its ``include`` and ``exclude`` say which groups to tell of; None for all.
        progress: told what is being computed, and about how long it takes.

    Raises:
        PlanError: a glob matches nothing, or the batches tell nothing: the loss is no finite
            scalar with a gradient, say.
    """
    groups = [group for part in analyses for group in part.groups if group.kind != "pinned"]
    if request is not None and (request.include or request.exclude):
        widths, _ = select([group for part in analyses for group in part.groups], request)
        groups = [group for group in groups if group.name in widths]
    pairing = init.paired(None)
    asked = {group.name: Room(group.width, _MOST, pairing, 1) for group in groups}
    network = sharing(model)
    pairs, unfit = init.pairs(network, analyses, asked)
    rooms = init.rooms(asked, pairs)
    limits = Limits(init.keep, init.threshold, "")
    tight = limits.too_tight(rooms)
    pairs = {name: pair for name, pair in pairs.items() if name not in tight}
    found = init.selected(network, pairs, rooms, limits, progress) if pairs else {}
    reasons = {refusal.name: refusal.reason for refusal in unfit}
    reasons |= {name: f"{init.name}: {why}" for name, why in tight.items()}
    costs = Costs(analyses)
    prices = {n: costs.of(n, rooms.get(n, room).each, {}) for n, room in asked.items()}
    return tuple(
        _told(init, group, found.get(group.name), prices[group.name], reasons.get(group.name))
        for group in groups
    )


def _told(
    init: DataDriven,
    group: ChannelGroup,
    directions: Directions | None,
    parameters: int,
    refused: str | None,
) -> GroupGrowth:
    """Return what is told of one group.

    Args:
        init: how new channels are computed.
        group: the group.
        directions: that it would get; None where none were computed.
        parameters: that each brings.
        refused: why none were computed, if they were not.
    """
    strengths, gains, why = list[float](), list[float](), init.nothing
    if directions is not None:
        strengths, gains = directions.strengths.tolist(), directions.gains.tolist()
        why = directions.none or why
    reason = "" if strengths else f"{init.name}: {why}"
    return GroupGrowth(
        group.name,
        group.width,
        tuple(strengths),
        tuple(gains),
        parameters,
        reason if refused is None else refused,
    )
