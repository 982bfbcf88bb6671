"""Other numbers of convolution groups: the weight of some groups as that of fewer, exactly.

A convolution in G groups is one in G/k groups whose weight is zero between the k that became one.
A larger architecture may have fewer, wider groups (RegNets do): each of its groups then takes in as
few of the source's as will do, in order, and the last ones may be left with none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.channels import Channels
from fxgrow.errors import PlanError
from fxgrow.grow.kernels.convolutions import sharing_weight
from fxgrow.modules.tensors import named_tensors

Regrouping = Mapping[str, tuple[int, int]]  # a weight's name -> numbers of groups before and after


def regrouped_towards(
    source: Analysis, target: nn.Module, modules: Mapping[str, str]
) -> Regrouping:
    """Return the weights of the source whose groups are not continued one by one as they are.

    Args:
        source: of the smaller network.
        target: the larger one.
        modules: for each module of the target that continues one of the source, that one's name.

    Raises:
        PlanError: some layer's groups have no place there, or its weight is not its own.
    """
    found: dict[str, tuple[int, int]] = {}
    tensors = named_tensors(source.traced.standin)
    for after, before in modules.items():
        layers = source.traced.standin.get_submodule(before), target.get_submodule(after)
        if not (isinstance(layers[0], _ConvNd) and isinstance(layers[1], _ConvNd)):
            continue
        old, new = _Groups.of(layers[0]), _Groups.of(layers[1])
        if old.count == new.count or (old.count < new.count and old.columns == new.columns):
            continue  # as many groups, or more of the same
        counts = f"{old.count} groups of {old.columns}", f"{new.count} of {new.columns}"
        told = f"{after} has {counts[0]} in the source and {counts[1]} there"
        if problem := _problem(source, before, old, new):
            raise PlanError(f"{told}: {problem}.", name=after)
        names = [name for name, tensor in tensors.items() if tensor is layers[0].weight]
        for name in names:
            if found.setdefault(name, (old.count, new.count)) != (old.count, new.count):
                raise PlanError(f"{told}: its weight is shared, and not so there.", name=after)
    return found


@dataclass(frozen=True)
class _Groups:
    """How many groups a convolution has, and the rows and columns of its weight in each."""

    count: int
    rows: int
    columns: int

    @classmethod
    def of(cls, layer: _ConvNd) -> _Groups:
        rows, columns = layer.weight.shape[:2]
        return cls(layer.groups, rows // layer.groups, columns)


def _problem(source: Analysis, layer: str, old: _Groups, new: _Groups) -> str:
    """Return why a layer's groups cannot be put into others; "" if they can."""
    times = -(-old.count // new.count)
    if times * old.rows > new.rows or times * old.columns > new.columns:
        return f"one there would have to hold {times} of the source's, and none can be split"
    if source.channels.convolution_groups.get(f"{layer}.weight") == 0:
        return "a depthwise convolution stays one"
    sharing = sharing_weight(source, layer)
    return sharing if isinstance(sharing, str) else ""


def regrouped(channels: Channels, regrouping: Regrouping) -> Channels:
    """Return channels as if they were those of convolutions in other numbers of groups.

    Args:
        channels: of the network as it is.
        regrouping: as :func:`regrouped_towards` returns it.
    """
    counts = {
        **channels.convolution_groups,
        **{name: after for name, (_, after) in regrouping.items()},
    }
    return replace(
        channels,
        axes=tuple(
            replace(axis, groups=regrouping[axis.tensor][1])
            if axis.tensor in regrouping and axis.dim == 1
            else axis
            for axis in channels.axes
        ),
        convolution_groups={name: count for name, count in counts.items() if count != 1},
        regrouped=regrouping,
    )
