"""Optimizers that hold parameters which a network no longer has: they fail at their next step.

Such an optimizer would go on without a word, and train nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, MutableMapping

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from fxgrow.errors import PlanError

# What each parameter was called that a growth left behind.
_LEFT: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()


def leave(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Note that a network no longer has some parameters, by the names that they had there."""
    _watch()
    for name, parameter in parameters:
        _LEFT[parameter] = name


def take_back(parameters: Iterable[Tensor]) -> None:
    """Note that a network has some parameters after all."""
    for parameter in parameters:
        _LEFT.pop(parameter, None)


@functools.cache
def _watch() -> None:
    """Look at every optimizer before its steps, from the first growth on."""
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Return if an optimizer holds no parameter that was left behind.

    Raises:
        PlanError: it does; the first one is named.
    """
    del args, kwargs
    if not len(_LEFT):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _LEFT:
                kind, name = type(optimizer).__name__, _LEFT[parameter]
                raise PlanError(
                    f"this {kind} holds {name} as it was before the network grew, so it would train"
                    " what the network no longer has.",
                    name=name,
                    way_out="Give it to the growth, grow_(…, optimizer=optimizer), or make a new "
                    f"one: torch.optim.{kind}(model.parameters(), …).",
                )
