"""What labelling one call claims: which positions of operands and results are one channel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.labels.forest import IntArray
from fxgrow.labels.layers import Layer, along, core, support
from fxgrow.labels.operators import traits_of
from fxgrow.labels.propagate import Labeller
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Operation, Value
from fxgrow.modules.calling import map_tensors, tensors_in

# How each operand comes in: "p" as a parameter, "c" as a constant, "d" as data, with labels in the
# dims that follow: "d02".
Way: TypeAlias = tuple[str, ...]
PARAMETER = "operand"  # what the parameters of a call are named, with their number
MOST_TRIED = 30  # calls with other numbers, where those of a call do not suit more channels
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SampleCall:
    """One call of a function.

    Attributes:
        name: the operator, as ``--op`` takes it.
        function: what is called.
        args, kwargs: its arguments.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def operands(self) -> list[Tensor]:
        """The tensors among the arguments, in order."""
        return tensors_in((self.args, self.kwargs))

    def on(self, operands: Sequence[Tensor]) -> Any:
        """Return what the function makes of other operands."""
        queue = iter(operands)
        args, kwargs = map_tensors(lambda _: next(queue), (self.args, self.kwargs))
        return self.function(*args, **kwargs)

    def with_larger_numbers(self) -> Iterator[SampleCall]:
        """Yield the call with one of the numbers among its arguments doubled, two, or all."""
        count = itertools.count()
        _exchange((self.args, self.kwargs), lambda number: next(count) and number)
        places = range(next(count))
        some = [*itertools.combinations(places, 1), *itertools.combinations(places, 2), places]
        for chosen in some[:MOST_TRIED]:
            queue = itertools.count()
            larger = lambda number: number * (1 + (next(queue) in chosen))  # noqa: E731, B023
            args, kwargs = _exchange((self.args, self.kwargs), larger)
            yield replace(self, args=args, kwargs=kwargs)

    def __str__(self) -> str:
        told = [_text(arg) for arg in self.args]
        told += [f"{key}={_text(item)}" for key, item in self.kwargs.items()]
        return f"{self.name}({', '.join(told)})"


def _exchange(part: Any, change: Callable[[int], int]) -> Any:
    """Return a nest of arguments with each number above one that may be a size changed."""
    if isinstance(part, dict):
        return {key: _exchange(item, change) for key, item in part.items()}
    if isinstance(part, (tuple, list)):
        return type(part)([_exchange(item, change) for item in part])
    return change(part) if type(part) is int and part > 1 else part


def _text(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"{str(part.dtype).removeprefix('torch.')}{list(part.shape)}"
    if isinstance(part, (tuple, list)):
        return f"[{', '.join(map(_text, part))}]"
    return repr(part)


def ways_of(operands: Sequence[Tensor]) -> Iterator[Way]:
    """Yield how labels can enter a call, the simplest first.

    Each dim of more than one entry by itself, pairs of dims of one size, all dims at once; beside
    data, constants and parameters.
    """
    dims = [[d for d, size in enumerate(x.shape) if size > 1] for x in operands]
    whole = [f"d{''.join(map(str, own))}" for own in dims]
    weights = ["p" if x.is_floating_point() else "d" for x in operands]
    found: dict[Way, None] = {}

    def say(*places: tuple[int, str], others: Sequence[str]) -> None:
        way = list(others)
        for place, entry in places:
            way[place] = entry
        found[tuple(way)] = None

    data, constants = ["d"] * len(operands), ["c"] * len(operands)
    singles = [(i, f"d{d}") for i, own in enumerate(dims) for d in own]
    for single in singles:
        say(single, others=data)
        say(single, others=constants)
        say(single, others=weights)
    for (i, left), (j, right) in itertools.combinations(singles, 2):
        if operands[i].shape[int(left[1:])] == operands[j].shape[int(right[1:])] and i != j:
            say((i, left), (j, right), others=data)
    for i, weight in enumerate(weights):
        say((i, whole[i]), others=weights)
        say((i, weight), others=data)
        say((i, weight), others=whole)
    say(others=whole)
    say(others=weights)
    return (way for way, own in ((w, set(w)) for w in found) if own - {"d", "c"})


class Located(NamedTuple):
    """The channels of one layer.

    Attributes:
        dims: the dims that it varies in.
        channels: the channel of each position in these dims, flat; 0 where nothing is claimed.
        shape: the sizes of these dims.
        is_read: it is the axis of a parameter that reads channels.
    """

    dims: tuple[int, ...]
    channels: IntArray
    shape: tuple[int, ...]
    is_read: bool = False


@dataclass(frozen=True)
class Claims:
    """What is claimed of one call.

    Attributes:
        operands, results: the layers of each tensor in which some channel is claimed.
        group: for each channel the convolution group that it is tied to.
        is_read, is_mixed: for each channel, whether a parameter contracts it, and whether the
            result depends on a set of channels with it.
        treated: for each operation that altered values, the channels of these.
        pins: the reasons for which the other labels are pinned.
        numbers: those that the ATen operators took which ran.
        is_sized: some laid its operand out by literal sizes, or none took some operand.
        is_open: for each result, that nothing is claimed of it: whoever uses it pins channels.
        shapes: of the results on meta tensors.
        is_random: some drew numbers, or left memory as it was.
    """

    operands: list[list[Located]]
    results: list[list[Located]]
    group: IntArray
    is_read: BoolArray
    is_mixed: BoolArray
    treated: tuple[IntArray, ...]
    pins: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    is_sized: bool = False
    is_open: tuple[bool, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    is_random: bool = False

    @property
    def channels(self) -> IntArray:
        """The channels of the operands, ascending."""
        found = [layer.channels for layers in self.operands for layer in layers]
        every = np.unique(np.concatenate([np.zeros(1, dtype=np.int64), *found]))
        return every[every > 0]

    def signatures(self) -> dict[tuple[int, ...], list[int]]:
        """Return the channels by what they are part of: only such alike can change places."""
        channels = self.channels
        layers = [x for layers in (*self.operands, *self.results) for x in layers]
        size = len(self.group)
        every = [*(layer.channels for layer in layers), *self.treated]
        counts = [np.bincount(found, minlength=size)[channels] for found in every]
        found: dict[tuple[int, ...], list[int]] = {}
        table = np.stack([self.group[channels], *counts], 1).tolist()
        for channel, row in zip(channels.tolist(), table, strict=True):
            found.setdefault(tuple(row), []).append(channel)
        return found


@dataclass(frozen=True)
class Labelled:
    """A call that ran on labels.

    Attributes:
        space: what was said of these.
        entering, leaving: the values of operands and results.
        operations: what ran.
    """

    space: LabelSpace
    entering: Sequence[Value]
    leaving: Sequence[Value]
    operations: Sequence[Operation]


def label(call: SampleCall, way: Way, operands: Sequence[Tensor]) -> Labelled:
    """Label the operands of a call and run it on meta tensors.

    Args:
        call: the call.
        way: how each operand comes in.
        operands: the tensors that it is to be run on; their values do not matter.
    """
    metas = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in operands
    ]
    named = {f"{PARAMETER} {i}": x for i, x in enumerate(metas) if way[i] == "p"}
    space = LabelSpace()
    labeller = Labeller(named, space)
    for index, (meta, entry) in enumerate(zip(metas, way, strict=True)):
        if entry[0] == "d":
            lines = (
                (dim, space.axis(f"data {index}", dim, meta.shape[dim]))
                for dim in map(int, entry[1:])
            )
            labeller.enter_input(meta, tuple(along(line, dim, meta.shape) for dim, line in lines))
    entering = [labeller.value(meta) for meta in metas]
    with torch.no_grad(), labeller:
        result = call.on(metas)
    leaving = [labeller.value(tensor) for tensor in tensors_in(result)]
    return Labelled(space, entering, leaving, labeller.tape.operations)


def claims_of(run: Labelled) -> Claims:
    """Return what is claimed of a call that ran on labels."""
    numbers: list[int] = []

    def note(number: int) -> int:
        numbers.append(number)
        return number

    for op in run.operations:
        _exchange((op.args, op.kwargs), note)
    targets = {op.target for op in run.operations}
    empty = {target for target in targets if "empty" in target._opname}
    used = {value.index for op in run.operations for value in op.inputs}
    return replace(
        _resolved(run.space, run.entering, run.leaving),
        numbers=tuple(numbers),
        is_sized=any(map(_is_sized, targets)) or not used.issuperset(x.index for x in run.entering),
        is_open=tuple(value.positions is not None for value in run.leaving),
        shapes=tuple(value.shape for value in run.leaving),
        is_random=any(torch.Tag.nondeterministic_seeded in target.tags for target in targets)
        or (bool(empty) and all(traits_of(target).is_movement for target in targets - empty)),
    )


def _is_sized(target: OpOverload) -> bool:
    """Return whether an operator lays its operand out by sizes, which a forward may fix."""
    return traits_of(target).is_movement and "SymInt" in str(target._schema)


def _resolved(space: LabelSpace, entering: Sequence[Value], leaving: Sequence[Value]) -> Claims:
    """Return the claims of a finished run, without what is told of its operators."""
    roots = space.roots()
    is_mixed, is_read, reads = (np.zeros(len(roots), dtype=bool) for _ in range(3))
    for labels, _, _ in space.mixers:
        is_mixed[roots[labels]] = True
    group = np.zeros(len(roots), dtype=np.int64)
    for index, axis in enumerate(space.axes):
        own = slice(axis.start, axis.start + axis.size)
        if space.roles.get(index) == "reader":
            reads[own] = is_read[roots[own]] = True
        split = space.convolution_groups.get(axis.tensor, space.norm_groups.get(axis.tensor, 0))
        if split and axis.size % split == 0 and (axis.groups > 1 or axis.dim == 0):
            group[roots[own]] = np.arange(axis.size) // (axis.size // split)
    channel = _claimed(space, roots, entering, leaving, reads)
    operands, results = (
        [[_locate(layer, channel, reads) for layer in value.layers] for value in values]
        for values in (entering, leaving)
    )
    for axis in space.axes:
        if axis.groups > 1:  # the columns of each group's rows are that group's
            place, own = int(axis.tensor.split()[1]), slice(axis.start, axis.start + axis.size)
            rows, columns = entering[place].shape[:2]
            table = channel[own].reshape(axis.groups, columns).repeat(rows // axis.groups, 0)
            operands[place].append(Located((0, 1), table.ravel(), (rows, columns), is_read=True))
    return Claims(
        operands=[[x for x in layers if x.channels.any()] for layers in operands],
        results=[[x for x in layers if x.channels.any()] for layers in results],
        group=group,
        is_read=is_read,
        is_mixed=is_mixed,
        treated=tuple(
            channel[core(layer, support(layer)).numpy().ravel()] for _, layer in space.history
        ),
        pins=tuple(str(pin) for _, pin in space.pinned(roots)),
    )


def _claimed(
    space: LabelSpace,
    roots: IntArray,
    entering: Sequence[Value],
    leaving: Sequence[Value],
    reads: BoolArray,
) -> IntArray:
    """Return the channel of each label, 0 for those of which nothing is claimed.

    These are pinned, or an axis of a parameter of which no operation said anything, or what nothing
    but parameters that read it has: nobody writes it, so that there is no group to widen.
    """
    pinned, is_carried = np.zeros(len(roots), dtype=bool), np.zeros(len(roots), dtype=bool)
    for labels, _ in space.pinned(roots):
        pinned[roots[labels]] = True
    for value in (*entering, *leaving):
        for layer in value.layers:
            labels = core(layer, support(layer)).numpy().ravel()
            is_carried[roots[labels[~reads[labels]]]] = True
    is_told = roots != np.arange(len(roots))
    is_told[roots[is_told]] = True
    for value in leaving:
        for layer in value.layers:
            is_told[core(layer, support(layer)).numpy().ravel()] = True
    channel = np.where(pinned[roots] | ~is_carried[roots], 0, roots)
    for index, axis in enumerate(space.axes):
        own = slice(axis.start, axis.start + axis.size)
        if (
            index not in space.roles
            and axis.tensor.startswith(PARAMETER)
            and not is_told[own].any()
        ):
            channel[own] = 0
    channel[0] = 0
    return channel


def _locate(layer: Layer, channel: IntArray, reads: BoolArray) -> Located:
    """Return the channels of a layer."""
    dims = tuple(sorted(support(layer)))
    labels = core(layer, dims).numpy().ravel()
    is_read = bool(labels.size) and bool(reads[labels].all())
    return Located(dims, channel[labels], tuple(layer.shape[d] for d in dims), is_read)
