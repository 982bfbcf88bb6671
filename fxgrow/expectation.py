"""Random draws as their expectation, so that two networks of different widths can be compared.

Dropout and stochastic depth draw a mask and divide it by the mean; with the mean in place of the
draw they are the identity, whether a module, a function or an attention kernel does them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class Expectation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which random draws give their mean and fused dropout does nothing."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, without chance."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            name = func._opname.rstrip("_")
            if name == "bernoulli" and len(args) > 1:
                return result.copy_(args[1]) if isinstance(args[1], Tensor) else result.fill_(args[1])
            if name == "bernoulli":
                return result.copy_(args[0])
            if name in ("rand", "rand_like"):
                return result.fill_(0.5)
        return result
