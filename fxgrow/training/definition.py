"""A network of full size, as what it can be made smaller in: which groups, by which steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from glob import escape
from math import lcm

from torch import nn

from fxgrow.api.widen import plan as plan_widening
from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.channels.scope import follow
from fxgrow.errors import PlanError, UsageError
from fxgrow.grow.obstacle import Obstacle
from fxgrow.grow.sizes.rerun import run_resized
from fxgrow.grow.sizes.resize import Sizes, new_sizes
from fxgrow.grow.sizes.widths import matches, must_match_group
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.requests import Where
from fxgrow.training.followers import unwrapped
from fxgrow.training.geometric import Unit


@dataclass(frozen=True)
class Definition:
    """A network that has been followed.

    Attributes:
        model: the network.
        analysis: what is known of it.
        example_inputs: what it was followed with, as for :func:`fxgrow.widen`.
    """

    model: nn.Module
    analysis: Analysis
    example_inputs: object = None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        tensors = named_tensors(self.analysis.traced.standin)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def sizes(self, widths: Mapping[str, int]) -> Sizes:
        """Return the sizes that follow from the widths of groups, by name."""
        analysis = self.analysis
        return new_sizes(analysis.channels, analysis.groups, widths, self.shapes, "width")

    def units(
        self, where: Where = "all", include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> list[Unit]:
        """Return the groups that can have other widths, those together that need the same ratio.

        Args:
            where: which groups, as for :func:`fxgrow.widen`.
            include: globs; only these.
            exclude: globs; not these.

        Raises:
            PlanError: there is none, or a glob matches none.
        """
        groups = self.analysis.groups
        for glob in (*include, *exclude):
            must_match_group(glob, groups)
        chosen = [
            group
            for group in groups
            if group.kind != "pinned"
            and where in ("all", group.kind)
            and (not include or any(matches(group, glob) for glob in include))
            and not any(matches(group, glob) for glob in exclude)
            and group.followed_at is None
            and group.width > 1
        ]
        found = [unit for unit in map(self._unit, _together(chosen)) if unit is not None]
        if not found:
            raise PlanError(
                f"none of the {len(groups)} channel groups can be narrower.",
                way_out="See fxgrow.inspect for the groups, and where=, include=, exclude=.",
            )
        return self._told_whole(found)

    def _told_whole(self, units: list[Unit]) -> list[Unit]:
        """Return units that tell whether they only grow by whole copies, as behind some norms.

        A plan for the least growth of all of them shows it.
        """
        wider = {name: n for unit in units for name, n in unit.at(unit.lead + unit.step).items()}
        widths = {escape(name): str(width) for name, width in wider.items()}
        try:
            plan = plan_widening(self.model, widths, self.example_inputs, where="all")
        except UsageError:
            raise
        except PlanError:
            return [replace(unit, whole=True) for unit in units]  # none of them can grow so
        refused = {refusal.name for refusal in plan.refused}
        return [replace(unit, whole=bool(refused & unit.widths.keys())) for unit in units]

    def _unit(self, groups: Sequence[ChannelGroup]) -> Unit | None:
        """Return groups as one unit, None if only the full widths work out."""
        plain = [group for group in groups if len(group.channels) == group.width]
        lead = max(group.width for group in plain or groups)
        step = lcm(*(self._granule(group) * lead // group.width for group in groups))
        if step >= lead:
            return None
        least = max(2 * self._kinds(group) * lead // group.width for group in groups)
        unit = Unit(lead, step, {group.name: group.width for group in groups}, least)
        return unit if plain or self._runs_at(unit.at(lead - step)) else None

    def _runs_at(self, widths: Mapping[str, int]) -> bool:
        """Return whether the network runs at some widths of groups.

        Heads alone may not: those of nn.MultiheadAttention are as wide as what they read.
        """
        return not isinstance(run_resized(self.analysis, self.sizes(widths)), Obstacle)

    def _kinds(self, group: ChannelGroup) -> int:
        """Return how many rows of a group make one of each kind, as in the groups of a convolution.

        With one alone, that would be depthwise, and a lone head is told from nothing.
        """
        channels = self.analysis.channels
        touched = {channels.axes[axis].tensor for axis in group.axes}
        split = [n for weight, n in channels.convolution_groups.items() if weight in touched]
        return max(group.width // len(group.channels), *split, 1)

    def _granule(self, group: ChannelGroup) -> int:
        """Return the least part of a group's width that it can have, and multiples of which."""
        for size in range(1, group.width):
            if group.width % size == 0 and not self.sizes({group.name: size}).refused:
                return size
        return group.width


def _together(groups: Sequence[ChannelGroup]) -> Iterator[list[ChannelGroup]]:
    """Yield groups that need the same ratio: heads of attention, and the stream that they read.

    Code tells the width of a head from that of the stream, or the other way round.
    """
    owner = {group.name: group.name for group in groups}
    for heads in groups:
        count = len(heads.channels)
        if count == heads.width:
            continue
        for other in groups:
            reads = set(heads.writers) & set(other.readers)
            if reads and other.width == len(other.channels) and other.width % count == 0:
                old, new = owner[heads.name], owner[other.name]
                owner = {name: new if held == old else held for name, held in owner.items()}
    for first in dict.fromkeys(owner.values()):
        yield [group for group in groups if owner[group.name] == first]


def units_of(widths: Mapping[str, int]) -> list[Unit]:
    """Return groups of told widths as units by themselves.

    Raises:
        UsageError: a width is no positive whole number.
    """
    for name, width in widths.items():
        if type(width) is not int or width < 1:
            raise UsageError(f"the width {width!r} of {name} is no number of channels.", name=name)
    return [Unit(width, 1, {name: width}) for name, width in widths.items()]


def built(definition: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Return the network that a definition is, or makes.

    Raises:
        UsageError: it makes something else.
    """
    model = definition if isinstance(definition, nn.Module) else definition()
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the definition makes a {type(model).__name__}, and no nn.Module.",
            way_out="Give a network of full size, or a function without arguments that makes one.",
        )
    return unwrapped(model)


@exclusive
def definition_of(
    definition: nn.Module | Callable[[], nn.Module], example_inputs: object = None
) -> Definition:
    """Return a network of full size as what it can be made smaller in.

    Args:
        definition: the network, which is only read, or what makes it.
        example_inputs: as for :func:`fxgrow.widen`.

    Raises:
        TraceError: it cannot be followed as a whole.
    """
    model = built(definition)
    analyses, _ = follow(model, example_inputs)
    if len(analyses) > 1:
        raise PlanError(
            "the network cannot be followed as a whole on inputs that are inferred.",
            way_out="Give example_inputs.",
        )
    return Definition(model, analyses[0], example_inputs)
