"""Sizes rewritten where the code of a module makes its calls, if there is no graph to do it in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxgrow.grow.sizes.literals import CallSite, Repair
from fxgrow.labels.trace import Traced
from fxgrow.plan.edits import SizeEdit

_LARGER = (2, 4, 8)  # times as large as the images at hand: code may decide by their sizes
_Ends: TypeAlias = tuple[tuple[int | None, ...], tuple[int | None, ...]]


def edits_in_code(
    runs: Sequence[tuple[Sequence[Repair], Sequence[CallSite]]],
) -> tuple[SizeEdit, ...] | None:
    """Return the sizes to be rewritten in the code of modules, line by line.

    Args:
        runs: of each run, the sizes that were wrong, and where each call that takes sizes was made.

    Returns:
        None where a call is made of several sizes that change in different ways.
    """
    lines: dict[tuple[str, str], dict[str, list[Repair | None]]] = {}
    for repairs, sites in runs:
        by_call = {repair.call: repair for repair in repairs}
        for place, site in enumerate(sites):
            calls = lines.setdefault((site.module, site.at), {})
            calls.setdefault(site.call, []).append(by_call.get(place))
    found: list[SizeEdit] = []
    for (module, line), calls in lines.items():
        if not any(repair for repairs in calls.values() for repair in repairs):
            continue
        whole = _edit([x for repairs in calls.values() for x in repairs], module, line)
        apart = [_edit(repairs, module, call) for call, repairs in calls.items() if any(repairs)]
        edits = [whole] if whole or len(calls) == 1 else apart
        if not line or None in edits:
            return None
        found += [edit for edit in edits if edit is not None]
    return tuple(found)


def _edit(repairs: Sequence[Repair | None], module: str, at: str) -> SizeEdit | None:
    """Return what changes all sizes of some calls in one ratio, None if some stay or differ."""
    wrong = [repair for repair in repairs if repair is not None]
    ends = [_changing(repair) for repair in wrong]
    if len(wrong) < len(repairs) or any(_ratios(ends[0]) != _ratios(other) for other in ends):
        return None
    return SizeEdit("", wrong[0].function, *ends[0], module, at)


def _changing(repair: Repair) -> _Ends:
    """Return the sizes of a repair before and after, -1 for those that stay."""
    pairs = zip(repair.given, repair.wanted, strict=True)
    kept = [(-1, -1) if old is not None and old == new else (old, new) for old, new in pairs]
    return tuple(old for old, _ in kept), tuple(new for _, new in kept)


def _ratios(ends: _Ends) -> list[Fraction | None]:
    """Return by how much each size grows."""
    return [Fraction(new, old) if old and new else None for old, new in zip(*ends, strict=True)]


def at_larger_images(traced: Traced) -> Iterator[Traced]:
    """Yield the network with larger images, if it takes images.

    Args:
        traced: the network, with the inputs at hand.
    """

    def larger(factor: int, value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.ndim < 4:
            return value
        sizes = (*value.shape[:2], *(factor * size for size in value.shape[2:]))
        return torch.empty(sizes, dtype=value.dtype, device="meta")

    for factor in _LARGER:
        inputs = pytree.tree_map_only(Tensor, lambda x, by=factor: larger(by, x), traced.inputs)
        shapes = replace(traced, inputs=inputs, inferred=False)
        if shapes.input_shapes == traced.input_shapes:
            return
        yield shapes
