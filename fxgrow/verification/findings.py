"""What a judgement consists of, as plain data."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Judgement = Literal["preserved", "as predicted", "changed", "failed", "skipped"]
Effort = Literal["full", "quick", "none"]

_MOST_FILLS = 4  # different values that masks are filled with
_FILL = 1e6  # times the largest of all that differs: no part of one computation with it


@dataclass(frozen=True)
class Errors:
    """Largest deviations over all outputs and inputs.

    Attributes:
        max_abs: max |after − before|.
        max_rel: max |after − before| / max |before|.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0

    def worst(self, other: Errors) -> Errors:
        """Return the larger of each figure."""
        return Errors(max(self.max_abs, other.max_abs), max(self.max_rel, other.max_rel))

    def within(self, tolerance: float, negligible: float = 0.0) -> bool:
        """Return whether deviations are within a relative or an absolute bound; NaN is not."""
        return self.max_rel <= tolerance or self.max_abs <= negligible


@dataclass(frozen=True)
class ExactResult:
    """What was measured in float64.

    Attributes:
        float64: grown against old network.
        predicted: how far the prediction is from the old network.
        residual: grown network against the prediction.
    """

    float64: Errors = field(default_factory=Errors)
    predicted: Errors = field(default_factory=Errors)
    residual: Errors = field(default_factory=Errors)

    def worst(self, other: ExactResult) -> ExactResult:
        """Return the larger of each figure."""
        return ExactResult(
            self.float64.worst(other.float64),
            self.predicted.worst(other.predicted),
            self.residual.worst(other.residual),
        )


@dataclass(frozen=True)
class ModeResult:
    """What was measured in one mode.

    Attributes:
        float64: grown against old network, in float64.
        native: the same in the network's own dtype.
        rounding: the old network in its own dtype against itself in float64.
        predicted: how far the prediction is from the old network, in float64.
        residual: grown network against the prediction, in float64.
        grown_rounding: the grown network in its own dtype against the prediction in float64; None
            where nothing predicts it.
        ratio: ``grown_rounding`` over ``rounding``, the largest of all inputs; None where the old
            network does not round, and where nothing predicts the grown one.
    """

    float64: Errors = field(default_factory=Errors)
    native: Errors = field(default_factory=Errors)
    rounding: Errors = field(default_factory=Errors)
    predicted: Errors = field(default_factory=Errors)
    residual: Errors = field(default_factory=Errors)
    grown_rounding: Errors | None = None
    ratio: float | None = None

    @classmethod
    def of(cls, exact: ExactResult) -> ModeResult:
        """Return what was measured in float64 alone."""
        return cls(exact.float64, predicted=exact.predicted, residual=exact.residual)

    def worst(self, other: ModeResult) -> ModeResult:
        """Return the larger of each figure."""
        both = (self.grown_rounding, other.grown_rounding)
        roundings = [errors for errors in both if errors is not None]
        return ModeResult(
            float64=self.float64.worst(other.float64),
            native=self.native.worst(other.native),
            rounding=self.rounding.worst(other.rounding),
            predicted=self.predicted.worst(other.predicted),
            residual=self.residual.worst(other.residual),
            grown_rounding=functools.reduce(Errors.worst, roundings) if roundings else None,
            ratio=max((r for r in (self.ratio, other.ratio) if r is not None), default=None),
        )


@dataclass(frozen=True)
class Verification:
    """The judgement and what it rests on.

    Attributes:
        verdict: ``preserved``, ``as predicted`` (the function changed as the plan said),
            ``changed`` (the plan said that it would change, and could not say how), ``failed`` or
            ``skipped``.
        eval, train: measurements on the given weights; None if there are none.
        drawn: measurements in float64 on drawn weights, of both modes; None if there are none.
        effort: ``full``, ``quick`` (one small input, eval mode, the given weights) or ``none``.
        inputs: shapes of the inputs, as text.
        without_gradient: grown tensors whose new entries received no gradient in two steps.
        notes: what a reader should know of the measurement.
    """

    verdict: Judgement
    eval: ModeResult | None = None
    train: ModeResult | None = None
    drawn: ExactResult | None = None
    effort: Effort = "none"
    inputs: tuple[str, ...] = ()
    without_gradient: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def ratio_of(grown: Errors, own: Errors) -> float | None:
    """Return how many times a network's own rounding another's is; None without any."""
    return grown.max_rel / own.max_rel if 0 < own.max_rel < math.inf else None


def gap_between(old: Tensor, new: Tensor) -> Tensor:
    """Return how far numbers are apart; those that are NaN in both are the same, and infinities."""
    same = (old == new) | (old.isnan() & new.isnan())
    return torch.where(same, 0.0, (new - old).abs())


def scale_of(old: Tensor, gap: Tensor) -> float:
    """Return the largest magnitude of finite numbers, but for what masks are filled with.

    A few values that lie far beyond all that differs, and do not differ themselves (-1e9, the least
    number of a dtype), say nothing of how large the rest may be off.

    Args:
        old: the numbers.
        gap: how far each is from what it is in the other network; 0 where they are the same.
    """
    sizes = torch.where(old.isfinite(), old.abs(), 0.0)
    largest = float(sizes.max())
    differing = float(torch.where(gap == 0.0, 0.0, torch.maximum(sizes, gap)).max())
    for _ in range(_MOST_FILLS):
        is_fill = sizes == largest
        if largest <= _FILL * differing or not differing or bool(gap[is_fill].any()):
            break
        sizes = torch.where(is_fill, 0.0, sizes)
        largest = float(sizes.max())
    return largest


def errors_of(
    before: Sequence[Tensor], after: Sequence[Tensor], *, whole_numbers: bool = False
) -> Errors:
    """Return the largest deviations; entries that are NaN in both are equal.

    Args:
        before: the outputs of one network.
        after: those of the other.
        whole_numbers: those (classes) are compared too; any other one is infinitely far.
    """
    if len(before) != len(after):
        return Errors(math.inf, math.inf)
    worst = Errors()
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            return Errors(math.inf, math.inf)
        if old.is_complex() and new.is_complex():
            old, new = torch.view_as_real(old), torch.view_as_real(new)
        if not old.is_floating_point():
            if whole_numbers and not torch.equal(old, new):
                return Errors(math.inf, math.inf)
            continue
        if not old.numel():
            continue
        old, new = old.double(), new.double()
        gap = gap_between(old, new)
        largest = float(gap.max())
        if math.isnan(largest):
            return Errors(math.inf, math.inf)
        scale = scale_of(old, gap)
        worst = worst.worst(Errors(largest, largest / scale if scale else largest))
    return worst


def rounding_of(exact: Sequence[Tensor], native: Sequence[Tensor]) -> Errors:
    """Return how far a network's outputs are from those in float64, where they are finite.

    A mask of the lowest float64 number is infinite after a cast within the network, and a softmax
    of nothing else is NaN.
    """
    finite = [
        torch.where(own.isfinite(), wide, own.to(wide.dtype)) if wide.shape == own.shape else wide
        for wide, own in zip(exact, native, strict=False)
    ]
    return errors_of([*finite, *exact[len(finite) :]], native)
