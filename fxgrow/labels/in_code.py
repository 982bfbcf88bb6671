"""Sizes that a module's own code fixes, given to its calls where they are made.

Code that no graph can be made of (``if window >= height``) keeps its class and all its branches:
while its module runs, calls that take sizes are told apart by the line that makes them, and those
with an edit get other sizes.
"""

from __future__ import annotations

import dis
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxgrow.labels.sizes import SIZED, function_name, map_sizes, sizes_in

_CALLS = frozenset(
    ("CALL", "CALL_KW", "CALL_METHOD", "CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_FUNCTION_EX")
)


class Sized(NamedTuple):
    """Sizes of the calls that one line makes.

    Attributes:
        at: the line, as :attr:`Line.at` tells it, or one call of several there, as
            :attr:`Line.call` does.
        before, after: the sizes among the arguments; None where a slice has no bound.
    """

    at: str
    before: tuple[int | None, ...]
    after: tuple[int | None, ...]


class Line(NamedTuple):
    """Where a call is made.

    Attributes:
        at: ``"package.module:Class.forward:12:reshape"``; lines are counted from the beginning of
            the function that they are in.
        code, offset: the code that runs, and the place of the call in it.
    """

    at: str
    code: CodeType
    offset: int

    @property
    def call(self) -> str:
        """Which of several calls of the line it is: ``"…:12:reshape#1"`` is the second of all."""
        return f"{self.at}#{_ranks(self.code).get(self.offset, 0)}"


@functools.lru_cache(1 << 8)
def _ranks(code: CodeType) -> dict[int, int]:
    """Return, by the place of each call in some code, how many come before it on its line."""
    seen: Counter[int | None] = Counter()
    found = {}
    lines = [(first, last, line) for first, last, line in code.co_lines()]
    for instruction in dis.get_instructions(code):
        if instruction.opname in _CALLS:
            place = instruction.offset
            line = next((line for first, last, line in lines if first <= place < last), None)
            found[place] = seen[line]
            seen[line] += 1
    return found


def line_of_call(name: str) -> Line | None:
    """Return where a function is called, None if no code calls it.

    Args:
        name: of the function; the caller is a mode that was asked to run it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _hands_on(frame, name):
        frame = frame.f_back
    if frame is None:
        return None
    code, module = frame.f_code, frame.f_globals.get("__name__", "")
    qualified = getattr(code, "co_qualname", code.co_name)  # since Python 3.11
    at = f"{module}:{qualified}:{frame.f_lineno - code.co_firstlineno}:{name}"
    return Line(at, code, frame.f_lasti)


def _hands_on(frame: FrameType, name: str) -> bool:
    """Return whether a frame only hands a call on: a mode, what asks modes, the function itself."""
    code, module = frame.f_code, frame.f_globals.get("__name__", "")
    if code.co_name == "__torch_function__" or module == "torch.overrides":
        return True
    return code.co_name == name and module.startswith("torch.")


class _InCode(TorchFunctionMode):
    """Gives calls other sizes.

    Args:
        tables: by line, what to change; one after the other.
    """

    def __init__(self, tables: Sequence[dict[str, Sized]]) -> None:
        super().__init__()
        self._tables = tables

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
        if name in SIZED:
            line = line_of_call(name)
            for table in self._tables:
                sized = (table.get(line.at) or table.get(line.call)) if line else None
                if sized is not None:
                    args, kwargs = _changed(name, args, kwargs, sized)
        return func(*args, **kwargs)


def _changed(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], sized: Sized
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with other sizes; a size that a batch multiplies changes in its ratio."""
    given = sizes_in(name, args, kwargs)
    if len(given) != len(sized.before):
        return args, kwargs
    told = zip(given, sized.before, sized.after, strict=True)
    sizes = iter([_size(*item) for item in told])
    return map_sizes(name, args, kwargs, lambda _: next(sizes))


def _size(now: Any, before: int | None, after: int | None) -> Any:
    if before == after or not before or after is None or now is None:
        return now
    if isinstance(now, torch.SymInt):
        return now * after // before
    size = Fraction(int(now) * after, before)  # a tensor where torch.jit traces
    return int(size) if size.denominator == 1 else now


class SizesInCode:
    """What a module's hooks do: sizes change while it runs.

    Attributes:
        tables: by line, what to change; one table for each time that it was grown.
    """

    def __init__(self) -> None:
        self.tables: list[dict[str, Sized]] = []
        self._running: dict[int, list[_InCode]] = {}  # by thread

    def begin(self, module: nn.Module, args: object) -> None:
        """Change sizes from now on."""
        del module, args
        mode = _InCode(self.tables)
        self._running.setdefault(threading.get_ident(), []).append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self, module: nn.Module, args: object, output: object) -> None:
        """Change no more."""
        del module, args, output
        self._running[threading.get_ident()].pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


def sizes_in_code(module: nn.Module) -> SizesInCode | None:
    """Return what changes sizes in a module's code, if anything does."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, SizesInCode)), None)


def change_sizes(module: nn.Module, sizes: Iterable[Sized]) -> None:
    """Let a module's code use other sizes, in place, beside those that it was told before."""
    held = sizes_in_code(module)
    if held is None:
        held = SizesInCode()
        module.register_forward_pre_hook(held.begin)
        module.register_forward_hook(held.end, always_call=True)
    held.tables.append({sized.at: sized for sized in sizes})
