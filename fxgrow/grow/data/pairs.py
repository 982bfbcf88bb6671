"""Layers between which new channels can be computed from data: one writer, and what reads it.

Both methods ask what a new channel does near zero: what one linear layer writes, changed by
whatever lies between, and read by one linear layer or several. What lies between is not
interpreted, it is asked by running it (:mod:`fxgrow.grow.data.passages`): norms over the batch,
activations, pooling, convolutions of each channel by itself, a flattening into columns. Whether it
treats each channel by itself is read off the operations that ran, and tried. What does not is
refused by name: a group norm, a gate, another layer. A norm over all channels is left as it was by
new channels that hold the mean of the others (or zero, before an RMSNorm); see
:mod:`fxgrow.grow.data.held`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.grow.data.between import is_depthwise, norm_over, problems_between
from fxgrow.grow.data.directions import Shapes
from fxgrow.grow.norms.padding import follow_padding
from fxgrow.grow.norms.zero_channels import follow_zeros
from fxgrow.labels.padding import Holds
from fxgrow.modules.tensors import layer_of
from fxgrow.plan.step import Refusal

# A layer that is linear in its weight (out, in, *kernel); bias or none.
LinearLayer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Slopes: TypeAlias = tuple[float, float]  # left and right of zero


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads a channel group.

    Attributes:
        name: fully qualified.
        columns: where the columns of each channel are, (channels, columns of each): several where
            a convolution's output was flattened.
        column: shape of what one channel has in it, (out, *kernel) or (out, columns of each).
        slopes: of the scalar function σ that lies between, if it is no more than that; else None.
        slope: σ'(0) as torch's autograd has it; 0 for a ReLU.
        raised: the same at what new channels of zero rows hold if biases are a little above zero.
    """

    name: str
    columns: Tensor
    column: tuple[int, ...]
    slopes: Slopes | None = None
    slope: float = 0.0
    raised: float = 0.0


@dataclass(frozen=True, eq=False)
class LayerPair:
    """The layers on either side of a channel group, and what lies between.

    Attributes:
        group: the group's name.
        width: its present width.
        writer: fully qualified name of the layer that writes it.
        readers: the layers that read it.
        has_bias: whether the writer has a bias.
        norms: batch norms between, by name, with the eps of each.
        carried: what new channels have in the other carriers between, by tensor, with one channel
            or as a number: the mean of what old ones have (a PReLU); in a depthwise convolution,
            whose taps have no mean to speak of, the mean norm of old kernels at the centre, which
            no padding touches, and no bias.
        carriers: all tensors with an entry for each channel but the writer's own.
        flat: why new channels cannot be zeros that learn; "" if they can.
        over: name of the norm over the channels (a LayerNorm, an RMSNorm); "" if there is none.
        holds: what new channels hold before that norm, so that its result stays what it was.
    """

    group: str
    width: int
    writer: str
    readers: tuple[Reader, ...]
    has_bias: bool
    norms: Mapping[str, float] = field(default_factory=dict)
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    carriers: tuple[str, ...] = ()
    flat: str = ""
    over: str = ""
    holds: Holds = "zero"

    @property
    def is_raisable(self) -> bool:
        """Whether the writer's bias can hold new channels above zero: no norm is over it."""
        return self.has_bias and not self.over

    @property
    def over_bias(self) -> str:
        """The bias of the norm over the channels, by name; "" if there is none."""
        name = f"{self.over}.bias"
        return name if self.over and name in self.carriers else ""

    @property
    def reader(self) -> str:
        """The names of the readers, for texts."""
        return ", ".join(reader.name for reader in self.readers)

    @property
    def block(self) -> int:
        """How many channels are run at a time: as many as there are, or one where there is none."""
        return max(self.width, 1)

    @property
    def has_offset(self) -> bool:
        """Whether the writer or a norm has a bias, which can hold new channels above zero."""
        return self.is_raisable or bool(self.norms) or bool(self.over_bias)


def find_pair(analysis: Analysis, group: ChannelGroup, model: nn.Module) -> LayerPair | Refusal:
    """Return the layers around a channel group, or why they are none that can be treated.

    Args:
        analysis: of the network or of a part of it.
        group: one of its groups.
        model: the network itself.
    """
    problem = next(_problems_around(analysis, group, model), None)
    if problem is not None:
        return Refusal(group.name, problem)
    over = norm_over(analysis, group, model)
    problem = next(problems_between(analysis, group, model, over), None)
    if problem is not None:
        return Refusal(group.name, problem)
    (writer,) = group.writers
    padding = follow_padding(analysis, group) if over else None
    if padding is not None and padding.refusal:
        return Refusal(group.name, f"{over} is over all channels, and {padding.refusal}")
    zeros = "" if padding else follow_zeros(analysis, group)
    norms = {
        layer: module.eps
        for layer in group.carriers
        if isinstance(module := model.get_submodule(layer), _BatchNorm)
    }
    carriers = tuple(t for t, _ in _axes(analysis, group, "carrier") if layer_of(t) != writer)
    return LayerPair(
        group=group.name,
        width=group.width,
        writer=writer,
        readers=tuple(_reader(analysis, group, model, layer) for layer in group.readers),
        has_bias=model.get_submodule(writer)._parameters["bias"] is not None,
        norms=norms,
        carried={
            name: _entry(model, name) for name in carriers if layer_of(name) not in {*norms, over}
        },
        carriers=carriers,
        flat=zeros if isinstance(zeros, str) else "",
        over=over,
        holds=padding.holds if padding else "zero",
    )


def _axes(analysis: Analysis, group: ChannelGroup, role: str) -> Iterator[tuple[str, int]]:
    """Yield the tensors with an axis of a role in a group, and the index of the axis."""
    for index in group.axes:
        if analysis.channels.roles[index] == role:
            yield analysis.channels.axes[index].tensor, index


def _entry(model: nn.Module, name: str) -> Tensor:
    """Return what new channels have in a carrier that is no norm, in float64 on the CPU."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    tensor = named[name].detach().double().cpu()
    if not is_depthwise(model, layer_of(name)):
        return tensor.mean()
    if tensor.ndim == 1:
        return tensor.new_zeros(())
    found = torch.zeros_like(tensor[:1])  # (1, 1, *kernel)
    centre = (0, 0, *(size // 2 for size in tensor.shape[2:]))
    norms = tensor.flatten(1).norm(dim=1)
    found[centre] = norms.mean() if bool(norms.any()) else 1.0
    return found


def _reader(analysis: Analysis, group: ChannelGroup, model: nn.Module, layer: str) -> Reader:
    """Return a layer that reads a group."""
    columns = _columns(analysis, group, layer)
    shape = model.get_parameter(f"{layer}.weight").shape
    each = columns.shape[1:] if columns.shape[1] > 1 else torch.Size()
    return Reader(layer, columns, (shape[0], *shape[2:], *each))


def _columns(analysis: Analysis, group: ChannelGroup, layer: str) -> Tensor:
    """Return where a reader has the columns of each channel: (channels, columns of each).

    Empty if its columns are not those of the group's channels alone, equally many of each.
    """
    (axis,) = (i for t, i in _axes(analysis, group, "reader") if t == f"{layer}.weight")
    there = analysis.present
    if not (wanted := there.numbers(group.rows)).size:
        return torch.zeros(0, 1, dtype=torch.int64)
    channels = there.channels.of_axis(axis)
    order = np.argsort(channels, kind="stable")
    found, counts = np.unique(channels, return_counts=True)
    whole = len(set(counts.tolist())) == 1 and set(found) == set(wanted.tolist())
    if not whole:
        return torch.zeros(0, 0, dtype=torch.int64)
    by_channel = dict(zip(found.tolist(), order.reshape(len(found), -1), strict=True))
    return torch.from_numpy(np.stack([by_channel[c] for c in wanted.tolist()]))


def _problems_around(analysis: Analysis, group: ChannelGroup, model: nn.Module) -> Iterator[str]:
    """Yield why the layers around a group cannot be treated; each holds if those before do not."""
    if group.kind != "hidden":
        yield (
            f"it is a {group.kind} group, which has to be written by one layer alone (it is by "
            f"{len(group.writers)}) and not to be added to another"
        )
    if len(group.writers) != 1:
        yield f"{len(group.writers)} layers write it ({', '.join(group.writers)})"
    if not group.readers:
        yield "no layer reads it"
    (writer,) = group.writers
    for layer in (writer, *group.readers):
        yield from _problems_of(model, layer)
    yield from _empty_around(model, writer, group.readers)
    rows = model.get_parameter(f"{writer}.weight").shape[0]
    if group.followed_at not in (None, len(group.channels)):
        yield f"several rows of {writer} make one of its channels"
    for layer in group.readers:
        columns = _columns(analysis, group, layer)
        if not rows == group.width == len(group.channels) - len(group.absent) == len(columns):
            yield f"its channels are not each one row of {writer} and columns of {layer} alone"
        if not _in_order(columns):
            yield f"its channels are in another order where {layer} reads them"
    for tensor, axis in _axes(analysis, group, "carrier"):
        there = analysis.present
        if not np.array_equal(there.channels.of_axis(axis), there.numbers(group.rows)):
            yield f"{tensor} has not one entry for each of its channels, in order"
    for layer in group.carriers:
        yield from _problems_of_carrier(model, layer)


def _empty_around(model: nn.Module, writer: str, readers: Collection[str]) -> Iterator[str]:
    """Yield which layer is empty on its other side, so that data tell nothing."""
    if not model.get_parameter(f"{writer}.weight").shape[1]:
        yield f"{writer} reads no channels yet (grow these first, by another init if need be)"
    for layer in readers:
        if not len(model.get_parameter(f"{layer}.weight")):
            yield f"{layer} writes no channels yet (grow these first, by another init if need be)"


def _in_order(columns: Tensor) -> bool:
    """Return whether columns are laid out by channel, or by position and there by channel."""
    flat = torch.arange(columns.numel())
    return torch.equal(columns.flatten(), flat) or torch.equal(columns.T.flatten(), flat)


def _problems_of(model: nn.Module, name: str) -> Iterator[str]:
    """Yield why a layer does more than apply a weight (out, in, *kernel) of its own."""
    layer = dict(model.named_modules()).get(name)
    plain = [kind.forward for kind in _LAYERS]
    if (
        not isinstance(layer, _LAYERS)
        or "weight" not in layer._parameters  # a parametrized one is computed
        or type(layer).forward not in plain
    ):
        yield f"{name} is no plain linear layer or convolution"
        return
    if getattr(layer, "groups", 1) != 1:
        yield f"{name} is a grouped convolution"
    uses = [p for _, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
    if len(uses) > 1:
        yield f"the weight of {name} is shared"


def _problems_of_carrier(model: nn.Module, name: str) -> Iterator[str]:
    """Yield why new channels cannot pass a layer with an entry for each as they need to."""
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, _BatchNorm):
        return
    if layer._buffers.get("running_mean") is None:
        yield f"the norm {name} keeps no statistics, so that it is no function of one sample"
    if layer._parameters.get("weight") is None:
        yield f"the norm {name} has no weight, so that no new channel passes it unchanged"


def shapes_of(network: nn.Module, pair: LayerPair) -> Shapes:
    """Return the shapes of a row and of a column over all readers."""
    weight = network.get_parameter(f"{pair.writer}.weight")
    entries = sum(math.prod(reader.column) for reader in pair.readers)
    return Shapes(tuple(weight.shape[1:]), (entries,), pair.has_bias, weight.dtype)
