"""What a network does on inputs of a size, as the operations that it runs on meta tensors.

A forward may look at sizes (``if x.shape[0] >= 8``) and do something else there than on the inputs
that it was followed and judged on. Two runs are alike if they run the same operations on the
results of the same operations, with the same arguments, sizes apart: those are what the dispatcher
calls ``SymInt``, so that a dim or a flag counts and a length does not.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from fxgrow.modules.calling import Arguments, call, map_tensors, opaque_in, results_in, tensors_in
from fxgrow.modules.draws import same_chance
from fxgrow.modules.on_meta import OnMeta
from fxgrow.modules.standin import first_line, keeping_state
from fxgrow.verification.forward import Mode, set_mode

Operation: TypeAlias = tuple[Any, ...]
BATCHES = (1, 2, 3, 4, 5, 7, 8, 16, 17, 33)
# Of height and width: smaller, larger, and with sides that are odd and not equal.
_SCALES = ((0.5, 0.5), (0.75, 0.75), (1, 1.25), (1.5, 1.5), (2, 2))
_LENGTHS = (1, 2, 7, 32)
_COPIES = frozenset(("aten::clone", "aten::contiguous", "aten::alias", "aten::detach"))
_VIEWS = dict.fromkeys(("aten::_unsafe_view", "aten::_reshape_alias"), "aten::view")
_TELLING = ("int", "bool", "str", "ScalarType", "Layout")  # arguments that follow no sizes
_TYPE = re.compile(r"(\w+)(?:\[\d*\])?\??(?:\[\])? (\w+)")  # of an argument, and its name


@dataclass(frozen=True)
class Behaviour:
    """What a network did.

    Attributes:
        operations: each with the arguments that are no numbers, and where its operands come from.
        numbers: those of each operation.
        shapes: of the results.
        problem: why the network did not run; "" if it did.
        writes: whether it wrote into a parameter.
        opaque: kinds of objects among its outputs that hold tensors which nothing sees.
        rows: of each output tensor, the size of its first dim; 1 where it has none.
    """

    operations: tuple[Operation, ...] = ()
    numbers: tuple[tuple[float, ...], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    problem: str = ""
    writes: bool = False
    opaque: frozenset[str] = frozenset()
    rows: tuple[int, ...] = ()

    def equals(self, other: Behaviour) -> bool:
        """Return whether another run, on the same sizes, did the same."""
        return (self.operations, self.numbers) == (other.operations, other.numbers)

    def like(self, other: Behaviour, size: Size, factor: tuple[int, int] | None) -> bool:
        """Return whether another run did the same.

        Args:
            other: the run.
            size: what is other than there.
            factor: the sizes of both batches, where nothing else differs: each dim of a result, and
                each number, is then either the same or in this proportion.
        """
        if factor is None and len(self.operations) != len(other.operations):
            return size.step != 0 and self._repeats(other, size.step)
        if self.operations != other.operations:
            return False
        if factor is None:
            pairs = zip(self._fractions(), other._fractions(), strict=True)
            return all(one == two for one, two in pairs)
        lists = zip((*self.shapes, *self.numbers), (*other.shapes, *other.numbers), strict=True)
        return all(
            len(one) == len(two) and all(map(_proportional(*factor), one, two))
            for one, two in lists
        )

    def cuts(self, other: Behaviour, samples: int) -> bool:
        """Return whether results have other rows than there are samples, and not in another run.

        A flatten of a fixed size makes several rows of a larger image.
        """
        pairs = zip(self.rows, other.rows, strict=False)
        return any(was == samples != rows for rows, was in pairs)

    def _fractions(self) -> Iterator[float]:
        """Yield the numbers that are no whole ones: those may follow sizes."""
        return (x for numbers in self.numbers for x in numbers if x != int(x))

    def _repeats(self, other: Behaviour, step: int) -> bool:
        """Return whether all that differs is how often a loop over a sequence ran."""
        own, others = self._kinds(), other._kinds()
        return own.keys() == others.keys() and all(
            (count - others[kind]) % step == 0 for kind, count in own.items()
        )

    def _kinds(self) -> Counter[object]:
        """Return how often there is each operation, with the parameters among its operands."""
        return Counter(
            (name, *rest, tuple(origin for origin in origins if isinstance(origin, str)))
            for name, origins, *rest in self.operations
        )


def _proportional(own: int, others: int) -> Callable[[float, float], bool]:
    """Return what tells whether two numbers are equal, or as two sizes are, or their inverses."""

    def tell(one: float, two: float) -> bool:
        return (
            one == two
            or math.isclose(one * others, two * own)
            or math.isclose(one * own, two * others)
        )

    return tell


def behaviour(standin: nn.Module, arguments: Arguments, mode: Mode) -> Behaviour:
    """Return what a network does on inputs.

    Args:
        standin: the network on the meta device; its mode is changed.
        arguments: floating-point tensors on the meta device, others with values.
        mode: the mode; dropout is off in both.
    """
    set_mode(standin, mode)
    recorder = _OperationRecorder(standin, arguments)
    try:
        with torch.no_grad(), same_chance(), keeping_state(standin), recorder:
            result = call(standin, arguments)
    except Exception as error:  # a user's forward may raise anything, on sizes that are none
        return Behaviour(problem=first_line(error))
    return Behaviour(
        tuple(recorder.operations), tuple(recorder.numbers), tuple(recorder.shapes),
        writes=recorder.writes, opaque=frozenset(opaque_in(result)),
        rows=tuple(len(tensor) if tensor.ndim else 1 for tensor in results_in(result)),
    )  # fmt: skip


class _OperationRecorder(OnMeta):  # type: ignore[no-untyped-call]
    """A dispatch mode that notes what runs."""

    def __init__(self, standin: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.numbers: list[tuple[float, ...]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.writes = False
        self._held: list[object] = []  # ids are only unique among the living
        self._origin: dict[int, object] = {
            id(tensor): ("input", index) for index, tensor in enumerate(tensors_in(arguments))
        }
        self._names = {id(tensor): name for name, tensor in standin.named_parameters()}
        self._lent = frozenset(map(_memory, standin.parameters()))

    def ran(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
        result: object,
    ) -> None:
        """Note an operation."""
        if func._name in _COPIES and len(operands) == 1:  # whether one is made depends on strides
            self._origin[id(result)] = self._of(operands[0])
            self._held.append(result)
            return
        position = len(self.operations)
        if not self.writes and func._schema.is_mutable:
            given = [args[i] for i in _written(func) if i < len(args)] + [*kwargs.values()]
            self.writes = any(_memory(tensor) in self._lent for tensor in tensors_in(given))
        self.numbers.append(tuple(_numbers((args, kwargs))))
        origins = tuple([self._of(tensor) for tensor in operands])
        fixed = tuple([_plain(args[i]) for i in _fixed(func) if i < len(args)])
        name = _VIEWS.get(func._name, func._name)
        self.operations.append((name, origins, fixed, *sorted(kwargs.keys() - {"device"})))
        for index, tensor in enumerate(tensors_in(result)):
            self.shapes.append(tuple(tensor.shape))
            if id(tensor) not in self._names:
                self._origin[id(tensor)] = (position, index)
        self._held.append(result)

    def joined(self, tensor: Tensor, twin: Tensor) -> None:
        """Let what stands in for a constant come from where that does."""
        self._origin[id(twin)] = self._of(tensor)
        self._held += (tensor, twin)

    def _of(self, tensor: Tensor) -> object:
        """Return where a tensor comes from."""
        name = self._names.get(id(tensor))
        return name if name is not None else self._origin.get(id(tensor), "constant")


def _memory(tensor: Tensor) -> int:
    """Return what tells a tensor's memory from that of others, which its views share."""
    return int(tensor.untyped_storage()._cdata)


@functools.cache
def _written(func: OpOverload) -> tuple[int, ...]:
    """Return the positions of the arguments that an operation writes into."""
    arguments = enumerate(func._schema.arguments)
    return tuple(i for i, x in arguments if x.alias_info is not None and x.alias_info.is_write)


def _numbers(value: object) -> Iterator[float]:
    """Yield the numbers among the arguments of an operation."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value if math.isfinite(value) else math.copysign(1e308, value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)


@functools.cache
def _fixed(func: OpOverload) -> tuple[int, ...]:
    """Return the places of the arguments of an operation that are neither tensors nor sizes."""
    # Only the text of a schema tells sizes from other whole numbers.
    kinds = _TYPE.findall(str(func._schema).partition("(")[2].rpartition(" -> ")[0])
    order = {argument.name: place for place, argument in enumerate(func._schema.arguments)}
    return tuple(order[name] for kind, name in kinds if name in order and kind in _TELLING)


def _plain(value: object) -> object:
    """Return an argument as something that can be compared and hashed."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value


@dataclass(frozen=True)
class Size:
    """Inputs of another size.

    Attributes:
        told: what is other, for people.
        sizes: by (index of the tensor, dim): its size.
        batch: the number of samples, if that is all that is other.
        step: by how much a length differs, if that is what is other.
    """

    told: str
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    batch: int | None = None
    step: int = 0


def other_sizes(arguments: Arguments) -> Iterator[Size]:
    """Yield other sizes that a network may take, judging by the inputs that it takes.

    These are batches, and lengths or sizes of images.

    Args:
        arguments: what it takes. The first dim of the first tensor counts samples, and so do those
            of others that are of the same size.
    """
    tensors = tensors_in(arguments)
    if not tensors or not tensors[0].ndim:
        return
    samples = tensors[0].shape[0]
    firsts = [(i, 0) for i, t in enumerate(tensors) if t.ndim and t.shape[0] == samples]
    for batch in BATCHES:
        if batch != samples:
            yield Size(f"a batch of {batch}", dict.fromkeys(firsts, batch), batch)
    main = tensors[0]
    if main.ndim > 3 and main.is_floating_point():
        for scale in _SCALES:
            space = {
                (i, dim): max(1, int(t.shape[dim] * scale[dim % 2]) + (scale[0] == 1))
                for i, t in enumerate(tensors)
                for dim in range(2, t.ndim)
            }
            told = "x".join(str(space[0, dim]) for dim in range(2, main.ndim))
            yield Size(f"images of {told}", space)
    elif main.ndim > 1:
        for dim in range(1, main.ndim):
            length = main.shape[dim]
            along = [
                (i, d) for i, t in enumerate(tensors) for d in range(1, t.ndim)
                if t.shape[d] == length
            ]  # fmt: skip
            for other in sorted({*_LENGTHS, length // 2, 2 * length, 4 * length} - {0, length}):
                step = other - length
                yield Size(f"a length of {other}", dict.fromkeys(along, other), step=step)


def resized(arguments: Arguments, size: Size, *, meta: bool) -> Arguments:
    """Return inputs of another size: values are repeated or cut.

    Args:
        arguments: the inputs.
        size: the other size.
        meta: floating-point tensors are on the meta device, and are to be.
    """
    places = iter(range(len(tensors_in(arguments))))

    def change(tensor: Tensor) -> Tensor:
        index = next(places)
        shape = [size.sizes.get((index, dim), old) for dim, old in enumerate(tensor.shape)]
        if meta and tensor.is_floating_point():
            return torch.empty(shape, dtype=tensor.dtype, device="meta")
        for dim, (new, old) in enumerate(zip(shape, tensor.shape, strict=True)):
            if new != old and old:
                tensor = tensor.index_select(dim, torch.arange(new, device=tensor.device) % old)
        return tensor

    made: Arguments = map_tensors(change, arguments)
    return made
