"""What tells one network from another: the names, shapes and dtypes of its tensors."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from fxgrow.modules.tensors import named_tensors, states_of


def fingerprint(
    model: nn.Module, edited: Collection[str]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every tensor by name: what a plan is made for.

    Args:
        model: the network, or one of its shapes.
        edited: names of what the plan changes. First states that it does not change are left out:
            a forward may have put others in their place.
    """
    states = states_of(model)
    return {
        name: described(tensor)
        for name, tensor in named_tensors(model).items()
        if name in edited or name not in states
    }


def described(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    """Return the shape and the dtype of a tensor."""
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
