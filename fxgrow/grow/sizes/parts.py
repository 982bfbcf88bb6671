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
        None where a line makes calls of several sizes that change in different ways.
    """
    found: dict[CallSite, tuple[str, _Ends]] = {}
    right: set[CallSite] = set()
    for repairs, sites in runs:
        by_call = {repair.call: repair for repair in repairs}
        for place, site in enumerate(sites):
            repair = by_call.get(place)
            if repair is None:
                right.add(site)
                continue
            ends = _changing(repair)
            known = found.setdefault(site, (repair.function, ends))[1]
            if not site.at or _ratios(known) != _ratios(ends):
                return None
    if right & found.keys():
        return None
    return tuple(
        SizeEdit("", function, *ends, site.module, site.at)
        for site, (function, ends) in found.items()
    )


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
