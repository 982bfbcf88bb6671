"""Steps of SGD and Adam that are made part by part, where an optimizer would make them as a whole.

To hold back what parts do not take of a step, they are to be read and written once more, twice with
weight decay; memory is what that costs. Made part by part, a step reads and writes what it would.
torch's own functions make it, of views of each part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fxgrow.training.parts import Part

Shares: TypeAlias = Iterable[tuple[tuple[Part, ...], float]]
_Group: TypeAlias = Mapping[str, Any]


def _averages(optimizer: Optimizer, group: _Group) -> tuple[str, ...]:
    """Return the names of an optimizer's averages."""
    if type(optimizer) is torch.optim.SGD:
        return ("momentum_buffer",) if group["momentum"] else ()
    return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))


def is_by_parts(
    optimizer: Optimizer, group: _Group, parameter: Tensor, parts: Iterable[tuple[Part, ...]]
) -> bool:
    """Return whether a step of a parameter can be made part by part.

    Args:
        optimizer: what holds it.
        group: its settings.
        parameter: the parameter.
        parts: of the parameter.
    """
    gradient, state = parameter.grad, optimizer.state.get(parameter, {})
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        return False
    if parameter.device.type != "cpu" or parameter.is_complex():
        return False  # elsewhere, shares as numbers would be waited for
    if any(group.get(name) for name in ("fused", "differentiable", "capturable")):
        return False
    if gradient is None or gradient.is_sparse or gradient.dtype != parameter.dtype:
        return False
    if any(state.get(name) is None for name in _averages(optimizer, group)):
        return False  # the optimizer makes them in its first step
    return sum(part.count for several in parts for part in several) == parameter.numel()


@torch.no_grad()
def step_by_parts(optimizer: Optimizer, group: _Group, parameter: Tensor, shares: Shares) -> None:
    """Make a step: each part at its share of the rate, and with the whole decay.

    Args:
        optimizer: what holds the parameter.
        group: its settings.
        parameter: the parameter, which has a gradient.
        shares: parts with the share of the rate that they take, above 0.
    """
    gradient, state = parameter.grad, optimizer.state.get(parameter, {})
    if gradient is None:
        return
    averages = [state[name] for name in _averages(optimizer, group)]
    for parts, share in shares:
        told = {
            "lr": float(group["lr"]) * share,
            "weight_decay": float(group["weight_decay"]) / share,
            "maximize": group["maximize"],
            "foreach": False,
        }
        views = [
            [view for part in parts for view in part.views(tensor)]
            for tensor in (parameter, gradient, *averages)
        ]
        if type(optimizer) is torch.optim.SGD:
            _sgd(group, told, *views)
        else:
            _adam(group, told, state["step"], *views)
    if "step" in state:
        state["step"] += 1


def _sgd(
    group: _Group, told: _Group, weights: list[Tensor], gradients: list[Tensor],
    momenta: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    """Make the step of SGD of views of a parameter, its gradient and its momentum."""
    sgd(
        weights, gradients, [*momenta] or [None] * len(weights),
        momentum=group["momentum"], dampening=group["dampening"], nesterov=group["nesterov"],
        **told,
    )  # fmt: skip


def _adam(
    group: _Group, told: _Group, step: Tensor, weights: list[Tensor], *others: list[Tensor]
) -> None:
    """Make the step of Adam of views of a parameter, its gradient and its averages."""
    gradients, means, squares, *largest = others
    first, second = map(float, group["betas"])
    adam(
        weights, gradients, means, squares, largest[0] if largest else [],
        [step.clone() for _ in weights],  # each view counts its own
        decoupled_weight_decay=bool(group.get("decoupled_weight_decay", False)),
        amsgrad=group["amsgrad"], beta1=first, beta2=second, eps=group["eps"], **told,
    )  # fmt: skip
