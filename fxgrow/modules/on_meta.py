"""Run a module on meta tensors, whatever constants it makes on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.modules.calling import map_tensors, tensors_in
from fxgrow.modules.decisions import AsIfReal, Decider, looks_at_values, positions_of
from fxgrow.modules.dispatch import DispatchMode
from fxgrow.modules.meta_shapes import run_on_meta

_TO_COPY = torch.ops.aten._to_copy.default
_LOOK_UP = torch.ops.aten.index.Tensor
_SELECT = torch.ops.aten.masked_select.default


class OnMeta(DispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which constants that a model makes on another device join the meta one.

    Args:
        decider: answers where the model looks at values; without one, that fails.

    Attributes:
        wants_values: whether the model looked at values.
    """

    def __init__(self, decider: Decider | None = None) -> None:
        super().__init__()
        self.wants_values = False
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a constant and its meta twin
        self._stale: set[int] = set()  # ids of constants whose twins were written into
        self._decider = decider
        self._as_if_real = None if decider is None else AsIfReal(decider, self.left)

    def __enter__(self) -> OnMeta:
        """Begin; tensors say from now on where those of the decider are."""
        super().__enter__()
        if self._as_if_real is not None:
            self._as_if_real.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        if self._as_if_real is not None:
            self._as_if_real.__exit__(*error)
        super().__exit__(*error)

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
        if self._decider is None:
            return self._dispatch(func, args, kwargs or {})
        with torch._C.DisableTorchFunction():  # here tensors are where they are
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._stale:
            args, kwargs = map_tensors(self.current, (args, kwargs))
        tensors = tensors_in((args, kwargs))
        elsewhere = len(tensors) - sum([tensor.is_meta for tensor in tensors])
        if 0 < elsewhere < len(tensors):
            changed = tensors[0] if func._schema.is_mutable else None
            args, kwargs = map_tensors(self._to_meta, (args, kwargs))
            tensors = tensors_in((args, kwargs))
            if changed is not None and tensors[0] is not changed:
                self._stale.add(id(changed))
        if not tensors and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": self._device_of(func, args, kwargs)}
        elif func is _TO_COPY:
            kwargs = {key: item for key, item in kwargs.items() if key != "device"}
        if tensors and tensors[0].is_meta and looks_at_values(func, args):
            self.wants_values = True
            if self._decider is not None and func in (_LOOK_UP, _SELECT):
                return self._at_positions(func, args)
            if self._decider is not None:
                result = self._decider.decide(func, args, kwargs)
                self.ran(func, args, kwargs, tensors, result)
                return result
        result = self.computed(func, args, kwargs, tensors)
        self.ran(func, args, kwargs, tensors, result)
        return result

    def _device_of(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.device:
        """Return where to make a tensor of numbers alone, whatever device is asked for."""
        given = torch.device(kwargs["device"])
        if not _is_made_up(func, args, kwargs):
            return torch.device("cpu")
        asked_there = self._decider is not None and given == self._decider.device
        return torch.device("meta") if asked_there and func._opname == "zeros" else given

    def computed(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Any:
        """Return the result of an operation that looks at no values, or that nobody knows."""
        try:
            return run_on_meta(func, args, kwargs, operands)
        except (NotImplementedError, RuntimeError):
            if self._decider is None or func.namespace == "aten":
                raise
            return self._decider.decide(func, args, kwargs)

    def _at_positions(self, func: OpOverload, args: tuple[Any, ...]) -> Any:
        """Return what lies where masks are set, looked up by the positions that they tell."""
        x, given = args
        with self:
            if func is _SELECT:
                x, mask = torch.broadcast_tensors(x, given)
                given = [mask]
            return _LOOK_UP(x, positions_of(given))

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

    def left(self, tensor: Tensor, name: str) -> None:
        """Take note that Python reads all values of a tensor."""

    def current(self, tensor: Tensor) -> Tensor:
        """Return a tensor, or the meta twin of a constant that was written over since."""
        return self._twins[id(tensor)][1] if id(tensor) in self._stale else tensor

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
