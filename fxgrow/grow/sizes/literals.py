"""Sizes that a network's own code fixes.

At new sizes a forward that says ``x.view(n, l, self.num_heads, 64)`` fails, or does something
else. Run in step with the old run, each call that takes sizes is given those that the labels of
its old result foretell; what had to be changed is a :class:`Repair`. Most repairs go back to an
attribute (``num_heads``, ``hidden_dim``): set to its new value, the repair is no longer needed, and
the network keeps its class (:mod:`fxgrow.grow.sizes.guesses`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fxgrow.channels.channels import Channels
from fxgrow.errors import TraceError
from fxgrow.grow.sizes.growth import Expansion
from fxgrow.labels.forest import IntArray
from fxgrow.labels.in_code import line_of_call
from fxgrow.labels.layers import core, cover, support
from fxgrow.labels.propagate import Place
from fxgrow.labels.sizes import SIZED, SizedCall, function_name, map_sizes, sizes_in
from fxgrow.labels.tape import Value
from fxgrow.registry import Registry

Count: TypeAlias = Fraction | int
Shape: TypeAlias = tuple[Count, ...]


@dataclass(frozen=True)
class NewShapes:
    """The shapes that the values of an old run get.

    Attributes:
        growth: of the channels of that run.
        channels: of that run.
        norm_groups: new number of groups of each group norm that gets new ones, by its weight.
    """

    growth: Expansion
    channels: Channels
    norm_groups: Mapping[str, int]

    def size(self, value: Value, dim: int, stop: int | None = None) -> Count:
        """Return the new size of a value along a dim, or of its first ``stop`` positions there."""
        end = value.shape[dim] if stop is None else stop
        met = tuple(value.taken[:1])  # tells what padding stands for, too
        layer = cover(met if value.is_padded and met else value.layers or met, dim)
        if layer is not None:
            channels = self.channels.channel_of_label[core(layer, support(layer)).numpy()]
        elif (made := cover(value.made, dim)) is not None:
            channels = self._met[core(made, support(made)).numpy()]
        else:
            return end
        if not self.growth.grows(channels):
            return end
        varying = [d for d in range(channels.ndim) if (channels != channels.take([0], d)).any()]
        if varying and dim != max(varying, key=lambda d: channels.shape[d]):
            return end  # a head's positions, a shuffle's groups
        inside = np.moveaxis(channels, dim, 0)
        return self.growth.positions(inside.reshape(inside.shape[0], -1)[:end, 0])

    def has_met(self, value: Value, dim: int) -> bool:
        """Return whether a constant lies where channels do, along a dim."""
        layer = cover(value.made, dim)
        return layer is None or bool((self._met[core(layer, support(layer)).numpy()] >= 0).any())

    @cached_property
    def _met(self) -> IntArray:
        """The channel that lies where each numbered position of a constant does, -1 if none does.

        Of several, one that grows.
        """
        found = np.full(self.channels.numbered + 1, -1, dtype=np.int64)
        for numbers, channels in self.channels.met:
            better = (found[numbers] < 0) | (self.growth.parts[channels] > self.growth.whole)
            found[numbers[better]] = channels[better]
        return found

    def shape(self, value: Value) -> Shape:
        """Return the new shape of a value."""
        return tuple(self.size(value, dim) for dim in range(len(value.shape)))


@dataclass(frozen=True)
class Repair:
    """Sizes in a call that were wrong at the new widths.

    Attributes:
        call: which of the run's calls it was; -1 for code that compares sizes and stops the run.
        node, module: the fx node and the module that made it.
        function: what it called; "" if nothing.
        given, wanted: the sizes in its arguments, as they were and as they should be; None
            where a slice has no bound.
    """

    call: int
    node: str
    module: str
    function: str
    given: tuple[int | None, ...]
    wanted: tuple[int | None, ...]


class CallSite(NamedTuple):
    """Where a call was made.

    Attributes:
        module: the module that was running.
        at: the line of code (:class:`fxgrow.labels.in_code.Line`).
        call: which call of that line it was.
    """

    module: str
    at: str
    call: str


# A function of an old call and the new shapes: the sizes that its arguments should hold, in order;
# what is no whole number cannot be told beforehand.
Sizes: TypeAlias = tuple[Count | None, ...]
Wanted: TypeAlias = Callable[[SizedCall, NewShapes], Sizes]
WANTED: Registry[Wanted] = Registry("function with sizes")


@WANTED.register("view", "reshape", "expand")
def _shape(call: SizedCall, new: NewShapes) -> Sizes:
    """Sizes for all dims."""
    return new.shape(call.outputs[0])


@WANTED.register("repeat")
def _times(call: SizedCall, new: NewShapes) -> Sizes:
    """How often the tensor is there along each dim; where neither grows, what the code says."""
    x, out = call.inputs[0], call.outputs[0]
    added = len(out.shape) - len(x.shape)
    wanted: list[Count | None] = []
    for dim in range(len(call.sizes)):
        size, before = (new.size(x, dim - added), x.shape[dim - added]) if dim >= added else (1, 1)
        after = new.size(out, dim)
        known = size and (size, after) != (before, out.shape[dim])
        wanted.append(Fraction(after) / size if known else None)
    return tuple(wanted)


@WANTED.register("repeat_interleave")
def _times_each(call: SizedCall, new: NewShapes) -> Sizes:
    """How often each position is there; where neither grows, what the code says."""
    x, out = call.inputs[0], call.outputs[0]
    dim = call.argument(2, "dim")
    if dim is None or not isinstance(call.sizes[0], int) or not x.shape[dim]:
        return (None,) * len(call.sizes)  # they are data, or positions of all dims
    dim %= len(x.shape)
    size, after = new.size(x, dim), new.size(out, dim)
    if not size or (size, after) == (x.shape[dim], out.shape[dim]):
        return (None,)  # one head of keys is repeated for as many queries as there are
    return (Fraction(after) / size,)


@WANTED.register("zeros", "ones", "full", "empty")
@WANTED.register("new", "new_zeros", "new_ones", "new_full", "new_empty")
def _made(call: SizedCall, new: NewShapes) -> Sizes:
    """Sizes for all dims, told by what the constant meets; where it meets nothing, any will do."""
    value = call.outputs[0]
    if len(call.sizes) != len(value.shape):  # data, not sizes
        return tuple(call.sizes)
    return tuple(
        new.size(value, dim) if new.has_met(value, dim) else None for dim in range(len(value.shape))
    )


@WANTED.register("unflatten")
def _unflattened(call: SizedCall, new: NewShapes) -> Sizes:
    """Sizes for the dims that one dim becomes."""
    first = call.argument(1, "dim") % len(call.inputs[0].shape)
    return new.shape(call.outputs[0])[first : first + len(call.argument(2, "sizes"))]


@WANTED.register("split", "split_with_sizes")
def _parts(call: SizedCall, new: NewShapes) -> Sizes:
    """The size of each part; where one size serves for all, that of the first."""
    dim = call.argument(2, "dim", 0) % len(call.inputs[0].shape)
    one_for_all = len(call.sizes) == 1
    return tuple(new.size(part, dim) for part in call.outputs[: 1 if one_for_all else None])


@WANTED.register("narrow")
def _part(call: SizedCall, new: NewShapes) -> Sizes:
    """Where a part begins, and its size."""
    value = call.inputs[0]
    dim = call.argument(1, "dim") % len(value.shape)
    start, length = call.argument(2, "start"), call.argument(3, "length")
    begin = new.size(value, dim, start)
    return begin, new.size(value, dim, start + length) - begin


@WANTED.register("pad")
def _padding(call: SizedCall, new: NewShapes) -> Sizes:
    """How much is put before and after each dim, from the last one on; it need not be in ratio."""
    value, amounts = call.outputs[0], call.sizes
    wanted: list[Count | None] = []
    for index in range(0, len(amounts), 2):
        dim = len(value.shape) - 1 - index // 2
        before, after = amounts[index : index + 2]
        inner = round(new.size(value, dim, value.shape[dim] - after))
        wanted += [round(new.size(value, dim, before)), new.size(value, dim) - inner]
    return tuple(wanted)


@WANTED.register("__getitem__")
def _slices(call: SizedCall, new: NewShapes) -> Sizes:
    """Where slices begin and end."""
    value, index = call.args
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    bounds: list[Count | None] = []
    dim = 0
    for part in parts:
        if part is Ellipsis:
            dim += len(value.shape) - taken
        elif part is not None:
            if isinstance(part, slice):
                bounds += [_bound(new, value, dim, end) for end in (part.start, part.stop)]
            dim += 1
    return tuple(bounds)


def _bound(new: NewShapes, value: Value, dim: int, end: int | None) -> Count | None:
    """Return a slice's new bound; a negative one is counted from the end."""
    size = value.shape[dim]
    if not isinstance(end, int) or abs(end) > size:
        return end
    if end < 0:
        return new.size(value, dim, size + end) - new.size(value, dim)
    return new.size(value, dim, end)


@WANTED.register("layer_norm", "rms_norm")
def _normalized(call: SizedCall, new: NewShapes) -> Sizes:
    """The sizes of the last dims."""
    count = len(call.argument(1, "normalized_shape"))
    return new.shape(call.inputs[0])[-count:]


@WANTED.register("group_norm")
def _groups(call: SizedCall, new: NewShapes) -> Sizes:
    """The number of groups."""
    weight = call.argument(2, "weight")
    name = weight.parameter if isinstance(weight, Value) else ""
    return (new.norm_groups.get(name, call.argument(1, "num_groups")),)


class Repairer(TorchFunctionMode):
    """Gives every call that takes sizes the right ones, in step with an old run.

    Args:
        calls: of the old run.
        before: number of calls in runs before that one.
        shapes: what its values become.
        place: returns the fx node and the module that are running.
        stops: whether the run is to end with a repair.

    Attributes:
        repairs: what was repaired.
        is_stopped: whether the run ended with a repair.
        sites: where each call was made.
    """

    def __init__(
        self,
        calls: Sequence[SizedCall],
        before: int,
        shapes: NewShapes,
        place: Callable[[], Place],
        stops: Callable[[Repair], bool],
    ) -> None:
        super().__init__()
        self.repairs: list[Repair] = []
        self.is_stopped = False
        self.sites: list[CallSite] = []
        self._calls = iter(enumerate(calls, before))
        self._shapes = shapes
        self._place = place
        self._stops = stops

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call with the sizes it should have."""
        kwargs = kwargs or {}
        name = function_name(func)
        if name not in SIZED:
            return func(*args, **kwargs)
        index, call = next(self._calls, (0, None))
        line = line_of_call(name)
        told = (line.at, line.call) if line else ("", "")
        self.sites.append(CallSite(self._place()[1], *told))
        given = sizes_in(name, args, kwargs)
        if call is None or call.function != name or len(given) != len(call.sizes):
            raise TraceError("the network computes in another order at its new sizes")
        if all(isinstance(size, int) or size is None for size in given):
            with _disable_current_modes():  # labels are no data of the run
                right = WANTED[name](call, self._shapes)
            wanted = [_told(old, new) for old, new in zip(given, right, strict=True)]
            if given != wanted:
                self._note(Repair(index, *self._place(), name, tuple(given), tuple(wanted)))
                sizes = iter(wanted)
                args, kwargs = map_sizes(name, args, kwargs, lambda _: next(sizes))
        return func(*args, **kwargs)

    def _note(self, repair: Repair) -> None:
        """Keep a repair.

        Raises:
            TraceError: the run is to end with it.
        """
        self.repairs.append(repair)
        if self._stops(repair):
            self.is_stopped = True
            raise TraceError(f"{repair.function} needs other sizes", name=repair.module)


def _told(old: int | None, new: Count | None) -> int | None:
    """Return a size as it should be; none is told by a -1, nor by what is no whole number."""
    return old if old in (-1, None) or new is None or new.denominator > 1 else int(new)
