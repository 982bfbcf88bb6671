"""Run a network in which a layer of no channel gets one, which is told from what is broadcast.

At a width of one it cannot be told; at two it can. So the network runs with two there, and the
second is taken out of what that tells, as of a group that was followed at another width
(:mod:`fxgrow.channels.present`). The run at a width of one says whether the network does the same
there, and which attributes follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.channels import Channels
from fxgrow.channels.present import without
from fxgrow.grow.obstacle import Obstacle
from fxgrow.grow.sizes.rerun import Resized, run_resized
from fxgrow.grow.sizes.resize import Sizes

_TWO = 2  # channels, the fewest that are told from what is broadcast


def run_at(
    analysis: Analysis, sizes: Sizes, sizes_at: Callable[[Mapping[str, int]], Sizes]
) -> Resized | Obstacle:
    """Run at new sizes, also where groups have one channel there.

    Args:
        analysis: of the network.
        sizes: the new sizes.
        sizes_at: returns those that follow from widths, by group name.

    Returns:
        What a run at the new sizes tells, with the channels as they are told with two for one.
    """
    # A channel may be several rows, as of a GLU.
    empty = [g for g in analysis.groups if not g.width and len(g.channels)]
    rows = {group.name: group.followed // len(group.channels) for group in empty}
    ones = [name for name, width in sizes.widths.items() if width == rows.get(name)]
    if not ones:
        return run_resized(analysis, sizes)
    wider = {name: _TWO * sizes.widths[name] for name in ones}
    found = run_resized(analysis, sizes_at(sizes.widths | wider))
    if isinstance(found, Obstacle):
        return found
    plain = run_resized(analysis, sizes)
    if isinstance(plain, Obstacle):
        return plain
    channels = _first_alone(analysis, found.channels, ones)
    ran = [[op.target for op in run.tape.operations] for run in (found, plain)]
    set_there = [{(x.module, x.attribute) for x in run.modules} for run in (found, plain)]
    fixed = found.sizes or plain.sizes
    if fixed or ran[0] != ran[1] or set_there[0] != set_there[1] or not _fits(channels, sizes):
        told = "the code does something else with one channel; ask for more"
        return Obstacle(told, groups=dict.fromkeys(ones, told), certain=True)
    return replace(plain, channels=channels)


def _first_alone(analysis: Analysis, channels: Channels, ones: Sequence[str]) -> Channels:
    """Return the channels of a run without the second ones that the first writers of groups have.

    Args:
        analysis: of the network at its present sizes.
        channels: of the run.
        ones: the groups, by name.
    """
    places = {(axis.tensor, axis.dim): index for index, axis in enumerate(channels.axes)}
    before, roles = analysis.channels.axes, analysis.channels.roles
    absent = np.zeros(channels.count, dtype=bool)
    for group in analysis.groups:
        if group.name in ones:
            first = before[next(index for index in group.axes if roles[index] == "writer")]
            there = channels.of_axis(places[first.tensor, first.dim])
            absent[there[there != there[0]]] = True
    return without(channels, absent).channels


def _fits(channels: Channels, sizes: Sizes) -> bool:
    """Return whether what is left of axes is as long as they are."""
    return all(
        axis.size == sizes.shapes[axis.tensor][axis.dim]
        for axis in channels.axes
        if axis.groups == 1 and axis.tensor in sizes.shapes
    )
