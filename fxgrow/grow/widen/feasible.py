"""Which of the groups that should grow can: sizes at which the network runs and every channel fits.

The whole request is tried first. If the network does not run at those sizes, groups of one kind
(the names of their layers alike but for numbers) are tried together, then what fails is tried
singly, and what fails alone is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup, layer_of
from fxgrow.errors import PlanError, TraceError
from fxgrow.grow.match.match import Matching, match
from fxgrow.grow.norms.eta import Eta, settle
from fxgrow.grow.norms.mixers import Mixed, mixed_groups
from fxgrow.grow.norms.padding import Surplus, find_surplus, follow_surplus
from fxgrow.grow.norms.padding_flow import SurplusFlow
from fxgrow.grow.norms.zero_channels import Silence, follow_silence
from fxgrow.grow.sizes.rerun import Resized, run_resized
from fxgrow.grow.sizes.resize import Sizes, new_sizes
from fxgrow.labels.forest import IntArray
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
        surplus: by group name, what makes norms ignore the channels beyond whole copies.
        eta: how the norms' η is taken up.
        refused: groups that have to stay as they are, and why.
        silent: by group name, what is zero of groups whose new channels are.
    """

    sizes: Sizes
    resized: Resized
    matching: Matching
    copied: IntArray
    surplus: dict[str, Surplus]
    eta: Eta
    refused: tuple[Refusal, ...]
    silent: dict[str, Silence] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempts:
    """All that an attempt depends on but the widths.

    Attributes:
        analysis: of the network at its present sizes.
        shapes: present shape by tensor name.
        grouped: how grouped convolutions grow.
        pairing: lays out new channels.
        with_eps: for each layer the attributes that may be its eps.
        scale_writers: whether 1/η may be a factor on old weights.
    """

    analysis: Analysis
    shapes: Mapping[str, tuple[int, ...]]
    grouped: Grouped
    pairing: Pairing
    with_eps: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    scale_writers: bool = True
    _flows: dict[str, SurplusFlow | PlanError] = field(default_factory=dict)
    _silences: dict[str, Silence | PlanError] = field(default_factory=dict)

    def silent(
        self, widths: Mapping[str, int], mixed: Mixed
    ) -> tuple[dict[str, Silence], dict[str, str]]:
        """Return what is zero of the groups whose new channels are to be, and why it cannot be."""
        found: dict[str, Silence] = {}
        problems: dict[str, str] = {}
        if not self.pairing(1, 0, "").silent:
            return found, problems
        for group in self.analysis.groups:
            if widths.get(group.name, group.width) == group.width or mixed.lays_out(group):
                continue
            if group.name not in self._silences:
                self._silences[group.name] = follow_silence(self.analysis, group)
            silence = self._silences[group.name]
            if isinstance(silence, PlanError):
                problems[group.name] = silence.message.rstrip(".")
            else:
                found[group.name] = silence
        return found, problems

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

    def surplus(self, group: ChannelGroup, width: int) -> Surplus:
        """Return how a group grows by more than whole copies; its run is followed once.

        Raises:
            PlanError: it cannot; the message says why.
        """
        if group.name not in self._flows:
            try:
                self._flows[group.name] = follow_surplus(self.analysis, group)
            except PlanError as error:
                self._flows[group.name] = error
        flow = self._flows[group.name]
        if isinstance(flow, PlanError):
            raise flow
        return find_surplus(flow, width)

    def make(self, widths: Mapping[str, int]) -> Feasible:
        """Return what comes of some widths; those that no count allows are refused.

        Group norms get new groups, unless the pairing copies or writes zeros, which they would
        normalise; where that cannot be, they keep their numbers of groups if whole copies fit.

        Raises:
            TraceError, PlanError: the network does not run, or a channel has no place.
        """
        layout = self.pairing(1, 1, "")
        copying = bool(layout.copies) or layout.silent
        try:
            return self._make(widths, copying=copying)
        except (TraceError, PlanError):
            if copying or not self.analysis.channels.norm_groups or self.grouped == "count":
                raise
            with suppress(TraceError, PlanError):
                return self._make(widths, copying=True)
            raise

    def _make(self, widths: Mapping[str, int], *, copying: bool) -> Feasible:
        analysis, refused = self.analysis, dict[str, str]()
        while True:
            widths = {name: width for name, width in widths.items() if name not in refused}
            sizes = new_sizes(
                analysis.channels, analysis.groups, widths, self.shapes, self.grouped,
                copying=copying,
            )  # fmt: skip
            mixed = mixed_groups(analysis, sizes.widths, self.surplus, sizes.norm_groups)
            eta, unsettled = settle(
                analysis.tape, mixed.surplus, self.with_eps, scale_writers=self.scale_writers
            )
            silent, mute = self.silent(widths, mixed)
            problems = mute | mixed.problems | unsettled | self._copied_groups(sizes, mixed)
            problems |= {refusal.name: refusal.reason for refusal in sizes.refused}
            if not problems:
                break
            refused |= problems
        found = tuple(Refusal(name, reason) for name, reason in refused.items())
        if not widths:
            raise PlanError(found[0].reason if found else "nothing grows", name=found[0].name)
        resized = run_resized(analysis, sizes)
        copies = mixed.copies(analysis.groups)
        matching = match(analysis.channels, resized.channels, self.pairing, mixed.copied, copies)
        return Feasible(sizes, resized, matching, mixed.copied, mixed.surplus, eta, found, silent)

    def problem(self, widths: Mapping[str, int]) -> str:
        """Return why some widths are impossible, or ""."""
        try:
            self.make(widths)
        except (TraceError, PlanError) as error:
            return error.message.rstrip(".")
        return ""


def feasible(attempts: Attempts, widths: Mapping[str, int]) -> Feasible:
    """Return sizes at which the network runs; groups that stand in the way are refused.

    Raises:
        PlanError: nothing is left to grow; the first reason is told.
    """
    refused: dict[str, str] = {}
    while True:
        left = {name: width for name, width in widths.items() if name not in refused}
        try:
            made = attempts.make(left)
        except (TraceError, PlanError) as error:
            stuck = _read_together(attempts.analysis, error.name) & set(left)
            if len(left) == 1:
                more = dict.fromkeys(left, error.message.rstrip("."))
            elif isinstance(error, TraceError) or not stuck:
                more = _that_fail(attempts, left)
            else:
                more = {name: error.message.rstrip(".") for name in left if name in stuck}
            refused |= more
            if set(refused) == set(widths) or not more:
                name, reason = next(iter(refused.items()), (error.name, error.message.rstrip(".")))
                raise PlanError(f"{name} cannot be widened: {reason}.", name=name) from error
        else:
            told = tuple(Refusal(name, reason) for name, reason in refused.items())
            return replace(made, refused=told + made.refused)


def _read_together(analysis: Analysis, writer: str | None) -> set[str]:
    """Return the groups that a layer writes, and all that share a reader with them, and so on.

    A concatenation or a shuffle lays these out side by side, so that they grow together or not.
    """
    axes = {axis for group in analysis.groups if writer in group.writers for axis in group.axes}
    found: set[str] = set()
    while True:
        beside = [g for g in analysis.groups if g.name not in found and axes & set(g.axes)]
        if not beside:
            return found
        found |= {group.name for group in beside}
        roles = analysis.channels.roles
        axes |= {a for group in beside for a in group.axes if roles[a] == "reader"}


def _that_fail(attempts: Attempts, widths: Mapping[str, int]) -> dict[str, str]:
    """Return the groups without which the others work, and why each does not.

    Where each works alone and they fail together, they join one kind after the other.
    """
    failing: dict[str, str] = {}
    kinds = _kinds([group for group in attempts.analysis.groups if group.name in widths])
    for names in kinds:
        reason = ""  # of all together it is known that they fail
        if len(names) < len(widths):
            reason = attempts.problem({name: widths[name] for name in names})
            if not reason:
                continue
        if len(names) == 1:
            failing[names[0]] = reason
        else:
            failing |= _that_fail_alone(attempts, widths, names)
    if failing:
        return failing
    joined: dict[str, int] = {}
    for names in kinds:
        together = joined | {name: widths[name] for name in names}
        if reason := attempts.problem(together):
            failing |= dict.fromkeys(names, reason)
        else:
            joined = together
    return failing


def _kinds(groups: Sequence[ChannelGroup]) -> list[list[str]]:
    """Return the names of groups, side by side where their layers differ in numbers alone."""
    kinds: dict[tuple[frozenset[str], ...], list[str]] = {}
    for group in groups:
        layers = (group.writers, group.carriers, group.readers)
        kind = tuple(frozenset(re.sub(r"\d+", "#", name) for name in names) for names in layers)
        kinds.setdefault(kind, []).append(group.name)
    return list(kinds.values())


def _that_fail_alone(
    attempts: Attempts, widths: Mapping[str, int], names: Sequence[str]
) -> dict[str, str]:
    """Return the groups that fail alone; if the first and the last do, so do all between."""
    ends = dict.fromkeys((names[0], names[-1]))
    reasons = {name: attempts.problem({name: widths[name]}) for name in ends}
    if all(reasons.values()):
        return {name: reasons.get(name, reasons[names[0]]) for name in names}
    for name in names[1:-1]:
        reasons[name] = attempts.problem({name: widths[name]})
    return {name: reasons[name] for name in names if reasons[name]}
