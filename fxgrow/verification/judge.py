"""Judge a result before it is written, with code that shares nothing with the planner.

Three networks run in float64 on the same inputs, one after the other: the old one, the grown one
and the *reference*: the old one with the multipliers that the plan predicts. The grown network must
equal the reference; where the plan says that the function is preserved, the reference is the old
network itself. They do so twice: with the given weights, and once more with drawn ones, since a
head of zeros equals any other (:mod:`fxgrow.verification.weights`). Then the old and the grown
network run once more as they are, in their own dtype.

Eval mode and train mode (batch statistics; dropout off) are judged alike. In train mode a norm
that absorbed a gain s computes what the old one would with eps / s², and the reference does so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from fxgrow.modules.calling import tensors_in
from fxgrow.modules.tensors import named_tensors
from fxgrow.verification.cases import Case, Drawn, Inputs
from fxgrow.verification.findings import ExactResult, Judgement, ModeResult, Verification
from fxgrow.verification.forward import Mode
from fxgrow.verification.runs import Runs

TOLERANCE = 1e-10  # of max |after − predicted| / max |predicted|, in float64
NATIVE_FACTOR = 100.0  # a network may round this many times worse than another
# … and one that equals the other in float64, and has its weights, this many times; it is told.
MADE_FACTOR = 1000.0
# Outputs of given weights that are next to nothing (a layer of zeros, a constant less its mean) are
# not judged by their own size; drawn weights tell of the rest.
NEGLIGIBLE = 1e-11
NEGLIGIBLE_UNITS, _LEAST = 4096, 1e-3  # as saved: in rounding units, and never more than this
# … but where that would excuse anything (half precision) only as much as this, or a few times what
# the old one does.
_MOST, _FEW = 0.05, 4.0


def judge(
    case: Case, inputs: Inputs, progress: Callable[[float], object] = lambda done: None
) -> Verification:
    """Run the networks of a case and return the judgement; raises nothing on failure.

    Args:
        case: the networks.
        inputs: arguments of ``forward``, floating-point ones in the networks' own dtype.
        progress: called with the fraction that is done.

    Raises:
        VerificationError: one of the networks does not run.
    """
    runs = Runs(case, inputs, progress)
    given: dict[Mode, ModeResult] = {}
    for mode, result in runs.given(TOLERANCE):
        given[mode] = result if mode not in given else given[mode].worst(result)
    if inputs.same_modes:
        given.setdefault("train", given["eval"])
    drawn = runs.drawn(TOLERANCE)
    batches = [batch for batch, _ in (*inputs.given, *inputs.drawn)]
    return Verification(
        verdict=_verdict(case, given, drawn, runs.excused),
        eval=given["eval"],
        train=given.get("train"),
        drawn=_worst(found.result for found in drawn),
        effort=case.effort,
        inputs=tuple("x".join(map(str, t.shape)) for batch in batches for t in tensors_in(batch)),
        without_gradient=runs.gradients.missing,
        notes=(*case.notes, *runs.notes, *runs.gradients.notes),
    )


def _worst(results: Iterable[ExactResult]) -> ExactResult | None:
    found = tuple(results)
    return functools.reduce(ExactResult.worst, found) if found else None


def _verdict(
    case: Case,
    given: Mapping[Mode, ModeResult],
    drawn: Iterable[Drawn],
    excused: Mapping[Mode, float],
) -> Judgement:
    """Return the judgement; NaN compares as failed."""
    if not case.predictable:
        return "changed"
    for mode, result in given.items():
        if mode not in case.judged:
            continue
        if not result.residual.within(max(TOLERANCE, excused.get(mode, 0.0)), NEGLIGIBLE):
            return "failed"
        floor = native_bound(result, case.after.module, MADE_FACTOR)
        nothing = min(NEGLIGIBLE_UNITS * coarsest(case.after.module), _LEAST)
        if not result.native.within(result.predicted.max_rel + floor, nothing):
            return "failed"
    for found in drawn:
        tolerance = max(TOLERANCE, found.rounding)
        if found.mode in case.judged and not found.result.residual.within(tolerance):
            return "failed"
    return "preserved" if given["eval"].predicted.max_rel <= TOLERANCE else "as predicted"


def agree(result: ModeResult, model: nn.Module) -> bool:
    """Return whether two given networks agree within what the second one's dtype rounds."""
    bound = native_bound(result, model)
    return all(errors.within(bound) for errors in (result.float64, result.native))


def native_bound(result: ModeResult, model: nn.Module, factor: float = NATIVE_FACTOR) -> float:
    """Return the relative deviation that the networks' own dtype excuses."""
    own = result.rounding.max_rel if math.isfinite(result.rounding.max_rel) else 0.0
    bound = min(factor * max(own, coarsest(model)), max(_MOST, _FEW * own))
    return max(TOLERANCE, bound)


def coarsest(model: nn.Module) -> float:
    """Return the coarsest rounding unit among a network's floating-point tensors."""
    dtypes = {t.dtype for t in named_tensors(model).values() if t.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
