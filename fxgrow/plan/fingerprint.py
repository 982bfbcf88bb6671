"""What tells one network from another: the names, shapes and dtypes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every tensor by name: what a plan is made for."""
    return {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }
