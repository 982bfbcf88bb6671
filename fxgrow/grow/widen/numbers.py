"""Let the numbers that code makes of a width follow it, where the weights can take that up."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from fxgrow.channels.analysis import Analysis
from fxgrow.grow.norms.eta import Eta
from fxgrow.grow.norms.scales import Number, Scales, changed_numbers, compensated
from fxgrow.grow.obstacle import Obstacle
from fxgrow.grow.sizes.numbers import number_edits, scalar_factors
from fxgrow.grow.sizes.rerun import Resized, run_with
from fxgrow.grow.sizes.resize import Sizes


def with_numbers(
    analysis: Analysis,
    sizes: Sizes,
    found: Resized,
    eta: Eta,
    with_eps: Mapping[str, Mapping[str, float]],
) -> tuple[Resized, Scales, Obstacle | None]:
    """Return a run in which numbers follow the widths of streams, and who takes that up.

    Those that nobody can take up stay as they are, if attributes hold them; what stands in the way
    is a number that code makes of a width anew.

    Args:
        analysis: of the network.
        sizes: the new sizes.
        found: a run at these.
        eta: what else has factors.
        with_eps: for each layer the attributes that may be its eps.
    """
    settling = _Settling(analysis, eta, with_eps)
    first = settling.by(found, {})
    obstacle = _obstacle(analysis, sizes, first) if isinstance(first, Number) else None
    scales = first if isinstance(first, Scales) else Scales()
    widths = {
        group.width: sizes.widths[group.name]
        for group in analysis.groups
        if group.kind == "stream" and sizes.widths.get(group.name, group.width) != group.width
    }
    if widths and not (found.sizes or obstacle):
        found, scales = _with_attributes(settling, sizes, found, scales, widths)
        found, scales = _with_scalars(settling, found, scales, widths)
        obstacle = None
    return _as_before(analysis, found, scales), scales, obstacle


@dataclass(frozen=True)
class _Settling:
    """Finds who takes up the numbers that change in a run; see :func:`with_numbers`."""

    analysis: Analysis
    eta: Eta
    with_eps: Mapping[str, Mapping[str, float]]

    def by(
        self, found: Resized, scalars: Mapping[str, float], apart: Collection[int] = ()
    ) -> Scales | Number | None:
        """Return who takes up what changes in a run, or what nobody can; None where it is open."""
        numbers = changed_numbers(self.analysis.tape, found.tape)
        if numbers is None:
            return None
        return compensated(self.analysis, numbers, scalars, self.eta, self.with_eps, apart)


def _with_attributes(
    settling: _Settling,
    sizes: Sizes,
    found: Resized,
    scales: Scales,
    widths: Mapping[int, int],
) -> tuple[Resized, Scales]:
    """Return a run in which numbers that attributes hold follow, where that can be taken up."""
    analysis = settling.analysis
    for edits in number_edits(analysis.traced.standin, analysis.tape, widths):
        known = {(edit.module, edit.attribute) for edit in found.modules}
        more = tuple(edit for edit in edits if (edit.module, edit.attribute) not in known)
        again = run_with(analysis, sizes, found, more) if more else None
        settled = None if again is None else settling.by(again, {}, widths)  # heads' widths, too
        if again and isinstance(settled, Scales) and settled.numbers != scales.numbers:
            found, scales = again, settled
    return found, scales


def _with_scalars(
    settling: _Settling, found: Resized, scales: Scales, widths: Mapping[int, int]
) -> tuple[Resized, Scales]:
    """Return a run in which tensors without dims follow, and the attributes beside them."""
    analysis = settling.analysis
    scalars = scalar_factors(analysis.traced.scalars, widths)
    settled = settling.by(found, scalars, widths) if scalars else None
    if not isinstance(settled, Scales):
        return found, scales
    told = tuple(
        edit
        for edits in number_edits(analysis.traced.standin, analysis.tape, widths)
        for edit in edits
        if isinstance(edit.before, float) and _is_beside(edit.module, scalars)
    )
    return replace(found, modules=tuple(dict.fromkeys((*found.modules, *told)))), settled


def _obstacle(analysis: Analysis, sizes: Sizes, number: Number) -> Obstacle:
    """Return what stands in the way: the groups of whose width the number is a power, or any."""
    told = [(a, b) for a, b in zip(number.before, number.after, strict=True) if a != b]
    groups = [
        group.name
        for group in analysis.groups
        if (width := sizes.widths.get(group.name, group.width)) != group.width
        and any(_is_made_of(group.width, width, *pair) for pair in told)
    ]
    return Obstacle(str(number), number.op.module, dict.fromkeys(groups, str(number)))


def _is_made_of(width: int, new: int, before: float, after: float) -> bool:
    """Return whether two numbers grow as a power of a width does."""
    ratio = new / width
    grown = after / before if before else math.nan
    return any(math.isclose(grown, ratio**power, rel_tol=1e-5) for power in (0.5, -0.5, 1, -1))


def _is_beside(module: str, scalars: Mapping[str, float]) -> bool:
    """Return whether a module holds one of some tensors."""
    return any(name.rpartition(".")[0] == module for name in scalars)


def _as_before(analysis: Analysis, found: Resized, scales: Scales) -> Resized:
    """Return a run in which operations are told as at the old sizes, where factors are taken up."""
    old, new = analysis.channels.noted, found.channels.noted
    if not scales.numbers or len(old) != len(new):
        return found
    noted = tuple((done, layer) for (done, _), (_, layer) in zip(old, new, strict=True))
    return replace(found, channels=replace(found.channels, noted=noted))
