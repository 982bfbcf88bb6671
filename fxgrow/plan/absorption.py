"""How a norm's tensors take up a gain of its input, exactly where running statistics are used."""

from __future__ import annotations

import torch
from torch import Tensor


def absorbed_mean(running_mean: Tensor, gain: float) -> Tensor:
    """Return the running mean behind a gain: times the gain."""
    return running_mean * gain


def absorbed_variance(running_var: Tensor, gain: float, eps: float) -> Tensor:
    """Return the running variance behind a gain s: s²·(running_var + eps) − eps, at least 0.

    Args:
        running_var: shape (channels,).
        gain: s.
        eps: the norm's.
    """
    return _exact(running_var, gain, eps).clamp(min=0.0).to(running_var.dtype)


def absorbed_weight(weight: Tensor, running_var: Tensor, gain: float, eps: float) -> Tensor:
    """Return the weight behind a gain: times √eps / (s·√(running_var + eps)) where 0 is the least.

    Args:
        weight: shape (channels,).
        running_var: shape (channels,), before growth.
        gain: s.
        eps: the norm's.
    """
    grown = _exact(running_var, gain, eps)
    shifted = running_var.detach().double() + eps
    correction = torch.where(grown < 0, eps**0.5 / (gain * shifted.sqrt()), 1.0)
    return (weight.double() * correction).to(weight.dtype)


def _exact(running_var: Tensor, gain: float, eps: float) -> Tensor:
    """Return s²·(running_var + eps) − eps in float64."""
    return gain * gain * (running_var.detach().double() + eps) - eps
