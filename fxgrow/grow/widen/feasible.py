"""Which of the groups that should grow can: sizes at which the network runs and every channel fits.

The whole request is tried first. What stands in the way tells which groups it comes from, and the
others go on without them. Where it is not certain that these cannot grow, they are tried again
beside the others, those of one kind (the names of their layers alike but for numbers) together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup, kinds_of
from fxgrow.errors import PlanError
from fxgrow.grow.match.match import Matching, match
from fxgrow.grow.norms.eta import Eta, settle
from fxgrow.grow.norms.mixers import Mixed, mixed_groups
from fxgrow.grow.norms.padding import Padding, follow_padding, padding_of
from fxgrow.grow.norms.scales import Scales
from fxgrow.grow.norms.zero_channels import follow_zeros
from fxgrow.grow.obstacle import Obstacle
from fxgrow.grow.sizes.attributes import ALIKE, TOGETHER, alike_layers
from fxgrow.grow.sizes.rerun import Resized
from fxgrow.grow.sizes.resize import Sizes
from fxgrow.grow.sizes.to_one import run_at
from fxgrow.grow.sizes.together import sizes_together
from fxgrow.grow.widen.numbers import with_numbers
from fxgrow.labels.forest import IntArray
from fxgrow.labels.padding import PaddingFlow
from fxgrow.modules.tensors import layer_of
from fxgrow.plan.pairing import Pairing
from fxgrow.plan.requests import Grouped
from fxgrow.plan.step import Refusal


@dataclass(frozen=True)
class Feasible:
    """Sizes that work out.

    Attributes:
        sizes: new widths and shapes.
        resized: the run at these sizes.
        matching: which new channel continues which old one.
        copied: old channels that can only be copied, sorted.
        padding: by group name, what makes norms ignore the channels beyond whole copies.
        eta: how the norms' η is taken up.
        refused: groups that have to stay as they are, and why.
        zero_channels: by group name, what is zero of groups whose new channels are.
        scales: numbers that follow a width, and who takes that up.
    """

    sizes: Sizes
    resized: Resized
    matching: Matching
    copied: IntArray
    padding: dict[str, Padding]
    eta: Eta
    refused: tuple[Refusal, ...]
    zero_channels: dict[str, frozenset[int]] = field(default_factory=dict)
    scales: Scales = field(default_factory=Scales)


@dataclass(frozen=True)
class Attempts:
    """All that an attempt depends on but the widths.

    Attributes:
        analysis: of the network at its present sizes.
        shapes: present shape by tensor name.
        grouped: how grouped convolutions grow.
        pairing: lays out new channels.
        pairings: by group name, what lays out those of groups with a pairing of their own.
        rounded: the groups whose widths are ratios, which may be rounded up.
        with_eps: for each layer the attributes that may be its eps.
        scale_writers: whether 1/η may be a factor on old weights.
        rescaled: weights on which it may not, whatever ``scale_writers``.
    """

    analysis: Analysis
    shapes: Mapping[str, tuple[int, ...]]
    grouped: Grouped
    pairing: Pairing
    with_eps: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    scale_writers: bool = True
    rescaled: frozenset[str] = frozenset()
    pairings: Mapping[str, Pairing] = field(default_factory=dict)
    rounded: frozenset[str] = frozenset()
    _flows: dict[str, PaddingFlow] = field(default_factory=dict)
    _zero_channels: dict[str, frozenset[int] | str] = field(default_factory=dict)
    _made: dict[frozenset[tuple[str, int]], Feasible | Obstacle] = field(default_factory=dict)

    def zero_channels(
        self, widths: Mapping[str, int], mixed: Mixed
    ) -> tuple[dict[str, frozenset[int]], dict[str, str]]:
        """Return what is zero of the groups whose new channels are to be, and why it cannot be."""
        found: dict[str, frozenset[int]] = {}
        problems: dict[str, str] = {}
        for group in self.analysis.groups:
            if not self._pairing_of(group)(1, 0, "").writes_zeros:
                continue
            if widths.get(group.name, group.width) == group.width or mixed.lays_out(group):
                continue
            if group.name not in self._zero_channels:
                self._zero_channels[group.name] = follow_zeros(self.analysis, group)
            found_zeros = self._zero_channels[group.name]
            if isinstance(found_zeros, str):
                problems[group.name] = found_zeros
            else:
                found[group.name] = found_zeros
        return found, problems

    def keeps_from_zero(self, reason: str) -> bool:
        """Return whether a reason is why new channels of some group cannot be zero."""
        return reason in self._zero_channels.values()

    def _pairing_of(self, group: ChannelGroup) -> Pairing:
        """Return what lays out a group's new channels."""
        return self.pairings.get(group.name, self.pairing)

    def pairing_by_channel(self) -> dict[int, Pairing]:
        """Return, by old channel, the pairing of those whose group has one of its own."""
        there = self.analysis.present
        own = (group for group in self.analysis.groups if group.name in self.pairings)
        return {
            int(c): self.pairings[group.name]
            for group in own
            for c in there.numbers(group.channels)
        }

    def pairing_of_empty(self) -> dict[tuple[str, int], Pairing]:
        """Return the same by tensor and dim, for groups without a channel."""
        axes = self.analysis.channels.axes
        return {
            (axes[index].tensor, axes[index].dim): self.pairings[group.name]
            for group in self.analysis.groups
            if group.name in self.pairings and not group.width
            for index in group.axes
        }

    def _copied_groups(self, sizes: Sizes, mixed: Mixed) -> dict[str, str]:
        """Return why groups cannot grow that new convolution groups read and norms want copied.

        A new convolution group cancels with its twin, which reads twins; copies are none.
        """
        channels = self.analysis.channels
        weights = {name for name in sizes.convolution_groups if channels.convolution_groups[name]}
        found = {}
        for group in self.analysis.groups:
            touched = {channels.axes[axis].tensor for axis in group.axes} & weights
            if touched and group.name in sizes.widths and mixed.lays_out(group):
                found[group.name] = (
                    f"a norm over all its channels wants copies, and new groups of "
                    f"{layer_of(min(touched))} want twins; grow inside the groups instead "
                    "(grouped width)"
                )
        return found

    def padding(self, group: ChannelGroup, width: int) -> Padding | str:
        """Return how a group grows by more than whole copies, or why not; it is followed once."""
        if group.name not in self._flows:
            self._flows[group.name] = follow_padding(self.analysis, group)
        flow = self._flows[group.name]
        return flow.refusal or padding_of(flow, group, width)

    def make(self, widths: Mapping[str, int]) -> Feasible | Obstacle:
        """Return what comes of some widths; those that no count allows are refused.

        Group norms get new groups, unless the pairing copies or writes zeros, which they would
        normalise; where that cannot be, they keep their numbers of groups if whole copies fit.
        """
        key = frozenset(widths.items())
        if key not in self._made:
            self._made[key] = self._make_either(widths)
        return self._made[key]

    def _make_either(self, widths: Mapping[str, int]) -> Feasible | Obstacle:
        """Try new groups of group norms first, or copies first."""
        layouts = {g.name: self._pairing_of(g)(1, 1, "") for g in self.analysis.groups}
        copying = {name for name, own in layouts.items() if own.copies or own.writes_zeros}
        made = self._make(widths, copying)
        all_copy = copying == layouts.keys()
        if isinstance(made, Feasible) or all_copy or not self.analysis.channels.norm_groups:
            return made
        other = made if self.grouped == "count" else self._make(widths, layouts.keys())
        return other if isinstance(other, Feasible) else made

    def _make(self, widths: Mapping[str, int], copying: Collection[str]) -> Feasible | Obstacle:
        analysis, refused = self.analysis, dict[str, str]()
        while True:
            widths = {name: width for name, width in widths.items() if name not in refused}
            sizes_at = partial(
                sizes_together, analysis, shapes=self.shapes, grouped=self.grouped,
                copying=copying, rounded=self.rounded,
            )  # fmt: skip
            sizes = sizes_at(widths)
            mixed = mixed_groups(analysis, sizes.widths, self.padding, sizes.norm_groups)
            written = {writer for padding in mixed.padding.values() for writer in padding.writers}
            scale_writers = self.scale_writers and self.rescaled.isdisjoint(written)
            eta, unsettled = settle(
                analysis.tape, mixed.padding, self.with_eps, scale_writers=scale_writers,
                silenced=analysis.silenced,
            )  # fmt: skip
            zero_channels, stuck = self.zero_channels(widths, mixed)
            problems = stuck | mixed.problems | unsettled | self._copied_groups(sizes, mixed)
            problems |= {refusal.name: refusal.reason for refusal in sizes.refused}
            if not problems:
                break
            refused |= problems
        found = tuple(Refusal(name, reason) for name, reason in refused.items())
        if not widths:
            return Obstacle(found[0].reason, found[0].name, refused, certain=True)
        resized = run_at(analysis, sizes, sizes_at)
        if isinstance(resized, Obstacle):
            return resized
        resized, scales, changed = with_numbers(analysis, sizes, resized, eta, self.with_eps)
        there = analysis.present
        copies = {int(there.number[c]): n for c, n in mixed.copies(analysis.groups).items()}
        copied = there.numbers(mixed.copied)
        matching = match(
            there.channels, resized.channels, self.pairing, copied, copies,
            self.pairing_by_channel(), self.pairing_of_empty(),
        )  # fmt: skip
        if isinstance(matching, Obstacle):
            together = self._read_together(matching.name)
            groups = dict.fromkeys((name for name in widths if name in together), matching.reason)
            return replace(matching, groups=groups, certain=bool(groups))
        if changed is not None:
            return changed
        return Feasible(
            sizes, resized, matching, mixed.copied, mixed.padding, eta, found, zero_channels, scales
        )

    def _read_together(self, writer: str) -> set[str]:
        """Return the groups that a layer writes, and all that share a reader with them, and so on.

        A concatenation or a shuffle lays these out side by side, so that they grow together or not.
        """
        groups, roles = self.analysis.groups, self.analysis.channels.roles
        axes = {axis for group in groups if writer in group.writers for axis in group.axes}
        found: set[str] = set()
        while True:
            beside = [g for g in groups if g.name not in found and axes & set(g.axes)]
            if not beside:
                return found
            found |= {group.name for group in beside}
            axes |= {a for group in beside for a in group.axes if roles[a] == "reader"}

    def suspects(self, obstacle: Obstacle, widths: Mapping[str, int]) -> list[str]:
        """Return which of some groups an obstacle may come from: all of them if nothing tells.

        What a module's code does wrong comes from the groups that its tensors hold.
        """
        named = [name for name in widths if name in obstacle.groups]
        if named or not obstacle.name:
            return named or [*widths]
        axes = self.analysis.channels.axes
        inside = f"{obstacle.name}."
        held = {index for index, axis in enumerate(axes) if axis.tensor.startswith(inside)}
        touching = {group.name for group in self.analysis.groups if held & set(group.axes)}
        return [name for name in widths if name in touching] or [*widths]


def feasible(attempts: Attempts, widths: Mapping[str, int]) -> Feasible:
    """Return sizes at which the network runs; groups that stand in the way are refused.

    All are tried together. What an obstacle comes from is set aside until the rest works, and then
    joins it again, kind by kind and then all at once, unless it is certain that it cannot grow.

    Raises:
        PlanError: nothing is left to grow; the first reason is told.
    """
    left, refused, aside = dict(widths), dict[str, str](), set[str]()
    made = _set_aside(attempts, left, refused, aside)
    alone: list[str] = []
    for kind in kinds_of([group for group in attempts.analysis.groups if group.name in aside]):
        more, failing = _join(attempts, {name: widths[name] for name in kind}, left)
        made = more or made
        refused = {name: why for name, why in refused.items() if name not in kind} | failing
        alone += failing
    if len(alone) > 1 and {*alone} < {*widths}:  # heads that only grow beside what comes in
        joined = attempts.make(left | {name: widths[name] for name in alone})
        if isinstance(joined, Feasible):
            made, refused = (
                joined,
                {name: why for name, why in refused.items() if name not in alone},
            )
    if made is None:
        _tell_first(attempts, widths, left, refused)
        name, reason = next(iter(refused.items()))
        out = "Choose another pairing for it." if attempts.keeps_from_zero(reason) else ""
        raise PlanError(f"{name} cannot be widened: {reason}.", name=name, way_out=out)
    refused |= {refusal.name: refusal.reason for refusal in made.refused}
    _tell_first(attempts, widths, left, refused)
    told = tuple(Refusal(name, refused[name]) for name in widths if name in refused)
    return replace(made, refused=told)


def _tell_first(
    attempts: Attempts, widths: Mapping[str, int], left: Mapping[str, int], refused: dict[str, str]
) -> None:
    """Say why groups that only grow together do not, where each was told of the other, in place."""
    lone = {n: why for n, why in refused.items() if why in ALIKE and n in widths}
    if not lone:
        return
    joined = attempts.make({**left, **{name: widths[name] for name in refused if name in widths}})
    if isinstance(joined, Obstacle) and joined.reason not in ALIKE:
        refused |= {name: joined.reason_for(name) for name in lone}
        return
    causes = {name: _cause(attempts.analysis, name, widths, refused) for name in lone}
    for name in sorted(lone, key=lambda name: not causes[name]):  # then others lead to these
        cause = causes[name] or _cause(attempts.analysis, name, widths, refused)
        refused[name] = lone[name] + cause


def _cause(
    analysis: Analysis, name: str, widths: Mapping[str, int], refused: Mapping[str, str]
) -> str:
    """Return which group stays that one only grows beside, and why; "" if none does.

    Args:
        analysis: of the network.
        name: of the group that would grow.
        widths: wanted width by name of the groups that were asked for.
        refused: by name, why some of them do not grow.
    """
    alike = alike_layers(analysis.traced.standin)
    layers = [layer_of(axis.tensor) for axis in analysis.channels.axes]
    held = {g.name: alike & {layers[axis] for axis in g.axes} for g in analysis.groups}
    beside = [g for g in analysis.groups if g.name != name and held[g.name] & held[name]]
    for group in beside:
        if refused.get(group.name, TOGETHER) not in ALIKE:
            return f"; {group.name} cannot: {refused[group.name]}"
    for group in beside:
        if group.pin is not None:
            return f"; {group.name} cannot: {group.pin}"
    unasked = next((group for group in beside if group.name not in widths), None)
    return f"; {unasked.name} was not asked to (--where all, --include, width)" if unasked else ""


def _set_aside(
    attempts: Attempts, left: dict[str, int], refused: dict[str, str], aside: set[str]
) -> Feasible | None:
    """Return what comes of the groups that are left without those that obstacles come from.

    Args:
        attempts: to make of what.
        left: the wanted widths; what stands in the way is taken out, in place.
        refused: the reason for each that is taken out, in place.
        aside: which of these may work beside others, in place.
    """
    while left:
        made = attempts.make(left)
        if isinstance(made, Feasible):
            return made
        suspects = attempts.suspects(made, left)
        if not made.certain and len(left) > 1:
            aside |= {*suspects}
        for name in suspects:
            refused[name] = made.reason_for(name)
            del left[name]
    return None


def _join(
    attempts: Attempts, more: dict[str, int], left: dict[str, int]
) -> tuple[Feasible | None, dict[str, str]]:
    """Let more groups of one kind grow, all of them or those that can.

    If the first and the last of the kind cannot, nor can those between.

    Args:
        attempts: to make of what.
        more: their widths.
        left: the widths of what grows already; those that can are put among these, in place.

    Returns:
        What comes of it, None if no more than before, and why the others cannot grow.
    """
    made = attempts.make(left | more)
    if isinstance(made, Feasible):
        left |= more
        return made, {}
    names = [*more]
    if len(names) == 1:
        return None, {names[0]: made.reason_for(names[0])}
    best: Feasible | None = None
    failing: dict[str, str] = {}
    for name in dict.fromkeys((names[0], names[-1], *names)):  # the ends first
        if len(failing) == 2 and {*failing} == {names[0], names[-1]}:
            failing = {name: failing.get(name, failing[names[0]]) for name in names}
            break
        if name in failing or name in left:
            continue
        one, why = _join(attempts, {name: more[name]}, left)
        best, failing = one or best, failing | why
    return best, {name: failing[name] for name in names if name in failing}
