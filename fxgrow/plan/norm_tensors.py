"""A norm's tensors by themselves, for growth methods that work on tensors.

This module needs no torch before a function of it is called.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fxgrow.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NormTensors:
    """The tensors of a norm over channels, one entry a channel; None for what it has not.

    Attributes:
        weight, bias: shape (channels,).
        running_mean, running_var: shape (channels,); of a batch norm.
        eps: what is added to a variance, 1e-5 by default.

    Example:
        >>> import torch
        >>> NormTensors.of(torch.nn.BatchNorm2d(3)).running_var.tolist()
        [1.0, 1.0, 1.0]
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5

    @classmethod
    def of(cls, module: object) -> NormTensors:
        """Return those of a batch norm such as ``nn.BatchNorm2d``, by their names there.

        Raises:
            PlanError: it is no batch norm, which alone treats each channel by itself.
        """
        if isinstance(module, NormTensors):
            return module
        if not hasattr(module, "running_mean"):
            kind = type(module).__name__
            together = (
                ""
                if "Norm" not in kind
                else (": it takes its statistics over channels together, which new channels change")
            )
            raise PlanError(
                f"a {kind} is no batch norm{together}.",
                way_out="Give an nn.BatchNorm1d, 2d or 3d, or leave the norm out; fxgrow.widen "
                "keeps what a LayerNorm, RMSNorm or GroupNorm computes.",
            )
        found = {name: getattr(module, name, None) for name in _NEW}
        return cls(
            **{name: None if tensor is None else tensor.detach() for name, tensor in found.items()},
            eps=float(getattr(module, "eps", 1e-5)),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        found = {name: getattr(self, name) for name in _NEW}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def check(self, channels: int) -> None:
        """Return if all are of a number of channels.

        Raises:
            PlanError: one is not, or there is one of the two statistics alone.
        """
        for name, tensor in self.tensors.items():
            if tuple(tensor.shape) != (channels,):
                raise PlanError(
                    f"the norm's {name} has shape {tuple(tensor.shape)}, not ({channels},).",
                    way_out="It has one entry for each channel.",
                )
        if (self.running_mean is None) != (self.running_var is None):
            raise PlanError(
                "a norm has running_mean and running_var, or neither.",
                way_out="Give both, or leave both out.",
            )

    def behind(self, factor: float) -> NormTensors:
        """Return the norm that does to ``factor`` times its input what this does to its input.

        That is exact in eval mode; without statistics, as in train mode, up to eps.

        Args:
            factor: c; running_mean becomes c·running_mean, and running_var
                c²·(running_var + eps) − eps, at least 0.

        Raises:
            PlanError: a variance would be negative, and there is no weight to make up for it.
        """
        from fxgrow.plan.absorption import absorbed_mean, absorbed_variance, absorbed_weight

        mean, variance = self.running_mean, self.running_var
        if factor == 1.0 or mean is None or variance is None:
            return self
        if self.weight is None and bool((factor**2 * (variance + self.eps) < self.eps).any()):
            raise PlanError(
                f"behind a factor of {factor:.6g}, a running variance would be negative, and the "
                "norm has no weight to make up for it.",
                way_out="Give it a weight of ones.",
            )
        weight = self.weight
        if weight is not None:
            weight = absorbed_weight(weight, variance, factor, self.eps)
        return replace(
            self,
            weight=weight,
            running_mean=absorbed_mean(mean, factor),
            running_var=absorbed_variance(variance, factor, self.eps),
        )

    def extended(self, count: int, copies: list[int] | None = None) -> NormTensors:
        """Return the norm over more channels.

        Args:
            count: how many are new: weight 1, bias 0, mean 0, variance 1.
            copies: for each new channel, the old one whose entries it gets instead.
        """
        import torch

        found = {}
        for name, tensor in self.tensors.items():
            new = tensor.new_full((count,), _NEW[name]) if copies is None else tensor[copies]
            found[name] = torch.cat([tensor, new])
        return NormTensors(**found, eps=self.eps)


_NEW = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
