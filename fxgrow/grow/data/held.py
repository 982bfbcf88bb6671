"""Norms over all channels between the layers: new channels that leave them as they were.

A LayerNorm (an RMSNorm) of c is w·(c − μ)/σ + β with the mean μ (none) and the deviation σ of all
channels. New channels that hold μ (zero) leave μ and σ as they were, but for a factor that the plan
gives to old weights (:mod:`fxgrow.grow.norms.eta`); then they are β behind the norm. Moved by δ
from there, they are w·δ/σ + β to first order: σ moves by δ² alone, and μ by the sum of all δ. So
they come as twins with opposite δ, read with opposite signs, which leave μ as it is. What lies
between is then linear in δ, with a factor 1/σ for each position, which is that of the old network.

Under a step (Tiny) rows are off the mean by A^¾·a and columns are A^¼·ω at the amplitude A, so that
what σ does to old channels, A^{3/2}, is of no matter to first order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.pairs import LayerPair
from fxgrow.plan.edits import TensorEdit
from fxgrow.plan.step import GroupPlan

ROW_POWER = 0.75  # of the amplitude, in rows off the mean; columns have the rest
_TOLERANCE = 1e-6  # relative, of what a norm makes of old channels


class UnknownNorm(Exception):  # noqa: N818 - a reason, no error
    """What normalises over all channels does it in another way."""


class _Stop(Exception):  # noqa: N818 - no error
    """Ends a run where the norm is."""


@dataclass(frozen=True)
class NormDivisor:
    """What a norm over all channels divides by.

    Attributes:
        inverse: 1/σ of each position, with one channel.
    """

    inverse: Tensor

    def hook(self, bias: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """Return a hook that makes of a norm what it is to new channels, with weight 1.

        Args:
            bias: theirs.
        """

        def normed(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> Tensor:
            return args[0] * self.inverse + bias

        return normed


def deviation(
    module: nn.Module, norm: str, pair: LayerPair, run: Callable[[], object]
) -> NormDivisor:
    """Return what a norm divides by when a module runs.

    Args:
        module: holds the norm, in float64.
        norm: its name there.
        pair: the layers around.
        run: runs the module.

    Raises:
        UnknownNorm: what it returns is no weight times what it is given, centred or as it is,
            divided by one number for each position; or there is nothing to divide.
    """
    seen: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def see(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
        seen.append((args[0], output, weight, bias))
        raise _Stop

    handle = module.get_submodule(norm).register_forward_hook(see)
    try:
        with torch.no_grad(), contextlib.suppress(_Stop):
            run()
    finally:
        handle.remove()
    for given, output, weight, bias in seen:
        for dim in (-1, 1):
            if weight is None or given.shape[dim] != len(weight):
                continue
            shape = [1] * given.ndim
            shape[dim] = -1
            centred = given - given.mean(dim, keepdim=True) if pair.holds == "mean" else given
            weighed = centred * weight.view(shape)
            found = output if bias is None else output - bias.view(shape)
            squares = weighed.square().sum(dim, keepdim=True).clamp(min=1e-300)
            inverse = (found * weighed).sum(dim, keepdim=True) / squares
            off = (found - inverse * weighed).abs().amax()
            if not bool(centred.any()):
                raise UnknownNorm(
                    f"what {pair.over} is given is "
                    f"{'the same in all channels' if pair.holds == 'mean' else 'zero'}, so it has "
                    "nothing to divide by but its eps"
                )
            if float(off) <= _TOLERANCE * float(found.abs().amax()):
                return NormDivisor(inverse)
    raise UnknownNorm(
        f"{pair.over} is over all channels and does not divide them by their deviation alone"
    )


def over_entries(pair: LayerPair, bias: float) -> dict[str, float]:
    """Return what new channels have in the norm over all of them, by tensor.

    Args:
        pair: the layers around.
        bias: theirs, where the norm has one.
    """
    names = [f"{pair.over}.weight", f"{pair.over}.bias"]
    found = zip(names, (1.0, bias), strict=True)
    return {name: value for name, value in found if pair.over and name in pair.carriers}


def in_twins(directions: Directions, group: GroupPlan, writer: TensorEdit) -> Directions:
    """Return rows of both signs, (2k, …), and columns, (entries, k), of which each is read twice.

    Args:
        directions: k of them.
        group: the plan of the group.
        writer: what happens to the writer's weight. What the norm divides by becomes its factor
            times √(D/T) of what it was, for T channels of which D are old.
    """
    old, new = group.width
    part = writer.scale * math.sqrt(old / new / 2)
    rows, biases = directions.rows * part, directions.biases
    return replace(
        directions,
        rows=torch.cat([rows, -rows]),
        biases=None if biases is None else torch.cat([biases * part, biases * -part]),
        columns=directions.columns / math.sqrt(2),
    )
