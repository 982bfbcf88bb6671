"""What the batches say: inputs of layers, gradients at their outputs, and sums over all of them.

A network is run as it stands, on a copy. At the output of each reader a tensor of zeros is added,
and its gradient is ∂L/∂z, the direction in which z should not move.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxgrow.errors import PlanError
from fxgrow.grow.data.batches import Batch, LossFunction, loss_of, not_finite, size_of
from fxgrow.grow.data.pairs import LayerPair, LinearLayer, Reader, Slopes
from fxgrow.grow.data.passages import Passage, by_channel, one_sided, rows_of
from fxgrow.modules.calling import arguments_of


class Summed(Protocol):
    """What can be summed over batches and divided by the number of samples."""

    def __add__(self, other: Any, /) -> Any: ...

    def __truediv__(self, other: Any, /) -> Any: ...


Sum = TypeVar("Sum", bound=Summed)


@dataclass(frozen=True)
class Read:
    """What one reader saw of one batch, in float64.

    Attributes:
        layer: the reader; where it has several columns for each channel, a convolution over these.
        h: its inputs, (…, in) for a linear layer, else (N, in, …).
        descent: −∂L/∂z of the summed loss at its outputs z, (…, out) or (N, out, …).
        slopes: of the scalar function that lies before it, if it is no more than that.
        slope, raised: see :class:`fxgrow.grow.data.pairs.Reader`.
    """

    layer: LinearLayer
    h: Tensor
    descent: Tensor
    slopes: Slopes | None
    slope: float
    raised: float


@dataclass(frozen=True)
class Seen:
    """What a pair of layers saw of one batch, in float64.

    Attributes:
        writer: the layer.
        x: its inputs, (…, in) for a linear layer, else (N, in, …).
        reads: what each reader saw.
        passage: runs what lies between; None where that is a scalar function before each reader.
    """

    writer: LinearLayer
    x: Tensor
    reads: tuple[Read, ...]
    passage: Passage | None

    def laid_out(self, written: Tensor) -> list[Tensor]:
        """Return what a writer puts out as each reader has it: its positions in their layouts."""
        return [_laid_out(self.writer, written, read) for read in self.reads]

    def mean_slopes(self, written: Tensor) -> list[Tensor]:
        """Return what readers get per amplitude: the mean of what either sign of it gives."""
        if self.passage is None:
            return [
                _laid_out(self.writer, written * (sum(slopes) / 2), read)
                for read, slopes in self._scalar
            ]
        sides = one_sided(self.passage, written), one_sided(self.passage, -written)
        return [(plus - minus) / 2 for plus, minus in zip(*sides, strict=True)]

    def right_slopes(self, written: Tensor) -> list[Tensor]:
        """Return what readers get per amplitude, for a small one, if the writer puts out this."""
        if self.passage is None:
            return [
                _laid_out(self.writer, right * written.relu() - left * (-written).relu(), read)
                for read, (left, right) in self._scalar
            ]
        return one_sided(self.passage, written)

    @property
    def _scalar(self) -> list[tuple[Read, Slopes]]:
        return [(read, read.slopes) for read in self.reads if read.slopes is not None]


def _laid_out(writer: LinearLayer, values: Tensor, read: Read) -> Tensor:
    """Return what a writer puts out as its reader has it: the same positions, in its layout."""
    rows, dim = as_rows(writer, values), channel_dim(read.layer)
    shape = read.h.movedim(dim, -1).shape
    return rows.reshape(*shape[:-1], rows.shape[-1]).movedim(-1, dim)


@dataclass
class _Recorder:
    """Hooks on the layers of pairs that note inputs and add zeros to outputs.

    Attributes:
        inputs: of each layer, by its name.
        added: the zeros that were added to the outputs, by name.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)

    def note_input(self, name: str, arguments: tuple[Tensor, ...]) -> None:
        """Keep what a layer is given; a copy, for what follows may work in place."""
        self.inputs[name] = arguments[0].detach().to(torch.float64, copy=True)

    def add_zeros(self, name: str, output: Tensor) -> Tensor:
        """Return an output with zeros added, which receive its gradient."""
        self.added[name] = torch.zeros_like(output, requires_grad=True)
        return output + self.added[name]


@contextlib.contextmanager
def _recording(model: nn.Module, pairs: Iterable[LayerPair]) -> Iterator[_Recorder]:
    """Have a recorder note what the layers of pairs get and put out."""
    recorder = _Recorder()
    readers = {reader.name for pair in pairs for reader in pair.readers}
    handles = []
    for name in readers | {pair.writer for pair in pairs}:
        layer = model.get_submodule(name)

        def before(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            recorder.note_input(name, args)

        def after(_: nn.Module, __: object, output: Tensor, name: str = name) -> Tensor:
            return recorder.add_zeros(name, output)

        handles.append(layer.register_forward_pre_hook(before))
        if name in readers:
            handles.append(layer.register_forward_hook(after))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def averages(
    model: nn.Module,
    pairs: Sequence[LayerPair],
    loss_fn: LossFunction,
    batches: Sequence[Batch],
    function: Callable[[str, Seen], tuple[Sum, ...]],
) -> dict[str, tuple[Sum, ...]]:
    """Return, for each pair by the name of its group, averages over all samples.

    Args:
        model: in eval mode; a copy that may be run.
        pairs: what to look at.
        loss_fn: ``(outputs, targets) -> scalar``, the mean over the samples of a batch.
        batches: (inputs, targets) each.
        function: returns sums over the samples of one batch, for a group.

    Raises:
        PlanError: a loss is no finite scalar, it has no gradient, a gradient is not finite, or a
            layer is not run.
    """
    totals: dict[str, tuple[Sum, ...]] = {}
    for number, batch in enumerate(batches):
        for pair, seen in _observed(model, pairs, loss_fn, batch, number):
            found = function(pair.group, seen)
            before = totals.get(pair.group, found)
            joined = zip(before, found, strict=True)
            totals[pair.group] = found if before is found else tuple(a + b for a, b in joined)
    samples = sum(map(size_of, batches))
    return {name: tuple(total / samples for total in found) for name, found in totals.items()}


def _observed(
    model: nn.Module,
    pairs: Sequence[LayerPair],
    loss_fn: LossFunction,
    batch: Batch,
    number: int,
) -> Iterator[tuple[LayerPair, Seen]]:
    """Yield what each pair of layers saw of a batch, which is told by its number in errors."""
    with torch.enable_grad():
        with _recording(model, pairs) as recorder:
            loss = loss_of(model, loss_fn, batch, number)
        if not math.isfinite(float(loss.detach())):
            raise PlanError(
                f"the loss of batch {number} is {float(loss.detach())}, and "
                f"{not_finite(model, batch)}.",
                way_out="Leave that batch out, or mend what is not finite.",
            )
        if not loss.requires_grad:
            raise PlanError(
                "the loss has no gradient: it does not depend on the outputs, or is detached.",
                way_out="Compute it from the outputs by differentiable operations.",
            )
        found = torch.autograd.grad(loss.sum(), [*recorder.added.values()], materialize_grads=True)
    gradients = dict(zip(recorder.added, found, strict=True))
    doubles: dict[str, nn.Module] = {}
    for pair in pairs:
        yield pair, _seen(model, pair, recorder.inputs, gradients, batch, doubles)


def _seen(
    model: nn.Module,
    pair: LayerPair,
    inputs: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    batch: Batch,
    doubles: dict[str, nn.Module],
) -> Seen:
    """Return what one pair saw."""
    if pair.writer not in inputs or any(r.name not in gradients for r in pair.readers):
        raise PlanError(f"a batch does not run {pair.writer} and {pair.reader}.", name=pair.group)
    reads = []
    for reader in pair.readers:
        gradient = gradients[reader.name].to(torch.float64)
        if not bool(torch.isfinite(gradient).all()):
            raise PlanError(
                f"the gradient at {reader.name} is not finite.",
                name=pair.group,
                way_out="Look for NaN in the weights, or leave the group out with exclude.",
            )
        layer, h = _whole_reader(_linear(model, reader.name), reader, inputs[reader.name])
        descent = gradient * -size_of(batch)
        if isinstance(layer, nn.Conv1d) and reader.columns.shape[1] > 1:
            descent = descent.reshape(-1, descent.shape[-1], 1)  # (N, out, 1)
        reads.append(Read(layer, h, descent, reader.slopes, reader.slope, reader.raised))
    passage = None
    if any(reader.slopes is None for reader in pair.readers):
        passage = Passage(model, pair, arguments_of(batch[0]), doubles)
    return Seen(_linear(model, pair.writer), inputs[pair.writer], tuple(reads), passage)


def _linear(model: nn.Module, name: str) -> LinearLayer:
    """Return a layer of a pair.

    Raises:
        PlanError: it is none that is linear in a weight.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, LinearLayer):
        raise PlanError(f"{name} is a {type(layer).__name__}, no linear layer.", name=name)
    return layer


def _whole_reader(layer: LinearLayer, reader: Reader, inputs: Tensor) -> tuple[LinearLayer, Tensor]:
    """Return a reader with several columns for each channel as a convolution over these."""
    out, (channels, each) = layer.weight.shape[0], reader.columns.shape
    if each == 1:
        return layer, inputs
    has_bias = layer.bias is not None
    whole = nn.Conv1d(channels, out, each, bias=has_bias, device="meta")
    return whole, by_channel(reader, inputs)


def applied(
    layer: LinearLayer, weight: Tensor, inputs: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return what a layer would put out with another weight (and a bias, instead of its own).

    Strides, padding and dilation are the layer's; the numbers of channels may differ from its own.
    """
    parameters = {"weight": weight}
    if layer.bias is not None:
        parameters["bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    result: Tensor = functional_call(layer, parameters, (inputs,))
    return result


def patches(layer: LinearLayer, inputs: Tensor) -> Tensor:
    """Return what each output of a layer reads, as channels: (N, in · kernel, …)."""
    if isinstance(layer, nn.Linear):
        return inputs
    kernel = layer.weight.shape[2:]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    found = nn.functional.pad(inputs, layer._reversed_padding_repeated_twice, mode)
    first = inputs.ndim - len(kernel)
    for dim, size in enumerate(kernel):
        spread = layer.dilation[dim]
        windows = found.unfold(first + dim, (size - 1) * spread + 1, layer.stride[dim])
        found = windows[..., ::spread]  # each kernel's dim behind all others, in order
    # (N, in, …, *kernel) -> (N, in, *kernel, …)
    ends = range(found.ndim - len(kernel), found.ndim)
    found = found.movedim([*ends], [*range(first, first + len(kernel))])
    return found.flatten(first - 1, first + len(kernel) - 1)


def correlation(layer: LinearLayer, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the sum over samples and positions of outputs times inputs: (out, in, *kernel).

    For ``outputs`` = ∂L/∂z it is ∂L/∂A of an auxiliary layer A of zeros, with the layer's strides,
    padding and dilation, that is added to it.
    """
    shape = (outputs.shape[channel_dim(layer)], inputs.shape[channel_dim(layer)])
    weight = inputs.new_zeros(*shape, *layer.weight.shape[2:]).requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(applied(layer, weight, inputs), weight, outputs)
    return found


def readings(layer: LinearLayer, inputs: Tensor) -> Tensor:
    """Return how often a layer reads each position of its inputs, with one channel."""
    # (N, 1, …): the gradient of a sum of the outputs of a layer of ones counts the readings.
    channel = torch.zeros_like(inputs.narrow(channel_dim(layer), 0, 1), requires_grad=True)
    ones = channel.new_ones(1, 1, *layer.weight.shape[2:])
    with torch.enable_grad():
        (found,) = torch.autograd.grad(applied(layer, ones, channel).sum(), channel)
    return found


def channel_dim(layer: LinearLayer) -> int:
    """Return the dim of the channels in inputs and outputs, counted from the end."""
    return 1 - layer.weight.ndim


def as_rows(layer: LinearLayer, values: Tensor) -> Tensor:
    """Return values as (positions, channels)."""
    return rows_of(values, channel_dim(layer))
