"""GradMax: new channels that keep the function and learn fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxgrow.grow.data import directions as algebra
from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.held import over_entries
from fxgrow.grow.data.inits import DataDriven
from fxgrow.grow.data.pairs import LayerPair, shapes_of
from fxgrow.grow.data.passages import RAISED, Passage, norm_entries
from fxgrow.grow.data.selection import Limits, Room
from fxgrow.grow.data.statistics import (
    Read,
    Seen,
    applied,
    as_rows,
    channel_dim,
    correlation,
    patches,
)
from fxgrow.grow.data.sums import Product, stacked
from fxgrow.plan.pairing import Layout

_ROWS = 64  # of a large weight that are in float64 at a time


class GradMax(DataDriven):
    """New channels that give zeros and learn fastest (Evci et al. 2022).

    New rows are zeros, so that the function is kept. New columns are the leading singular vectors
    of the gradient of an auxiliary layer of zeros, from what the writer reads to what the reader
    puts out, and have the mean norm of the reader's old columns: of all orthogonal columns of
    that norm, they give the new rows the largest gradients.

    Where rows of zeros would not learn, since an activation has slope 0 at 0 (ReLU) or a batch norm
    would divide by their deviation, new channels are twins with biases of 0.001, which columns of
    both signs read: the function is kept, and each twin learns as a row of zeros would where the
    slope is that right of 0. A batch norm gets the weight √eps and the variance 0 there, so that it
    passes them on unchanged, in training too.

    Behind a norm over all channels (LayerNorm, RMSNorm) new channels hold the mean of the old ones
    (zero), as twins that columns of both signs read.
    """

    pairing = "zero_z"
    nothing = "no new channel would get a gradient that is strong enough"
    runs = 1
    fits = False

    def _unpaired(self, layout: Layout) -> str:
        if all(layout.column_signs) and (layout.preserving or layout.writes_zeros):
            return ""
        return (
            "its new rows are zeros, which keep the function and learn as the rows of 'zero_z' or, "
            "with columns of both signs, of 'vv_z_negz'"
        )

    def _problem(self, pair: LayerPair, model: nn.Module) -> str:
        if not _learns(pair, raised=_is_raised(pair)):
            if pair.has_offset:
                return (
                    f"what lies between {pair.writer} and {pair.reader} has slope 0 at 0 and, by "
                    f"biases, at {RAISED:g} too, so new channels would never learn"
                )
            return (
                f"what lies between {pair.writer} and {pair.reader} has slope 0 at 0 as torch "
                "differentiates it, and no bias holds new channels above it, so new rows of zeros "
                f"would never learn (give {pair.over or pair.writer} a bias; or "
                "nn.Threshold(-1e-30, 0), which differs from a ReLU by 1e-30, has slope 1)"
            )
        if not _mean_norm(model, pair):
            return f"{pair.reader} has no weights but zeros to take a scale from"
        return ""

    def _needs_twins(self, pair: LayerPair) -> bool:
        return _is_raised(pair)

    def selected(
        self,
        network: nn.Module,
        pairs: Mapping[str, LayerPair],
        rooms: Mapping[str, Room],
        limits: Limits,
        progress: Callable[[str], object] = lambda step: None,
    ) -> dict[str, Directions]:
        """Return the directions of each group; see :meth:`DataDriven.selected`.

        Each twin has the gradient of a row of zeros, so that two of them gain twice as much.
        """
        found = super().selected(network, pairs, rooms, limits, progress)
        return {n: replace(d, gains=d.gains * rooms[n].each) for n, d in found.items()}

    def _directions(
        self,
        network: nn.Module,
        pairs: Mapping[str, LayerPair],
        most: Mapping[str, int],
        progress: Callable[[str], object],
    ) -> dict[str, Directions]:
        averages = self.averages(
            network,
            pairs,
            lambda name, seen: _pulled(seen, pairs[name], _is_raised(pairs[name])),
        )
        found = {}
        for name, pair in pairs.items():
            progress(name)
            scale, shapes = _mean_norm(network, pair), shapes_of(network, pair)
            matrix, expand = stacked(averages.pop(name))
            found[name] = algebra.gradmax(matrix, scale, shapes, expand, most[name])
            biases = found[name].biases
            if biases is not None and _is_raised(pair) and not pair.over:
                found[name] = replace(found[name], biases=torch.full_like(biases, RAISED))
        return found

    def _norm_entries(self, pair: LayerPair) -> dict[str, float]:
        bias = RAISED if _is_raised(pair) else 0.0
        found: dict[str, float] = {}
        for norm, eps in pair.norms.items():
            found |= norm_entries(norm, weight=math.sqrt(eps), bias=bias, mean=0.0, variance=0.0)
        return found | over_entries(pair, bias)


def _is_raised(pair: LayerPair) -> bool:
    """Return whether new channels are held above zero by biases."""
    return pair.has_offset and bool(pair.flat or not _learns(pair, raised=False))


def _learns(pair: LayerPair, *, raised: bool) -> bool:
    """Return whether a gradient comes back from some reader."""
    return any(reader.raised if raised else reader.slope for reader in pair.readers)


def _mean_norm(network: nn.Module, pair: LayerPair) -> float:
    """Return the mean norm of the columns of a pair's readers, 1 where they have none."""
    if not pair.width:
        return 1.0
    squares = torch.zeros(pair.width, dtype=torch.float64)
    for reader in pair.readers:
        weight = network.get_parameter(f"{reader.name}.weight").detach()
        found = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        for rows in torch.split(weight, _ROWS):
            found += rows.double().square().transpose(0, 1).flatten(1).sum(1)
        squares += found.cpu()[reader.columns].sum(1)
    return float(squares.sqrt().mean())


def _pulled(seen: Seen, pair: LayerPair, raised: bool) -> tuple[Product, ...]:
    """Return the sum over samples of the gradient of a zero row for each column, by reader.

    Each is (entries, inputs); for a reader without a kernel as the factors, where these are less.

    Args:
        seen: of a batch.
        pair: the layers.
        raised: whether biases hold the channels above zero.
    """
    if seen.passage is not None:
        return _pulled_through(seen, seen.passage, pair, raised)
    read = patches(seen.writer, seen.x)
    found = []
    for index, part in enumerate(seen.laid_out(read)):
        one = seen.reads[index]
        slope = one.raised if raised else one.slope
        if one.layer.weight.ndim == 2:  # (positions, out) and (positions, inputs)
            rows = as_rows(one.layer, part * slope)
            found.append(Product.of(as_rows(one.layer, one.descent), rows))
        else:
            whole = correlation(one.layer, part, one.descent)  # (out, inputs, *kernel)
            found.append(Product((slope * whole.movedim(1, -1).flatten(0, -2),)))
    return tuple(found)


def _pulled_through(
    seen: Seen, passage: Passage, pair: LayerPair, raised: bool
) -> tuple[Product, ...]:
    """Return the same for each reader, by the gradient of what lies between."""
    start = passage.written + (RAISED if raised and pair.is_raisable else 0.0)
    start.requires_grad_()
    with torch.enable_grad():
        got = passage.run(start, raised=raised)
    found = []
    for reader, one, h in zip(pair.readers, seen.reads, got, strict=True):
        columns = reader.columns.shape[1]
        if columns > 1 and len(h) == len(start):
            rows = _rows_by_sample(seen, h, start, pair.block)
            found.append(Product.of(one.descent.flatten(1), rows))
        else:
            found.append(Product((_rows_by_column(seen, one, h, start, pair.block),)))
    return tuple(found)


def _rows_by_sample(seen: Seen, h: Tensor, start: Tensor, width: int) -> Tensor:
    """Return the gradient of each column's input with respect to a zero row: (N, columns, inputs).

    All channels are alike, so that as many columns as there are channels are told at a time.

    Args:
        seen: of a batch.
        h: what the reader gets, (N, channels, columns).
        start: what the writer puts out.
        width: the number of channels.
    """
    dim, columns = channel_dim(seen.writer), h.shape[2]
    read = patches(seen.writer, seen.x).movedim(dim, -1).flatten(1, -2)  # (N, positions, inputs)
    found = []
    for first in range(0, columns, width):
        channels = torch.arange(min(width, columns - first), device=h.device)
        chosen = h[:, channels, first + channels].sum()
        (pulled,) = torch.autograd.grad(chosen, start, retain_graph=True)
        own = pulled.movedim(dim, 1).flatten(2)[:, : len(channels)]  # (N, columns, positions)
        found.append(own @ read)
    return torch.cat(found, 1)


def _rows_by_column(seen: Seen, one: Read, h: Tensor, start: Tensor, width: int) -> Tensor:
    """Return the gradient of a zero row for each entry of a reader's column: (entries, inputs)."""
    out, kernel = one.layer.weight.shape[0], one.layer.weight.shape[2:]
    entries = out * math.prod(kernel)
    found = []
    for first in range(0, entries, width):
        count = min(width, entries - first)
        chosen = torch.arange(count, device=h.device)
        weight = h.new_zeros(entries, width)
        weight[first + chosen, chosen] = 1  # each channel is read by one entry
        shaped = weight.reshape(out, *kernel, width).movedim(-1, 1)
        with torch.enable_grad():
            z = applied(one.layer, shaped, h)
            (pulled,) = torch.autograd.grad(z, start, one.descent, retain_graph=True)
        found.append(correlation(seen.writer, seen.x, pulled).flatten(1)[:count])
    return torch.cat(found)
