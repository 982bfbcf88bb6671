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
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fxgrow.channels.channels import Channels
from fxgrow.errors import PlanError
from fxgrow.labels.layers import core, cover, support
from fxgrow.labels.propagate import Place
from fxgrow.labels.sizes import SIZED, SizedCall, function_name, map_sizes, sizes_in
from fxgrow.labels.tape import Value
from fxgrow.plan.edits import ModuleEdit
from fxgrow.registry import Registry

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Growth:
    """How wide the values of an old run become.

    Attributes:
        ratio: by label, the new number of channels over the old one.
        channel: by label, its channel.
        norm_groups: new number of groups of each group norm that gets new ones, by its weight.
    """

    ratio: npt.NDArray[np.float64]
    channel: npt.NDArray[np.int64]
    norm_groups: Mapping[str, int] = field(default_factory=dict)

    def size(self, value: Value, dim: int, stop: int | None = None) -> int:
        """Return the new size of a value along a dim, or of its first ``stop`` positions there."""
        end = value.shape[dim] if stop is None else stop
        met = tuple(value.taken[:1])  # tells what padding stands for, too
        layer = cover(met if value.is_padded and met else value.layers or met, dim)
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


def growth_of(
    now: Channels,
    analysed: Channels,
    ratio_of_channel: Sequence[float],
    norm_groups: Mapping[str, int],
) -> Growth:
    """Return the growth of a run's labels.

    Args:
        now: the channels of that run.
        analysed: those of the analysis, whose groups the widths are for.
        ratio_of_channel: for each channel of the analysis, new width over old.
        norm_groups: new number of groups of each group norm that gets new ones, by its weight.
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
    return Growth(by_channel[now.channel_of_label], now.channel_of_label, norm_groups)


@dataclass(frozen=True)
class Repair:
    """Sizes in a call that were wrong at the new widths.

    Attributes:
        call: which of the run's calls it was.
        node, module: the fx node and the module that made it.
        function: what it called.
        given, wanted: the sizes in its arguments, as they were and as they should be; None
            where a slice has no bound.
    """

    call: int
    node: str
    module: str
    function: str
    given: tuple[int | None, ...]
    wanted: tuple[int | None, ...]


# A function of an old call and the growth: the sizes that its arguments should hold, in order.
Sizes: TypeAlias = "tuple[int | None, ...]"
Wanted: TypeAlias = Callable[[SizedCall, Growth], Sizes]
WANTED: Registry[Wanted] = Registry("function with sizes")


@WANTED.register("view", "reshape", "expand")
@WANTED.register("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
def _shape(call: SizedCall, growth: Growth) -> Sizes:
    """Sizes for all dims; those of a constant are told by what it is combined with."""
    return growth.shape(call.outputs[0])


@WANTED.register("unflatten")
def _unflattened(call: SizedCall, growth: Growth) -> Sizes:
    """Sizes for the dims that one dim becomes."""
    first = call.argument(1, "dim") % len(call.inputs[0].shape)
    return growth.shape(call.outputs[0])[first : first + len(call.argument(2, "sizes"))]


@WANTED.register("split", "split_with_sizes")
def _parts(call: SizedCall, growth: Growth) -> Sizes:
    """The size of each part; where one size serves for all, that of the first."""
    dim = call.argument(2, "dim", 0) % len(call.inputs[0].shape)
    one_for_all = len(call.sizes) == 1
    return tuple(growth.size(part, dim) for part in call.outputs[: 1 if one_for_all else None])


@WANTED.register("narrow")
def _part(call: SizedCall, growth: Growth) -> Sizes:
    """Where a part begins, and its size."""
    value = call.inputs[0]
    dim = call.argument(1, "dim") % len(value.shape)
    start, length = call.argument(2, "start"), call.argument(3, "length")
    begin = growth.size(value, dim, start)
    return begin, growth.size(value, dim, start + length) - begin


@WANTED.register("pad")
def _padding(call: SizedCall, growth: Growth) -> Sizes:
    """How much is put before and after each dim, from the last one on."""
    value, amounts = call.outputs[0], call.sizes
    wanted: list[int | None] = []
    for index in range(0, len(amounts), 2):
        dim = len(value.shape) - 1 - index // 2
        before, after = amounts[index : index + 2]
        inner = growth.size(value, dim, value.shape[dim] - after)
        wanted += [growth.size(value, dim, before), growth.size(value, dim) - inner]
    return tuple(wanted)


@WANTED.register("__getitem__")
def _slices(call: SizedCall, growth: Growth) -> Sizes:
    """Where slices begin and end."""
    value, index = call.args
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    bounds: list[int | None] = []
    dim = 0
    for part in parts:
        if part is Ellipsis:
            dim += len(value.shape) - taken
        elif part is not None:
            if isinstance(part, slice):
                bounds += [_bound(growth, value, dim, end) for end in (part.start, part.stop)]
            dim += 1
    return tuple(bounds)


def _bound(growth: Growth, value: Value, dim: int, end: int | None) -> int | None:
    """Return a slice's new bound; a negative one is counted from the end."""
    size = value.shape[dim]
    if not isinstance(end, int) or abs(end) > size:
        return end
    if end < 0:
        return growth.size(value, dim, size + end) - growth.size(value, dim)
    return growth.size(value, dim, end)


@WANTED.register("layer_norm", "rms_norm")
def _normalized(call: SizedCall, growth: Growth) -> Sizes:
    """The sizes of the last dims."""
    count = len(call.argument(1, "normalized_shape"))
    return growth.shape(call.inputs[0])[-count:]


@WANTED.register("group_norm")
def _groups(call: SizedCall, growth: Growth) -> Sizes:
    """The number of groups."""
    weight = call.argument(2, "weight")
    name = weight.parameter if isinstance(weight, Value) else ""
    return (growth.norm_groups.get(name, call.argument(1, "num_groups")),)


class Repairer(TorchFunctionMode):
    """Gives every call that takes sizes the right ones, in step with an old run.

    Args:
        calls: of the old run.
        growth: of its values.
        place: returns the fx node and the module that are running.
    """

    def __init__(
        self, calls: Sequence[SizedCall], growth: Growth, place: Callable[[], Place]
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
        name = function_name(func)
        if name not in SIZED:
            return func(*args, **kwargs)
        index, call = next(self._calls, (0, None))
        given = sizes_in(name, args, kwargs)
        if call is None or call.function != name or len(given) != len(call.sizes):
            raise PlanError("the network computes in another order at its new sizes")
        if all(isinstance(size, int) or size is None for size in given):
            with _disable_current_modes():  # labels are no data of the run
                right = WANTED[name](call, self._growth)
            wanted = tuple(
                old if old in (-1, None) else new for old, new in zip(given, right, strict=True)
            )
            if tuple(given) != wanted:
                node, module = self._place()
                self.repairs.append(Repair(index, node, module, name, tuple(given), wanted))
                sizes = iter(wanted)
                args, kwargs = map_sizes(name, args, kwargs, lambda _: next(sizes))
        return func(*args, **kwargs)


Candidate: TypeAlias = tuple[str, str]  # class, attribute


def candidates(
    model: nn.Module, repair: Repair, without: set[Candidate]
) -> Iterator[tuple[Candidate, ModuleEdit]]:
    """Yield attributes that a wrong size may come from, the most likely first.

    The modules that were running are asked from the innermost outwards, then the innermost one's
    children, whose methods it may have called: for an attribute that is all the sizes, for one that
    is a size, then for one of which a size is a small multiple; their own attributes first, then
    those of objects that they hold (``self.config``).
    """
    names = repair.module.split(".") if repair.module else []
    owners = [".".join(names[:depth]) for depth in range(len(names), -1, -1)]
    inner = model.get_submodule(repair.module)
    owners += [".".join((*names, child)) for child, _ in inner.named_children()]
    after_all = tuple(size for size in repair.wanted if size is not None)
    for owner in owners:
        module = model.get_submodule(owner)
        for attribute, before in _sizes_of(module):
            key = (type(module).__qualname__, attribute)
            if before == repair.given and key not in without:
                yield key, ModuleEdit(owner, attribute, before, after_all)
    for multiple in (1, 2, 3, 4):
        for given, wanted in zip(repair.given, repair.wanted, strict=True):
            if given is None or wanted is None or wanted <= given:
                continue
            if given % multiple or wanted % multiple:
                continue
            for owner, (path, holder) in _holders(model, owners):
                for attribute, before in _sizes_of(holder):
                    key = (type(holder).__qualname__, attribute)
                    after = _replaced(before, given // multiple, wanted // multiple)
                    if after != before and key not in without:
                        yield key, ModuleEdit(owner, path + attribute, before, after)


def _holders(model: nn.Module, owners: Sequence[str]) -> Iterator[tuple[str, tuple[str, object]]]:
    """Yield modules, then what they hold, each with its owner and its path from there."""
    modules = [(owner, model.get_submodule(owner)) for owner in owners]
    yield from ((owner, ("", module)) for owner, module in modules)
    for owner, module in modules:
        for name, held in vars(module).items():
            if not name.startswith("_") and hasattr(held, "__dict__") and not callable(held):
                yield owner, (f"{name}.", held)


def _sizes_of(holder: object) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """Yield the attributes of an object that are integers or tuples of them."""
    for name, value in vars(holder).items():
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
            if key not in present or not ("." in edit.attribute or edit in present[key].edits)
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
