"""TINY: new channels for what the present ones cannot express, one step down the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxgrow.apply.trial import apply_to_module
from fxgrow.grow.data import directions as algebra
from fxgrow.grow.data.batches import mean_loss
from fxgrow.grow.data.carriers import identities
from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.from_data import FromData
from fxgrow.grow.data.inits import DataDriven
from fxgrow.grow.data.pairs import LayerPair, LinearLayer, shapes_of
from fxgrow.grow.data.statistics import (
    Read,
    Seen,
    applied,
    as_rows,
    channel_dim,
    correlation,
    patches,
    readings,
)
from fxgrow.grow.data.sums import Moments, Product, stacked
from fxgrow.plan.pairing import cancels
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import GroupPlan


class Tiny(DataDriven):
    """New channels for what the present ones cannot express (Verbockhaven et al. 2024).

    At the outputs of each reader, −∂L/∂z says how the loss wants them to move. What part of that
    the reader's own weights cannot reach (least squares on its present inputs) is what new
    channels are for: the pairs of rows and columns nearest to it, whitened by what the writer
    reads, are the leading singular vectors of a matrix. Those that would raise the loss to first
    order, since they move the reachable part too, are left out, and the next weaker ones take their
    places. One amplitude for all, found by a line search on the loss, sets the step; so the
    function is not kept, and the loss falls. Under a pairing that is asked for the function is
    kept, and the amplitude is 1.

    For a σ with a kink at 0 (ReLU, max pooling), the mean of its slopes on both sides stands for
    σ'(0), and each channel takes the sign for which it lowers the loss more. A batch norm between
    the layers is the identity on new channels, by their statistics over the batches. Before a norm
    over all channels (LayerNorm, RMSNorm) they are twins on either side of the mean of the old ones
    (of zero), read with opposite signs, so that it stays what it was to first order.
    """

    pairing = "none"
    nothing = "old weights can do what the loss asks for"
    runs = 3  # moments, what is left of the gradient, gains
    forwards = 8  # doubling or halving an amplitude until the loss rises again
    drops = True
    fits = True

    def _problem(self, pair: LayerPair, model: nn.Module) -> str:
        del model
        if any(r.slopes is None or sum(r.slopes) for r in pair.readers):
            return ""
        return (
            f"what lies between {pair.writer} and {pair.reader} is flat at 0, or the same on both "
            "sides of it"
        )

    def _directions(
        self,
        network: nn.Module,
        pairs: Mapping[str, LayerPair],
        most: Mapping[str, int],
        progress: Callable[[str], object],
    ) -> dict[str, Directions]:
        shapes = {name: shapes_of(network, pair) for name, pair in pairs.items()}
        sums = self.averages(network, pairs, lambda name, seen: _first(seen, pairs[name].has_bias))
        roots: dict[str, Tensor] = {}
        moves: dict[str, list[tuple[Tensor, Tensor]]] = {}
        scales: dict[str, float] = {}
        for name in pairs:
            progress(name)
            squares, read, *fits = sums.pop(name)
            dtype = shapes[name].dtype
            scales[name] = float(squares.rows.sum().sqrt())
            roots[name] = read.root(dtype)
            moves[name] = [fit.solution(dtype) for fit in fits]
        left = self.averages(
            network, pairs, lambda name, seen: _unreached(seen, moves[name], roots[name])
        )
        found = {}
        for name in pairs:
            matrix, expand = stacked(left.pop(name))
            found[name] = algebra.tiny(
                matrix, roots[name], scales[name], shapes[name], expand, most[name]
            )
        return found

    def _gaining(
        self, network: nn.Module, pairs: Mapping[str, LayerPair], chosen: Mapping[str, Directions]
    ) -> dict[str, Directions]:
        """Return the directions that lower the loss to first order, signed for the most of it."""
        growing = {name: pair for name, pair in pairs.items() if len(chosen[name])}
        if not growing:
            return dict(chosen)
        result = dict(chosen)
        gains = self.averages(network, growing, lambda name, seen: _gains(seen, chosen[name]))
        for name, (plain, mirrored) in gains.items():
            if pairs[name].over:  # twins of both signs
                plain = mirrored = (plain + mirrored) / 2
            better = mirrored > plain
            turned = chosen[name].turned(torch.where(better, -1.0, 1.0).to(plain))
            best = replace(turned, gains=torch.where(better, mirrored, plain))
            left = best.chosen(torch.nonzero(best.gains > 0)[:, 0])
            why = f"its {len(best)} strongest new channels would raise the loss, to first order"
            result[name] = replace(left, none="" if len(left) else why)
        return result

    def _told(self, group: GroupPlan, found: Directions, told: str) -> GroupPlan:
        if cancels(group.pairing):
            return super()._told(group, found, told)
        gain = float(found.gains.sum())
        reason = f"Tiny: the new channels move the output, by a first-order gain of {gain:.6g}"
        return super()._told(replace(group, reason=reason), found, told)

    def _fitted(self, network: nn.Module, made: Plan, found: FromData) -> FromData:
        before = mean_loss(network, self.loss_fn, self.batches)

        def loss(amplitude: float) -> float:
            grown = apply_to_module(made, network, found.scaled(amplitude))
            return mean_loss(grown, self.loss_fn, self.batches)

        gain = sum(sum(gains) for gains in found.gains.values())
        # What rescaling alone does to the loss is not the new channels' doing.
        scaled = any(edit.scale != 1.0 for edit in made.tensors.values())
        start = loss(0.0) if scaled else before
        amplitude, after = algebra.search_amplitude(loss, start, gain)
        note = (
            f"Tiny: the mean loss over the given batches is {before:.6g} before and {after:.6g} "
            f"after, at amplitude {amplitude:.3g}"
        )
        return replace(found.scaled(amplitude), notes=(note,))

    def _settled(
        self, network: nn.Module, made: Plan, pairs: Mapping[str, LayerPair], found: FromData
    ) -> FromData:
        grown = apply_to_module(made, network, found).eval()
        norms = identities(grown, made, pairs, [inputs for inputs, _ in self.batches])
        return replace(found, entries={**found.entries, **norms})


def _first(seen: Seen, has_bias: bool) -> tuple[Moments, ...]:
    """Return the sum of V², moments of what the writer reads, and each reader's for a fit of V.

    What the writer reads is taken as the readers get it, through the slopes of what lies between;
    each patch counts as often as a reader reads it, on average over the readers.

    Args:
        seen: of a batch.
        has_bias: whether the writer has a bias, which reads ones.
    """
    squares = torch.cat([read.descent.reshape(-1, 1) for read in seen.reads])
    rows = []
    for one, given in zip(seen.reads, _given(seen, has_bias), strict=True):
        counted = as_rows(one.layer, given * readings(one.layer, given).sqrt())
        rows.append(counted / math.sqrt(len(seen.reads)))  # (positions, inputs)
    fits = [_fit(read) for read in seen.reads]
    return Moments.of(squares), Moments.of(torch.cat(rows)), *fits


def _given(seen: Seen, has_bias: bool) -> list[Tensor]:
    """Return what the writer reads, as each reader gets it: (N, inputs, …) or (…, inputs)."""
    read = patches(seen.writer, seen.x)
    dim = channel_dim(seen.writer)
    if has_bias:
        read = torch.cat([read, torch.ones_like(read.narrow(dim, 0, 1))], dim)
    return seen.mean_slopes(read)


def _fit(read: Read) -> Moments:
    """Return the moments of what a reader reads, and of these with V."""
    inputs = as_rows(read.layer, patches(read.layer, read.h))  # (positions, h · kernel)
    if read.layer.bias is not None:
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    return Moments.of(inputs, as_rows(read.layer, read.descent))


def _left(read: Read, move: tuple[Tensor, Tensor]) -> Tensor:
    """Return what is left of V if a reader's own weights and bias move.

    Args:
        read: what the reader saw.
        move: of its weights, as factors (inputs, r) and (r, out).
    """
    basis, factors = move
    if not len(factors):  # it reads nothing but zeros, and torch runs no convolution without rows
        return read.descent
    kernel = read.layer.weight.shape[1:]
    count = kernel.numel()
    weight = basis[:count].T.reshape(basis.shape[1], *kernel)  # (h · kernel, r) -> (r, h, *kernel)
    bias = basis[count] if len(basis) > count else None
    return read.descent - _mixed(read.layer, applied(read.layer, weight, read.h, bias), factors)


def _mixed(layer: LinearLayer, values: Tensor, factors: Tensor) -> Tensor:
    """Return values with their channels times a matrix, (channels, others)."""
    dim = channel_dim(layer)
    return (values.movedim(dim, -1) @ factors).movedim(-1, dim)


def _unreached(
    seen: Seen, moves: Sequence[tuple[Tensor, Tensor]], root: Tensor
) -> tuple[Product, ...]:
    """Return the correlation of what the writer reads, times a root, with what is left of V.

    Args:
        seen: of a batch.
        moves: of each reader's own weights and bias: what they can do for V; see ``_left``.
        root: of the pseudo-inverse of the moments of what the writer reads, (inputs, r).

    Returns:
        (outputs · kernel, r) of each reader.
    """
    found = []
    has_bias = len(root) > math.prod(seen.writer.weight.shape[1:])
    for one, move, given in zip(seen.reads, moves, _given(seen, has_bias), strict=True):
        left, mixed = _left(one, move), _mixed(one.layer, given, root)
        if left.ndim == 3 and mixed.shape[2:] == one.layer.weight.shape[2:]:  # each read once
            found.append(Product.of(left.flatten(1), mixed.transpose(1, 2)))
        else:
            whole = correlation(one.layer, mixed, left)  # (out, r, *kernel)
            found.append(Product((whole.movedim(1, -1).flatten(0, -2),)))
    return tuple(found)


def _gains(seen: Seen, found: Directions) -> tuple[Tensor, Tensor]:
    """Return ⟨V, δz⟩ of each channel for a small amplitude, as it is and with both signs turned."""
    written = applied(seen.writer, found.rows, seen.x, found.biases)  # (N, k, …)
    shapes = [one.layer.weight.shape for one in seen.reads]
    sizes = [out * math.prod(kernel) for out, _, *kernel in shapes]
    columns = torch.split(found.columns, sizes)
    gains = []
    for sign in (1.0, -1.0):
        gain = written.new_zeros(len(found))
        given = seen.right_slopes(sign * written)
        for one, h, column in zip(seen.reads, given, columns, strict=True):
            whole = correlation(one.layer, h, one.descent)  # (out, k, *kernel)
            gain += sign * (whole.movedim(1, -1).flatten(0, -2) * column).sum(0)
        gains.append(gain)
    return gains[0], gains[1]
