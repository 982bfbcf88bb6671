"""Runs without chance, and without casts: what a network computes as mathematics.

Two networks of different widths draw different dropout masks, and a network whose norms compute in
float32 rounds there whatever the dtype of its weights. Neither says anything about the surgery.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.modules.calling import tensors_in
from fxgrow.modules.dispatch import DispatchMode

_LOWER = (torch.float32, torch.float16, torch.bfloat16)


class Expectation(DispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which random draws give their mean and fused dropout does nothing.

    Dropout and stochastic depth draw a mask and divide it by its mean: with the mean in place of
    the draw they are the identity, whether a module, a function or an attention kernel does them.

    Args:
        exact: casts to a lower precision than float64 give float64, and so do constants that a
            forward makes without naming a dtype.

    Attributes:
        casts: whether there were such casts.
    """

    def __init__(self, *, exact: bool = False) -> None:
        super().__init__()
        self.casts = False
        self._exact = exact

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, without chance."""
        kwargs = kwargs or {}
        if self._exact and kwargs.get("dtype") in _LOWER:
            kwargs = {**kwargs, "dtype": torch.float64}
            self.casts = True
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        result = func(*args, **kwargs)
        if self._exact and _is_constant(func, args, kwargs, result):
            result = result.double()
        mean = _mean(func, args)
        if isinstance(mean, Tensor):
            return result.copy_(mean)
        return result if mean is None else result.fill_(mean)


def _mean(func: OpOverload, args: tuple[Any, ...]) -> Tensor | float | None:
    """Return what a random draw gives on average, or None if the operation is no draw."""
    name = func._opname
    if name in ("bernoulli", "bernoulli_"):  # the probability 0.5 is left out of the arguments
        mean: Tensor | float = args[1] if len(args) > 1 else args[0] if name == "bernoulli" else 0.5
        return mean
    return 0.5 if name in ("rand", "rand_like") else None


def _is_constant(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: object
) -> bool:
    """Return whether a result is a new tensor of the dtype that is the default for all threads."""
    if not isinstance(result, Tensor) or result.dtype != torch.get_default_dtype():
        return False
    made = func is torch.ops.aten.lift_fresh.default or not tensors_in((args, kwargs))
    return made and kwargs.get("dtype") is None
