"""Clip gradients of a network that has grown as those of the narrow one would be."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fxgrow.training.stepping import RATES, Rate


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Iterable[Tensor], max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Clip the norm of gradients in place, copies counted as the one channel that they stand for.

    Of m copies of each row and k of each column, each entry's gradient has a square of 1/m² of the
    narrow network's, and there are m·k of them. So squares count m/k times, by which the norm is
    the narrow network's. Without such copies (under ``lr="width"``) this is
    :func:`torch.nn.utils.clip_grad_norm_` with the norm of all squares.

    Args:
        parameters: the network, or parameters of it.
        max_norm: gradients are multiplied by max_norm / norm where that is less than 1.
        error_if_nonfinite: raise where the norm is no finite number.

    Returns:
        The norm before.

    Raises:
        RuntimeError: the norm is not finite, and ``error_if_nonfinite``.

    Example:
        >>> import torch, fxgrow.training
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> norm = fxgrow.training.clip_grad_norm_(net, 1.0)
        >>> fxgrow.training.clip_grad_norm_(net, 1.0).item() <= 1.0
        True
    """
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    held = [parameter for parameter in given if parameter.grad is not None]
    norms = [_norm(parameter.grad, RATES.get(parameter)) for parameter in held]  # type: ignore[arg-type]
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0].device) for norm in norms])
    )
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError("the norm of the gradients is not finite, so they cannot be clipped.")
    share = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for parameter in held:
        parameter.grad.mul_(share.to(parameter.grad))  # type: ignore[union-attr]
    return total


def _norm(gradient: Tensor, rate: Rate | None) -> Tensor:
    """Return the norm of a gradient, shape (), entries weighted by m/k."""
    if rate is not None and not rate.is_whole:
        weight = torch.as_tensor(rate.gradient * rate.update, dtype=torch.float64)
        gradient = gradient * weight.sqrt().to(gradient)
    norm: Tensor = torch.linalg.vector_norm(gradient)
    return norm
