"""Gain propagation: the scalar by which each activation of the grown network differs.

A factor on a layer's weights is not the end, nor is a statistic over more channels than before.
It travels on as a *gain*: products multiply gains, positively homogeneous operations pass them on,
a norm absorbs them, and wherever none of this holds (two unequal gains at an addition, a gain that
reaches a sigmoid, or the output) the function changes. Such a place is a :class:`Mismatch`: the
grown network computes there what the old one would compute with a multiplier on that edge, which
is the prediction that verification holds it to, and what ``compensate`` undoes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from typing import TypeAlias

from fxgrow.channels.groups import layer_of
from fxgrow.grow.norms.gain_flow import Absorbed, Gain, GainFlow, Mismatch, same
from fxgrow.labels.operators import LIKENESSES, MOVEMENTS, aten, operator_name
from fxgrow.labels.tape import Operation, Tape, Value
from fxgrow.plan.step import Verdict
from fxgrow.registry import Registry

GainRule: TypeAlias = Callable[[GainFlow, Operation], Gain]
GAIN_RULES: Registry[GainRule] = Registry("gain rule")

HOMOGENEOUS = aten(
    "relu leaky_relu _prelu_kernel neg abs max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
    "sum amax amin upsample_nearest2d upsample_bilinear2d native_dropout as_strided embedding"
)


def propagate_gains(
    tape: Tape,
    factors: Mapping[str, float],
    with_eps: Mapping[str, Mapping[str, float]],
    statistics: Mapping[int, float],
    undone: Set[str],
) -> GainFlow:
    """Carry the factors of the weights through a run; see :class:`GainFlow` for the arguments.

    Factors and statistics equal to 1 have no effect.
    """
    acting = {name: factor for name, factor in factors.items() if factor != 1.0}
    flow = GainFlow(acting, with_eps, statistics, undone)
    if not acting and not statistics:
        return flow
    for op in tape.operations:
        gain = _gain_after(flow, op)
        for value in op.outputs if op.target.is_view else op.outputs[:1]:
            flow.set(value, gain)
    for value in tape.outputs:
        gain = flow.of(value)
        if gain.scale != 1.0 and value.producer is not None:
            reason = f"the output of the network is scaled by {gain.scale:.6g}"
            flow.mismatches.append(
                Mismatch(value.producer, -1, gain.scale, "scaled", reason, gain.sources)
            )
    return flow


def _gain_after(flow: GainFlow, op: Operation) -> Gain:
    name = operator_name(op.target)
    rule = GAIN_RULES.get(name)
    if rule is not None:
        return rule(flow, op)
    if name in LIKENESSES:
        return Gain()
    if op.target.is_view or name in MOVEMENTS:
        return agree(flow, op)
    if name in HOMOGENEOUS:
        return flow.of(op.inputs[0])
    return not_homogeneous(flow, op)


def not_homogeneous(flow: GainFlow, op: Operation) -> Gain:
    """Any gain that comes in is a mismatch."""
    for value in op.inputs:
        gain = flow.of(value)
        if gain.scale != 1.0:
            where = f" at {op.module}" if op.module else ""
            why = f"a gain of {gain.scale:.6g} reaches {op.name}{where}, which is not homogeneous"
            flow.part(op, value, gain, "no", why)
    return Gain()


@GAIN_RULES.register("aten.convolution")
def convolution(flow: GainFlow, op: Operation) -> Gain:
    """The product of input and weight gains; the bias follows."""
    return _with_bias(flow, op, op.args[0], op.args[1], op.args[2])


@GAIN_RULES.register("aten.addmm")
def addmm(flow: GainFlow, op: Operation) -> Gain:
    """The product of the factors' gains; the bias follows."""
    return _with_bias(flow, op, op.args[1], op.args[2], op.args[0])


def _with_bias(flow: GainFlow, op: Operation, x: Value, weight: Value, bias: object) -> Gain:
    gain = flow.undo(weight, flow.of(x)).times(flow.of(weight))
    if bias is None or flow.follow(bias, gain):
        return gain
    # The sum is what the old one would be for an input times gain / own, all of it times own.
    taken = flow.taken_by(bias)
    sources = gain.sources | taken.sources
    why = f"the bias of {op.module} cannot take a gain of {gain.scale:.6g}"
    if not same(taken.scale, 1.0):
        why += f", having taken one of {taken.scale:.6g} where it is used as well"
    flow.part(op, x, Gain(gain.scale / taken.scale, sources), "no", why)
    return Gain(taken.scale, sources)


@GAIN_RULES.register("aten.mm", "aten.bmm", "aten.mul", "aten.baddbmm")
def product(flow: GainFlow, op: Operation) -> Gain:
    """The product of all gains."""
    weights = [value for value in op.inputs if value.is_weight]
    gain = Gain()
    for value in op.inputs:
        gain = gain if value.is_weight else gain.times(flow.of(value))
    reads = op.name != "mul" or op.module in flow.undone  # a norm's weight, but no layer scale
    if reads and len(weights) == 1:
        gain = flow.undo(weights[0], gain)
    for value in weights:
        gain = gain.times(flow.of(value))
    return gain


@GAIN_RULES.register("aten.mean")
def mean(flow: GainFlow, op: Operation) -> Gain:
    """Homogeneous; one of squares, over more channels than before, differs by a known ratio."""
    ratio = Gain(flow.statistics.get(op.index, 1.0), frozenset({op.module}))
    return flow.of(op.inputs[0]).times(ratio)


@GAIN_RULES.register("aten.pow", "aten.square", "aten.sqrt", "aten.rsqrt", "aten.reciprocal")
def power(flow: GainFlow, op: Operation) -> Gain:
    """A power of the gain, where the exponent is a number."""
    exponents = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
    exponent = exponents.get(op.name) or op.args[1]
    gain = flow.of(op.inputs[0])
    if gain.scale == 1.0 or not isinstance(exponent, (int, float)):
        return not_homogeneous(flow, op)
    return Gain(gain.scale**exponent, gain.sources)


@GAIN_RULES.register("aten.div")
def quotient(flow: GainFlow, op: Operation) -> Gain:
    """The quotient of two gains."""
    first = flow.of(op.inputs[0])
    second = flow.of(op.inputs[1]) if len(op.inputs) > 1 else Gain()
    return first.times(Gain(1.0 / second.scale, second.sources))


@GAIN_RULES.register("aten.add", "aten.sub", "aten.cat", "aten.stack")
def agree(flow: GainFlow, op: Operation) -> Gain:
    """All gains must agree; parameters follow; what differs is a mismatch on its edge."""
    data = [value for value in op.inputs if not value.is_weight]
    if not data:
        return flow.of(op.inputs[0]) if op.inputs else Gain()
    gains = [flow.of(value) for value in data]
    common = next((gain for gain in gains if gain.scale == 1.0), gains[0])
    offset = any(isinstance(arg, (int, float)) and arg for arg in op.args[1:2])
    joins = "another path"
    verdict: Verdict = "scaled"
    if offset and op.name in ("add", "sub"):
        followed = _eps_follows(flow, op, gains[0]) if len(data) == 1 else None
        if followed is not None:
            return followed
        common = Gain()
        joins, verdict = "a constant that no attribute holds", "no"
    for value in op.inputs:
        if value.is_weight and not flow.follow(value, common):
            taken = flow.taken_by(value)  # where it is used as well
            if not same(taken.scale, common.scale):
                common = Gain(taken.scale, common.sources | taken.sources)
                joins = "a constant or shared parameter"
    for value, gain in zip(data, gains, strict=True):
        if not same(gain.scale, common.scale):
            where = f" at {op.module}" if op.module else ""
            why = f"scaled by {gain.scale:.6g} where it joins {joins} ({op.name}{where})"
            sources = gain.sources | common.sources
            flow.part(op, value, Gain(gain.scale / common.scale, sources), verdict, why)
    return common


@GAIN_RULES.register("aten.constant_pad_nd")
def pad(flow: GainFlow, op: Operation) -> Gain:
    """Zeros take any gain; another constant parts from a gain that is not one."""
    gain = flow.of(op.inputs[0])
    if gain.scale != 1.0 and len(op.args) > 2 and op.args[2]:
        flow.part(op, op.inputs[0], gain, "scaled", "scaled where a constant is padded on")
        return Gain()
    return gain


@GAIN_RULES.register(
    "aten.native_batch_norm",
    "aten.cudnn_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
)
def batch_norm(flow: GainFlow, op: Operation) -> Gain:
    """Running statistics take the gain up exactly, if there are any."""
    _, weight, _, mean, variance = op.args[:5]
    names = [v.parameter if isinstance(v, Value) else "" for v in (weight, mean, variance)]
    layer = layer_of(next(filter(None, names), "")) or op.module
    gain, eps = flow.of(op.args[0]), float(op.args[-1])
    if not _takes_up(flow, op, layer, gain):
        return Gain()
    if all(names):
        flow.absorbed[layer] = Absorbed(layer, gain.scale, eps, gain.sources, *names)
        return Gain()
    if _eps_of(flow, layer, eps):  # statistics without a weight: exact in both modes
        scales = zip(names[1:], (gain.scale, gain.scale**2), strict=True)
        flow.vectors |= {name: scale for name, scale in scales if name}
    _absorb_by_eps(flow, op, layer, eps, gain)
    return Gain()


@GAIN_RULES.register("aten.native_layer_norm", "aten.native_group_norm")
def layer_norm(flow: GainFlow, op: Operation) -> Gain:
    """A norm over the sample's own statistics: exact in both modes with eps' = s²·eps.

    Over more channels than before, its standard deviation differs by η, and the weight by 1/η.
    """
    layer = layer_of(next(iter(op.parameters), "")) or op.module
    eta = Gain(math.sqrt(flow.statistics.get(op.index, 1.0)), frozenset({op.module}))
    gain = flow.of(op.args[0]).times(eta)
    if _takes_up(flow, op, layer, gain):
        _absorb_by_eps(flow, op, layer, float(op.args[-1]), gain)
    return flow.undo(op.args[2], Gain(1.0 / eta.scale, eta.sources))


def _takes_up(flow: GainFlow, op: Operation, layer: str, gain: Gain) -> bool:
    """Return whether a norm has a gain to take up; one that is used twice takes up its first."""
    taken = _taken_before(flow, layer, gain)
    if taken is None:
        return gain.scale != 1.0
    if not same(taken.scale, gain.scale):
        ratio = Gain(gain.scale / taken.scale, gain.sources | taken.sources)
        flow.part(op, op.args[0], ratio, "no", f"{layer} is used twice, with different gains")
    return False


def _taken_before(flow: GainFlow, layer: str, gain: Gain) -> Gain | None:
    """Return what a norm took up where it was used before, or None at its first use.

    It took up nothing if the first gain was one, or if it has nothing to absorb a gain with.
    """
    first = flow.norms.get(layer)
    if first is None:
        flow.norms[layer] = gain
        return None
    absorbed = flow.absorbed.get(layer)
    return Gain(1.0 if absorbed is None else absorbed.gain, first.sources)


def _absorb_by_eps(flow: GainFlow, op: Operation, layer: str, eps: float, gain: Gain) -> None:
    """Let a norm's eps take up a gain, if it can be set."""
    attribute = _eps_of(flow, layer, eps)
    if attribute:
        flow.absorbed[layer] = Absorbed(layer, gain.scale, eps, gain.sources, attribute=attribute)
    else:
        where = layer or op.name
        why = f"{where} has no statistics or eps to absorb a gain with"
        flow.part(op, op.args[0], gain, "no", why)


def _eps_of(flow: GainFlow, layer: str, eps: float) -> str:
    """Return the attribute of a layer that holds its eps, or ""."""
    return next((name for name, v in flow.with_eps.get(layer, {}).items() if v == eps), "")


def _eps_follows(flow: GainFlow, op: Operation, gain: Gain) -> Gain | None:
    """Let the eps that an RMSNorm adds to its mean of squares take the gain s² of these.

    Returns:
        The gain of the sum, or None if what is added is no eps.
    """
    eps, attribute = op.args[1], _eps_of(flow, op.module, float(op.args[1]))
    if not attribute:
        return None
    root = Gain(math.sqrt(gain.scale), gain.sources)
    taken = _taken_before(flow, op.module, root)
    if taken is None and root.scale != 1.0:
        norm = Absorbed(op.module, root.scale, eps, gain.sources, attribute=attribute)
        flow.absorbed[op.module] = norm
    if taken is None or same(taken.scale, root.scale):
        return gain
    own = Gain(taken.scale**2, gain.sources | taken.sources)
    why = f"{op.module} is used twice, with different gains"
    flow.part(op, op.inputs[0], Gain(gain.scale / own.scale, own.sources), "no", why)
    return own
