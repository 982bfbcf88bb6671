"""What channels hold on their way through a run, where their writers write a mean or zeros.

The flow follows the new channels of one group from what writes them to what reads them: linear
operations that treat all channels alike pass the mean of the old ones on, and zero stays zero as
far as each operation, asked at zero, says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.errors import PlanError
from fxgrow.grow.norms.at_zero import at_zero
from fxgrow.labels.forest import IntArray
from fxgrow.labels.layers import Layer, core, cover, support
from fxgrow.labels.operators import MOVEMENTS, aten, operator_name
from fxgrow.labels.tape import Operation, Value
from fxgrow.registry import Registry

Holds: TypeAlias = Literal["mean", "zero"]


@dataclass(frozen=True)
class State:
    """What the surplus channels of a value hold.

    Attributes:
        holds: the mean of the old channels, zero, or None for anything else.
        why: where that was lost ("" if it was not).
    """

    holds: Holds | None
    why: str = ""


@dataclass
class SurplusFlow:
    """The surplus channels of one group on their way through a run.

    Attributes:
        analysis: of the network.
        group: the group.
        holds: what its writers write.
        silent: zeros go on where no gradient comes back, which is followed afterwards, and no
            further than to two of them multiplied by one another.
        filled: axes that have to be filled with it.
        free: reader axes, and whether the surplus is zero at all that they read.
        reasons: of the reader axes that are not free, why.
        flat: operations that have no slope at zero, and why.
        statistics: operations that average squares over the group.
    """

    analysis: Analysis
    group: ChannelGroup
    holds: Holds
    silent: bool = False
    filled: set[int] = field(default_factory=set)
    free: dict[int, bool] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    flat: dict[int, str] = field(default_factory=dict)
    statistics: list[int] = field(default_factory=list)
    _states: dict[int, State] = field(default_factory=dict)

    @cached_property
    def _is_member(self) -> npt.NDArray[np.bool_]:
        """Whether each channel is one of the group's; one entry more, for "no channel"."""
        is_member = np.zeros(self.analysis.channels.count + 1, dtype=bool)
        is_member[self.group.channels] = True
        return is_member

    @cached_property
    def _axes(self) -> dict[str, tuple[int, ...]]:
        """The group's axes by tensor."""
        axes: dict[str, tuple[int, ...]] = {}
        for index in self.group.axes:
            name = self.analysis.channels.axes[index].tensor
            axes[name] = (*axes.get(name, ()), index)
        return axes

    def carries(self, value: Value) -> bool:
        """Return whether a value has any of the group's channels."""
        return any(self.touches(channels_of(self.analysis, layer)) for layer in value.layers)

    def touches(self, channels: IntArray) -> bool:
        """Return whether any of these channels is the group's."""
        return bool(self._is_member[channels].any())

    def is_alone(self, channels: IntArray) -> bool:
        """Return whether these channels are all the group's."""
        return bool(self._is_member[channels].all())

    def is_whole(self, channels: IntArray) -> bool:
        """Return whether these are all the group's channels, each once, and nothing else."""
        count = len(self.group.channels)
        return len(channels) == count == len(np.unique(channels)) and self.is_alone(channels)

    def of(self, value: Value) -> State:
        """Return what the surplus of a value holds; a parameter's is filled as the writers' is."""
        if value.parameter:
            return self._of_whole(value, State(self.holds), "it is a part of them")
        return self._states.get(value.index, State(None, "it is computed in an unknown way"))

    def _of_whole(self, value: Value, state: State, why: str) -> State:
        """Return a state, or that it is lost: the mean of a part is not the mean of all."""
        if state.holds != "mean":
            return state
        found = self.analysis.channels.of_layers(value.layers)
        whole = np.count_nonzero(self._is_member[found]) == len(self.group.channels)
        return state if whole else State(None, why)

    def axes_of(self, value: Value, role: str) -> list[int]:
        """Return the group's axes with a role, of the parameters that a value depends on."""
        roles = self.analysis.channels.roles
        return [i for name in value.origins for i in self._axes.get(name, ()) if roles[i] == role]

    def fill(self, value: object) -> None:
        """Have what a value of parameters adds to the surplus filled as the writers' rows are."""
        if isinstance(value, Value):
            self.filled.update(self.axes_of(value, "carrier"))

    def run(self) -> None:
        """Follow the surplus through all operations.

        Raises:
            PlanError: a norm would not get what it needs.
        """
        for op in self.analysis.tape.operations:
            carriers = [value for value in op.inputs if self.carries(value)]
            if carriers:
                state = _after(self, op, carriers)
                for value in op.outputs:
                    self._states[value.index] = self._of_whole(value, state, lost(self, op).why)


def channels_of(analysis: Analysis, layer: Layer) -> IntArray:
    """Return the channels of a layer, one for each of its positions; -1 for none."""
    channels: IntArray = analysis.channels.channel_of_label[core(layer, support(layer)).numpy()]
    return channels.ravel()


def lost(flow: SurplusFlow, op: Operation) -> State:
    """Return the state after an operation that does not pass on what the surplus holds."""
    what = "the mean of channels" if flow.holds == "mean" else "a channel of zeros"
    return State(None, f"{_place(op)} changes {what}")


def _place(op: Operation) -> str:
    return f"{op.name} at {op.module or op.node or 'the top level'}"


SurplusRule: TypeAlias = Callable[[SurplusFlow, Operation, list[Value]], State]
SURPLUS_RULES: Registry[SurplusRule] = Registry("surplus rule")

# Linear, and the same for every channel: what the surplus holds passes.
LINEAR = aten(
    "neg sum avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d as_strided "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d native_dropout"
)
# One of the values that they get, so zero among zeros.
SELECTIONS = aten(
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d "
    "amax amin"
)
# What an RMSNorm averages: it has no slope at zero, and needs none there.
SQUARES = aten("square pow")


def _after(flow: SurplusFlow, op: Operation, carriers: list[Value]) -> State:
    """Return what the surplus of an operation's outputs holds."""
    name = operator_name(op.target)
    rule = SURPLUS_RULES.get(name)
    if rule is not None:
        return rule(flow, op, carriers)
    if op.target.is_view or name in MOVEMENTS:
        return joined(flow, op, carriers)
    state = flow.of(carriers[0])
    if not any(flow.carries(value) for value in op.outputs):
        raise PlanError(f"{op.name} is computed over them")
    if name in LINEAR or (name in SELECTIONS and state.holds == "zero") or state.why:
        return state
    return _pointwise(flow, op, name) if state.holds == "zero" else lost(flow, op)


def _pointwise(flow: SurplusFlow, op: Operation, name: str) -> State:
    """Return the state after an operation on zeros: what it makes of one tells."""
    found = at_zero(op)
    if found is None:
        return lost(flow, op)
    if found.value:
        return State(None, f"{_place(op)} makes {found.value:.6g} of a channel of zeros")
    if not found.slope:
        flow.flat[op.index] = f"{_place(op)} has no slope at zero and stops the gradient"
        if not (flow.silent or name in SQUARES):
            return State(None, flow.flat[op.index])
    return State("zero")


@SURPLUS_RULES.register("aten.add", "aten.sub", "aten.cat", "aten.stack")
def joined(flow: SurplusFlow, op: Operation, carriers: list[Value]) -> State:
    """The same in all that is joined; parameters are filled accordingly."""
    states = [flow.of(value) for value in carriers]
    first = next((state for state in states if state.why), states[0])
    if any(state.holds != first.holds for state in states) and not first.why:
        return State(None, f"{op.name} at {op.module or op.node} joins them with normalised ones")
    offset = op.name in ("add", "sub") and (
        len(op.inputs) > len(carriers) or any(isinstance(arg, (int, float)) for arg in op.args[1:2])
    )
    if offset and first.holds == "zero":
        return lost(flow, op)
    weights = [value for value in carriers if value.is_weight]
    if len(weights) < len(carriers):
        for value in weights:
            flow.fill(value)
    return first


def _zero_times(
    flow: SurplusFlow, op: Operation, data: list[Value], states: list[State]
) -> State | None:
    """Return the state of a product of which some factor is zero, or None.

    Raises:
        PlanError: several are, in a flow of silent channels: the slope for each is zero then.
    """
    zeros = [state for state in states if state.holds == "zero"]
    factors = [value for value in data if not value.is_weight]
    if flow.silent and len(zeros) > 1 and len(factors) > 1:
        raise PlanError(
            f"{_place(op)} multiplies channels of zeros by one another, so that none of them ever "
            "gets a gradient"
        )
    return zeros[0] if zeros else None


@SURPLUS_RULES.register("aten.mul", "aten.div")
def product(flow: SurplusFlow, op: Operation, carriers: list[Value]) -> State:
    """A factor that is the same for all channels passes; zero times anything is zero."""
    data = [value for value in carriers if not value.is_weight] or carriers
    states = [flow.of(value) for value in (data[:1] if op.name == "div" else data)]
    zero = _zero_times(flow, op, data, states)
    if zero is not None and data is not carriers:
        return zero
    if len(carriers) == 1 and (op.name == "mul" or op.inputs[0] is carriers[0]):
        return states[0]
    return next((state for state in states if state.why), lost(flow, op))


@SURPLUS_RULES.register(
    "aten.convolution", "aten.addmm", "aten.mm", "aten.bmm", "aten.baddbmm", "aten.embedding"
)
def written(flow: SurplusFlow, op: Operation, carriers: list[Value]) -> State:
    """What is written is filled; what is read by any weight is noted; what passes, passes."""
    weights = [value for value in carriers if value.is_weight]
    passing = [value for value in carriers if not value.is_weight]
    for value in op.inputs:
        for axis in flow.axes_of(value, "reader"):
            states = [flow.of(x) for x in passing]
            zero = bool(states) and all(state.holds == "zero" for state in states)
            flow.free[axis] = flow.free.get(axis, True) and zero
            if not zero:
                found = next((state.why for state in states if state.why), "")
                flow.reasons.setdefault(axis, found or f"{_place(op)} reads them by themselves")
    if not any(flow.carries(value) for value in op.outputs):
        return State(None)
    axes = [axis for value in weights for axis in flow.axes_of(value, "writer")]
    if axes:
        position = {"convolution": 2, "addmm": 0, "baddbmm": 0}.get(op.name)
        bias = None if position is None else op.args[position]
        parts = [value for value in (*weights, bias) if isinstance(value, Value)]
        whole = all(flow.is_whole(flow.analysis.channels.of_axis(axis)) for axis in axes)
        apart = op.name == "convolution" and op.args[8] > 1  # its groups read different channels
        sums = whole and not apart
        if (sums or flow.holds == "zero") and all(flow.of(v).holds == flow.holds for v in parts):
            flow.filled.update(axes)
            flow.fill(bias)
            return State(flow.holds)
        return lost(flow, op)
    states = [flow.of(value) for value in passing]
    if len(passing) == 1 and len(op.inputs) == 2 and not weights:
        return states[0]  # another dim is contracted, without a bias
    nothing = None if len(carriers) < len(op.inputs) else _zero_times(flow, op, passing, states)
    if nothing is not None:  # a depthwise kernel and its bias accompany them, or it is of heads
        biases = [value for value in weights if value is not op.args[1]]
        if biases and flow.holds != "zero":
            return lost(flow, op)
        for value in biases:
            flow.fill(value)
        return nothing
    return next((state for state in states if state.why), lost(flow, op))


@SURPLUS_RULES.register(
    "aten.native_batch_norm", "aten.cudnn_batch_norm", "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training", "aten.native_group_norm",
)  # fmt: skip
def batch_norm(flow: SurplusFlow, op: Operation, carriers: list[Value]) -> State:
    """A channel of zeros has variance zero, and gradients are divided by its root."""
    state = flow.of(op.args[0])
    if state.holds != "zero":
        return lost(flow, op) if not state.why else state
    eps = float(op.args[-1])
    raise PlanError(
        f"in training, the norm {op.module} divides its channels by their standard deviation, "
        f"which is √eps for zeros: their gradients would be multiplied by {eps**-0.5:.3g}"
    )


@SURPLUS_RULES.register("aten.native_layer_norm")
def layer_norm(flow: SurplusFlow, op: Operation, carriers: list[Value]) -> State:
    """Where the surplus is the mean of all that is normalised, it is zero afterwards."""
    x = op.args[0]
    mixed = _mixed(flow, x, {len(x.shape) - 1})
    if mixed is None:
        return lost(flow, op)
    state = flow.of(x)
    if state.holds != "mean" or not flow.is_whole(mixed):
        raise PlanError(state.why or "it does not get all of them, and nothing else")
    flow.statistics.append(op.index)
    return State("zero")


@SURPLUS_RULES.register("aten.mean")
def mean(flow: SurplusFlow, op: Operation, carriers: list[Value]) -> State:
    """Over other dims it passes; over the channels it is an RMSNorm's mean of squares."""
    x = op.args[0]
    given = op.args[1] if len(op.args) > 1 else None
    reduced = {dim % len(x.shape) for dim in given} if given else set(range(len(x.shape)))
    mixed = _mixed(flow, x, reduced)
    state = flow.of(x)
    if mixed is None:
        return state
    times = np.unique(mixed, return_counts=True)[1]
    alike = len(times) == len(flow.group.channels) and len(np.unique(times)) == 1
    if state.holds != "zero" or not alike or not flow.is_alone(mixed):
        raise PlanError(state.why or "they are averaged together with others")
    flow.statistics.append(op.index)
    return State(None)


def _mixed(flow: SurplusFlow, x: Value, dims: set[int]) -> IntArray | None:
    """Return the channels along some dims of a value, if the group's are among them."""
    layers = [cover(x.layers, dim) for dim in sorted(dims)]
    for layer in layers:
        if layer is not None and support(layer) <= dims:
            found = channels_of(flow.analysis, layer)
            if flow.touches(found):
                return found
    return None
