"""How the innermost module around two layers was called, so that it can be run by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.errors import PlanError
from fxgrow.grow.data.pairs import LayerPair
from fxgrow.grow.data.skipped import note_ends
from fxgrow.modules.calling import Arguments, call, map_tensors


class Stop(Exception):  # noqa: N818 - no error
    """Ends a run where all is known that was asked for."""


@dataclass(frozen=True)
class Entered:
    """How the innermost module around a pair of layers was called.

    Attributes:
        owner: its name.
        args, kwargs: its arguments, in float64.
        written: what the writer puts out, zeros in its shape.
        ended: what its parts put out before the writer did, by their names there and by call.
    """

    owner: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    written: Tensor
    ended: dict[str, list[Any]]


def channel_dim_of(module: nn.Module, layer: str) -> int:
    """Return the dim of the channels in what a layer puts out, counted from the end."""
    return 1 - module.get_parameter(f"{layer}.weight").ndim


def enter(network: nn.Module, pair: LayerPair, inputs: Arguments) -> Entered:
    """Run a network up to a writer, and return how the innermost module around it was called."""
    names = [pair.writer, *(reader.name for reader in pair.readers), *pair.carriers]
    called: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    written: list[Tensor] = []
    ended: dict[str, list[Any]] = {}
    dim = channel_dim_of(network, pair.writer)

    def noting(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called[name] = map_tensors(_doubled, (args, kwargs))
            ended.clear()

        return note

    def write(_: nn.Module, __: object, output: Tensor) -> None:
        shape = list(output.shape)
        shape[dim] = pair.block
        written.append(torch.zeros(shape, dtype=torch.float64, device=output.device))
        raise Stop

    handles = [network.get_submodule(pair.writer).register_forward_hook(write)]
    handles += note_ends(network, ended)
    for name in _around(names):
        module = network.get_submodule(name)
        handles.append(module.register_forward_pre_hook(noting(name), with_kwargs=True))
    try:
        with torch.no_grad(), contextlib.suppress(Stop):
            call(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not written:
        raise PlanError(f"a batch does not run {pair.writer}.", name=pair.group)
    owner = max(called, key=len)
    start = f"{owner}." if owner else ""
    own = {n.removeprefix(start): told for n, told in ended.items() if n.startswith(start)}
    return Entered(owner, *called[owner], written[0], own)


def _doubled(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, in float64 if it holds floating-point numbers."""
    copy = tensor.detach().clone()
    return copy.double() if copy.is_floating_point() else copy


def _around(names: list[str]) -> Iterator[str]:
    """Yield the names of the modules that hold all of some parts, the innermost first."""
    split = [name.split(".")[:-1] for name in names]
    shared = 0
    for level in zip(*split, strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    for length in range(shared, -1, -1):
        yield ".".join(split[0][:length])
