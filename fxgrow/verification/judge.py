"""Judge a result before it is written, with code that shares nothing with the planner.

Three networks run in float64 on the same inputs: the old one, the grown one (surgery done on a
float64 copy, so that the algebra shows as 1e-15 or so and not as the rounding of the weights, and
with float64 wherever the networks' own code asks for less), and
the *reference*: the old one with the multipliers that the plan predicts. The grown network must
equal the reference; where the plan says that the function is preserved, the reference is the old
network itself. Then the old and the grown network run once more as they are, in their own dtype.

Eval mode and train mode (batch statistics; dropout off) are judged alike. In train mode a norm
that absorbed a gain s computes what the old one would with eps / s², and the reference does so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxgrow.modules.calling import Arguments, tensors_in
from fxgrow.modules.expectation import Expectation
from fxgrow.modules.standin import stand_in
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import NormGain, TensorEdit
from fxgrow.verification.forward import Mode, in_double, outputs_of, shown
from fxgrow.verification.gradients import check_gradients

Judgement = Literal["preserved", "as predicted", "failed", "skipped"]

TOLERANCE = 1e-10  # of max |after − predicted| / max |predicted|, in float64
# Smaller deviations count as none, so that outputs which are nothing but rounding (a constant less
# its mean, say) are not judged by their own size.
NEGLIGIBLE = 1e-11
NEGLIGIBLE_UNITS = 4096  # the same for the native dtype, in its rounding units
NATIVE_FACTOR = 100.0  # the grown network may round this many times worse than the old one


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


@dataclass(frozen=True)
class ModeResult:
    """What was measured in one mode.

    Attributes:
        float64: grown against old network, in float64.
        native: the same in the network's own dtype.
        rounding: the old network in its own dtype against itself in float64.
        predicted: how far the prediction is from the old network, in float64.
        residual: grown network against the prediction, in float64.
    """

    float64: Errors = field(default_factory=Errors)
    native: Errors = field(default_factory=Errors)
    rounding: Errors = field(default_factory=Errors)
    predicted: Errors = field(default_factory=Errors)
    residual: Errors = field(default_factory=Errors)

    def worst(self, other: ModeResult) -> ModeResult:
        """Return the larger of each figure."""
        return ModeResult(
            float64=self.float64.worst(other.float64),
            native=self.native.worst(other.native),
            rounding=self.rounding.worst(other.rounding),
            predicted=self.predicted.worst(other.predicted),
            residual=self.residual.worst(other.residual),
        )


@dataclass(frozen=True)
class Verification:
    """The judgement and what it rests on.

    Attributes:
        verdict: ``preserved``, ``as predicted`` (the function changed as the plan said),
            ``failed`` or ``skipped``.
        eval, train: measurements; None if skipped.
        inputs: shapes of the inputs, as text.
        without_gradient: grown tensors whose new entries received no gradient in two steps.
        notes: what a reader should know of the measurement.
    """

    verdict: Judgement
    eval: ModeResult | None = None
    train: ModeResult | None = None
    inputs: tuple[str, ...] = ()
    without_gradient: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """What is to be judged.

    Attributes:
        before, after: the networks as they are; neither is changed.
        exact_before, exact_after: both in float64, the second made from the first.
        reference: the float64 network that the grown one must equal.
        norms: norms of the reference that absorbed a gain.
        predictable: whether the reference predicts the grown network at all.
        edits: grown tensors, for the gradient check (none: no check).
        notes: to be passed on.
        judged: the modes in which the result must be what is predicted; the other is measured.
    """

    before: nn.Module
    after: nn.Module
    exact_before: nn.Module
    exact_after: nn.Module
    reference: nn.Module
    norms: tuple[NormGain, ...] = ()
    predictable: bool = True
    edits: Mapping[str, TensorEdit] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    judged: tuple[Mode, ...] = ("eval", "train")


def judge(
    case: Case, batches: Sequence[Arguments], progress: Callable[[], None] = lambda: None
) -> Verification:
    """Run the networks of a case and return the judgement; raises nothing on failure.

    Args:
        case: the networks.
        batches: arguments of ``forward``, floating-point ones in the networks' own dtype.
        progress: called after each batch in each mode.
    """
    runs = _Runs(case)
    results: dict[Mode, ModeResult] = {}
    modes: tuple[Mode, ...] = ("eval", "train")
    for mode in modes:
        result = ModeResult()
        for batch in batches:
            result = result.worst(runs.compare(batch, mode))
            progress()
        results[mode] = result
    gradients = check_gradients(case.exact_after, case.edits, batches[0])
    return Verification(
        verdict=_verdict(case, results),
        eval=results["eval"],
        train=results["train"],
        inputs=tuple("x".join(map(str, t.shape)) for batch in batches for t in tensors_in(batch)),
        without_gradient=gradients.missing,
        notes=(*case.notes, *gradients.notes),
    )


class _Runs:
    """Runs the networks of a case, in float64 and, where that is another, in their own dtype."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._exactly = Expectation(exact=True)
        self._exact_is_native = (
            _epsilon(case.after) <= torch.finfo(torch.float64).eps and not case.notes
        )
        buffers = (b for b in case.reference.buffers() if b.is_floating_point())
        self._statistics = [(buffer, buffer.clone()) for buffer in buffers]

    @cached_property
    def _native(self) -> tuple[nn.Module, nn.Module]:
        """Copies of the networks before and after as they are."""
        return stand_in(self._case.before, {}), stand_in(self._case.after, {})

    def compare(self, batch: Arguments, mode: Mode) -> ModeResult:
        """Return what one batch shows in one mode."""
        case = self._case
        exact = in_double(batch)
        before = outputs_of(case.exact_before, exact, mode, self._exactly)
        after = outputs_of(case.exact_after, exact, mode, self._exactly, grown=True)
        predicted = before
        norms = case.norms if mode == "train" else ()
        if case.reference is not case.exact_before or norms:
            for buffer, value in self._statistics:  # a run in train mode has moved them
                buffer.copy_(value)
            with _absorbing(case.reference, norms):
                predicted = outputs_of(case.reference, exact, mode, self._exactly)
        old, new = before, after
        if not self._exact_is_native or self._exactly.casts:
            old, new = (outputs_of(model, batch, mode, Expectation()) for model in self._native)
        return ModeResult(
            float64=_errors(before, after),
            native=_errors(old, new),
            rounding=_errors(before, old),
            predicted=_errors(before, predicted),
            residual=_errors(predicted, after),
        )


def _verdict(case: Case, results: Mapping[Mode, ModeResult]) -> Judgement:
    """Return the judgement; NaN compares as failed."""
    if not case.predictable:
        return "as predicted"
    for result in (results[mode] for mode in case.judged):
        if not _within(result.residual, TOLERANCE, NEGLIGIBLE):
            return "failed"
        floor, negligible = _native_bounds(result, case)
        if not _within(result.native, result.predicted.max_rel + floor, negligible):
            return "failed"
    return "preserved" if results["eval"].predicted.max_rel <= TOLERANCE else "as predicted"


def agree(result: ModeResult, case: Case) -> bool:
    """Return whether two given networks agree within what their own dtype rounds."""
    bounds = _native_bounds(result, case)
    return all(_within(errors, *bounds) for errors in (result.float64, result.native))


def _native_bounds(result: ModeResult, case: Case) -> tuple[float, float]:
    """Return the relative and the absolute deviation that the networks' own dtype excuses."""
    epsilon = _epsilon(case.after)
    relative = NATIVE_FACTOR * max(result.rounding.max_rel, epsilon)
    return max(TOLERANCE, relative), max(NEGLIGIBLE, NEGLIGIBLE_UNITS * epsilon)


def _within(errors: Errors, tolerance: float, negligible: float) -> bool:
    """Return whether deviations are within tolerance or negligible; NaN is neither."""
    return errors.max_rel <= tolerance or errors.max_abs <= negligible


def _epsilon(model: nn.Module) -> float:
    """Return the coarsest rounding unit among a network's floating-point tensors."""
    dtypes = {t.dtype for t in named_tensors(model).values() if t.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def _errors(before: Sequence[Tensor], after: Sequence[Tensor]) -> Errors:
    """Return the largest deviations; entries that are NaN in both are equal."""
    if len(before) != len(after):
        return Errors(math.inf, math.inf)
    worst = Errors()
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            return Errors(math.inf, math.inf)
        if not old.numel() or not old.is_floating_point():
            continue
        old, new = old.double(), new.double()
        same = (old == new) | (old.isnan() & new.isnan())
        gap = torch.where(same, 0.0, (new - old).abs())
        largest = float(gap.max())
        if math.isnan(largest):
            return Errors(math.inf, math.inf)
        scale = float(torch.where(old.isfinite(), old.abs(), 0.0).max())
        worst = worst.worst(Errors(largest, largest / scale if scale else largest))
    return worst


@contextlib.contextmanager
def _absorbing(reference: nn.Module, norms: Sequence[NormGain]) -> Iterator[None]:
    """Make norms behave, for a while, as they do in train mode after absorbing a gain s.

    Batch statistics meet eps / s² instead of eps; and channels whose running variance is too
    small to absorb s alone had their weight changed.
    """
    changed: list[tuple[Any, float, Tensor]] = []
    try:
        for norm in norms:
            module: Any = reference.get_submodule(norm.module)
            changed.append((module, module.eps, module.weight.detach().clone()))
            shifted = module.running_var + module.eps
            ratio = module.eps / (norm.gain**2 * shifted)
            with torch.no_grad():
                module.weight *= ratio.sqrt().clamp(min=1.0)
            module.eps = module.eps / norm.gain**2
        yield
    finally:
        for module, eps, weight in changed:
            module.eps = eps
            with torch.no_grad():
                module.weight.copy_(weight)


def notes_on(broken: Sequence[str]) -> tuple[str, ...]:
    """Return what to say of tensors with entries that are not finite."""
    if not broken:
        return ()
    return (f"{shown(broken)}: NaN or infinite entries were taken as 0 in the float64 check",)
