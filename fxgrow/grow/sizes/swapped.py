"""A network at other sizes, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fxgrow.apply.trial import set_attributes
from fxgrow.modules.states import set_state
from fxgrow.modules.tensors import named_tensors, states_of
from fxgrow.plan.edits import ModuleEdit


@contextlib.contextmanager
def resized(
    standin: nn.Module, shapes: Mapping[str, tuple[int, ...]], edits: tuple[ModuleEdit, ...]
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
    set_attributes(standin, edits)
    try:
        yield
    finally:
        _swap(standin, {name: t for name, t in before.items() if id(t) in fresh})
        set_attributes(standin, edits, back=True)


def _swap(standin: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    states = states_of(standin)
    for name, tensor in tensors.items():
        if name in states:
            set_state(standin, name, tensor)
            continue
        owner, _, local = name.rpartition(".")
        module = standin.get_submodule(owner)
        held = module._parameters if local in module._parameters else module._buffers
        held[local] = tensor  # type: ignore[assignment]
