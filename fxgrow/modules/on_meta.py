"""Run a module on meta tensors, whatever constants it makes on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.modules.calling import map_tensors, tensors_in
from fxgrow.modules.dispatch import DispatchMode
from fxgrow.modules.meta_shapes import run_on_meta
from fxgrow.modules.one_device import OnOneDevice

_ZEROS = torch.ops.aten.zeros.default
_TO_COPY = torch.ops.aten._to_copy.default


class OnMeta(DispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which constants that a model makes on another device join the meta one."""

    def __init__(self) -> None:
        super().__init__()
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a constant and its meta twin
        self._one_device = OnOneDevice(self._to_meta)

    def __enter__(self) -> OnMeta:
        """Begin."""
        super().__enter__()  # type: ignore[no-untyped-call]
        self._one_device.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        self._one_device.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation with every tensor argument on the meta device.

        What has not met a meta tensor (token ids, a mask made of them) keeps its values, on the
        CPU, even where the model wants it on the device of its weights: forwards look into masks.
        """
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        elsewhere = len(tensors) - sum([tensor.is_meta for tensor in tensors])
        if 0 < elsewhere < len(tensors):
            args, kwargs = map_tensors(self._to_meta, (args, kwargs))
            tensors = tensors_in((args, kwargs))
        if not tensors and kwargs.get("device") is not None and not _is_made_up(func, args, kwargs):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        elif func is _ZEROS and args[0] and _is_made_up(func, args, kwargs):
            kwargs = {**kwargs, "device": torch.device("meta")}  # what is written there is, too
        elif func is _TO_COPY:
            kwargs = {key: item for key, item in kwargs.items() if key != "device"}
        result = run_on_meta(func, args, kwargs, tensors)
        self.ran(func, args, kwargs, tensors, result)
        return result

    def ran(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
        result: object,
    ) -> None:
        """Take note of an operation that ran; ``operands`` are the tensors that it was given."""

    def joined(self, tensor: Tensor, twin: Tensor) -> None:
        """Take note that a constant is stood in for by a meta tensor, from now on."""

    def _to_meta(self, tensor: Tensor) -> Tensor:
        """Move a tensor; those without dims mix with any device as they are."""
        if tensor.device.type == "meta" or not tensor.ndim:
            return tensor
        if id(tensor) not in self._twins:
            # As it lies in memory: a dim that was expanded has no values of its own.
            twin = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            self._twins[id(tensor)] = (tensor, twin)
            self.joined(*self._twins[id(tensor)])
        return self._twins[id(tensor)][1]


def _is_made_up(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether no forward looks at the values of what an operation makes.

    A recurrent layer's first state, of floating-point zeros; and what an operator makes for itself
    and insists on having where the data is: a number (quantiles, tolerances), a place for counts.
    """
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    if func._opname == "zeros":
        return bool(dtype.is_floating_point)
    is_number = func._opname == "scalar_tensor" or args[:1] == ([],)
    return is_number or (func._opname == "empty" and dtype == torch.int64)
