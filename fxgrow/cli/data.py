"""Inits from data on the command line: ``--init tiny --data batches.pt``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fxgrow.errors import SourceError, UsageError
from fxgrow.plan.by_layer import values_in

if TYPE_CHECKING:
    from torch import nn

    from fxgrow.grow.data import DataDriven

METHODS = ("tiny", "gradmax")


def _method(name: str) -> type[DataDriven]:
    """Return the class of an init from data by its name on the command line."""
    from fxgrow.grow.data import GradMax, Tiny

    return {"tiny": Tiny, "gradmax": GradMax}[name]


class DataInit:
    """An init from data, made when there is a network, and then once.

    Args:
        method: one of :data:`METHODS`.
        data: the file with the batches.
        loss: a name; None infers it from the targets.
        keep: at most so many directions for each group; None for no such limit.
        threshold: the least strength, as a part of the strongest.

    Raises:
        UsageError: there is no such method, or no data.
        SourceError: there is no such file.
    """

    def __init__(
        self,
        method: str,
        data: Path | None,
        loss: str | None = None,
        keep: int | None = None,
        threshold: float = 0.0,
    ) -> None:
        if method not in METHODS:
            raise UsageError(
                f"there is no method {method!r}.", way_out=f"Known: {', '.join(METHODS)}."
            )
        if data is None:
            raise UsageError(
                f"{method} computes new channels from data, and there is none.",
                way_out="Give batches: --data batches.pt, which torch.save([(inputs, targets), …], "
                "PATH) writes.",
            )
        if not os.path.lexists(data):  # before anything is read
            raise SourceError(
                f"{data} does not exist.", name=str(data), way_out="Check the path given to --data."
            )
        self._method, self._data, self._loss = method, data, loss
        self._limits: dict[str, Any] = {"keep": keep, "threshold": threshold}
        self._made: DataDriven | None = None

    def __call__(self, model: nn.Module) -> DataDriven:
        """Return the init, with batches on a network's device and in its dtype.

        Raises:
            SourceError: the file holds no batches.
            PlanError: no loss can be inferred from them, or there is none of that name.
        """
        if self._made is None:
            self._made = self._of(model)
        return self._made

    def _of(self, model: nn.Module) -> DataDriven:
        from fxgrow.files.batches import read_batches
        from fxgrow.files.checkpoint.reading import about
        from fxgrow.grow.data.losses import LOSSES, inferred_loss

        batches = _moved(read_batches(self._data), model)
        with about(self._data):
            loss = self._loss or inferred_loss(batches)
        if self._loss is None:
            why = "whole numbers" if loss == "cross_entropy" else "no whole numbers"
            typer.echo(f"loss: {loss}, since the targets are {why}", err=True)
        return _method(self._method)(LOSSES[loss], batches, **self._limits)


def data_init(
    init: str | Mapping[str, str],
    data: Path | None,
    loss: str | None,
    keep: int | None,
    threshold: float,
) -> DataInit | None:
    """Return the init from data that options ask for, or None if they ask for another.

    Raises:
        UsageError: options for data are given without an init that takes any.
    """
    if isinstance(init, str) and init in METHODS:
        return DataInit(init, data, loss, keep, threshold)
    if any(name in METHODS for name in values_in(init)):
        raise UsageError(
            "an init from data computes the new weights of all layers together, and is not taken "
            "for some of them.",
            way_out="Give it as the one --init, and choose what grows with --include.",
        )
    given = {"--data": data, "--loss": loss, "--keep": keep, "--threshold": threshold or None}
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} says nothing without an init that takes data.",
                way_out=f"Use --init {' or --init '.join(METHODS)}.",
            )
    return None


def _moved(batches: Sequence[tuple[Any, Any]], model: nn.Module) -> list[tuple[Any, Any]]:
    """Return batches on a network's device, with floating numbers in its dtype."""
    import torch

    from fxgrow.modules.calling import map_tensors

    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(1))

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        dtype = first.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(first.device, dtype)

    return [(map_tensors(moved, inputs), moved(targets)) for inputs, targets in batches]
