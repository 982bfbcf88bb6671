"""Runs of a module in which what ended before a layer stands still: zeros take its place.

What lies between two layers depends on what the first puts out, and on weights, alone. So whatever
ran before it need not run again, as long as its results have their shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.modules.calling import map_tensors
from fxgrow.modules.standin import stand_in


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module in eval mode, of which no parameter gets a gradient.

    It shares nothing: forwards may write into parameters, as those do that are set by first data.
    """
    return stand_in(module, {}).eval().requires_grad_(requires_grad=False)


def note_ends(network: nn.Module, into: dict[str, list[Any]]) -> list[Any]:
    """Note what each module without others in it puts out, on the meta device, call by call.

    Args:
        network: runs afterwards.
        into: by name.

    Returns:
        The handles of the hooks.
    """

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: object, output: Any) -> None:
            into.setdefault(name, []).append(
                map_tensors(lambda t: torch.empty_like(t, device="meta"), output)
            )

        return note

    leaves = [(name, part) for name, part in network.named_modules() if not [*part.children()]]
    return [part.register_forward_hook(hook(name)) for name, part in leaves]


@contextlib.contextmanager
def skipping(
    module: nn.Module,
    ended: Mapping[str, Sequence[Any]],
    writer: str,
    written: Tensor,
    *,
    in_place: bool,
) -> Iterator[None]:
    """Have some of the calls of parts of a module return zeros, and those of a layer a tensor.

    Args:
        module: runs meanwhile.
        ended: by name, what each of the first calls of a part puts out, on the meta device.
        writer: name of the layer.
        written: what it puts out.
        in_place: whether code may write into the zeros, which are one number else: the outputs of
            early layers are large.
    """
    changed: list[nn.Module] = []

    def replaced(part: nn.Module, results: Sequence[Any]) -> Callable[..., Any]:
        calls, run = iter(results), part.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            result = next(calls, None)
            if result is None:
                return run(*args, **kwargs)
            return map_tensors(zeros, result)

        return forward

    def zeros(meta: Tensor) -> Tensor:
        dtype = torch.float64 if meta.is_floating_point() else meta.dtype
        shape = meta.shape if in_place else ()
        return torch.zeros(shape, dtype=dtype, device=written.device).expand(meta.shape)

    try:
        for name, results in ended.items():
            part = module.get_submodule(name)
            part.__dict__["forward"] = replaced(part, results)
            changed.append(part)
        layer = module.get_submodule(writer)
        layer.__dict__["forward"] = lambda *_, **__: written.clone()
        changed.append(layer)
        yield
    finally:
        for part in changed:
            part.__dict__.pop("forward", None)
