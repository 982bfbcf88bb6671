"""Whether new entries learn: two steps of gradient descent on the grown network.

Zero columns pass no gradient to the rows before them in the first step, so that takes two.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxgrow.apply.tensors import regroup
from fxgrow.modules.calling import Arguments, call, map_tensors, tensors_in
from fxgrow.modules.draws import same_chance
from fxgrow.modules.expectation import Expectation
from fxgrow.modules.standin import first_line, stand_in
from fxgrow.plan.edits import TensorEdit
from fxgrow.verification.forward import FAULTS, no_longer_runs, set_mode, shown


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
    model: nn.Module,
    edits: Mapping[str, TensorEdit],
    batch: Arguments,
    original: nn.Module | None = None,
) -> Gradients:
    """Return which tensors' new entries receive no gradient within two steps of descent.

    Args:
        model: the grown network as it is; only read.
        edits: grown tensors by name; none, no check.
        batch: what it is called with.
        original: the old network; what it does, the grown one must do.

    Raises:
        NoLongerRuns: the grown network fails, and the original does not.
    """
    # Where nothing begins as zero one step mostly tells all, and no parameter needs to move for it.
    dead = any(p.requires_grad and not p.any() for p in model.parameters())
    if not dead and not any(map(_has_zeros, edits.values())):
        found = _descended(model, edits, batch, original, steps=1)
        if not found.missing:
            return found
    return _descended(model, edits, batch, original, steps=2)


def _descended(
    model: nn.Module,
    edits: Mapping[str, TensorEdit],
    batch: Arguments,
    original: nn.Module | None,
    *,
    steps: int,
) -> Gradients:
    """Return what some steps of descent find."""
    copied = _copy(model)
    waiting = _listened_to(copied, edits, moves=steps > 1)
    set_mode(copied, "train")
    unchecked: list[str] = []
    try:
        for _ in range(steps):
            unchecked = [*waiting]
            arguments = map_tensors(Tensor.clone, _typed(batch, model))
            if not waiting or not _backward(copied, arguments):
                break
    except (*FAULTS, UserWarning) as error:
        if original is not None and _learns(original, batch):
            raise no_longer_runs(copied, "in train mode with gradients", error) from error
        reason = first_line(error).partition(". ")[0]
        note = f"gradients of {shown(unchecked)} were not checked: {reason}"
        return Gradients(notes=(note,))
    return Gradients(tuple(waiting))


def _listened_to(
    model: nn.Module, edits: Mapping[str, TensorEdit], *, moves: bool
) -> dict[str, Tensor]:
    """Return the parameters with new entries; one goes when a gradient reaches some of these.

    Args:
        model: a copy of the grown network, of which no other parameter takes a gradient afterwards.
        edits: grown tensors by name.
        moves: whether parameters descend as their gradients come.
    """
    waiting: dict[str, Tensor] = {}

    def listener(name: str) -> Callable[[Tensor], None]:
        def listen(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None  # all at once would be a third network
            if gradient is not None:
                if name in waiting and _touches_new(gradient, edits[name]):
                    del waiting[name]
                if moves:
                    _descend(parameter, gradient)

        return listen

    for name, parameter in model.named_parameters():
        grown = name in edits and _has_new(edits[name])
        # A head of zeros passes nothing on before it has moved.
        if parameter.requires_grad and (grown or not parameter.any()):
            parameter.register_post_accumulate_grad_hook(listener(name))  # type: ignore[no-untyped-call]
            if grown:
                waiting[name] = parameter
        else:
            parameter.requires_grad_(False)
    return waiting


def _learns(original: nn.Module, batch: Arguments) -> bool:
    """Return whether the old network runs where the grown one, on its gradients, did not."""
    copied = _copy(stand_in(original, {}))  # its forward may write into its parameters
    set_mode(copied, "train")
    try:
        _backward(copied, map_tensors(Tensor.clone, _typed(batch, original)))
    except (*FAULTS, UserWarning):
        return False
    return True


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy for descent, in float32 at least.

    Its parameters are those of the original until they are moved to a place of their own.
    """
    shared: dict[int, object] = {
        id(p): nn.Parameter(_wide(p.detach()), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    buffers = {id(b): _wide(b.detach().clone()) for b in model.buffers()}
    return stand_in(model, {}, shared={**shared, **buffers})


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in a dtype in which small gradients do not vanish."""
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.float() if narrow else tensor


def _typed(batch: Arguments, model: nn.Module) -> Arguments:
    """Return inputs in the dtype of the copy of a network."""
    if all(_wide(p) is p for p in model.parameters()):
        return batch
    widened: Arguments = pytree.tree_map_only(Tensor, _wide, batch)
    return widened


def _backward(model: nn.Module, arguments: Arguments) -> bool:
    """Give parameters the gradients of a loss of all outputs; return whether it has any."""
    model.zero_grad(set_to_none=True)
    with warnings.catch_warnings(), torch.enable_grad(), same_chance(), Expectation():
        # Without it, the gradients of an operation of an older library would silently be none.
        warnings.filterwarnings("error", ".*autograd kernel was not registered")
        outputs = [t for t in tensors_in(call(model, arguments)) if t.is_floating_point()]
        loss = torch.stack([_loss(t) for t in outputs if t.numel()]).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    return loss.requires_grad


def _loss(output: Tensor) -> Tensor:
    """Return a loss whose gradient vanishes neither at zero nor where the sum is constant."""
    scaled = output / (output.detach().abs().max() or 1.0)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator).to(output)
    return (scaled * weights).mean() + scaled.square().mean()


@torch.no_grad()
def _descend(parameter: Tensor, gradient: Tensor) -> None:
    """Take a step against the gradient of a hundredth of the parameter's norm."""
    size = float(gradient.norm())
    if size > 0 and math.isfinite(size):
        step = 1e-2 * (float(parameter.norm()) or 1.0) / size
        parameter.data = parameter.data - step * gradient


def _has_new(edit: TensorEdit) -> bool:
    """Return whether some entries of a tensor are new; those with a source are altogether."""
    return bool(edit.axes or edit.source or edit.groups[0] != edit.groups[1])


def _has_zeros(edit: TensorEdit) -> bool:
    """Return whether some entries of a tensor begin as zeros."""
    return bool(edit.fill) or any(run.kind == "zero" for axis in edit.axes for run in axis.runs)


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
