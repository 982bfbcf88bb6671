"""TINY: new channels for what the present ones cannot express, one step down the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxgrow.apply.trial import apply_to_module
from fxgrow.channels.analysis import Analysis
from fxgrow.errors import PlanError
from fxgrow.grow.data import directions as algebra
from fxgrow.grow.data import statistics
from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.inits import DataDriven, FromData, shapes_of
from fxgrow.grow.data.pairs import LayerPair
from fxgrow.grow.data.statistics import (
    Seen,
    applied,
    as_rows,
    channel_dim,
    correlation,
    patches,
    readings,
)
from fxgrow.grow.widen.planner import VarianceOf
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import GroupPlan


class Tiny(DataDriven):
    """New channels for what the present ones cannot express (Verbockhaven et al. 2024).

    At the outputs of each reader, −∂L/∂z says how the loss wants them to move. What part of that
    the reader's own weights cannot reach (least squares on its present inputs) is what new
    channels are for: the pairs of rows and columns nearest to it, whitened by what the writer
    reads, are the leading singular vectors of a matrix. Those that would raise the loss to first
    order, since they move the reachable part too, are left out. One amplitude for all, found by a
    line search on the loss, sets the step; so the function is not kept, and the loss falls.

    For a σ with a kink at 0 (ReLU), the mean of its slopes on both sides stands for σ'(0), and
    each channel takes the sign for which it lowers the loss more.
    """

    pairing = "none"
    nothing = "old weights can do what the loss asks for, or new channels would raise it"

    def plan(
        self,
        model: nn.Module,
        analyses: Sequence[Analysis],
        request: Widen,
        variance_of: VarianceOf,
    ) -> Plan:
        """Compute new weights, and return the plan that makes room for them.

        Raises:
            PlanError: as for :meth:`DataDriven.plan`; old weights would be rescaled; no amplitude
                lowers the loss.
        """
        if request.rescaling != "none":
            raise PlanError(
                f"Tiny takes its step from the old weights, which {request.rescaling} changes.",
                way_out="Use rescaling none.",
            )
        return super().plan(model, analyses, request, variance_of)

    def _problem(self, pair: LayerPair, model: nn.Module) -> str:
        del model
        if sum(pair.slopes):
            return ""
        return (
            f"what lies between {pair.writer} and {pair.reader} is flat at 0, or the same on both "
            "sides of it"
        )

    def _directions(
        self, network: nn.Module, pairs: Mapping[str, LayerPair]
    ) -> dict[str, Directions]:
        shapes = {name: shapes_of(network, pair) for name, pair in pairs.items()}
        fits = self.averages(network, pairs, lambda _, seen: _fit(seen))
        moves = {
            name: algebra.pseudo_solution(gram, cross, shapes[name].dtype)
            for name, (gram, cross, _) in fits.items()
        }
        sums = self.averages(
            network, pairs, lambda name, seen: _unreached(seen, moves[name], pairs[name].has_bias)
        )
        return {
            name: algebra.tiny(
                correlation=sums[name][0],
                gram=sums[name][1],
                slope=sum(pair.slopes) / 2,
                scale=float(fits[name][2].sqrt()),
                shapes=shapes[name],
            )
            for name, pair in pairs.items()
        }

    def _gaining(
        self, network: nn.Module, pairs: Mapping[str, LayerPair], chosen: Mapping[str, Directions]
    ) -> dict[str, Directions]:
        """Return the directions that lower the loss to first order, signed for the most of it."""
        growing = {name: pair for name, pair in pairs.items() if len(chosen[name])}
        if not growing:
            return dict(chosen)
        result = dict(chosen)
        gains = self.averages(
            network, growing, lambda name, seen: _gains(seen, chosen[name], pairs[name].slopes)
        )
        for name, (plain, mirrored) in gains.items():
            better = mirrored > plain
            turned = chosen[name].turned(torch.where(better, -1.0, 1.0).to(plain))
            best = replace(turned, gains=torch.where(better, mirrored, plain))
            result[name] = best.chosen(torch.nonzero(best.gains > 0)[:, 0])
        return result

    def _told(self, group: GroupPlan, found: Directions, asked: int, most: int) -> GroupPlan:
        gain = float(found.gains.sum())
        reason = f"Tiny: the new channels move the output, by a first-order gain of {gain:.6g}"
        return super()._told(replace(group, reason=reason), found, asked, most)

    def _fitted(self, network: nn.Module, made: Plan, found: FromData) -> FromData:
        before = statistics.mean_loss(network, self.loss_fn, self.batches)

        def loss(amplitude: float) -> float:
            grown = apply_to_module(made, network, found.scaled(amplitude))
            return statistics.mean_loss(grown, self.loss_fn, self.batches)

        gain = sum(sum(gains) for gains in found.gains.values())
        amplitude, after = algebra.search_amplitude(loss, before, gain)
        note = (
            f"Tiny: the mean loss over the given batches is {before:.6g} before and {after:.6g} "
            f"after, at amplitude {amplitude:.3g}"
        )
        return replace(found.scaled(amplitude), notes=(note,))


def _fit(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums for a least-squares fit of V on what the reader reads, and that of V²."""
    read = as_rows(seen.reader, patches(seen.reader, seen.h))  # (positions, h · kernel)
    if seen.reader.bias is not None:
        read = torch.cat([read, read.new_ones(len(read), 1)], dim=1)
    wanted = as_rows(seen.reader, seen.descent)  # (positions, out)
    return read.T @ read, read.T @ wanted, wanted.square().sum()


def _unreached(seen: Seen, move: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Return the correlation of what the writer reads with what is left of V, and its moments.

    Args:
        seen: of a batch.
        move: of the reader's own weights and bias, (inputs, out): what they can do for V.
        has_bias: whether the writer has a bias, which reads ones.

    Returns:
        N as (out, inputs, *kernel) and S as (inputs, inputs); each patch counts in S as often as
        the reader reads it.
    """
    kernel = seen.reader.weight.shape[1:]
    count = kernel.numel()
    weight = move[:count].T.reshape(
        move.shape[1], *kernel
    )  # (h · kernel, out) -> (out, h, *kernel)
    bias = move[count] if len(move) > count else None
    left = seen.descent - applied(seen.reader, weight, seen.h, bias)
    read = patches(seen.writer, seen.x)  # (N, inputs, …) or (positions, inputs)
    dim = channel_dim(seen.writer)
    if has_bias:
        read = torch.cat([read, torch.ones_like(read.narrow(dim, 0, 1))], dim)
    counted = as_rows(seen.writer, read * readings(seen.reader, read))  # (positions, inputs)
    return correlation(seen.reader, read, left), counted.T @ as_rows(seen.writer, read)


def _gains(seen: Seen, found: Directions, slopes: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return ⟨V, δz⟩ of each channel for a small amplitude, as it is and with both signs turned.

    Near zero σ(y) is right·y for positive and left·y for negative y.
    """
    left, right = slopes
    hidden = applied(seen.writer, found.rows, seen.x, found.biases)  # (N, k, …)
    positive, negative = (
        (correlation(seen.reader, side.relu(), seen.descent) * found.columns)  # (out, k, *kernel)
        .transpose(0, 1)
        .flatten(1)
        .sum(1)  # (k,)
        for side in (hidden, -hidden)
    )
    return right * positive - left * negative, left * positive - right * negative
