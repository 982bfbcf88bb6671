"""Ask an operation what it does, by running it on numbers, before anything is listed of it.

How a factor on an operand comes out (homogeneity), in what an operation is linear, whether it keeps
zero, treats channels alike, or minds that all it gets is there twice: each is a property of the
function, and shows when the function is run in float64 on numbers of both signs and of magnitudes
from 1e-30 to 1e30, on those next to each number that the call is given (``clamp(max=1e9)`` is not
homogeneous), and at zero. What cannot be run answers no.

A call is asked once: shapes are cut to a few entries per dim where the operation allows, and
answers are kept by operator, arguments and shapes.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes

from fxgrow.labels.operators import on_numbers
from fxgrow.labels.tape import Operation, Value
from fxgrow.modules.calling import map_kind, tensors_in

_SCALES = (4.0, 2.0**20, 2.0**-20)  # powers of four: their square roots are exact as well
_MAGNITUDES = (1e-30, 1e-10, 1.0, 1e10, 1e30)
_ENOUGH = 8  # entries of a dim that are run, where the operation takes so few
_MOST = 2**22  # entries of a call that is run with its own shapes
_CLOSE = 1e-9  # relative; sums in another order differ by less
_SEEDS = (0, 1)
_OWN = 1000  # seeds of the operands in question come after those of the others
_AS_OTHERS = -_OWN  # what is drawn for the first of the others, if it is of the same shape
T = TypeVar("T")


class OpCall(NamedTuple):
    """An operation with its arguments, tensors replaced by their values."""

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Asked: TypeAlias = OpCall | Operation


class AtZero(NamedTuple):
    """An operation where some operands are zero.

    Attributes:
        value: what it returns there, the largest; 0 if that is zero everywhere.
        slope: its derivative there, as autograd has it; 0 if it has none.
    """

    value: float
    slope: float


def degrees(call: Asked, operands: Sequence[Value]) -> tuple[float | None, ...]:
    """Return with which power each output takes a positive factor on some operands.

    Args:
        call: the operation.
        operands: those of its values that are multiplied, all by one factor.

    Returns:
        d for each output if f(s·x) = s^d·f(x) for every s > 0, None if there is no such power or
        the operation cannot be run.

    Example: 1 for ``relu``, 2 for ``square``, −1 for a divisor, 0 for ``argmax``.
    """
    return asked(_degrees, call, operands) or ()


def is_linear(call: Asked, operands: Sequence[Value]) -> bool:
    """Return whether what depends on some operands is linear in them, taken together."""
    return bool(asked(_is_linear, call, operands))


def is_alike(
    call: Asked, operands: Sequence[Value], dims: Sequence[int], out: Sequence[int]
) -> bool:
    """Return whether an operation does the same to all channels of some operands.

    Args:
        call: the operation.
        operands: of one shape.
        dims: the dims of these in which the channels lie.
        out: the dims of the first output in which they lie.
    """
    return bool(asked(_is_alike, call, operands, tuple(dims), tuple(out)))


def at_zero(call: Asked, operands: Sequence[Value]) -> AtZero | None:
    """Return what an operation makes of zeros.

    Args:
        call: the operation; entries of other operands may be any.
        operands: those that are zero.

    Returns:
        The value and the slope; None if they depend on other operands, or if it cannot be run.
    """
    return asked(_at_zero, call, operands)


def ignores_copies(call: Asked, operand: Value, dims: Sequence[int]) -> bool:
    """Return whether the first output stays as it is if all along some dims is there twice."""
    return bool(asked(_ignores_copies, call, (operand,), tuple(dims)))


# ── what is asked ─────────────────────────────────────────────────────────────────────────────


class Numbers(NamedTuple):
    """A call that is run on numbers.

    Attributes:
        call: the call.
        shapes: of its values, by index.
        chosen: indices of the values in question.
    """

    call: Asked
    shapes: dict[int, tuple[int, ...]]
    chosen: tuple[int, ...]

    def run(self, chosen: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
        """Return the outputs for values of the operands in question, others being random."""
        given = dict(zip(self.chosen, chosen, strict=True))
        generator = torch.Generator().manual_seed(seed)
        made: dict[int, Tensor] = {}
        are_numbers = torch.Tag.pointwise in self.call.target.tags

        def number(value: Value) -> Tensor:
            if value.index in given:
                return given[value.index].clone()  # an operation in place must not change it
            if value.index not in made:
                shape = self.shapes[value.index]
                made[value.index] = _random(value.dtype, shape, generator, are_numbers)
            return made[value.index].clone()

        if torch.Tag.nondeterministic_seeded not in self.call.target.tags:
            return run_on(self.call, number)
        with torch.random.fork_rng(devices=()):  # the same chance in each run
            torch.manual_seed(seed)
            return run_on(self.call, number)

    def draw(self, seed: int, magnitude: float = 1.0) -> list[Tensor]:
        """Return numbers of both signs for the operands in question, of one magnitude."""
        generator = torch.Generator().manual_seed(_OWN + seed)
        shapes = (self.shapes[index] for index in self.chosen)
        return [magnitude * _random(torch.float64, shape, generator) for shape in shapes]

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """Small, ordinary and large numbers, and some near those that the call is given."""
        given = (1.5 * abs(x) for x in _scalars(self.call) if x and math.isfinite(x))
        return *_MAGNITUDES, *given


def _random(
    dtype: torch.dtype, shape: Sequence[int], generator: torch.Generator, are_numbers: bool = False
) -> Tensor:
    """Return numbers of both signs, none near zero; positions are zeros, and masks alternate.

    Integers are positions but for operations entry by entry, to which they are numbers.
    """
    if dtype is torch.bool:
        return (torch.arange(math.prod(shape)) % 2 == 0).view(tuple(shape))
    if not (dtype.is_floating_point or dtype.is_complex):
        counted = torch.arange(math.prod(shape)).view(tuple(shape)) % 4 + 1
        return (counted if are_numbers else torch.zeros(tuple(shape))).to(dtype)
    drawn = torch.rand(tuple(shape), dtype=torch.float64, generator=generator) + 0.5
    signs = torch.rand(tuple(shape), dtype=torch.float64, generator=generator) - 0.5
    return drawn * signs.sign() + (0j if dtype.is_complex else 0)


def run_on(call: Asked, number: Callable[[Value], Tensor]) -> list[Tensor]:
    """Return the results of a call on the numbers of its values, in float64 where it says a dtype.

    Raises:
        Exception: whatever the operation raises.
    """

    def in_float64(argument: Any) -> Any:
        is_dtype = isinstance(argument, torch.dtype) and argument.is_floating_point
        return torch.float64 if is_dtype else argument

    args, kwargs = map_kind(Value, number, (call.args, call.kwargs))
    named = {key: in_float64(item) for key, item in kwargs.items() if key != "device"}
    return tensors_in(on_numbers(call.target)(*map(in_float64, args), **named))


def _degrees(numbers: Numbers) -> tuple[float | None, ...] | None:
    found: list[float | None] = []  # NaN where nothing has been told yet
    for x in _of_all_magnitudes(numbers):
        before = numbers.run(x)
        after = [numbers.run([scale * t for t in x]) for scale in _SCALES]
        told = [_power(old, new) for old, *new in zip(before, *after, strict=True)]
        found = [_both(*pair) for pair in zip(found or told, told, strict=True)]
        if all(power is None for power in found):
            break
    return tuple(None if power is None or math.isnan(power) else power for power in found)


def _of_all_magnitudes(numbers: Numbers) -> Iterator[list[Tensor]]:
    """Yield numbers for what is scaled: of mixed magnitudes, of one each, near those given."""
    spread = torch.Generator().manual_seed(2000)
    yield [
        t * 10.0 ** (60 * torch.rand(t.shape, dtype=t.dtype, generator=spread) - 30)
        for t in numbers.draw(0)
    ]
    given = [abs(x) for x in _scalars(numbers.call) if x and math.isfinite(x)]
    near = [x * by for x in given for by in (0.75, 1.0, 1.5)]
    for seed, magnitude in enumerate((*_MAGNITUDES, *near)):
        yield numbers.draw(seed + 1, magnitude)
    for x in given:  # what is compared for equality is met by nothing that is drawn
        yield [torch.full_like(t, x) for t in numbers.draw(0)]
        yield [torch.full_like(t, -x) for t in numbers.draw(0)]
    yield numbers.draw(_AS_OTHERS)


def _both(first: float | None, second: float | None) -> float | None:
    """Return the power that two trials agree on; NaN is that of one that tells nothing."""
    if first is None or second is None:
        return None
    return first if math.isnan(second) or first == second else second if math.isnan(first) else None


def _power(before: Tensor, after: Sequence[Tensor]) -> float | None:
    """Return d where after = scale^d·before for each scale; NaN if zeros tell nothing."""
    if not before.is_floating_point():
        return 0.0 if all(torch.equal(before, x) for x in after) else None
    first = after[0]
    told = before.isfinite() & (before != 0) & first.isfinite() & (first != 0)
    power = math.nan
    if bool(told.any()):
        ratio = float((first[told] / before[told]).flatten()[0])
        if ratio <= 0:
            return None
        power = round(12 * math.log(ratio, _SCALES[0])) / 12
    for scale, new in zip(_SCALES, after, strict=True):
        wanted = before * scale ** (0.0 if math.isnan(power) else power)
        if not torch.allclose(new, wanted, rtol=_CLOSE, atol=0.0, equal_nan=True):
            return None
    return power


def _is_linear(numbers: Numbers) -> bool:
    zeros = [torch.zeros_like(x) for x in numbers.draw(0)]
    for seed, magnitude in enumerate(numbers.magnitudes):
        x, y = numbers.draw(seed, magnitude), numbers.draw(seed + 10, magnitude)
        base = numbers.run(zeros, seed)[0]
        one, other = numbers.run(x, seed)[0], numbers.run(y, seed)[0]
        both = numbers.run([2.0 * a - 3.0 * b for a, b in zip(x, y, strict=True)], seed)[0]
        moved = (one != base) | (other != base) | (both != base)
        told = moved if bool(moved.any()) else torch.ones_like(moved)
        offset = bool((base[told] != 0).any()) or not base.is_floating_point()
        slack = _CLOSE * float(both.abs().max()) if both.numel() else 0.0
        if offset or not torch.allclose(both[moved], (2 * one - 3 * other)[moved], 0.0, slack):
            return False
    return True


def _is_alike(numbers: Numbers, dims: tuple[int, ...], out: tuple[int, ...]) -> bool:
    for seed, magnitude in enumerate(_MAGNITUDES):
        same = []
        for x in numbers.draw(seed, magnitude):
            thin = functools.reduce(lambda t, dim: t.narrow(dim, 0, 1), dims, x)
            same.append(thin.expand_as(x).contiguous())
        found = numbers.run(same, seed)[0]
        first = functools.reduce(lambda t, dim: t.narrow(dim, 0, 1), out, found)
        if not torch.allclose(found, first.expand_as(found), _CLOSE, 0.0):
            return False
    return True


def _at_zero(numbers: Numbers) -> AtZero | None:
    values, slopes = set(), []
    for seed in _SEEDS:
        zeros = [torch.zeros_like(x).requires_grad_() for x in numbers.draw(seed)]
        slope = 0.0
        with torch.enable_grad():
            found = numbers.run(zeros, seed)[0]
            if found.requires_grad:
                weights = torch.arange(1.0, found.numel() + 1, dtype=found.dtype).view_as(found)
                out = (found * weights).sum()  # no sum of slopes is zero by chance
                given = torch.autograd.grad(out, zeros, allow_unused=True)
                slope = max(float(x.abs().max()) for x in given if x is not None)
        values.add(float(found.detach().abs().max()) if found.numel() else 0.0)
        slopes.append(slope)
    return AtZero(values.pop(), min(slopes)) if len(values) == 1 else None


def _ignores_copies(numbers: Numbers, dims: tuple[int, ...]) -> bool:
    for seed in _SEEDS:
        (x,) = numbers.draw(seed)
        twice = functools.reduce(lambda t, dim: t.repeat_interleave(2, dim), dims, x)
        once, again = numbers.run([x], seed)[0], numbers.run([twice], seed)[0]
        if once.shape != again.shape or not torch.allclose(again.double(), once.double(), 1e-9):
            return False
    return True


# ── how it is asked ───────────────────────────────────────────────────────────────────────────

_answers: dict[Hashable, Any] = {}
# Libraries whose kernels trust the positions that they are given, and read where these point.
_TRUSTING = frozenset({"torchvision"})
# Kernels that take as many steps as an operand is large, and so do not come to an end at 1e30.
_ENDLESS = re.compile("polynomial|polygamma")


def asked(
    question: Callable[..., T], call: Asked, operands: Sequence[Value], *more: Any
) -> T | None:
    """Return the answer to a question, None where the call cannot be run."""
    if call.target.namespace in _TRUSTING or _ENDLESS.search(call.target._opname):
        return None
    key = _key(question, call, operands, more)
    if key is None or key not in _answers:
        answer = None
        with _disable_current_modes(), torch.no_grad():
            for shapes in _shapes(call):
                try:
                    chosen = tuple(dict.fromkeys(value.index for value in operands))
                    answer = question(Numbers(call, shapes, chosen), *more)
                except Exception:
                    continue
                break
        if key is None:
            return answer
        _answers[key] = answer
    found: T | None = _answers[key]
    return found


def _shapes(call: Asked) -> Iterator[dict[int, tuple[int, ...]]]:
    """Yield shapes to run a call on: cut in each dim, sizes that are equal alike, and its own."""
    values: list[Value] = []
    map_kind(Value, values.append, (call.args, call.kwargs))
    yield {v.index: tuple(min(size, _ENOUGH) for size in v.shape) for v in values}
    if sum(math.prod(value.shape) for value in values) <= _MOST:
        yield {value.index: value.shape for value in values}


def _scalars(call: Asked) -> list[float]:
    """Return the numbers that a call is given, or takes by default."""
    found: list[float] = []

    def gather(argument: Any) -> None:
        if isinstance(argument, (list, tuple)):
            for item in argument:
                gather(item)
        elif isinstance(argument, (int, float)) and not isinstance(argument, bool):
            found.append(float(argument))

    left_out = call.target._schema.arguments[len(call.args) :]
    gather([argument.default_value for argument in left_out if argument.name not in call.kwargs])
    gather((*call.args, *call.kwargs.values()))
    return found


def _key(
    question: Callable[..., Any], call: Asked, operands: Sequence[Value], more: tuple[Any, ...]
) -> Hashable | None:
    """Return what an answer depends on; None if that cannot be hashed."""
    places = itertools.count()
    known: dict[int, int] = {}

    def told(value: Value) -> Hashable:
        place = known.setdefault(value.index, next(places))
        return (place, value.shape, value.dtype, any(value is x for x in operands))

    def plain(argument: Any) -> Hashable:
        if isinstance(argument, Value):
            return told(argument)
        if isinstance(argument, (list, tuple)):
            return tuple(map(plain, argument))
        if isinstance(argument, float):  # 1 and 1.0 and True are equal, and not the same
            return (float, repr(argument))
        return (type(argument), argument)

    try:
        key = (
            question, call.target, plain(call.args),
            tuple((name, plain(x)) for name, x in sorted(call.kwargs.items())), more,
        )  # fmt: skip
        hash(key)
    except TypeError:
        return None
    return key
