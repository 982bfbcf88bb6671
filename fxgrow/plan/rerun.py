"""Run a network at its new sizes, on meta tensors: nothing is assumed about where channels go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxgrow.channels import Channels, resolve
from fxgrow.groups import layer_of
from fxgrow.labels.propagate import named_tensors
from fxgrow.plan.modules import attribute_edits
from fxgrow.plan.schema import ModuleEdit
from fxgrow.trace import Traced


@dataclass(frozen=True)
class Resized:
    """What a run at new sizes tells.

    Attributes:
        channels: the channels at the new sizes.
        modules: the attributes that had to follow.
        flops: floating-point operations of the run.
    """

    channels: Channels
    modules: tuple[ModuleEdit, ...]
    flops: int


def run_resized(
    traced: Traced,
    shapes: Mapping[str, tuple[int, ...]],
    convolution_groups: Mapping[str, int],
) -> Resized:
    """Run the stand-in's own forward at new sizes, and put it back as it was.

    Raises:
        TraceError: the network does not run at these sizes.
    """
    edits = tuple(attribute_edits(traced.standin, shapes, convolution_groups))
    with _resized(traced.standin, shapes, edits):
        space, tape = traced.label_module()
    return Resized(resolve(space), edits, tape.flops)


@contextlib.contextmanager
def _resized(
    standin: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    edits: tuple[ModuleEdit, ...],
) -> Iterator[None]:
    """Swap tensors and attributes of a stand-in for a while; ties stay tied."""
    before = named_tensors(standin)
    fresh: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        old = before[name]
        tensor = torch.empty(shape, dtype=old.dtype, device="meta")
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        fresh[id(old)] = tensor
    _swap(standin, {name: fresh[id(t)] for name, t in before.items() if id(t) in fresh})
    for edit in edits:
        setattr(standin.get_submodule(edit.module), edit.attribute, edit.after)
    try:
        yield
    finally:
        _swap(standin, {name: t for name, t in before.items() if id(t) in fresh})
        for edit in edits:
            setattr(standin.get_submodule(edit.module), edit.attribute, edit.before)


def _swap(standin: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        owner = standin.get_submodule(layer_of(name) if "." in name else "")
        local = name.rpartition(".")[2]
        table = owner._parameters if local in owner._parameters else owner._buffers
        table[local] = tensor  # type: ignore[assignment]
