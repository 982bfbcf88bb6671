"""Widths that were rounded apart, and are one width in the code of a layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.grow.sizes.resize import Sizes, new_sizes
from fxgrow.plan.requests import Grouped


def sizes_together(
    analysis: Analysis,
    widths: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    grouped: Grouped,
    *,
    copying: Collection[str],
    rounded: Collection[str],
) -> Sizes:
    """Return the sizes that follow from new widths, as :func:`new_sizes` does.

    The heads of an ``nn.MultiheadAttention`` are as wide as what comes in. Where one ratio was
    asked of both, and was rounded up to whole heads, what comes in grows as much: of 3 heads over
    12 channels, ``1.5x`` makes 5 over 20.
    """
    wanted = dict(widths)
    while True:
        sizes = new_sizes(
            analysis.channels, analysis.groups, wanted, shapes, grouped,
            copying=copying, rounded=rounded,
        )  # fmt: skip
        raised = {
            group.name: width
            for heads, entering in _attentions(analysis)
            if {heads.name, entering.name} <= {*rounded} & sizes.widths.keys()
            and _alike(heads, entering, widths)
            for group, width in _evened(heads, entering, sizes.widths)
        }
        if not raised:
            return sizes
        wanted |= raised  # whole multiples of the present widths are always even, so that this ends


def _attentions(analysis: Analysis) -> Iterator[tuple[ChannelGroup, ChannelGroup]]:
    """Yield the group of each attention's heads, and that of what comes in, where each is one."""
    channels = analysis.channels
    places = {(axis.tensor, axis.dim): index for index, axis in enumerate(channels.axes)}
    for name, module in analysis.traced.standin.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            weight = f"{name}.in_proj_weight" if name else "in_proj_weight"
            both = [_only_group(analysis, places.get((weight, dim))) for dim in (0, 1)]
            if both[0] is not None and both[1] is not None and both[0] is not both[1]:
                yield both[0], both[1]


def _only_group(analysis: Analysis, axis: int | None) -> ChannelGroup | None:
    """Return the group that has all positions of an axis, None if there is none."""
    if axis is None:
        return None
    there = set(analysis.channels.of_axis(axis).tolist())
    return next((g for g in analysis.groups if there <= set(g.channels.tolist())), None)


def _alike(first: ChannelGroup, second: ChannelGroup, widths: Mapping[str, int]) -> bool:
    """Return whether the widths that were asked for differ by no more than rounding."""
    apart = widths[first.name] * second.width - widths[second.name] * first.width
    return abs(apart) <= max(first.width, second.width)


def _evened(
    first: ChannelGroup, second: ChannelGroup, widths: Mapping[str, int]
) -> Iterator[tuple[ChannelGroup, int]]:
    """Yield the one of two groups that has grown less, and the width that it has to have."""
    for one, other in ((first, second), (second, first)):
        width = -(-widths[other.name] * one.width // other.width)
        if width > widths[one.name]:
            yield one, width
