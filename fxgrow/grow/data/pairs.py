"""Pairs of layers between which new channels can be computed from data.

Both methods ask what a new channel does near zero: it is written by one linear layer, passes a
scalar function σ with σ(0) = 0, and is read by one linear layer. Whether that is so is read off
the operations that ran, and σ is those operations themselves, run on one number. Whatever else
lies between (a norm, a gate, pooling, a reshape of the channels) is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.errors import PlanError
from fxgrow.grow.identity.concrete_run import run
from fxgrow.labels.operators import traits_of
from fxgrow.labels.tape import Operation, Value
from fxgrow.plan.step import Refusal

# A layer that is linear in its weight (out, in, *kernel); bias or none.
LinearLayer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_START = -1  # in place of the index of a value: what the writer puts out
_STEP = 1e-5  # of the one-sided slopes; σ is run in float64

Function: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LayerPair:
    """The layers on either side of a channel group, and what lies between.

    Attributes:
        group: the group's name.
        width: its present width.
        writer, reader: fully qualified names of the layers.
        has_bias: whether the writer has a bias.
        slope: σ'(0) as torch's autograd has it; 0 for a ReLU.
        slopes: the slopes of σ left and right of zero.
    """

    group: str
    width: int
    writer: str
    reader: str
    has_bias: bool
    slope: float
    slopes: tuple[float, float]


def find_pair(analysis: Analysis, group: ChannelGroup, model: nn.Module) -> LayerPair | Refusal:
    """Return the pair of layers around a channel group, or why it has none.

    Args:
        analysis: of the network or of a part of it.
        group: one of its groups.
        model: the network itself, whose parameters σ may use.
    """
    problem = next(_problems_around(group, model), None)
    if problem is not None:
        return Refusal(group.name, problem)
    (writer,), (reader,) = group.writers, group.readers
    is_linear = model.get_parameter(f"{writer}.weight").ndim == 2
    path = _path(analysis, writer, reader, channels_last=is_linear)
    problem = next(_problems_between(analysis, path, writer, reader), None)
    if problem is not None:
        return Refusal(group.name, problem)
    between = _replayed(path, model)
    at_zero = float(between(torch.zeros(1, dtype=torch.float64)))
    if at_zero:
        text = f"what lies between {writer} and {reader} makes {at_zero:.6g} of zero"
        return Refusal(group.name, text)
    return LayerPair(
        group=group.name,
        width=group.width,
        writer=writer,
        reader=reader,
        has_bias=model.get_submodule(writer)._parameters["bias"] is not None,
        slope=_slope(between),
        slopes=_one_sided(between),
    )


def _problems_around(group: ChannelGroup, model: nn.Module) -> Iterator[str]:
    """Yield why the layers around a group are no pair; each holds if those before do not."""
    if group.kind != "hidden":
        yield f"it is a {group.kind} group, with more than one layer on either side"
    for role, layers in (("write", group.writers), ("read", group.readers)):
        if len(layers) != 1:
            yield f"{len(layers)} layers {role} it ({', '.join(layers)})"
    if group.carriers:
        yield f"{group.carriers[0]} lies between the layers"
    (writer,), (reader,) = group.writers, group.readers
    yield from _problems_of(model, writer)
    yield from _problems_of(model, reader)
    first, second = (model.get_parameter(f"{layer}.weight").shape for layer in (writer, reader))
    if not first[0] == second[1] == group.width == len(group.channels) - len(group.absent):
        yield f"its channels are not each one row of {writer} and one column of {reader}"
    if len(first) != len(second):
        yield f"{writer} and {reader} are not of one kind"


def _problems_of(model: nn.Module, name: str) -> Iterator[str]:
    """Yield why a layer does more than apply a weight (out, in, *kernel) of its own."""
    layer = dict(model.named_modules()).get(name)
    plain = [kind.forward for kind in _LAYERS]
    if (
        not isinstance(layer, _LAYERS)
        or "weight" not in layer._parameters  # a parametrized one is computed
        or type(layer).forward not in plain
    ):
        yield f"{name} is no plain linear layer or convolution"
        return
    if getattr(layer, "groups", 1) != 1:
        yield f"{name} is a grouped convolution"
    uses = [p for _, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
    if len(uses) > 1:
        yield f"the weight of {name} is shared"


@dataclass
class _Path:
    """The operations between two layers, as a function of one number.

    Attributes:
        channels_last: whether the channels are the last dim.
        steps: the operations that compute something of each number, in order.
        passed: for each value computed from what the writer puts out, by index, the value whose
            number it has: its own, or that of another that it is a view or a copy of.
        ends: the values that the reader takes.
        guilty: the operations that do not treat each number by itself.
    """

    channels_last: bool
    steps: list[Operation] = field(default_factory=list)
    passed: dict[int, int] = field(default_factory=dict)
    ends: set[Value] = field(default_factory=set)
    guilty: list[Operation] = field(default_factory=list)


def _path(analysis: Analysis, writer: str, reader: str, *, channels_last: bool) -> _Path:
    """Return what lies between two layers."""
    path = _Path(channels_last)
    for op in analysis.tape.operations:
        hidden = [value for value in op.inputs if value.index in path.passed]
        if op.module == writer:
            path.passed |= {value.index: _START for value in op.outputs if not value.is_weight}
        elif hidden and op.module == reader:
            path.ends.update(hidden)
        elif hidden:
            _add_step(op, path)
    return path


def _problems_between(analysis: Analysis, path: _Path, writer: str, reader: str) -> Iterator[str]:
    """Yield why what lies between two layers is no function of each number by itself."""
    for op in path.guilty:
        where = f" at {op.module}" if op.module else ""
        yield f"{op.name}{where} lies between the layers"
    for layer in (writer, reader):
        used = [op for op in analysis.tape.operations if f"{layer}.weight" in op.parameters]
        if sum(any(not value.is_weight for value in op.outputs) for op in used) != 1:
            yield f"{layer} is used more than once"
    if len(path.ends) != 1:
        yield f"{reader} does not read once what {writer} writes"


def _add_step(op: Operation, path: _Path) -> None:
    """Let a path go on through an operation, which may treat each number by itself or not."""
    others = [value for value in op.inputs if value.index not in path.passed]
    random = torch.Tag.nondeterministic_seeded in op.target.tags
    pointwise = traits_of(op.target).is_pointwise and not random
    if _keeps_order(op, path.channels_last):
        path.passed[op.outputs[0].index] = path.passed[op.inputs[0].index]
        return
    scalar = pointwise and all(_is_number(value) for value in others)
    (path.steps if scalar else path.guilty).append(op)
    path.passed |= {value.index: value.index for value in op.outputs}


def _keeps_order(op: Operation, channels_last: bool) -> bool:
    """Return whether an operation only views or copies, in order, and leaves channels apart.

    Where channels are the last dim, the others may be viewed as one.
    """
    if len(op.inputs) != 1 or not traits_of(op.target).is_movement:
        return False
    dims = slice(-1 if channels_last else 0, None)
    (given,), (taken, *_) = op.inputs, op.outputs
    places = torch.arange(math.prod(given.shape), dtype=torch.float64).reshape(given.shape)
    results = run(op, {given.index: places})
    same = len(results) == 1 and torch.equal(results[0].flatten(), places.flatten())
    return same and given.shape[dims] == taken.shape[dims]


def _is_number(value: Value) -> bool:
    """Return whether a value is one number that the network holds, the slope of a PReLU, say."""
    return value.is_weight and len(value.origins) == 1 and set(value.shape) <= {1}


def _replayed(path: _Path, model: nn.Module) -> Function:
    """Return the function that runs the operations of a path on a tensor of shape (1,)."""
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())

    def between(number: Tensor) -> Tensor:
        values = {_START: number}

        def at(value: Value) -> Tensor:
            if value.index in path.passed:
                return values[path.passed[value.index]]
            return parameters[value.origins[0]].detach().double().cpu().reshape(1)

        for op in path.steps:
            results = run(op, {value.index: at(value) for value in op.inputs})
            if len(results) != len(op.outputs):
                raise PlanError(f"{op.name} between the layers does not take one number.")
            values |= {v.index: result for v, result in zip(op.outputs, results, strict=True)}
        (end,) = path.ends
        return at(end)

    return between


def _slope(between: Function) -> float:
    """Return σ'(0), as autograd has it."""
    number = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        value = between(number)
        if not value.requires_grad:
            return 0.0
        (slope,) = torch.autograd.grad(value.sum(), number)
    return float(slope)


def _one_sided(between: Function) -> tuple[float, float]:
    """Return the slopes of σ left and right of zero."""
    with torch.no_grad():
        left, right = (
            float(between(torch.tensor([h], dtype=torch.float64))) / h for h in (-_STEP, _STEP)
        )
    return left, right
