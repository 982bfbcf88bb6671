"""What is judged, and on what, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from fxgrow.modules.calling import Arguments
from fxgrow.plan.edits import NormGain, TensorEdit
from fxgrow.verification.exact import Weights
from fxgrow.verification.findings import Effort, ExactResult
from fxgrow.verification.forward import Mode

Modes: TypeAlias = tuple[Mode, ...]


@dataclass(frozen=True)
class Network:
    """A network to be judged.

    Attributes:
        module: as it is; never changed.
        given: its weights in float64, by name.
        drawn: drawn ones, the most thoroughly drawn first.
        finish: what is done to it in place before it runs, as it was done to ``module``.
    """

    module: nn.Module
    given: Weights
    drawn: tuple[Weights, ...] = ()
    finish: Callable[[nn.Module], object] | None = None

    def weights(self, level: int | None) -> Weights:
        """Return drawn weights, or for None the given ones."""
        return self.given if level is None else self.drawn[level]


@dataclass(frozen=True)
class Case:
    """What is to be judged.

    Attributes:
        before, after: the networks.
        reference: what the grown one must equal; None for the old one.
        part: the submodule that runs, by its fully qualified name; "" for the whole.
        norms: norms that absorbed a gain, by their names in the whole.
        predictable: whether anything predicts the grown network at all.
        edits: grown tensors by their names in the whole, for the gradient check; none, no check.
        notes: to be passed on.
        judged: the modes in which the result must be what is predicted; the other is measured.
        effort: ``full`` or ``quick``.
    """

    before: Network
    after: Network
    reference: Network | None = None
    part: str = ""
    norms: tuple[NormGain, ...] = ()
    predictable: bool = True
    edits: Mapping[str, TensorEdit] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    judged: tuple[Mode, ...] = ("eval", "train")
    effort: Effort = "full"

    def is_inside(self, name: str) -> bool:
        """Return whether a name is one in the part that runs."""
        return not self.part or name.startswith(f"{self.part}.")


@dataclass(frozen=True)
class Inputs:
    """What a case is judged on.

    Attributes:
        given: batches for the given weights, each with the modes in which they run; the first runs
            in eval mode.
        drawn: batches for drawn weights, likewise.
        same_modes: train mode does what eval mode does, and is not run.
        writes: whether forwards may write into parameters, so that no network may lend its own.
    """

    given: Sequence[tuple[Arguments, Modes]]
    drawn: Sequence[tuple[Arguments, Modes]] = ()
    same_modes: bool = False
    writes: bool = True


@dataclass(frozen=True)
class Drawn:
    """What one batch shows on drawn weights.

    Attributes:
        mode: the mode.
        result: the measurement.
        rounding: the relative deviation that is no more than rounding in this network.
    """

    mode: Mode
    result: ExactResult
    rounding: float = 0.0
