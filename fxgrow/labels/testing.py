"""A check for rules of operations: two pictures of labels, and the numbers to them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fxgrow.labels.forest import IntArray
from fxgrow.labels.layers import core, cover, support
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Value
from fxgrow.labels.validate.case import outcomes_of
from fxgrow.labels.validate.claims import PARAMETER, SampleCall, label

_OPERAND = re.compile(r"(\w+)(\*?)\[([^\]]*)\]")


class _Operand(NamedTuple):
    """An operand as a picture shows it: its sizes, and the letter of each dim that has one."""

    name: str
    is_parameter: bool
    shape: tuple[int, ...]
    letters: dict[int, str]


def assert_rule(function: Callable[..., Any], before: str, after: str) -> None:
    """Assert what an operation does to labels, and that it does that to numbers.

    Args:
        function: takes the operands; a call of the operation, in most cases.
        before: the operands, as ``x[2 a=4] weight*[o=6 i=4]``: a star marks a parameter, and each
            dim is a size, or a letter for its channels and their number.
        after: the same once it ran, and the results: what is one channel has one letter, the first
            of those that it had. A parameter's dim tells its role as well, and ``!`` that it is
            pinned: ``x[2 a] weight*[o:writer a:reader] -> [2 o]``. Channels in another order are
            told by positions: ``a(2:4)+a(0:2)``.

    Raises:
        AssertionError: labels are others, or what they say is not so on numbers: if channels
            change places, if one changes, or if there are more of them. On numbers, operands come
            in as parameters, as constants and as data with channels in any of their dims.

    Example:
        >>> assert_rule(lambda x: x.roll(1, 1), "x[2 a=4]", "x[2 a] -> [2 a(3)+a(0:3)]")
    """
    operands = [_operand(name, star, dims.split()) for name, star, dims in _OPERAND.findall(before)]
    metas = [torch.empty(operand.shape, device="meta") for operand in operands]
    way = tuple(
        "p" if x.is_parameter else "d" + "".join(map(str, sorted(x.letters))) for x in operands
    )
    run = label(SampleCall("this", function, tuple(metas), {}), way, metas)
    found = _Picture(run.space, operands, run.entering)
    shown = " ".join(map(found.operand, range(len(operands)), operands, run.entering))
    shown += " -> " + " ".join(f"[{' '.join(found.dims(value))}]" for value in run.leaving)
    if shown != after:
        raise AssertionError(f"the labels are\n    {shown}\nand not\n    {after}")
    random = torch.Generator().manual_seed(0)
    given = tuple(torch.randn(x.shape, dtype=torch.float64, generator=random) for x in operands)
    for outcome in outcomes_of(SampleCall("this", function, given, {})):
        if outcome.kind == "wrong":
            names = [x.name for x in operands]
            ways = ", ".join(map(" ".join, zip(names, map(_told, outcome.way), strict=True)))
            raise AssertionError(f"on numbers, for {ways}: {outcome.reason}")


def _operand(name: str, star: str, dims: Sequence[str]) -> _Operand:
    parts = [dim.rpartition("=") for dim in dims]
    letters = {d: letter for d, (letter, _, _) in enumerate(parts) if letter}
    return _Operand(name, bool(star), tuple(int(size) for _, _, size in parts), letters)


def _told(way: str) -> str:
    """Return how an operand comes in, in words."""
    if way == "p":
        return "as a parameter"
    if way == "c":
        return "as a constant"
    return f"as data with channels in dim {' and '.join(way[1:])}" if way[1:] else "as data"


class _Picture:
    """Names for the channels of a run: the letter and the position of their first place."""

    def __init__(
        self, space: LabelSpace, operands: Sequence[_Operand], values: Sequence[Value]
    ) -> None:
        self.space = space
        self.roots: IntArray = space.roots()
        self.pinned = {
            root for labels, _ in space.pinned(self.roots) for root in self.roots[labels]
        }
        self.sizes: dict[str, int] = {}
        self.names: dict[int, tuple[str, int]] = {}
        for operand, value in zip(operands, values, strict=True):
            for dim, letter in operand.letters.items():
                self.sizes[letter] = operand.shape[dim]
                for place, root in enumerate(self._line(value, dim)):
                    self.names.setdefault(root, (letter, place))

    def operand(self, place: int, operand: _Operand, value: Value) -> str:
        """Return the picture of an operand."""
        dims = self.dims(value, operand.letters)
        star = "*" if operand.is_parameter else ""
        if operand.is_parameter:
            roles = {
                axis.dim: self.space.roles[index]
                for index, axis in enumerate(self.space.axes)
                if axis.tensor == f"{PARAMETER} {place}" and index in self.space.roles
            }
            dims = [f"{text}:{roles[d]}" if d in roles else text for d, text in enumerate(dims)]
        return f"{operand.name}{star}[{' '.join(dims)}]"

    def dims(self, value: Value, shown: Any = None) -> list[str]:
        """Return the picture of each dim: its size, or its channels."""
        return [
            str(size) if shown is not None and dim not in shown else self._dim(value, dim, size)
            for dim, size in enumerate(value.shape)
        ]

    def _line(self, value: Value, dim: int) -> list[int]:
        """Return the channel of each position of a dim, 0 for none."""
        layer = cover(value.layers, dim)
        if layer is None:
            return []
        labels = core(layer, support(layer)).movedim(dim, 0).reshape(layer.shape[dim], -1)[:, 0]
        return [int(root) for root in self.roots[labels.numpy()]]

    def _dim(self, value: Value, dim: int, size: int) -> str:
        line = self._line(value, dim)
        if not any(line):
            return str(size)
        mark = "!" if self.pinned.intersection(line) else ""
        layer = cover(value.layers, dim)
        beside = "~" if layer is not None and support(layer) != {dim} else ""
        return "+".join(self._runs(line)) + beside + mark

    def _runs(self, line: Sequence[int]) -> Iterator[str]:
        """Yield runs of channels that follow one another, as letters with positions."""
        names = [self.names.get(root, ("0" if not root else "?", 0)) for root in line]
        places = enumerate(names)
        for _, run in itertools.groupby(places, lambda item: (item[1][0], item[1][1] - item[0])):
            own = [name for _, name in run]
            (letter, first), count = own[0], len(own)
            if count == self.sizes.get(letter):
                yield letter
            elif letter in self.sizes:
                yield f"{letter}({first})" if count == 1 else f"{letter}({first}:{first + count})"
            else:
                yield letter
