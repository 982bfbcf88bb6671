"""Normalisations: the channels pass through, with vectors for company.

Gain: a norm takes a gain up, in its running statistics or by its eps. Padding: a LayerNorm makes
zero of a mean; a BatchNorm divides zeros by √eps, and their gradients with them.
"""

from __future__ import annotations

import math

from torch import Tensor

from fxgrow.labels.gains import Absorbed, Gain, GainFlow, same
from fxgrow.labels.layers import Layers, core, cover, support
from fxgrow.labels.padding import Held, PaddingFlow
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.record import rule
from fxgrow.labels.space import Fill, Normed
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation, Value
from fxgrow.modules.tensors import layer_of

# ── gain ──────────────────────────────────────────────────────────────────────────────────────


def batch_norm_gain(flow: GainFlow, op: Operation) -> Gain:
    """Running statistics take the gain up exactly, if there are any."""
    _, weight, _, mean, variance = op.args[:5]
    names = [v.parameter if isinstance(v, Value) else "" for v in (weight, mean, variance)]
    layer = layer_of(next(filter(None, names), "")) or op.module
    gain, eps = flow.of(op.args[0]), float(op.args[-1])
    _part_from_others(flow, op)
    paid = _paid(flow, op, *op.args[1:3])
    if not _takes_up(flow, op, layer, gain):
        return paid
    if all(names):
        flow.absorbed[layer] = Absorbed(layer, gain.scale, eps, gain.sources, *names)
        return paid
    if flow.eps_of(layer, eps):  # statistics without a weight: exact in both modes
        scales = zip(names[1:], (gain.scale, gain.scale**2), strict=True)
        flow.vectors |= {name: scale for name, scale in scales if name}
    _absorb_by_eps(flow, op, layer, eps, gain)
    return paid


def _paid(flow: GainFlow, op: Operation, weight: object, bias: object) -> Gain:
    """Return the gain that a norm's weight takes for what comes behind; its bias follows."""
    paid = flow.paid(weight)
    if paid.scale != 1.0 and isinstance(bias, Value) and not flow.follow(bias, paid):
        why = f"the bias of {op.module} cannot take a gain of {paid.scale:.6g}"
        flow.part_ways(op, op.args[0], paid, "no", why)
    return paid


def layer_norm_gain(flow: GainFlow, op: Operation) -> Gain:
    """A norm over the sample's own statistics: exact in both modes with eps' = s²·eps.

    Over more channels than before, its standard deviation differs by η, and the weight by 1/η.
    """
    layer = layer_of(next(iter(op.parameters), "")) or op.module
    eta = Gain(math.sqrt(flow.statistics.get(op.index, 1.0)), frozenset({op.module}))
    gain = flow.of(op.args[0]).times(eta)
    _part_from_others(flow, op)
    if _takes_up(flow, op, layer, gain):
        _absorb_by_eps(flow, op, layer, float(op.args[-1]), gain)
    rest = flow.undo(op.args[2], Gain(1.0 / eta.scale, eta.sources))
    return rest.times(_paid(flow, op, op.args[2], op.args[3]))


def _part_from_others(flow: GainFlow, op: Operation) -> None:
    """Let gains part ways on what scales and shifts the normalised channels, if it is data."""
    for value in op.inputs[1:]:
        if not value.is_weight and flow.of(value).scale != 1.0:
            why = f"a gain reaches what {op.place} scales or shifts its channels with"
            flow.part_ways(op, value, flow.of(value), "no", why)


def _takes_up(flow: GainFlow, op: Operation, layer: str, gain: Gain) -> bool:
    """Return whether a norm has a gain to take up; one that is used twice takes up its first."""
    taken = flow.taken_before(layer, gain)
    if taken is None:
        return gain.scale != 1.0
    if not same(taken.scale, gain.scale):
        ratio = Gain(gain.scale / taken.scale, gain.sources | taken.sources)
        why = f"{layer} is used twice, with different gains"
        flow.part_ways(op, op.args[0], ratio, "no", why)
    return False


def _absorb_by_eps(flow: GainFlow, op: Operation, layer: str, eps: float, gain: Gain) -> None:
    """Let a norm's eps take up a gain, if it can be set."""
    held = flow.eps_of(layer, eps)
    if held is not None:
        attribute, eps = held
        flow.absorbed[layer] = Absorbed(layer, gain.scale, eps, gain.sources, attribute=attribute)
    else:
        where = layer or op.name
        why = f"{where} has no statistics or eps to absorb a gain with"
        flow.part_ways(op, op.args[0], gain, "no", why)


def weight_norm_gain(flow: GainFlow, op: Operation) -> Gain | tuple[Gain, ...]:
    """A weight has the factor of its direction, which its length takes."""
    return flow.of(op.outputs[0]) if op.outputs[0].parameter else flow.generic(op)


# ── padding ───────────────────────────────────────────────────────────────────────────────────


def batch_norm_padding(flow: PaddingFlow, op: Operation) -> Held:
    """A channel of zeros has variance zero, and gradients are divided by its root."""
    held = flow.of(op.args[0])
    if held.what != "zero":
        return held if held.why else flow.lost(op)
    eps = float(op.args[-1])
    return flow.refuse(
        f"in training, the norm {op.module} divides its channels by their standard deviation, "
        f"which is √eps for zeros: their gradients would be multiplied by {eps**-0.5:.3g}"
    )


def layer_norm_padding(flow: PaddingFlow, op: Operation) -> Held:
    """Where the new channels are the mean of all that is normalised, they are zero afterwards."""
    x = op.args[0]
    mixed = flow.along(x, {len(x.shape) - 1})
    if mixed is None:
        return flow.lost(op)
    held = flow.of(x)
    if held.what != "mean" or not flow.is_whole(mixed):
        return flow.refuse(held.why or "it does not get all of them, and nothing else")
    flow.statistics.append(op.index)
    flow.fill(x)
    bias = op.args[3]  # a parameter's new entries are zeros
    added = isinstance(bias, Value) and not bias.is_weight and flow.of(bias).what != "zero"
    return flow.lost(op) if added else Held("zero")


def weight_norm_padding(flow: PaddingFlow, op: Operation) -> Held:
    """The weight holds what its direction is said to hold."""
    del op
    return Held(flow.holds)


# ── labels ────────────────────────────────────────────────────────────────────────────────────


@rule(
    "aten.native_batch_norm",
    "aten.cudnn_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
    gain=batch_norm_gain,
    padding=batch_norm_padding,
)
def batch_norm(step: Step) -> tuple[Layers, ...]:
    """Per channel: nothing is mixed."""
    for layer in step.layers(step.args[0]):
        if 1 not in support(layer):  # batch statistics are taken over all other dims
            step.space.mix(core(layer, support(layer)), step.place)
    channels = step.line(step.args[0], 1)
    fills: dict[str, Fill] = {
        "weight": "one", "bias": "zero", "running_mean": "zero", "running_var": "one"
    }  # fmt: skip
    for name, fill in fills.items():
        step.accompany(step.argument(name), channels, fill)
    own = () if channels is None else (channels,)  # of the statistics of a batch, if it takes any
    return (step.layers(step.args[0]), *(own if x.numel() else () for x in step.outputs[1:]))


@rule(
    "aten._weight_norm_interface",
    "fxgrow._weight_norm_interface",
    gain=weight_norm_gain,
    padding=weight_norm_padding,
)
def weight_norm(step: Step) -> tuple[Layers, ...]:
    """A direction and a length for each row: what reads and writes is the direction.

    It does so as if it were the weight, if the lengths follow its norms; see :class:`.Normed`.
    """
    direction, length, dim = *step.args[:2], step.argument("dim", 0)
    first, second = (step.value(part).parameter for part in (direction, length))
    parts = Normed(first, second, None if dim < 0 else dim)
    fits = tuple(length.shape) == parts.of(direction.shape)
    if first and second and fits and step.space.are_parts(parts):
        step.stands_for = parts.direction
    if parts.dim is None:
        return (step.layers(direction), *(() for _ in step.outputs[1:]))
    rows = step.line(direction, dim)
    beside = step.line(length, dim)
    if rows is not None and beside is not None:
        step.space.unify(rows, beside)
        step.space.mark(beside, "carrier", "copy")
    elif rows is not None or beside is not None:
        return step.give_up(PinKind.FIXED, step.met_by("combined with"))
    return (step.layers(direction), *(() for _ in step.outputs[1:]))


@rule("aten.native_layer_norm", gain=layer_norm_gain, padding=layer_norm_padding)
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
    else:
        channels = None if layer is None else step.flat(layer, (last,)).reshape(-1)
        if channels is not None:
            step.space.mix(channels, step.place)
        step.accompany(weight, channels, "one")
        step.accompany(step.argument("bias"), channels, "zero")
    beside = [own.narrow(last, 0, 1) for own in step.layers(x) if last not in support(own)]
    return (step.layers(x), *(tuple(beside) for _ in step.outputs[1:]))


@rule("aten.native_group_norm", gain=layer_norm_gain, padding=batch_norm_padding)
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
    samples = tuple(own for own in kept if support(own) == {0})
    taken = step.outputs[1].shape  # (N, groups)
    statistics = tuple(core(own, (0,)).reshape(-1, 1).expand(taken) for own in samples)
    shape = step.outputs[0].shape
    return (tuple(own.expand(shape) for own in kept if support(own)), statistics, statistics)
