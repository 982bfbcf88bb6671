"""What a part of a network uses: what takes no part in a run, and what others use as well."""

from __future__ import annotations

import torch
from torch import nn

from fxgrow.labels.pins import PinKind
from fxgrow.labels.space import LabelSpace
from fxgrow.modules.tensors import named_tensors


def unused(space: LabelSpace, standin: nn.Module, module: str) -> dict[str, int]:
    """Return the parameters with an axis to label that took no part in what was labelled.

    Args:
        space: the labels of some runs.
        standin: the network that ran.
        module: the submodule of it that is followed, "" for the whole.

    Returns:
        The ids of these parameters by their names in the whole.
    """
    tensors = named_tensors(standin)
    used = {id(tensors[axis.tensor]) for axis in space.axes if axis.tensor}
    inside = f"{module}." if module else ""
    return {
        name: id(tensor)
        for name, tensor in tensors.items()
        if name.startswith(inside)
        and id(tensor) not in used
        and isinstance(tensor, nn.Parameter)
        and max(tensor.shape, default=1) > 1
    }


def pin_shared(space: LabelSpace, standin: nn.Module, module: str) -> None:
    """Pin what the rest of the network uses too: nobody sees what it does there.

    Args:
        space: the labels of a submodule.
        standin: the whole network.
        module: the submodule, "" for the whole.
    """
    if not module:
        return
    tensors = named_tensors(standin)
    inside = f"{module}."
    outside = {id(t): name for name, t in tensors.items() if not name.startswith(inside)}
    for axis in space.axes:
        other = outside.get(id(tensors[axis.tensor])) if axis.tensor else None
        if other is not None:
            labels = torch.arange(axis.start, axis.start + axis.size)
            space.pin(labels, PinKind.OUTSIDE, other, module)
