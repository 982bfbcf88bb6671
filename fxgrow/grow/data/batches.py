"""Batches of data and the loss of each, with what is wrong with one told by its number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxgrow.errors import FxgrowError, PlanError
from fxgrow.modules.calling import arguments_of, call, tensors_in
from fxgrow.modules.standin import first_line

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
Batch: TypeAlias = tuple[Any, Any]  # inputs and targets


def checked_batches(batches: Iterable[Batch]) -> tuple[Batch, ...]:
    """Return batches that are pairs of inputs and targets, at least one.

    Raises:
        PlanError: there is none, or one is no pair.
    """
    found = tuple(batches) if isinstance(batches, Iterable) else ()
    if not found:
        raise PlanError("there are no batches.", way_out="Give a list of (inputs, targets).")
    for number, batch in enumerate(found):
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise PlanError(
                f"a batch is a {type(batch).__name__}, no pair.",
                way_out="Each batch is (inputs, targets); several inputs are a tuple or a dict.",
            )
        if not size_of(batch):
            raise PlanError(f"batch {number} is empty.", way_out="Leave it out.")
        if any(tensor.layout != torch.strided for tensor in tensors_in(batch[0])):
            raise PlanError(
                f"the inputs of batch {number} are no dense tensors.",
                way_out="Give x.to_dense().",
            )
    return tuple((inputs, targets) for inputs, targets in found)


def check_runs(model: nn.Module, batch: Batch) -> None:
    """Return if a network runs on the first of batches.

    Raises:
        PlanError: it does not.
    """
    try:
        with torch.no_grad():
            call(model, arguments_of(batch[0]))
    except Exception as error:  # a user's forward may raise anything
        raise not_running(error) from error


def not_running(error: Exception) -> PlanError:
    """Return the refusal of batches on which a network does not run, because of an error."""
    return PlanError(
        f"the network does not run on the first batch: {first_line(error)}.",
        way_out="Each batch is (inputs, targets), with inputs as the forward takes them, in "
        "its dtype; several are a tuple or a dict of keyword arguments.",
    )


def loss_of(model: nn.Module, loss_fn: LossFunction, batch: Batch, number: int) -> Tensor:
    """Return the loss of a batch.

    Raises:
        PlanError: it cannot be computed, or is no real scalar; the batch is told by its number.
    """
    inputs, targets = batch
    outputs = _outputs(model, inputs, number)
    try:
        loss = loss_fn(outputs, targets)
    except FxgrowError:
        raise
    except Exception as error:  # a user's loss may raise anything
        told = (
            f"{one} {_shapes(what)}" for one, what in (("outputs", outputs), ("targets", targets))
        )
        raise PlanError(
            f"the loss of batch {number} cannot be computed: {first_line(error)} "
            f"({', '.join(told)}).",
            way_out="Give targets as the loss takes them.",
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        is_complex = isinstance(loss, Tensor) and loss.is_complex() and loss.numel() == 1
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise PlanError(
            f"the loss is no scalar ({shape}).",
            way_out="Return a real one: loss.real." if is_complex else "Reduce it: loss.mean().",
        )
    return loss


def _outputs(model: nn.Module, inputs: Any, number: int) -> Any:
    """Return what a network makes of a batch's inputs.

    Raises:
        PlanError: it does not run on them.
    """
    try:
        return call(model, arguments_of(inputs))
    except Exception as error:  # a user's forward may raise anything
        raise PlanError(
            f"the network does not run on batch {number}: {first_line(error)}.",
            way_out="Give its inputs in the shapes and the dtype that the others have.",
        ) from error


def _shapes(given: Any) -> str:
    """Return the shapes of the tensors in what a loss is given, for texts."""
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_in(given)]
    return ", ".join(shapes) or type(given).__name__


def not_finite(model: nn.Module, batch: Batch) -> str:
    """Return what is NaN or infinite where a loss is, for texts."""
    inputs, targets = batch
    named = [
        *(("its inputs", tensor) for tensor in tensors_in(inputs)),
        *(("its targets", tensor) for tensor in tensors_in(targets)),
        *model.named_parameters(),
        *model.named_buffers(),
    ]
    dense = ((name, tensor) for name, tensor in named if tensor.layout == torch.strided)
    found = [name for name, tensor in dense if not bool(torch.isfinite(tensor).all())]
    if found:
        return f"not all numbers in {found[0]} are finite"
    return (
        "all inputs, targets and weights are finite: so the network's outputs overflow, or the "
        "loss divides by 0, as a cross entropy does whose targets are all left out (-100)"
    )


def size_of(batch: Batch) -> int:
    """Return the number of samples in a batch: the length of its first tensor."""
    first = next(iter(tensors_in(batch[0])), None)
    return len(first) if first is not None and first.ndim else 1


def mean_loss(model: nn.Module, loss_fn: LossFunction, batches: Sequence[Batch]) -> float:
    """Return the mean loss over all samples, which may be NaN; the model is left in eval mode."""
    model.eval()
    with torch.no_grad():
        total = sum(
            float(loss_of(model, loss_fn, batch, number)) * size_of(batch)
            for number, batch in enumerate(batches)
        )
    return total / sum(map(size_of, batches))
