"""Runs without chance, and without casts: what a network computes as mathematics.

Two networks of different widths draw different dropout masks, and a network whose norms compute in
float32 rounds there whatever the dtype of its weights. Neither says anything about the surgery.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.modules.calling import map_tensors, tensors_in
from fxgrow.modules.dispatch import DispatchMode
from fxgrow.modules.draws import Chance, RunDraws

_LOWER = (torch.float32, torch.float16, torch.bfloat16)


class Expectation(DispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which drawn masks give their mean, and fused dropout does nothing.

    Dropout and stochastic depth draw a mask and divide it by its mean: with the mean in place of
    the draw they are the identity, whether a module, a function or an attention kernel does them.
    Other noise is drawn, the same each time that the mode is entered
    (:class:`fxgrow.modules.draws.RunDraws`).

    Args:
        exact: whatever a forward computes in a lower precision than float64 is in float64: after
            casts, in constants that it makes, and where it makes numbers of integers.

    Attributes:
        casts: whether there was such a thing.
        chance: what masks are made of, from the next time on that the mode is entered; their mean
            at first.
        draws: those since it was entered.
        common: whether besides a common generator was drawn from, as far as whoever runs it says.
    """

    def __init__(self, *, exact: bool = False) -> None:
        super().__init__()
        self.casts = False
        self.chance: Chance = "mean"
        self.draws = RunDraws()
        self.common = False
        self._exact = exact

    def __enter__(self) -> Expectation:
        """Begin to draw anew."""
        self.draws = RunDraws(self.chance)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, without chance."""
        kwargs = kwargs or {}
        if self._exact:
            args, kwargs = self._in_double(func, args, kwargs)
        result = self.draws.run(func, args, kwargs)
        if self._exact and _is_made_lower(func, args, result):
            self.casts = True
            result = result.double()
        return result

    def _in_double(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments without a lower precision than float64.

        Views, and what is written into, stay what they are: a copy would be something else.
        """
        if kwargs.get("dtype") in _LOWER:
            kwargs = {**kwargs, "dtype": torch.float64}
            self.casts = True
        if func.is_view or func._schema.is_mutable:
            return args, kwargs
        if any(tensor.dtype in _LOWER for tensor in tensors_in((args, kwargs))):
            self.casts = True
            args, kwargs = map_tensors(_double, (args, kwargs))
        return args, kwargs


def _is_made_lower(func: OpOverload, args: tuple[Any, ...], result: object) -> bool:
    """Return whether numbers of a lower precision were made where there were none."""
    if not isinstance(result, Tensor) or result.dtype not in _LOWER:
        return False
    if func is torch.ops.aten.lift_fresh.default:
        return True
    numbers = any(t.is_floating_point() or t.is_complex() for t in tensors_in(args))
    return not (numbers or func.is_view or func._schema.is_mutable)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype in _LOWER else tensor
