"""What lies between a writer and its readers, asked by running it.

The network's own code runs with other numbers in place of what the writer puts out, as many
channels at a time as there are, and stops where the last reader gets its input. Norms over the
batch are the identity for these channels, as they will be for new ones; a norm over all channels
divides them by what it divides the old ones by. Everything is in float64, near zero: slopes there
are what new channels see first.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxgrow.errors import PlanError
from fxgrow.grow.data.entered import Stop, channel_dim_of, enter
from fxgrow.grow.data.held import NormDivisor, UnknownNorm, deviation, over_entries
from fxgrow.grow.data.pairs import LayerPair, LinearLayer, Reader, Slopes
from fxgrow.grow.data.skipped import frozen_copy, skipping
from fxgrow.modules.calling import Arguments, map_tensors
from fxgrow.modules.standin import first_line
from fxgrow.modules.tensors import layer_of

_STEP = 1e-5  # of the one-sided slopes, for inputs up to 1
RAISED = 1e-3  # biases of new channels that would else be where the slope is 0
_TOLERANCE = 1e-3  # relative, of slopes at different distances: a kink elsewhere is no matter


class Passage:
    """What lies between the layers of a pair, for one batch.

    Args:
        network: in eval mode; a copy that may be run.
        pair: the layers.
        inputs: of the batch.
        doubles: modules by their names, to which those that are needed are added.
    """

    def __init__(
        self,
        network: nn.Module,
        pair: LayerPair,
        inputs: Arguments,
        doubles: dict[str, nn.Module],
    ) -> None:
        self._pair = pair
        self._entered = enter(network, pair, inputs)
        owner = self._entered.owner
        if owner not in doubles:
            doubles[owner] = frozen_copy(network.get_submodule(owner))
        self._module = doubles[owner]
        self._between = self._doubled() | self._carriers(False)
        self._writes_in_place = False  # into what earlier parts put out
        self._deviation: NormDivisor | None = None
        if pair.over:
            norm, run = self._local(pair.over), self._run_plain
            self._deviation = deviation(self._module, norm, pair, run)

    def _run_plain(self) -> object:
        """Return what the module makes of its arguments."""
        args, kwargs = map_tensors(lambda x: x.clone(), (self._entered.args, self._entered.kwargs))
        return functional_call(self._module, self._doubled(whole=True), args, kwargs)

    def _doubled(self, *, whole: bool = False) -> dict[str, Tensor]:
        """Return tensors in float64, by name; without those of large layers that do not run.

        Args:
            whole: whether those are needed, too.
        """
        idle = {*self._entered.ended, self._local(self._pair.writer)}
        idle |= (
            {self._local(r.name) for r in self._pair.readers}
            if len(self._pair.readers) == 1
            else set()
        )
        idle = {n for n in idle if isinstance(self._module.get_submodule(n), LinearLayer)}
        named = [*self._module.named_parameters(), *self._module.named_buffers()]
        return {
            name: tensor.detach().double()
            for name, tensor in named
            if tensor.is_floating_point() and (whole or layer_of(name) not in idle)
        }

    @property
    def written(self) -> Tensor:
        """Zeros in the shape of what the writer puts out."""
        return self._entered.written

    def run(self, written: Tensor, *, raised: bool = False) -> list[Tensor]:
        """Return what each reader gets: (N, channels, …), or channels last for linear layers.

        Where a reader has several columns for each channel it is (N, channels, columns).

        Args:
            written: in place of what the writer puts out; any number of channels.
            raised: whether biases of norms are a little above zero.
        """
        pair, dim = self._pair, self._dim
        blocks = []
        for block in torch.split(written, pair.block, dim):
            count = block.shape[dim]
            padding = block.new_zeros(self.written.shape).narrow(dim, 0, pair.block - count)
            whole = torch.cat([block, padding], dim)
            got = self._run_whole(whole, raised)
            blocks.append(
                [g.narrow(dim_read(r), 0, count) for r, g in zip(pair.readers, got, strict=True)]
            )
        return [
            torch.cat(parts, dim_read(reader))
            for reader, parts in zip(pair.readers, zip(*blocks, strict=True), strict=True)
        ]

    @property
    def step(self) -> float:
        """How far from zero slopes are told for inputs up to 1: behind a norm, no farther."""
        steep = 1.0 if self._deviation is None else float(self._deviation.inverse.abs().amax())
        return _STEP / max(steep, 1.0)

    @property
    def _dim(self) -> int:
        return channel_dim_of(self._module, self._local(self._pair.writer))

    def _local(self, name: str) -> str:
        """Return the name of a part of the network in the module that is run."""
        owner = self._entered.owner
        return name[len(owner) + 1 :] if owner else name

    def _run_whole(self, written: Tensor, raised: bool) -> list[Tensor]:
        """Return what each reader gets if the writer puts out this."""
        pair, module = self._pair, self._module
        found: dict[str, Tensor] = {}
        readers = {self._local(reader.name): reader for reader in pair.readers}
        handles = []
        if self._deviation is not None:
            hook = self._deviation.hook(RAISED if raised and pair.over_bias else 0.0)
            norm = module.get_submodule(self._local(pair.over))
            handles.append(norm.register_forward_hook(hook))
        for name, reader in readers.items():

            def read(_: nn.Module, args: tuple[Tensor, ...], reader: Reader = reader) -> None:
                found[reader.name] = by_channel(reader, args[0].clone())
                if len(found) == len(readers):
                    raise Stop

            handles.append(module.get_submodule(name).register_forward_pre_hook(read))
        entered = self._entered
        tensors = self._between | (self._carriers(raised) if raised else {})

        def run(*, in_place: bool) -> None:
            found.clear()
            args, kwargs = map_tensors(lambda x: x.clone(), (entered.args, entered.kwargs))
            writer = self._local(pair.writer)
            skipped = skipping(module, entered.ended, writer, written, in_place=in_place)
            with skipped, contextlib.suppress(Stop):
                functional_call(module, tensors, args, kwargs)

        try:
            try:
                run(in_place=self._writes_in_place)
            except RuntimeError:
                if self._writes_in_place:
                    raise
                self._writes_in_place = True
                run(in_place=True)
        finally:
            for handle in handles:
                handle.remove()
        return [found[reader.name] for reader in pair.readers]

    def _carriers(self, raised: bool) -> dict[str, Tensor]:
        """Return the carriers as they are for new channels, under their names in the module."""
        values: dict[str, float | Tensor] = dict(self._pair.carried)
        for norm, eps in self._pair.norms.items():
            bias = RAISED if raised else 0.0
            values |= norm_entries(norm, weight=1.0, bias=bias, mean=0.0, variance=1.0 - eps)
        values |= over_entries(self._pair, 0.0)  # which its hook makes of no matter
        tensors = dict(self._module.named_parameters()) | dict(self._module.named_buffers())
        names = {name: self._local(name) for name in self._pair.carriers}
        return {local: _filled(tensors[local], values[name]) for name, local in names.items()}


def _filled(tensor: Tensor, value: float | Tensor) -> Tensor:
    """Return a tensor in float64 with one channel's value for each channel."""
    like = torch.empty_like(tensor, dtype=torch.float64)
    return like.copy_(torch.as_tensor(value, dtype=torch.float64))


def norm_entries(norm: str, *, weight: Any, bias: Any, mean: Any, variance: Any) -> dict[str, Any]:
    """Return what is said of a batch norm by the names of its tensors."""
    return {
        f"{norm}.weight": weight,
        f"{norm}.bias": bias,
        f"{norm}.running_mean": mean,
        f"{norm}.running_var": variance,
    }


def dim_read(reader: Reader) -> int:
    """Return the dim of the channels in what a reader gets, counted from the end."""
    return -len(reader.column)


def by_channel(reader: Reader, values: Tensor) -> Tensor:
    """Return a reader's inputs, with several columns of each channel as (N, channels, columns)."""
    if reader.columns.shape[1] == 1:
        return values
    columns = reader.columns.to(values.device)
    return values.index_select(-1, columns.flatten()).reshape(-1, *columns.shape)


def one_sided(passage: Passage, written: Tensor) -> list[Tensor]:
    """Return the derivative of what each reader gets in one direction, at zero and away from it.

    Args:
        passage: what lies between.
        written: the direction, in which the writer's output goes away from zero.
    """
    step = passage.step / max(float(written.abs().amax()), 1e-30)
    with torch.no_grad():
        return [got / step for got in passage.run(written * step)]


def ask(network: nn.Module, pair: LayerPair, inputs: Arguments) -> LayerPair | str:
    """Return a pair with what lies between its layers told, or why that cannot be linearised.

    Args:
        network: in eval mode; a copy that may be run.
        pair: the layers.
        inputs: of a batch.
    """
    try:
        passage = Passage(network, pair, inputs, {})
        return _told(pair, passage)
    except PlanError:
        raise
    except UnknownNorm as reason:
        return str(reason)
    except Exception as error:
        return (
            f"what lies between {pair.writer} and {pair.reader} does not run in float64 with other "
            f"numbers ({first_line(error)})"
        )


def _told(pair: LayerPair, passage: Passage) -> LayerPair | str:
    """Return a pair with the slopes of what lies between, or why there are none."""
    between = f"what lies between {pair.writer} and {pair.reader}"
    with torch.no_grad():
        zeros = passage.run(passage.written)
    at_zero = max((got.flatten()[got.abs().argmax()] for got in zeros), key=abs)
    if at_zero:
        return f"{between} makes {float(at_zero):.6g} of zero"
    dim = passage._dim
    generator = torch.Generator().manual_seed(0)
    one = passage.written.narrow(dim, 0, 1)
    drawn = torch.randn(one.shape, dtype=one.dtype, generator=generator).to(one.device)
    same = drawn.expand_as(passage.written)
    alone = torch.zeros_like(passage.written)
    alone.narrow(dim, 0, 1).copy_(drawn)
    right, left = one_sided(passage, same), [-got for got in one_sided(passage, -same)]
    first = one_sided(passage, alone)
    readers = []
    for index, reader in enumerate(pair.readers):
        own = dim_read(reader)
        head = right[index].narrow(own, 0, 1)
        size = float(right[index].abs().amax())
        if not _close(right[index], head.expand_as(right[index]), size):
            return f"{between} does not treat all channels alike"
        others = first[index].narrow(own, 1, pair.block - 1)
        if not (_close(first[index].narrow(own, 0, 1), head, size) and not others.any()):
            return f"{between} does not treat each channel by itself"
        # A norm over all channels has other slopes in another batch.
        sides = left[index], right[index]
        slopes = None if pair.over else _slopes(reader, drawn, sides, dim)
        readers.append(replace(reader, slopes=slopes))
    if not _has_slopes(passage, same, right):
        return f"{between} has no slope at zero"
    gradients = zip(*(_gradients(pair, passage, raised) for raised in (False, True)), strict=True)
    told = zip(readers, gradients, strict=True)
    return replace(pair, readers=tuple(replace(r, slope=a, raised=b) for r, (a, b) in told))


def _close(found: Tensor, wanted: Tensor, size: float) -> bool:
    return bool(((found - wanted).abs() <= _TOLERANCE * size).all())


def _has_slopes(passage: Passage, written: Tensor, right: list[Tensor]) -> bool:
    """Return whether steps of another size tell the same slopes."""
    step = passage.step / 8 / float(written.abs().amax())
    with torch.no_grad():
        near = [got / step for got in passage.run(written * step)]
    return all(
        bool(a.isfinite().all()) and _close(a, b, float(b.abs().amax()))
        for a, b in zip(near, right, strict=True)
    )


def _slopes(reader: Reader, drawn: Tensor, sides: tuple[Tensor, Tensor], dim: int) -> Slopes | None:
    """Return the slopes of a scalar function that does what was found, if there is one.

    Args:
        reader: of what was found.
        drawn: numbers of one channel, as the writer puts them out.
        sides: the derivatives at the reader, to the left and to the right of zero.
        dim: of the channels in what the writer puts out.
    """
    own = dim_read(reader)
    numbers = rows_of(drawn, dim)[:, 0]
    left, right = (rows_of(side.narrow(own, 0, 1), own)[:, 0] for side in sides)
    if len(numbers) != len(right):
        return None
    up, down = numbers > 0, numbers < 0
    # To the right of zero, positive numbers show the right slope and negative ones the left.
    found = []
    for chosen in (down, up):
        if not bool(chosen.any()):
            return None
        found.append(float((right[chosen] / numbers[chosen]).median()))
    slopes = (found[0], found[1])
    for side, (minus, plus) in ((right, slopes), (left, slopes[::-1])):
        wanted = torch.where(up, plus * numbers, minus * numbers)
        if not _close(side, wanted, float(numbers.abs().amax()) * max(map(abs, slopes))):
            return None
    return slopes


def rows_of(values: Tensor, dim: int) -> Tensor:
    """Return values as (positions, channels)."""
    moved = values.movedim(dim, -1)
    return moved.flatten(0, -2)


def _gradients(pair: LayerPair, passage: Passage, raised: bool) -> list[float]:
    """Return the slope of what each reader gets as autograd has it; the steepest if they differ."""
    written = passage.written + (RAISED if raised and pair.is_raisable else 0.0)
    written.requires_grad_()
    found = []
    with torch.enable_grad():
        for got in passage.run(written, raised=raised):
            if not got.requires_grad:
                found.append(0.0)
                continue
            (slope,) = torch.autograd.grad(got.sum(), written, retain_graph=True)
            found.append(float(slope.flatten()[slope.abs().argmax()]))
    return found
