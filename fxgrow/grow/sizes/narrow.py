"""Groups of no channel or of one: found where the network runs with more of them.

An axis of one entry cannot be told from one that is broadcast, nor that of an empty layer from
nothing. So the stand-in gets another width there, one that no other size of it has, and runs. What
reads the channels fails at first; the tensors of the call that fails are given the size that comes
in, and so on until the network runs as before. What is broadcast then fails too, or meets what has
not grown, and stays. The channels are those of the run at that width, without the ones that the
network does not have (:mod:`fxgrow.channels.present`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fxgrow.channels.analysis import Analysis, analyse_resized
from fxgrow.channels.groups import ChannelGroup, group_of_channel
from fxgrow.errors import PlanError, TraceError
from fxgrow.grow.sizes.attributes import attribute_edits
from fxgrow.grow.sizes.single import Single, Uses, free_width, kind_of, single_layers
from fxgrow.grow.sizes.swapped import resized
from fxgrow.labels.operators import place_of, traits_of
from fxgrow.labels.pins import Pin, PinKind
from fxgrow.labels.tape import Tape, Value
from fxgrow.modules.calling import tensors_in
from fxgrow.modules.stopped import stopped_at
from fxgrow.modules.tensors import named_tensors

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = dict[str, Shape]
_ROUNDS = 64  # of calls that fail one after another; each costs runs on meta tensors


def at_other_widths(plain: Analysis, leaving: Collection[str] = ()) -> Analysis:
    """Return what is known of a network with its groups of no channel and of one besides.

    Args:
        plain: what is known without.
        leaving: layers that are not asked for.

    Returns:
        The same if there is none, else an analysis at other widths of these. Those that stay are
        pinned, with the reason.
    """
    flow = Uses(plain.tape)
    found = [x for x in single_layers(plain.tape, flow) if x.layer not in leaving]
    if not found:
        return plain
    named = {group.name for group in plain.groups}
    found = [x for x in found if x.layer not in named]
    pins = {x.layer: x.pin for x in found if x.pin is not None}
    open_ones = [x for x in found if x.pin is None]
    analysis, pinned = _followed(plain, flow, open_ones)
    pins |= pinned
    widths = {x.layer: x.width for x in found}
    lone = [_pinned(name, width, pins[name]) for name, width in widths.items() if name in pins]
    return replace(analysis, groups=(*analysis.groups, *lone)) if lone else analysis


def _followed(
    plain: Analysis, flow: Uses, some: Sequence[Single]
) -> tuple[Analysis, dict[str, Pin]]:
    """Return what is known with some layers at another width, and why others of them stay."""
    pinned: dict[str, Pin] = {}
    while some:
        search = _Search(plain, flow, {x.operation: x for x in some})
        pinned |= search.find()
        joined = [x for x in some if x.layer not in pinned]
        if not joined:
            break
        with search.at(search.shapes):
            analysis = analyse_resized(plain.traced, plain)
        groups, fixed = _own_groups(analysis, joined, search)
        if not fixed:
            return replace(analysis, groups=groups), pinned
        pinned |= fixed
        some = [x for x in joined if x.layer not in fixed]
    return plain, pinned


def _pinned(name: str, width: int, pin: Pin) -> ChannelGroup:
    """Return a group of no channel that is known, which stays as it is."""
    none = np.zeros(0, dtype=np.int64)
    return ChannelGroup(name, width, "pinned", pin, (name,), (), (), none, none, ())


def _own_groups(
    analysis: Analysis, some: Sequence[Single], search: _Search
) -> tuple[tuple[ChannelGroup, ...], dict[str, Pin]]:
    """Return all groups with their own widths, and why those of some layers stay as they are."""
    channels, groups = analysis.channels, list(analysis.groups)
    group_of = group_of_channel(channels, groups)
    places = {(axis.tensor, axis.dim): index for index, axis in enumerate(channels.axes)}
    fixed: dict[str, Pin] = {}
    for single in some:
        axis = places.get((single.weight, single.dim))
        owners = [-1] if axis is None else np.unique(group_of[channels.of_axis(axis)]).tolist()
        group = groups[owners[0]] if owners[0] >= 0 else None
        if len(owners) > 1 or group is None or not _is_whole(group, single, search.width):
            fixed[single.layer] = _cannot("its channels are written by what has more of them")
        elif group.pin is not None:
            fixed[single.layer] = group.pin
        elif analysis.mixers_of(group):
            place = analysis.mixers_of(group)[0]
            fixed[single.layer] = _cannot("a norm over all of them makes it a constant", place)
        else:
            groups[owners[0]] = replace(group, width=single.width, followed_at=search.width)
    if not fixed and _others(analysis, groups, search.shapes):
        fixed |= {x.layer: _cannot("layers that write other channels would follow") for x in some}
    return tuple(groups), fixed


def _is_whole(group: ChannelGroup, single: Single, width: int) -> bool:
    """Return whether the channels of a layer at a trial width are all of a group.

    Where it has none, each may be several of its rows, as of a GLU; one cannot be cut.
    """
    return width in (len(group.channels), 0 if single.width else group.width)


def _others(analysis: Analysis, groups: Sequence[ChannelGroup], shapes: Shapes) -> bool:
    """Return whether rows of another number belong to groups that are at their own widths."""
    tensors, group_of = (
        named_tensors(analysis.traced.standin), group_of_channel(analysis.channels, groups),
    )  # fmt: skip
    for index, (axis, role) in enumerate(
        zip(analysis.channels.axes, analysis.channels.roles, strict=True)
    ):
        if role != "writer" or axis.tensor not in shapes:
            continue
        if tensors[axis.tensor].shape[axis.dim] != shapes[axis.tensor][axis.dim]:
            owners = np.unique(group_of[analysis.channels.of_axis(index)]).tolist()
            if any(owner < 0 or groups[owner].followed_at is None for owner in owners):
                return True
    return False


def _cannot(why: str, place: str = "") -> Pin:
    return Pin(PinKind.SINGLE, place, (why,))


class _Failed(NamedTuple):
    """A call that failed.

    Attributes:
        calls: how many went well before it.
        reason: what it said.
        sizes: those of the activations that it took.
        weights: the shapes of the parameters and buffers that it took, by name.
    """

    calls: int
    reason: str
    sizes: tuple[int, ...] = ()
    weights: tuple[tuple[str, Shape], ...] = ()


class _Watch(TorchFunctionMode):
    """Counts the calls of a run, and knows the one that fails."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self.calls = 0
        self.failed: tuple[tuple[int, ...], tuple[tuple[str, Shape], ...]] = ((), ())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call."""
        try:
            result = func(*args, **(kwargs or {}))
        except Exception:
            with _disable_current_modes():
                self.failed = self._told([*tensors_in((args, kwargs or {}))])
            raise
        self.calls += 1
        return result

    def _told(
        self, tensors: Sequence[Tensor]
    ) -> tuple[tuple[int, ...], tuple[tuple[str, Shape], ...]]:
        sizes: dict[int, None] = {}
        weights: dict[str, Shape] = {}
        for tensor in tensors:
            owner = tensor if tensor._base is None else tensor._base
            name = self._names.get(id(owner), "")
            if name:
                weights[name] = tuple(owner.shape)
            else:
                sizes |= dict.fromkeys(tensor.shape)
        return tuple(sizes), tuple(weights.items())


@dataclass
class _Search:
    """Looks for the sizes of all other tensors where layers have another width.

    Attributes:
        plain: what is known of the network at its own widths.
        flow: what becomes of its values.
        some: the layers, by the operation that they write by.
        shapes: the new shapes so far of what has others.
    """

    plain: Analysis
    flow: Uses
    some: dict[int, Single]
    shapes: Shapes = field(default_factory=dict)

    def __post_init__(self) -> None:
        tape = self.plain.tape
        self._sizes = {size for value in tape.values for size in value.shape}
        self._sizes |= {n for t in self._tensors.values() for n in t.shape}
        self.width = free_width(self._sizes, parted=any(not x.width for x in self.some.values()))
        self._tape: Tape | None = None

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return named_tensors(self.plain.traced.standin)

    def find(self) -> dict[str, Pin]:
        """Find sizes at which the network runs; return why layers stay that it does not run with.

        Layers whose channels are added up go together.
        """
        pinned: dict[str, Pin] = {}
        done: set[int] = set()
        failed: dict[str, list[Pin]] = {}  # by the names of layers, alike but for numbers
        kinds: dict[str, list[int]] = {}
        for operation, single in self.some.items():
            kinds.setdefault(re.sub(r"\d+", "#", single.layer), []).append(operation)
        for kind, operations in kinds.items():
            for operation in dict.fromkeys((operations[0], operations[-1], *operations)):
                known = failed.setdefault(kind, [])
                if operation in done:
                    continue
                members = {operation: self.some[operation]}
                # If neither the first nor the last of a kind can, nor can those between.
                found = known[0] if len(known) > 1 else self._with(members)
                if isinstance(found, Pin):
                    known.append(found)
                    pinned |= {x.layer: found for op, x in members.items() if op not in done}
                else:
                    self.shapes = found
                done |= members.keys()
        return pinned

    def at(self, shapes: Shapes) -> Any:
        """Return a context in which the stand-in has other shapes.

        Raises:
            PlanError: its modules say other sizes than their tensors have.
        """
        standin = self.plain.traced.standin
        return resized(standin, shapes, tuple(attribute_edits(standin, shapes, {})))

    def _with(self, members: dict[int, Single]) -> Shapes | Pin:
        """Return sizes at which the network runs with some layers wider, or why there are none.

        Args:
            members: by operation; others that these are added to join them, in place.
        """
        members |= self.flow.met_by_none(members, self.some)
        shapes = self._written(self.shapes, members)
        stop = self._run(shapes)
        for _ in range(_ROUNDS):
            if stop is not None:
                better = self._repaired(shapes, stop)
                if better is None:
                    return _cannot(f"the network does not run with more: {stop.reason}")
                shapes, stop = better
                continue
            met = self._meets()
            if met is None or isinstance(met, Pin):
                return shapes if met is None else met
            value, pin = met
            more = {x.operation: x for x in self.flow.sources(value, self.some)}
            if not more or more.keys() <= members.keys():
                return pin
            members |= more
            shapes = self._written(shapes, more)
            stop = self._run(shapes)
        return _cannot("too many calls of the network fail with more")

    def _written(self, shapes: Shapes, members: dict[int, Single]) -> Shapes:
        """Return shapes with the rows of some layers, and the vectors beside, of another width."""
        found, tensors = dict(shapes), self._tensors
        for single in members.values():
            shape = found.get(single.weight, tuple(tensors[single.weight].shape))
            found[single.weight] = _with_size(shape, single.dim, self.width)
            found |= dict.fromkeys(single.vectors, (self.width,))
        return found

    def _run(self, shapes: Shapes) -> _Failed | None:
        """Run the network at some sizes; return where it fails, None if it does not."""
        watches: list[_Watch] = []
        traced = self.plain.traced

        def watch(_: object) -> _Watch:
            watches.append(_Watch({id(t): name for name, t in reversed([*self._tensors.items()])}))
            return watches[-1]

        try:
            with self.at(shapes):
                _, self._tape = traced.label(watch)
        except PlanError as error:
            return _Failed(0, error.message)
        except TraceError as error:
            calls = sum(x.calls for x in watches)
            sizes, weights = watches[-1].failed if watches else ((), ())
            return _Failed(calls, stopped_at(error.__cause__ or error), sizes, weights)
        return None

    def _repaired(self, shapes: Shapes, stop: _Failed) -> tuple[Shapes, _Failed | None] | None:
        """Return sizes with which a run goes further than to a call that failed."""
        for trial in _trials(stop, [n for n in stop.sizes if n not in self._sizes]):
            found = self._run(shapes | trial)
            if found is None or found.calls > stop.calls:
                return shapes | trial, found
        return None

    def _meets(self) -> tuple[Value, Pin] | Pin | None:
        """Return what has not grown beside channels of the last run that have, and where."""
        before = self.plain.tape.operations
        after = [] if self._tape is None else self._tape.operations
        if [*map(kind_of, before)] != [*map(kind_of, after)]:
            return _cannot("the network runs other operations with more")
        for was, becomes in zip(before, after, strict=True):
            place = place_of(was.target, was.node, was.module)
            if was.numbers != becomes.numbers:
                return _cannot("the code makes a number of its width", place)
            traits = traits_of(was.target)
            if not traits.is_pointwise or traits.is_layout or not was.outputs:
                continue
            shape, grown = was.outputs[0].shape, becomes.outputs[0].shape
            for mine, other in zip(was.inputs, becomes.inputs, strict=False):
                skipped = len(shape) - len(mine.shape)
                stays = any(
                    shape[dim] != grown[dim] and mine.shape[dim - skipped] == 1 == size
                    for dim, size in enumerate(other.shape, skipped)
                )
                if stays and not (mine.is_weight or mine.is_uniform):
                    return mine, Pin(PinKind.BROADCAST, place)
        return None


def _trials(stop: _Failed, sizes: Sequence[int]) -> Iterator[Shapes]:
    """Yield other shapes for the parameters of a call: columns, then vectors, then other dims.

    Args:
        stop: the call.
        sizes: those that come in and that the network does not have at its own widths.
    """
    matrices = [(name, shape) for name, shape in stop.weights if len(shape) > 1]
    vectors = [(name, shape[0]) for name, shape in stop.weights if len(shape) == 1]
    for size in sizes:
        for name, shape in matrices:
            yield {name: _with_size(shape, 1, size)}
        for length in dict.fromkeys(length for _, length in vectors):
            if length != size:
                yield {name: (size,) for name, own in vectors if own == length}
        for name, shape in matrices:
            for dim in (d for d in range(len(shape)) if d != 1):
                yield {name: _with_size(shape, dim, size)}


def _with_size(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])
