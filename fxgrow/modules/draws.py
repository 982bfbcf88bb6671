"""Random draws that come out the same in each run, whatever the width of the network and its dtype.

Two networks that are compared must draw the same noise. What an operation draws here depends on the
operation, the sizes that it is given and how many such draws there were before in the run: not on
weights, a dtype, a device, or on draws of other sizes. So nothing needs to be kept of one run for
the next one, and a draw that only one of the networks makes does not shift those after it.

What is drawn for a mask is its mean, under which a dropout does nothing. A comparison with a mean
is true everywhere or nowhere, so that one side of a random branch would never be seen: in further
runs each such draw gives a single number for all entries, small, large or drawn. That is one of the
masks that may be drawn, for tensors of any width.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.modules.calling import map_tensors, tensors_in

# "mask": what takes its mean in the place of a draw, so that a mask that keeps the mean of what it
# is multiplied by does nothing; "noise": another draw; "": none, or one that a layer makes inside.
Law: TypeAlias = Literal["", "mask", "noise"]
# What masks are in a run: their mean; or made of numbers that are all small, all large, or drawn by
# a seed, one for each mask. Where only sizes matter, numbers may be spread over each mask.
Chance: TypeAlias = Literal["mean", "spread", "low", "high"] | int
OTHERS: tuple[Chance, ...] = ("low", "high", 1)

_MASKS = frozenset(
    ("bernoulli", "rand", "rand_like", "uniform", "rrelu_with_noise", "native_dropout")
)
_CONSTANT: dict[Chance, float] = {"mean": 0.5, "low": 0.02, "high": 0.98}
_MANY = 1 << 12  # masks of one kind; a loop may draw until the number is another one
# Seeds after which the first uniform numbers of Python and NumPy are small, and large.
_SEEDS: dict[Chance, int] = {"mean": 0, "spread": 0, "low": 39608, "high": 1470}
_DRAWN = _MASKS - {"rrelu_with_noise", "native_dropout"}
_UNTAGGED = frozenset(("aten::_sample_dirichlet", "aten::binomial"))
# Layers that drop numbers by chance inside, and say how many.
_LAYERS = re.compile("attention|dropout|rnn|lstm|gru")
_WIDE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


@functools.cache
def law_of(func: OpOverload) -> Law:
    """Return what kind of draw an operation is."""
    if torch.Tag.nondeterministic_seeded not in func.tags and func._name not in _UNTAGGED:
        return ""
    if func._opname.rstrip("_") in _MASKS:
        return "mask"
    return "" if _LAYERS.search(func._opname) else "noise"


class RunDraws:
    """The draws of one run of a network: masks are what ``chance`` says, and other noise is drawn.

    Args:
        chance: what masks are made of.

    Attributes:
        masks: how many masks were drawn, by operation and number of dims.
    """

    def __init__(self, chance: Chance = "mean") -> None:
        self.masks: Counter[str] = Counter()
        self._chance = chance
        self._counts: Counter[str] = Counter()

    def run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation, with no chance left in it.

        Args:
            func: the operation, a draw or not.
            args: its arguments.
            kwargs: its arguments by keyword.
        """
        law = law_of(func)
        if not law:
            return func(*args, **kwargs)
        if law == "noise":
            return self.draw(func, args, kwargs)
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if func._opname.rstrip("_") == "rrelu_with_noise":
            args = _with_mean_slope(args)
        result = func(*args, **kwargs)
        found = self._filling(func, args, kwargs, result)
        if isinstance(found, Tensor):
            return result.copy_(found)
        return result if found is None else result.fill_(found)

    def _filling(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor
    ) -> Tensor | float | None:
        """Return what a mask holds, or None if it draws nothing."""
        name = func._opname.rstrip("_")
        if name not in _DRAWN:
            return None
        kind = f"{func._name} {like.ndim}"  # its sizes may be those of channels
        self.masks[kind] += 1
        chances = _probability(func, args)
        if name == "bernoulli" and self._chance in ("mean", "spread"):
            return chances
        number: Tensor | float | None = _CONSTANT.get(self._chance)
        if self._chance == "spread":
            places = torch.arange(like.numel(), dtype=torch.float64, device=like.device)
            number = ((places + 0.5) / max(1, like.numel())).view(like.shape)
        if number is None or self.masks[kind] > _MANY:
            number = random.Random(f"{self._chance} {kind} {self.masks[kind]}").random()
        if name == "bernoulli":
            return (chances > number).double() if isinstance(chances, Tensor) else chances > number
        low, high = _range(func, args, kwargs)
        return low + number * (high - low)

    def draw(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation draws.

        It does so in float64 on the CPU, without the generator that it is given, whose state stays
        as it is.

        Args:
            func: the operation.
            args: its arguments; those that it writes into are written into.
            kwargs: its arguments by keyword, likewise.
        """
        kind = f"{func._name} {_sizes(args)}"
        self._counts[kind] += 1
        dtype, device = _kind_of(args, kwargs)
        others = {"generator": None, "device": torch.device("cpu")}
        named = {**kwargs, **{key: value for key, value in others.items() if key in kwargs}}
        if isinstance(named.get("dtype"), torch.dtype):
            named["dtype"] = _wide(named["dtype"])
        places = {i for i, x in enumerate(func._schema.arguments) if x.name == "generator"}
        plain = tuple(None if i in places else x for i, x in enumerate(args))
        copied, copied_named = map_tensors(_copy, (plain, named))
        with _seeded(zlib.crc32(f"{kind} {self._counts[kind]}".encode())):
            found = func(*copied, **copied_named)
        written = _written(func, args, kwargs)
        if written:
            for tensor, new in zip(written, _written(func, copied, copied_named), strict=True):
                tensor.copy_(new)
            return written[0] if len(written) == 1 else tuple(written)
        return map_tensors(functools.partial(_as_it_was, dtype=dtype, device=device), found)


@dataclass
class Common:
    """What was seen of draws that no operation shows.

    Attributes:
        drew: whether Python's or NumPy's common generator was drawn from; known at the end.
    """

    drew: bool = False


@contextlib.contextmanager
def same_chance(chance: Chance = "mean") -> Iterator[Common]:
    """Let all that draws by Python's, NumPy's or torch's common generator draw the same.

    These are draws that no operation shows, as where a layer is left out if ``random.random()`` is
    small. The generators go on afterwards from where they were.

    Args:
        chance: which of several draws these are.
    """
    numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
    state = random.getstate()
    arrays = None if numpy is None else numpy.get_state()
    found, seed = Common(), chance if isinstance(chance, int) else _SEEDS[chance]
    random.seed(seed)
    if numpy is not None:
        numpy.seed(seed)
    begun = random.getstate(), None if numpy is None else numpy.get_state()[2]
    try:
        with _seeded(0):
            yield found
    finally:
        ended = random.getstate(), None if numpy is None else numpy.get_state()[2]
        found.drew = begun != ended
        random.setstate(state)
        if numpy is not None:
            numpy.set_state(arrays)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator for the CPU, and no other, for a while."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _sizes(value: object) -> object:
    """Return the whole numbers among arguments, and the shapes of tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(_sizes(item) for item in value)
    return value if isinstance(value, int) else None


def _kind_of(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.dtype | None, torch.device | None]:
    """Return dtype and device of what a draw gives; a dtype of None leaves it as it is."""
    tensors = tensors_in((args, kwargs))
    numbers = [t.dtype for t in tensors if t.is_floating_point() or t.is_complex()]
    dtype = kwargs.get("dtype") or next(iter(numbers), None)
    return dtype, kwargs.get("device") or next((t.device for t in tensors), None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for a floating-point dtype, and what is like it for a complex one."""
    return torch.float64 if dtype.is_floating_point else _WIDE.get(dtype, dtype)


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor to draw with."""
    return tensor.detach().to("cpu", _wide(tensor.dtype), copy=True)


def _as_it_was(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    """Return what was drawn in the dtype and on the device where it is drawn without this."""
    number = tensor.is_floating_point() or tensor.is_complex()
    return tensor.to(device, dtype if number and dtype is not None else tensor.dtype)


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation writes into, in the order of its schema."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def _with_mean_slope(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a randomised leaky ReLU with its mean slope as the only one."""
    low = args[2] if len(args) > 2 else 1 / 8
    slope = (low + (args[3] if len(args) > 3 else 1 / 3)) / 2
    return (*args[:2], slope, slope, *args[4:])


def _probability(func: OpOverload, args: tuple[Any, ...]) -> Tensor | float:
    """Return how likely a one is among what is drawn; 0.5 is left out of the arguments."""
    chances: Tensor | float = 0.5
    if len(args) > 1:
        chances = args[1]
    elif func._opname == "bernoulli":
        chances = args[0]
    return chances


def _range(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    """Return between which numbers others are drawn."""
    if func._opname.rstrip("_") != "uniform":
        return 0.0, 1.0
    low = args[1] if len(args) > 1 else kwargs.get("from", 0.0)
    high = args[2] if len(args) > 2 else kwargs.get("to", 1.0)
    return float(low), float(high)
