"""Losses by name, for those who have batches and no function: the usual two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from fxgrow.errors import PlanError
from fxgrow.grow.data.batches import Batch, LossFunction
from fxgrow.modules.calling import tensors_in
from fxgrow.registry import Registry

_IGNORED = -100  # what torch's cross_entropy leaves out
LOSSES: Registry[LossFunction] = Registry("loss")


@LOSSES.register("cross_entropy")
def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of classes.

    Args:
        outputs: logits, (N, classes, …) or, as of words, (N, …, classes); or what holds them.
        targets: class indices (N, …), of which −100 is left out, or probabilities of logits' shape.
    """
    logits = _first(outputs)
    if not targets.is_floating_point():
        targets = targets.long()  # cross_entropy takes no other whole numbers
    if logits.ndim > 2 and logits.shape[:-1] == targets.shape and not targets.is_floating_point():
        logits, targets = logits.flatten(0, -2), targets.flatten()
    classes = logits.shape[min(1, logits.ndim - 1)]
    is_class = targets.is_floating_point() or ((targets >= 0) & (targets < classes)) | (
        targets == _IGNORED
    )
    if not torch.as_tensor(is_class).all():
        raise PlanError(
            f"a target is no class from 0 to {classes - 1}, of which the outputs are logits.",
            way_out="Give class indices of these, −100 for those to leave out.",
        )
    return F.cross_entropy(logits, targets)


@LOSSES.register("mse_loss")
def mse_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Return the mean squared error; outputs may lie in what the network returns."""
    first = _first(outputs)
    if first.shape != targets.shape:
        raise PlanError(
            f"the outputs have shape {tuple(first.shape)}, and the targets {tuple(targets.shape)}.",
            way_out="Give targets of the outputs' shape, or a loss of your own in Python.",
        )
    return F.mse_loss(first, targets)


def inferred_loss(batches: Sequence[Batch]) -> str:
    """Return the name of the usual loss for targets: whole numbers are classes.

    Raises:
        PlanError: the targets are no tensors.
    """
    targets = [batch[1] for batch in batches]
    if not all(isinstance(target, Tensor) for target in targets):
        raise PlanError(
            "the targets are no tensors, so no loss can be inferred.",
            way_out="Use Python with a loss of your own: fxgrow.Tiny(loss_fn, batches).",
        )
    whole = all(not t.is_floating_point() and t.dtype != torch.bool for t in targets)
    return "cross_entropy" if whole else "mse_loss"


def _first(outputs: Any) -> Tensor:
    """Return the logits that a network names, or the first tensor that it returns.

    Raises:
        PlanError: there is none.
    """
    named = outputs.get("logits") if isinstance(outputs, Mapping) else None
    found = [named] if isinstance(named, Tensor) else tensors_in(outputs)
    if not found:
        raise PlanError(f"the network returns a {type(outputs).__name__}, without any tensor.")
    return found[0]
