"""One call in every way that channels can enter: right, missing or wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fxgrow.labels.validate.checks import (
    SampleCase,
    UnmatchedError,
    alike,
    check_flow,
    check_locality,
    run,
)
from fxgrow.labels.validate.claims import SampleCall, Way, claims_of, label, ways_of
from fxgrow.labels.validate.following import check_gain, check_padding
from fxgrow.labels.validate.widening import check_widening


class Outcome(NamedTuple):
    """What came of labelling a call in one way.

    Attributes:
        kind: whether what is claimed is right, nothing is claimed, or something wrong is; or the
            call gives other values each time.
        way: how the operands came in.
        reason: what is wrong, or why nothing is claimed.
    """

    kind: Literal["right", "missing", "wrong", "unchecked"]
    way: Way
    reason: str = ""


def outcomes_of(call: SampleCall, way: Way | None = None) -> Iterator[Outcome]:
    """Yield what comes of a call in each way, or in one of them; nothing if it is random."""
    operands = call.operands
    try:
        results = run(call, operands)
    except Exception:  # a sample for other devices, which torch refuses on this one
        return
    dense = all(x.layout is torch.strided and not x.is_nested for x in results)
    if not dense or not _is_determined(call, operands, results):
        return
    on_meta = _runs_on_meta(call, operands)
    for own in ways_of(operands) if way is None else (way,):
        try:
            yield _outcome(call, own, operands, results)
        except Exception as error:  # whatever goes wrong is what is looked for
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if on_meta:
                yield Outcome("wrong", own, what)
            else:
                yield Outcome("missing", own, "torch does not run it without values")


def _outcome(
    call: SampleCall, way: Way, operands: Sequence[Tensor], results: Sequence[Tensor]
) -> Outcome:
    labelled = label(call, way, operands)
    claims = claims_of(labelled)
    if not len(claims.channels):
        return Outcome("missing", way, claims.pins[0] if claims.pins else "nothing is said of it")
    if claims.is_random:
        return Outcome("unchecked", way)
    # Some statistics that serve the backward pass are of another shape on meta tensors.
    fits = [x.shape == shape for x, shape in zip(results, claims.shapes, strict=True)]
    is_open = tuple(a or not b for a, b in zip(claims.is_open, fits, strict=True))
    told = [[] if gap else layers for gap, layers in zip(is_open, claims.results, strict=True)]
    claims = replace(claims, is_open=is_open, results=told)
    case = SampleCase(call, way, operands, results, labelled, claims)
    for check in (check_flow, check_locality, check_widening, check_gain, check_padding):
        try:
            wrong = check(case)
        except UnmatchedError:
            continue
        if wrong:
            return Outcome("wrong", way, f"{wrong} ({call})")
    return Outcome("right", way)


def _is_determined(call: SampleCall, operands: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    """Return whether a call gives the same for every seed and memory."""
    again = run(call, operands, seed=1)
    return len(again) == len(results) and all(
        a.shape == b.shape and bool(alike(a, b).all()) for a, b in zip(results, again, strict=True)
    )


def _runs_on_meta(call: SampleCall, operands: Sequence[Tensor]) -> bool:
    """Return whether torch by itself runs a call on meta tensors."""
    try:
        with torch.no_grad():
            call.on([x.to("meta") for x in operands])
    except Exception:  # as many kinds as there are operators
        return False
    return True
