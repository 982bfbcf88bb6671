"""What a network is followed on, where batches of data are given and no example inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.scope import follow
from fxgrow.errors import TooLargeError, TraceError
from fxgrow.grow.data import DataDriven
from fxgrow.grow.data.batches import size_of
from fxgrow.modules.calling import map_tensors, tensors_in

_MOST = 2  # samples, which tell as much of channels as all do


def example_of(init: object, module: str = "") -> Any:
    """Return the inputs of the first batch of an init from data, or None without one.

    Args:
        init: any.
        module: a submodule that is followed by itself, which takes other inputs; "" for the whole.

    Returns:
        The inputs; their first samples alone where every tensor has one entry for each.
    """
    if module or not isinstance(init, DataDriven):
        return None
    inputs = init.batches[0][0]
    count = size_of(init.batches[0])
    if all(tensor.ndim and len(tensor) == count for tensor in tensors_in(inputs)):

        def first(tensor: Tensor) -> Tensor:
            return tensor[:_MOST]

        return map_tensors(first, inputs)
    return inputs


def follow_on(
    model: nn.Module, example_inputs: object, module: str, init: object
) -> tuple[tuple[Analysis, ...], tuple[str, ...]]:
    """Follow a network on example inputs, else on those of a batch, else on what is inferred.

    Args and errors are those of :func:`fxgrow.channels.scope.follow`.
    """
    example = example_of(init, module) if example_inputs is None else None
    if example is None:
        return follow(model, example_inputs, module)
    try:
        return follow(model, example)
    except TooLargeError:
        raise
    except TraceError:
        try:
            return follow(model)  # parts of it, on inputs of their own
        except TraceError:
            pass
        raise
