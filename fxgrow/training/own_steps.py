"""Steps of SGD and Adam that are made part by part, where an optimizer would make them as a whole.

To hold back what parts do not take of a step, they are to be read and written once more, twice with
weight decay; memory is what that costs. Made part by part, a step reads and writes what it would.
The formulas are those of torch.optim, entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod, sqrt
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

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
    return sum(_count(part) for several in parts for part in several) == parameter.numel()


def _count(part: Part) -> int:
    """Return the number of entries of a part."""
    sizes = ([sum(end - first for first, end in dim) for dim in block] for block in part.blocks)
    return sum(map(prod, sizes))


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
    count = 0.0
    if "step" in state:
        state["step"] += 1
        count = float(state["step"])
    update = _sgd(group) if type(optimizer) is torch.optim.SGD else _adam(group, count)
    averages = [state[name] for name in _averages(optimizer, group)]
    for parts, share in shares:
        for part in parts:
            views = map(part.views, (parameter, gradient, *averages))
            for entries in zip(*views, strict=True):
                update(share, *entries)


def _sgd(group: _Group) -> Callable[..., None]:
    """Return what makes a step of SGD of a share, a weight, its gradient and its momentum."""
    rate, decay, momentum = float(group["lr"]), float(group["weight_decay"]), group["momentum"]

    sign = -1.0 if group["maximize"] else 1.0

    def update(share: float, weight: Tensor, gradient: Tensor, *averages: Tensor) -> None:
        step, new = gradient, sign
        for average in averages:
            new = 1 - group["dampening"]
            average.mul_(momentum).add_(gradient, alpha=sign * new)
            average.add_(weight, alpha=new * decay / share)
            step, new = average, 1.0
        if group["nesterov"]:
            step, new = step.mul(momentum).add_(gradient, alpha=sign), 1.0
        if decay and (group["nesterov"] or not averages):
            weight.mul_(1 - rate * decay)
        weight.add_(step, alpha=-rate * share * new)

    return update


def _adam(group: _Group, count: float) -> Callable[..., None]:
    """Return what makes the step of a number of Adam, likewise of both averages."""
    rate, decay = float(group["lr"]), float(group["weight_decay"])
    first, second = map(float, group["betas"])
    size, scale = rate / (1 - first**count), sqrt(1 - second**count)
    apart = bool(group.get("decoupled_weight_decay", False))

    def update(
        share: float, weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, *most: Tensor
    ) -> None:
        step = gradient.neg() if group["maximize"] else gradient
        if decay and apart:
            weight.mul_(1 - rate * decay)
        elif decay:
            step = step.add(weight, alpha=decay / share)
        mean.lerp_(step, 1 - first)
        square.mul_(second).addcmul_(step, step, value=1 - second)
        for one in most:
            torch.maximum(one, square, out=one)
        root = (most[0] if most else square).sqrt()
        weight.addcdiv_(mean, root.div_(scale).add_(group["eps"]), value=-size * share)

    return update
