"""Whether new entries learn: two steps of gradient descent on the grown network.

Zero columns pass no gradient to the rows before them in the first step, so that takes two.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxgrow.apply.tensors import regroup
from fxgrow.modules.calling import Arguments, call, tensors_in
from fxgrow.modules.expectation import Expectation
from fxgrow.modules.standin import first_line
from fxgrow.plan.edits import TensorEdit
from fxgrow.verification.forward import FAULTS, in_double, set_mode, shown


@dataclass(frozen=True)
class Gradients:
    """What a check of gradients found.

    Attributes:
        missing: tensors whose new entries received none.
        notes: what could not be checked.
    """

    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_gradients(
    model: nn.Module, edits: Mapping[str, TensorEdit], batch: Arguments
) -> Gradients:
    """Return which tensors' new entries receive no gradient within two steps of descent.

    Args:
        model: the grown network in float64; its parameters are moved.
        edits: grown tensors by name; none, no check.
        batch: what it is called with.
    """
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in edits and _has_new(edits[name]) and parameter.requires_grad
    }
    waiting = dict(parameters)
    set_mode(model, "train")
    try:
        for _ in range(2):
            if not waiting or not _backward(model, in_double(batch)):
                break
            for name in list(waiting):
                gradient = parameters[name].grad
                if gradient is not None and _touches_new(gradient, edits[name]):
                    del waiting[name]
            for parameter in parameters.values():
                _descend(parameter)
    except (*FAULTS, UserWarning) as error:
        reason = first_line(error).partition(". ")[0]
        note = f"gradients of {shown([*waiting])} were not checked: {reason}"
        return Gradients(notes=(note,))
    finally:
        model.zero_grad(set_to_none=True)
    return Gradients(tuple(waiting))


def _backward(model: nn.Module, arguments: Arguments) -> bool:
    """Give parameters the gradients of a loss of all outputs; return whether it has any."""
    model.zero_grad(set_to_none=True)
    with warnings.catch_warnings(), torch.enable_grad(), Expectation(exact=True):
        # Without it, the gradients of an operation of an older library would silently be none.
        warnings.filterwarnings("error", ".*autograd kernel was not registered")
        outputs = [t for t in tensors_in(call(model, arguments)) if t.is_floating_point()]
        scaled = [t / t.detach().abs().max().clamp(min=1e-30) for t in outputs]
        loss = torch.stack([t.square().mean() for t in scaled]).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    return loss.requires_grad


@torch.no_grad()
def _descend(parameter: nn.Parameter) -> None:
    """Take a step against the gradient of a hundredth of the parameter's norm."""
    size = 0.0 if parameter.grad is None else float(parameter.grad.norm())
    if parameter.grad is not None and size > 0 and math.isfinite(size):
        step = 1e-2 * (float(parameter.norm()) or 1.0) / size
        parameter.sub_(step * parameter.grad)


def _has_new(edit: TensorEdit) -> bool:
    """Return whether some entries of a tensor are new; those with a source are altogether."""
    return bool(edit.axes or edit.source or edit.groups[0] != edit.groups[1])


def _touches_new(gradient: Tensor, edit: TensorEdit) -> bool:
    """Return whether the gradient is nonzero anywhere among the new entries."""
    if edit.source:
        return bool(gradient.any())
    if not edit.axes:  # its groups were merged, and nothing else
        between = regroup(torch.ones(edit.shape), edit.groups) == 0
        return bool(gradient[between.to(gradient.device)].any())
    for axis in edit.axes:
        per_group = gradient.shape[axis.dim]
        old = torch.zeros(per_group * axis.groups, dtype=torch.bool)
        position, seen = 0, set[int]()
        for run in axis.runs:
            if run.kind in ("old", "share"):  # further copies of an old position are new
                sources = range(run.start, run.start + run.length)
                fresh = [source not in seen for source in sources]
                old[position : position + run.length] = torch.tensor(fresh)
                seen.update(sources)
            position += run.length
        new = (~old.view(axis.groups, per_group)).any(dim=0).to(gradient.device)
        if bool(gradient.movedim(axis.dim, 0)[new].any()):
            return True
    return False
