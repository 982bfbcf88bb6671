"""Sizes that a network's own code fixes, and the attributes they come from.

At new sizes a forward that says ``x.view(n, l, self.num_heads, 64)`` fails, or does something
else. Run in step with the old run, each call that takes sizes is given those that the labels of
its old result foretell; what had to be changed is a :class:`Repair`. Most repairs go back to an
attribute (``num_heads``, ``hidden_dim``): set to its new value, the repair is no longer needed, and
the network keeps its class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fxgrow.channels import Channels
from fxgrow.errors import PlanError
from fxgrow.labels.layers import core, cover, support
from fxgrow.labels.sizes import SIZED, SizedCall
from fxgrow.labels.tape import Value
from fxgrow.plan.schema import ModuleEdit
from fxgrow.registry import Registry

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Growth:
    """How wide the values of an old run become.

    Attributes:
        ratio: by label, the new number of channels over the old one.
        channel: by label, its channel.
    """

    ratio: npt.NDArray[np.float64]
    channel: npt.NDArray[np.int64]

    def size(self, value: Value, dim: int, stop: int | None = None) -> int:
        """Return the new size of a value along a dim, or of its first ``stop`` positions there."""
        end = value.shape[dim] if stop is None else stop
        layer = cover(value.layers, dim)
        if layer is None:
            return end
        labels = core(layer, support(layer)).numpy()
        channels = self.channel[labels]
        varying = [d for d in range(labels.ndim) if bool((channels != channels.take([0], d)).any())]
        if varying and dim != max(varying, key=lambda d: labels.shape[d]):
            return end  # a head's positions, a shuffle's groups
        inside = np.moveaxis(self.ratio[labels], dim, 0)
        return round(float(inside.reshape(inside.shape[0], -1)[:end, 0].sum()))

    def shape(self, value: Value) -> Shape:
        """Return the new shape of a value."""
        return tuple(self.size(value, dim) for dim in range(len(value.shape)))


def growth_of(now: Channels, analysed: Channels, ratio_of_channel: Sequence[float]) -> Growth:
    """Return the growth of a run's labels.

    Args:
        now: the channels of that run.
        analysed: those of the analysis, whose groups the widths are for.
        ratio_of_channel: for each channel of the analysis, new width over old.
    """
    index = {(axis.tensor, axis.dim): i for i, axis in enumerate(analysed.axes)}
    ratios = np.asarray([*ratio_of_channel, 1.0])
    by_channel = np.ones(now.count + 1)
    for axis, found in enumerate(now.axes):
        if (known := index.get((found.tensor, found.dim))) is None:
            continue
        rows = analysed.of_axis(known)
        if len(rows) == found.size:
            mine = now.of_axis(axis)
            by_channel[mine] = np.maximum(by_channel[mine], ratios[rows])
    return Growth(by_channel[now.channel_of_label], now.channel_of_label)


@dataclass(frozen=True)
class Repair:
    """Sizes in a call that were wrong at the new widths.

    Attributes:
        call: which of the run's calls it was.
        module: the module whose code made it.
        function: what it called.
        given, wanted: the sizes in its arguments, as they were and as they should be.
    """

    call: int
    module: str
    function: str
    given: Shape
    wanted: Shape


# A function of the call's arguments and the growth: the new arguments, given and wanted sizes.
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
Follow: TypeAlias = Callable[[SizedCall, Growth, Arguments], tuple[Arguments, Shape, Shape]]
_FOLLOW: Registry[Follow] = Registry("function with sizes")


@_FOLLOW.register("view", "reshape", "expand")
def _sizes(call: SizedCall, growth: Growth, given: Arguments) -> tuple[Arguments, Shape, Shape]:
    """Sizes for all dims, one by one or as a sequence."""
    (tensor, *rest), kwargs = given
    named = next((kwargs[key] for key in ("size", "shape") if key in kwargs), None)
    sizes = named if named is not None else rest[0] if _is_sequence(rest) else rest
    if not all(isinstance(size, int) for size in sizes):
        return given, (), ()  # a view as another dtype
    right = growth.shape(call.outputs[0])
    wanted = tuple(old if old == -1 else new for old, new in zip(sizes, right, strict=True))
    others = {key: item for key, item in kwargs.items() if key not in ("size", "shape")}
    return ((tensor, wanted), others), tuple(sizes), wanted


def _is_sequence(rest: Sequence[object]) -> bool:
    return len(rest) == 1 and isinstance(rest[0], (tuple, list))


@_FOLLOW.register("unflatten")
def _unflatten(call: SizedCall, growth: Growth, given: Arguments) -> tuple[Arguments, Shape, Shape]:
    """Sizes for the dims that one dim becomes."""
    (tensor, dim, sizes), kwargs = _positional(given, "dim", "sizes")
    first = dim % tensor.ndim
    right = growth.shape(call.outputs[0])[first : first + len(sizes)]
    wanted = tuple(old if old == -1 else new for old, new in zip(sizes, right, strict=True))
    return ((tensor, dim, wanted), kwargs), tuple(sizes), wanted


@_FOLLOW.register("split", "split_with_sizes")
def _split(call: SizedCall, growth: Growth, given: Arguments) -> tuple[Arguments, Shape, Shape]:
    """The size of each part, or of all but the last."""
    names = ("split_sizes", "dim") if call.function == "split_with_sizes" else ("split_size", "dim")
    if "split_size_or_sections" in given[1]:
        names = ("split_size_or_sections", "dim")
    (tensor, sizes, *rest), kwargs = _positional(given, *names)
    dim = rest[0] if rest else 0
    right = tuple(growth.size(part, dim % tensor.ndim) for part in call.outputs)
    if isinstance(sizes, int):
        return ((tensor, right[0], dim), kwargs), (sizes,), right[:1]
    return ((tensor, list(right), dim), kwargs), tuple(sizes), right


@_FOLLOW.register("narrow")
def _narrow(call: SizedCall, growth: Growth, given: Arguments) -> tuple[Arguments, Shape, Shape]:
    """Where a part begins, and its size."""
    (tensor, dim, start, length), kwargs = _positional(given, "dim", "start", "length")
    (old, _, old_start, old_length), _ = _positional(
        (call.args, call.kwargs), "dim", "start", "length"
    )
    axis = dim % tensor.ndim
    begin = growth.size(old, axis, old_start)
    wanted = (begin, growth.size(old, axis, old_start + old_length) - begin)
    return ((tensor, dim, *wanted), kwargs), (start, length), wanted


@_FOLLOW.register("__getitem__")
def _getitem(call: SizedCall, growth: Growth, given: Arguments) -> tuple[Arguments, Shape, Shape]:
    """Where slices begin and end."""
    (tensor, index), kwargs = given
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, (Tensor, list)) for part in parts):
        return given, (), ()
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    old, index = call.args
    olds = index if isinstance(index, tuple) else (index,)
    before: list[int] = []
    after: list[int] = []
    dim = 0
    for place, (part, was) in enumerate(zip(parts, olds, strict=True)):
        if part is Ellipsis:
            dim += len(old.shape) - taken
        elif part is not None:
            if isinstance(part, slice) and part.step in (None, 1):
                ends = [_bound(growth, old, dim, end) for end in (was.start, was.stop)]
                before += [end for end in (part.start, part.stop) if isinstance(end, int)]
                after += [end for end in ends if isinstance(end, int)]
                parts[place] = slice(*ends)
            dim += 1
    return ((tensor, tuple(parts)), kwargs), tuple(before), tuple(after)


def _bound(growth: Growth, value: Value, dim: int, end: int | None) -> int | None:
    """Return a slice's new bound; a negative one is counted from the end."""
    size = value.shape[dim]
    if not isinstance(end, int) or abs(end) > size:
        return end
    if end < 0:
        return growth.size(value, dim, size + end) - growth.size(value, dim)
    return growth.size(value, dim, end)


@_FOLLOW.register("layer_norm", "rms_norm")
def _normalized(
    call: SizedCall, growth: Growth, given: Arguments
) -> tuple[Arguments, Shape, Shape]:
    """The sizes of the last dims."""
    (tensor, sizes, *rest), kwargs = _positional(given, "normalized_shape")
    wanted = growth.shape(call.inputs[0])[-len(sizes) :]
    return ((tensor, list(wanted), *rest), kwargs), tuple(sizes), wanted


def _positional(given: Arguments, *names: str) -> Arguments:
    """Return the arguments with the named ones made positional, in this order."""
    args, kwargs = given
    more = tuple(kwargs[name] for name in names[len(args) - 1 :] if name in kwargs)
    return (*args, *more), {key: item for key, item in kwargs.items() if key not in names}


class Repairer(TorchFunctionMode):
    """Gives every call that takes sizes the right ones, in step with an old run.

    Args:
        calls: of the old run.
        growth: of its values.
        place: returns the module that is running.
    """

    def __init__(
        self, calls: Sequence[SizedCall], growth: Growth, place: Callable[[], str]
    ) -> None:
        super().__init__()
        self.repairs: list[Repair] = []
        self._calls = iter(enumerate(calls))
        self._growth = growth
        self._place = place

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call with the sizes it should have."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in SIZED:
            return func(*args, **kwargs)
        index, call = next(self._calls, (0, None))
        if call is None or call.function != name:
            raise PlanError("the network computes in another order at its new sizes")
        with _disable_current_modes():  # labels are no data of the run
            (args, kwargs), given, wanted = _FOLLOW[name](call, self._growth, (args, kwargs))
        if given != wanted:
            self.repairs.append(Repair(index, self._place(), name, given, wanted))
        return func(*args, **kwargs)


Candidate: TypeAlias = tuple[str, str]  # class, attribute


def candidates(
    model: nn.Module, repair: Repair, without: set[Candidate]
) -> Iterator[tuple[Candidate, ModuleEdit]]:
    """Yield attributes that a wrong size may come from, the most likely first.

    The modules that were running are asked from the innermost outwards: for an attribute that is
    the size itself, then for one of which it is a small multiple.
    """
    names = repair.module.split(".") if repair.module else []
    owners = [".".join(names[:depth]) for depth in range(len(names), -1, -1)]
    for multiple in (1, 2, 3, 4):
        for given, wanted in zip(repair.given, repair.wanted, strict=True):
            if wanted <= given or given % multiple or wanted % multiple:
                continue
            for owner in owners:
                module = model.get_submodule(owner)
                for attribute, before in _sizes_of(module):
                    key = (type(module).__qualname__, attribute)
                    after = _replaced(before, given // multiple, wanted // multiple)
                    if after != before and key not in without:
                        yield key, ModuleEdit(owner, attribute, before, after)


def _sizes_of(module: nn.Module) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """Yield the attributes of a module that are integers or tuples of them."""
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int):
            yield name, value
        elif isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
            yield name, tuple(value)


def _replaced(value: int | tuple[int, ...], given: int, wanted: int) -> int | tuple[int, ...]:
    if isinstance(value, int):
        return wanted if value == given else value
    return tuple(wanted if item == given else item for item in value)


@dataclass
class Guess:
    """Attributes of one name and class, set because of some calls.

    Attributes:
        edits: the attributes.
        calls: the calls whose sizes they may explain.
    """

    edits: list[ModuleEdit] = field(default_factory=list)
    calls: set[int] = field(default_factory=set)


def guesses(
    model: nn.Module,
    repairs: Sequence[Repair],
    without: set[Candidate],
    present: Mapping[Candidate, Guess],
) -> dict[Candidate, Guess]:
    """Return one guess for each repair: of several, the one that most repairs have in common.

    Args:
        model: the network.
        repairs: what is to be explained.
        without: attributes that did not help.
        present: what is set already.
    """
    offers = [
        (repair, [
            (key, edit)
            for key, edit in candidates(model, repair, without)
            if key not in present or edit not in present[key].edits
        ])
        for repair in repairs
    ]  # fmt: skip
    votes = Counter(key for _, offer in offers for key in dict.fromkeys(key for key, _ in offer))
    found: dict[Candidate, Guess] = {}
    for repair, offer in offers:
        if offer:
            best = max((key for key, _ in offer), key=votes.__getitem__)
            guess = found.setdefault(best, Guess())
            guess.calls.add(repair.call)
            edit = next(edit for key, edit in offer if key == best)
            if edit not in guess.edits:
                guess.edits.append(edit)
    return found
