"""Reductions, and what else runs along a dim."""

from __future__ import annotations

import numpy as np
import torch

from fxgrow.labels.gains import Gain, GainFlow
from fxgrow.labels.layers import Layer, Layers, core, support
from fxgrow.labels.operators import aten
from fxgrow.labels.padding import Held, PaddingFlow
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation


def mean_gain(flow: GainFlow, op: Operation) -> Gain:
    """Homogeneous; one of squares, over more channels than before, differs by a known ratio."""
    ratio = Gain(flow.statistics.get(op.index, 1.0), frozenset({op.module}))
    return flow.of(op.inputs[0]).times(ratio)


def mean_padding(flow: PaddingFlow, op: Operation) -> Held:
    """Over other dims it passes; over the channels it is an RMSNorm's mean of squares."""
    x = op.args[0]
    given = op.args[1] if len(op.args) > 1 else None
    reduced = {dim % len(x.shape) for dim in given} if given else set(range(len(x.shape)))
    mixed = flow.along(x, reduced)
    held = flow.of(x)
    if mixed is None:
        return held
    times = np.unique(mixed, return_counts=True)[1]
    alike = len(times) == len(flow.channels) and len(np.unique(times)) == 1
    if held.what != "zero" or not alike or not flow.is_alone(mixed):
        return flow.refuse(held.why or "they are averaged together with others")
    flow.statistics.append(op.index)
    return Held(None)


@rule("aten.mean", gain=mean_gain, padding=mean_padding)
@rule(
    *aten(
        "sum prod amax amin max min any all var var_mean std std_mean argmax argmin logsumexp "
        "linalg_vector_norm norm"
    )
)
def reduction(step: Step) -> tuple[Layers, ...]:
    """A reduction keeps the labels along the dims it leaves alone.

    One over all of a layer's dims mixes the channels; one over a part of them (the positions
    inside a head) makes what it reduces one channel.
    """
    x = step.args[0]
    given = step.argument("dim")
    dims = range(x.ndim) if given is None or given == [] else _sequence(given)
    reduced = {dim % x.ndim for dim in dims}
    keepdim = bool(step.argument("keepdim", False))
    kept: list[Layer] = []
    for layer in step.layers(x):
        if support(layer) and support(layer) <= reduced:
            if step.ignores_copies(x, sorted(reduced)):
                step.space.mix(core(layer, support(layer)), step.place)
                for place, out in enumerate(step.outputs):
                    if out.dtype == torch.int64 and x.dtype != torch.int64:  # of the largest
                        told = (core(layer, support(layer)), step.target._opname)
                        step.positions[place] = (*step.positions.get(place, ()), told)
            else:
                step.pin((layer,), PinKind.MIXED, step.target._opname)
            continue
        left = step.flat(layer, set(range(x.ndim)) - reduced)
        for dim in sorted(reduced, reverse=True):
            left = left.narrow(dim, 0, 1) if keepdim else left.select(dim, 0)
        kept.append(left)
    return tuple(tuple(layer.expand(out.shape) for layer in kept) for out in step.outputs)


def _sequence(dims: int | list[int]) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


@rule(*aten("_softmax _log_softmax _safe_softmax topk"))
def along_a_dim(step: Step) -> tuple[Layers, ...]:
    """What mixes the positions of one dim passes labels along the others.

    Positions of one dim that belong to a channel with others (the branches of a split attention)
    are mixed inside the channel.
    """
    x = step.args[0]
    given = step.argument("dim", step.argument("dims", -1))
    dims = {dim % x.ndim for dim in _sequence(given)}
    kept: list[Layer] = []
    for layer in step.layers(x):
        if support(layer) and support(layer) <= dims:
            step.pin((layer,), PinKind.MIXED, step.target._opname)
        else:
            kept.append(step.flat(layer, support(layer) - dims))
    return tuple(tuple(layer.expand(out.shape) for layer in kept) for out in step.outputs)


@rule("aten.glu")
def gated_half(step: Step) -> tuple[Layers, ...]:
    """``a · sigmoid(b)`` of the two halves of a dim: both halves are one set of channels."""
    x = step.args[0]
    dim = step.argument("dim", -1) % x.ndim
    out: list[Layer] = []
    for layer in step.layers(x):
        if dim in support(layer):
            half = x.shape[dim] // 2
            first, second = layer.narrow(dim, 0, half), layer.narrow(dim, half, half)
            step.space.unify(core(first, support(layer)), core(second, support(layer)))
            out.append(first)
        else:
            out.append(layer.narrow(dim, 0, x.shape[dim] // 2))
    return (tuple(out),)
