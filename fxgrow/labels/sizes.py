"""Function calls that take sizes as arguments, as they ran: where literal widths hide.

``x.view(n, 12, 64)`` says twelve heads in so many words. To run a network at new sizes, such
arguments must follow; what they should be is told by the labels of what the call returned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fxgrow.errors import TraceError
from fxgrow.labels.tape import Value
from fxgrow.modules.calling import map_kind, map_tensors, tensors_in

# Where each function takes its sizes: from which position to which, and under which names.
SIZED: dict[str, tuple[int, int | None, tuple[str, ...]]] = {
    "view": (1, None, ("size",)),
    "reshape": (1, None, ("shape",)),
    "expand": (1, None, ("size",)),
    "repeat": (1, None, ("repeats",)),
    "repeat_interleave": (1, 2, ("repeats",)),
    "unflatten": (2, 3, ("sizes",)),
    "split": (1, 2, ("split_size_or_sections", "split_size")),
    "split_with_sizes": (1, 2, ("split_sizes",)),
    "narrow": (2, 4, ("start", "length")),
    "__getitem__": (1, 2, ()),
    "layer_norm": (1, 2, ("normalized_shape",)),
    "rms_norm": (1, 2, ("normalized_shape",)),
    "group_norm": (1, 2, ("num_groups",)),
    "pad": (1, 2, ("pad",)),
    "zeros": (0, None, ("size",)),
    "ones": (0, None, ("size",)),
    "full": (0, 1, ("size",)),
    "empty": (0, None, ("size",)),
    "new": (1, None, ("size",)),
    "new_empty": (1, None, ("size",)),
    "new_zeros": (1, None, ("size",)),
    "new_ones": (1, None, ("size",)),
    "new_full": (1, 2, ("size",)),
}


@dataclass(frozen=True)
class SizedCall:
    """One call of a function that takes sizes.

    Attributes:
        function: its name.
        args, kwargs: what it took, tensors replaced by their values.
        outputs: the tensors it returned.
    """

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...]

    @property
    def inputs(self) -> list[Value]:
        """The tensors it took, in order."""
        found: list[Value] = []
        map_kind(Value, found.append, (self.args, self.kwargs))
        return found

    @property
    def sizes(self) -> list[Any]:
        """The sizes among its arguments, in order."""
        return sizes_in(self.function, self.args, self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


@functools.lru_cache(1 << 10)
def function_name(function: object) -> str:
    """Return what a function is called; an operator of ATen without its overload: ``view``."""
    packet = getattr(function, "overloadpacket", function)
    return str(getattr(packet, "__name__", ""))


def map_sizes(
    function: str, args: Sequence[Any], kwargs: Mapping[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with ``change`` applied to each of its sizes, in order."""
    first, end, names = SIZED[function]
    slices_only = function == "__getitem__"

    def visit(part: Any) -> Any:
        if isinstance(part, (tuple, list)):
            return type(part)([visit(item) for item in part])
        if isinstance(part, slice):
            return slice(change(part.start), change(part.stop), part.step)
        return part if slices_only else change(part)

    stop = len(args) if end is None else end
    return (
        (*args[:first], *(visit(arg) for arg in args[first:stop]), *args[stop:]),
        {key: visit(item) if key in names else item for key, item in kwargs.items()},
    )


def sizes_in(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the sizes among a call's arguments, in order."""
    found: list[Any] = []

    def collect(size: Any) -> Any:
        found.append(size)
        return size

    map_sizes(function, args, kwargs, collect)
    return found


class Recorder(TorchFunctionMode):
    """Writes the calls of :data:`SIZED` functions down, in order.

    Args:
        value: returns the recorded value of a tensor.
    """

    def __init__(self, value: Callable[[Tensor], Value]) -> None:
        super().__init__()
        self.calls: list[SizedCall] = []
        self._value = value

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call and write it down."""
        result = func(*args, **(kwargs or {}))
        name = function_name(func)
        if name in SIZED:
            with _disable_current_modes():  # labels are no data of the run
                seen_args, seen_kwargs = map_tensors(self._value, (args, kwargs or {}))
                outputs = tuple([self._value(tensor) for tensor in tensors_in(result)])
            self.calls.append(SizedCall(name, seen_args, seen_kwargs, outputs))
        return result


def called_by(node: fx.Node) -> str:
    """Return the name of the function that a node calls, "" if it calls none."""
    if node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if isinstance(node.target, str) else function_name(node.target)
    return {"getitem": "__getitem__"}.get(name, name)


def why_fixed(node: fx.Node, function: str, sizes: Sequence[int | None]) -> str:
    """Return why a node does not call a function with the given sizes one by one, "" if it does."""
    called = called_by(node)
    if called != function:
        return f"the sizes {list(sizes)} are fixed inside {called or node.op}"
    if len(sizes_in(function, node.args, node.kwargs)) != len(sizes):
        return f"the sizes {list(sizes)} of {function} are computed as a whole"
    return ""


def check_sizes(node: fx.Node, function: str, sizes: Sequence[int | None]) -> None:
    """Return if a node calls a function with the given sizes one by one.

    Raises:
        TraceError: it does not.
    """
    if reason := why_fixed(node, function, sizes):
        raise TraceError(f"{reason}, so that they cannot be rewritten in the graph", name=node.name)
