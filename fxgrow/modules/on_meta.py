"""Run a module on meta tensors, whatever constants it makes on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.modules.calling import map_tensors, tensors_in
from fxgrow.modules.decisions import AsIfReal, Decider, looks_at_values, masks_in, positions_of
from fxgrow.modules.dispatch import DispatchMode
from fxgrow.modules.draws import Chance, RunDraws, law_of
from fxgrow.modules.meta_shapes import broadcast, run_on_meta
from fxgrow.modules.one_device import OnOneDevice

_TO_COPY = torch.ops.aten._to_copy.default
_SELECT = torch.ops.aten.masked_select.default
_AT_POSITIONS = (
    _SELECT,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)
_PACK = torch.ops.aten._pack_padded_sequence.default


class OnMeta(DispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which constants that a model makes on another device join the meta one.

    Args:
        decider: answers where the model looks at values; without one, that fails.
        chance: what masks with values are made of.
    """

    def __init__(self, decider: Decider | None = None, chance: Chance = "mean") -> None:
        super().__init__()
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a constant and its meta twin
        self._bases: dict[int, Tensor] = {}  # by the id of a view's twin
        self._stale: set[int] = set()  # ids of constants whose twins were written into
        self._decider = decider
        self.draws = RunDraws(chance)
        self._one_device = OnOneDevice(self._to_meta)
        self._as_if_real = None if decider is None else AsIfReal(decider, self.left)

    def __enter__(self) -> OnMeta:
        """Begin; tensors say from now on where those of the decider are."""
        super().__enter__()  # type: ignore[no-untyped-call]
        self._one_device.__enter__()  # type: ignore[no-untyped-call]
        if self._as_if_real is not None:  # above the other, which needs to know where they are
            self._as_if_real.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        if self._as_if_real is not None:
            self._as_if_real.__exit__(*error)  # type: ignore[no-untyped-call]
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
        if self._decider is None:
            return self._dispatch(func, args, kwargs or {})
        with torch._C.DisableTorchFunction():  # here tensors are where they are
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._stale:
            args, kwargs = map_tensors(self.current, (args, kwargs))
        if func is _PACK:
            return self._packed(*args)
        tensors = tensors_in((args, kwargs))
        elsewhere = len(tensors) - sum([tensor.is_meta for tensor in tensors])
        if 0 < elsewhere < len(tensors):
            changed = tensors[0] if func._schema.is_mutable else None
            if changed is not None and changed._base is not None and not changed.is_meta:
                self._show(changed, changed._base)
            args, kwargs = map_tensors(self._to_meta, (args, kwargs))
            tensors = tensors_in((args, kwargs))
            if changed is not None and tensors[0] is not changed:
                self._stale.add(id(changed))
        if not tensors or func is _TO_COPY:
            kwargs = _placed(func, args, kwargs)
        if self._decider is not None and tensors and tensors[0].is_meta:
            if func in _AT_POSITIONS and (func is _SELECT or masks_in(args[1])):
                return self._at_positions(func, args, kwargs)
            if looks_at_values(func):
                result = self._decider.decide(func, args, kwargs)
                self.ran(func, args, kwargs, tensors, result)
                return result
        result = self.computed(func, args, kwargs, tensors)
        self.ran(func, args, kwargs, tensors, result)
        return result

    def computed(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Any:
        """Return the result of an operation that looks at no values, or that nobody knows."""
        if law_of(func) and not self._is_on_meta(kwargs, operands):
            return self.draws.run(func, args, kwargs)
        try:
            return run_on_meta(func, args, kwargs, operands)
        except (NotImplementedError, RuntimeError):
            if self._decider is None or func.namespace == "aten":
                raise
            return self._decider.decide(func, args, kwargs)

    def _is_on_meta(self, kwargs: dict[str, Any], operands: Sequence[Tensor]) -> bool:
        """Return whether the result of an operation has no values."""
        asked = torch.device(kwargs.get("device") or "cpu")
        return any(tensor.is_meta for tensor in operands) or asked.type == "meta"

    def _packed(self, x: Tensor, lengths: Tensor, batch_first: bool) -> Any:
        """Pack sequences, whose lengths have values."""
        if lengths.is_meta and self._decider is not None:
            lengths = torch.tensor(self._decider.read(lengths, "tolist", Tensor.tolist))
        result = _PACK(x, lengths, batch_first)
        self.ran(_PACK, (x, lengths, batch_first), {}, (x, lengths), result)
        return result

    def _at_positions(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do at the positions that masks tell what is to be done where they are set."""
        x, given, *rest = args
        with self:
            if func is _SELECT:
                shape = broadcast(x.shape, given.shape) or x.shape
                found = positions_of([given.expand(shape)])
                return torch.ops.aten.index.Tensor(x.expand(shape), found)
            return func(x, positions_of(given), *rest, **kwargs)

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

    def _show(self, view: Tensor, base: Tensor) -> None:
        """Let the twin of a view show a part of the twin of what it is a view of.

        What is written there is written into that, too.
        """
        if id(view) not in self._twins and not base.is_meta:
            whole = self._to_meta(base)
            self._stale.add(id(base))
            twin = torch.as_strided(whole, view.shape, view.stride(), view.storage_offset())
            self._twins[id(view)] = (view, twin)
            self._bases[id(twin)] = whole
            self.joined(view, twin)

    def base_of(self, view: Tensor) -> Tensor | None:
        """Return the tensor that one shows a part of, None if it shows none."""
        base = self._bases.get(id(view), view._base)
        return None if base is None else self.current(base)

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


def _placed(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments by which what is made, or copied, lies where it should here."""
    if func is _TO_COPY:
        return {key: item for key, item in kwargs.items() if key != "device"}
    if kwargs.get("device") is None or _is_made_up(func, args, kwargs):
        return kwargs
    return {**kwargs, "device": torch.device("cpu")}


def _is_made_up(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether no forward looks at the values of what an operation makes.

    What an operator makes for itself and insists on having where the data is: a number (quantiles,
    tolerances), a place for counts.
    """
    is_number = func._opname == "scalar_tensor" or args[:1] == ([],)
    return is_number or (func._opname == "empty" and kwargs.get("dtype") == torch.int64)
