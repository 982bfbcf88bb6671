"""Plan towards a given architecture: its own labels stand for the run at the new sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.channels import Channels
from fxgrow.errors import PlanError
from fxgrow.grow.convert.concatenated import apart
from fxgrow.grow.match.group_norms import with_new_groups
from fxgrow.grow.match.match import match
from fxgrow.grow.norms.eta import settle
from fxgrow.grow.norms.mixers import mixed_groups
from fxgrow.grow.obstacle import Obstacle
from fxgrow.grow.sizes.rerun import Resized
from fxgrow.grow.sizes.resize import Sizes
from fxgrow.grow.widen.feasible import Attempts, Feasible
from fxgrow.labels.forest import IntArray
from fxgrow.modules.tensors import named_tensors

_NOTHING: IntArray = np.zeros(0, dtype=np.int64)


def towards(
    attempts: Attempts,
    target: Analysis,
    names: Mapping[str, str],
    bridges: Collection[str] = (),
    added: IntArray = _NOTHING,
) -> Feasible:
    """Return the sizes and the channels that a target has for the tensors of a source.

    Args:
        attempts: of the source.
        target: of the target, at its own sizes.
        names: for each tensor of the target that continues one of the source, the name of that one.
        bridges: weights of the target that pass each channel on as it is.
        added: labels of the target, of places at which channels are there once more than in the
            source; see :func:`fxgrow.grow.convert.concatenated.added_places`.

    Raises:
        PlanError: some channel of the source has no place in the target, or a norm would compute
            something else.
    """
    analysis = attempts.analysis
    own = apart(target.channels, added)
    new = continuing(_bridged(own, bridges), names)
    tensors = named_tensors(target.traced.standin)
    shapes = {
        before: tuple(tensors[after].shape)
        for after, before in names.items()
        if tuple(tensors[after].shape) != attempts.shapes[before]
    }
    known = {(axis.tensor, axis.dim): axis for axis in new.axes}
    widths = {}
    for group in analysis.groups:
        first = next(x for x in group.axes if analysis.channels.roles[x] == "writer")
        axis = analysis.channels.axes[first]
        grown = known.get((axis.tensor, axis.dim))
        if grown is None:
            raise PlanError(
                f"the target computes with {axis.tensor} in another way.", name=group.name
            )
        if grown.size != axis.size:
            widths[group.name] = group.width * grown.size // axis.size
            if group.kind == "pinned":
                raise PlanError(
                    f"{group.name} would have {grown.size} channels instead of {axis.size}, and "
                    f"cannot grow: {group.reason}.",
                    name=group.name,
                )
    extended = with_new_groups(analysis.channels, new)
    if isinstance(extended, Obstacle):
        raise extended.error
    mixed = mixed_groups(analysis, widths, attempts.padding, extended)
    eta, unsettled = settle(
        analysis.tape, mixed.padding, attempts.with_eps, scale_writers=attempts.scale_writers
    )
    zero_channels, stuck = attempts.zero_channels(widths, mixed)
    for name, reason in (stuck | mixed.problems | unsettled).items():
        raise PlanError(f"{name} cannot get width {widths[name]}: {reason}.", name=name)
    if eta.statistics and not eta.factors:
        name = next(iter(mixed.padding))
        raise PlanError(
            f"{name} cannot get width {widths[name]}: its norms would need another eps than the "
            "target has.",
            name=name,
        )
    copies = mixed.copies(analysis.groups)
    matching = match(analysis.channels, new, attempts.pairing, mixed.copied, copies)
    if isinstance(matching, Obstacle):
        raise matching.error
    read_by_zeros = np.isin(np.arange(new.count), _written_elsewhere(own, names, new))
    read_by_zeros[target.channels.count :] = True
    matching = replace(matching, sign=np.where(read_by_zeros, 0, matching.sign))
    sizes = Sizes(shapes, {}, widths, ())
    resized = Resized(new, (), target.tape)
    return Feasible(sizes, resized, matching, mixed.copied, mixed.padding, eta, (), zero_channels)


def continuing(channels: Channels, names: Mapping[str, str]) -> Channels:
    """Return channels as the tensors that continue others have them, under the names of those.

    Args:
        channels: of a run of the target.
        names: as for :func:`towards`.
    """
    kept = [index for index, axis in enumerate(channels.axes) if axis.tensor in names]
    pieces = [channels.of_axis(index) for index in kept]
    return replace(
        channels,
        axes=tuple(replace(channels.axes[i], tensor=names[channels.axes[i].tensor]) for i in kept),
        roles=tuple(channels.roles[i] for i in kept),
        fills=tuple(channels.fills[i] for i in kept),
        channel=np.concatenate(pieces) if pieces else channels.channel[:0],
        start=np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64),
        convolution_groups=_renamed(channels.convolution_groups, names),
        norm_groups=_renamed(channels.norm_groups, names),
    )


def _renamed(by_tensor: Mapping[str, int], names: Mapping[str, str]) -> dict[str, int]:
    return {names[name]: value for name, value in by_tensor.items() if name in names}


def _bridged(channels: Channels, bridges: Collection[str]) -> Channels:
    """Return channels in which what some weights read and what they write is one and the same."""
    one = np.arange(channels.count)
    axes = {(axis.tensor, axis.dim): index for index, axis in enumerate(channels.axes)}
    for name in bridges:  # in order of execution, so that chains of them end at the first
        written, read = (channels.of_axis(axes[name, dim]) for dim in (0, 1))
        one[written] = one[read]
    return replace(channels, channel=one[channels.channel])


def _written_elsewhere(channels: Channels, names: Mapping[str, str], new: Channels) -> IntArray:
    """Return the channels that tensors of the target alone write: what reads them is to be zero."""
    writers = [index for index, role in enumerate(channels.roles) if role == "writer"]
    own = [channels.of_axis(i) for i in writers if channels.axes[i].tensor not in names]
    kept = [new.of_axis(i) for i, role in enumerate(new.roles) if role == "writer"]
    nothing = np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.concatenate([nothing, *own]), np.concatenate([nothing, *kept]))
