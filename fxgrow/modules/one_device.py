"""What asks for a device before an operation runs: recurrent layers, numbers made into tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fxgrow.modules.calling import map_tensors, tensors_in

# What compares devices by itself, where a dispatch mode sees nothing yet.
_RECURRENT = frozenset((
    "lstm", "gru", "rnn_tanh", "rnn_relu",
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
))  # fmt: skip
_LOOK_UPS = frozenset(("take_along_dim",))
_MAKERS = (torch.tensor, torch.as_tensor)


class OnOneDevice(TorchFunctionMode):
    """A mode in which recurrent layers get all tensors on the meta device, if any is there.

    A number that becomes a tensor there keeps its value, on the CPU: no dispatch mode sees it.

    Args:
        to_meta: returns what stands in for a constant there.
    """

    def __init__(self, to_meta: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._to_meta = to_meta

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _RECURRENT or name in _LOOK_UPS:
            devices = {tensor.is_meta for tensor in tensors_in((args, kwargs))}
            if len(devices) > 1:
                move = self._to_meta if name in _LOOK_UPS else self._moved
                with _disable_current_modes():  # what makes a tensor here is no part of the run
                    args, kwargs = map_tensors(move, (args, kwargs))
        elif func in _MAKERS and _is_number_on_meta(args, kwargs):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)

    def _moved(self, tensor: Tensor) -> Tensor:
        """Return a tensor on meta; lengths of packed sequences stay where code looks at them."""
        return self._to_meta(tensor) if tensor.is_floating_point() else tensor


def _is_number_on_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a tensor without values is to be made of one number."""
    device = kwargs.get("device")
    return (
        len(args) == 1
        and isinstance(args[0], (int, float))
        and device is not None
        and torch.device(device).type == "meta"
    )
