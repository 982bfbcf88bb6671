"""Parameters that others have taken the place of since a growth: their rates would be lost unsaid.

``torch.nn.utils.parametrizations.weight_norm`` computes a weight of two parameters of its own.
Steps of these are another thing than those of the weight, so that its rates are not theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxgrow.errors import PlanError
from fxgrow.training.stepping import RATES

OWN = "_fxgrow_rates_of_own"  # of each module with such parameters: rates by their local names

_MODULES: WeakSet[nn.Module] = WeakSet()


def watch(module: nn.Module) -> None:
    """Look for what takes the place of a module's parameters, before each step of an optimizer."""
    _watch()
    _MODULES.add(module)


@functools.cache
def _watch() -> None:
    """Look at every optimizer before its steps, from the first growth on."""
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Return if no optimizer trains what has taken the place of a parameter with a rate.

    Raises:
        PlanError: it does; the module's class is named.
    """
    del args, kwargs
    for module in _MODULES:
        for local, entry in vars(module).get(OWN, {}).items():
            if module._parameters.get(local) is entry.parameter or _is_over(entry.rate):
                continue
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if id(entry.parameter) in held:
                continue  # it has moved, as where a parametrization computes with it
            if any(id(p) in held and p not in RATES for p in _in_place_of(module, local)):
                kind = type(module).__name__
                raise PlanError(
                    f"the {local} of a {kind} has rates of its own since it has grown (lr=), and "
                    "others have taken its place (as weight_norm puts two there), which have none.",
                    name=local,
                    way_out='Grow with lr="none"; or register the parametrization before the '
                    'growth, which lr="width" refuses for layers that read copies.',
                )


def _is_over(rate: Any) -> bool:
    """Return whether a rate makes nothing of steps any more."""
    return bool(rate.is_whole and not rate.warming.left)


def _in_place_of(module: nn.Module, local: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module that stand where one of a name was."""
    for name, parameter in module.named_parameters():
        if name == local or name.startswith((f"{local}_", f"parametrizations.{local}.")):
            yield parameter
