"""Normalisations: the channels pass through, with vectors for company."""

from __future__ import annotations

from torch import Tensor

from fxgrow.labels.layers import Layers, core, cover, support
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.step import Step, rule


@rule(
    "aten.native_batch_norm",
    "aten.cudnn_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
)
def batch_norm(step: Step) -> tuple[Layers, ...]:
    """Per channel: nothing is mixed."""
    for layer in step.layers(step.args[0]):
        if 1 not in support(layer):  # batch statistics are taken over all other dims
            step.space.mix(core(layer, support(layer)), step.place)
    channels = step.line(step.args[0], 1)
    if channels is not None:
        vectors = zip(
            step.args[1:3] + _statistics(step), ("one", "zero", "zero", "one"), strict=False
        )
        for vector, fill in vectors:
            if isinstance(vector, Tensor):
                step.accompany(vector, channels, fill)  # type: ignore[arg-type]
    return (step.layers(step.args[0]), *(() for _ in step.outputs[1:]))


def _statistics(step: Step) -> tuple[object, ...]:
    return (step.argument("running_mean"), step.argument("running_var"))


@rule("aten._weight_norm_interface")
def weight_norm(step: Step) -> tuple[Layers, ...]:
    """A direction and a length for each row: rows may be new, columns count in the norm."""
    direction, length, dim = *step.args[:2], step.argument("dim", 0)
    rows = step.line(direction, dim)
    beside = step.line(length, dim)
    if rows is not None and beside is not None:
        step.space.unify(rows, beside)
        step.space.mark(beside, "carrier", "copy")
    return (step.layers(direction), *(() for _ in step.outputs[1:]))


@rule("aten.native_layer_norm")
def layer_norm(step: Step) -> tuple[Layers, ...]:
    """Mean and variance over the last dim: a mixer; inside each head, where there are several."""
    x, normalized = step.args[:2]
    if len(normalized) > 1:
        return step.give_up(PinKind.LAYER_NORM)
    last, weight = x.ndim - 1, step.argument("weight")
    layer = cover(step.layers(x), last)
    if layer is not None and support(layer) != {last} and isinstance(weight, Tensor):
        step.space.mix(core(layer, (last,)), step.place)
        step.accompany_each(weight, layer, last, "one")
        step.accompany_each(step.argument("bias"), layer, last, "zero")
    elif layer is not None:
        channels = step.flat(layer, (last,)).reshape(-1)
        step.space.mix(channels, step.place)
        step.accompany(weight, channels, "one")
        step.accompany(step.argument("bias"), channels, "zero")
    return (step.layers(x), *(() for _ in step.outputs[1:]))


@rule("aten.native_group_norm")
def group_norm(step: Step) -> tuple[Layers, ...]:
    """Mean and variance over each group of channels: a mixer inside each group."""
    x, weight, bias = step.args[:3]
    kept = step.beside(x, (0, 1), PinKind.POSITIONS, "a group norm")
    channels = step.line(x, 1)
    if channels is not None:
        named = step.value(weight).parameter if isinstance(weight, Tensor) else ""
        groups = int(step.args[6])
        if not named and groups > 1:
            return step.give_up(PinKind.GROUP_NORM)
        if named:
            step.space.norm_groups[named] = groups
        step.space.mix(channels, step.place, named)
        step.accompany(weight, channels, "one")
        step.accompany(bias, channels, "zero")
    shape = step.outputs[0].shape
    return (tuple(x.expand(shape) for x in kept if support(x)), *(() for _ in step.outputs[1:]))
