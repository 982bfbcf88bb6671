"""Function calls that take sizes as arguments, as they ran: where literal widths hide.

``x.view(n, 12, 64)`` says twelve heads in so many words. To run a network at new sizes, such
arguments must follow; what they should be is told by the labels of what the call returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fxgrow.labels.tape import Value, map_tensors, tensors_in

SIZED = (
    *("view", "reshape", "expand", "unflatten", "split", "split_with_sizes", "narrow"),
    *("__getitem__", "layer_norm", "rms_norm"),
)


@dataclass(frozen=True)
class SizedCall:
    """One call of a function that takes sizes.

    Attributes:
        function: its name.
        args, kwargs: what it took, tensors replaced by their values.
        inputs, outputs: the tensors it took and returned.
    """

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


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
        name = getattr(func, "__name__", "")
        if name in SIZED:
            with _disable_current_modes():  # labels are no data of the run
                seen_args, seen_kwargs = map_tensors(self._value, (args, kwargs or {}))
                inputs = tuple(self._value(tensor) for tensor in tensors_in((args, kwargs)))
                outputs = tuple(self._value(tensor) for tensor in tensors_in(result))
            self.calls.append(SizedCall(name, seen_args, seen_kwargs, inputs, outputs))
        return result
