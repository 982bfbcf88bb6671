"""Which weights a widening rescales, by which factor, and what else is chosen layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.grow.norms.scales import times
from fxgrow.grow.sizes.resize import Sizes
from fxgrow.grow.widen.feasible import Feasible
from fxgrow.modules.tensors import layer_of
from fxgrow.plan.by_layer import setting_for
from fxgrow.plan.presets import DEFAULTS
from fxgrow.plan.requests import Widen
from fxgrow.plan.rescaling import USES_VARIANCE, LayerStatistics, rescaling_factor

VarianceOf = Callable[[str], float]


def pairing_for(request: Widen, group: ChannelGroup) -> str:
    """Return the pairing of a group's new channels, by the first glob that names it."""
    return setting_for(request.pairing, (group.name, *group.writers), DEFAULTS[1])


def rescaling_for(request: Widen, weight: str) -> str:
    """Return the rescaling of a weight's layer."""
    return setting_for(request.rescaling, (layer_of(weight),), DEFAULTS[0])


def weights_of(analysis: Analysis, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Return, for each weight that writes or reads a widened group, its dim by role."""
    widened = {g.name for g in analysis.groups if sizes.widths.get(g.name, g.width) != g.width}
    axes = {axis for g in analysis.groups if g.name in widened for axis in g.axes}
    names = {
        analysis.channels.axes[axis].tensor
        for axis in axes
        if analysis.channels.roles[axis] in ("writer", "reader")
    }
    dims: dict[str, dict[str, int]] = {}
    for axis, role in zip(analysis.channels.axes, analysis.channels.roles, strict=True):
        if axis.tensor in names:
            dims.setdefault(axis.tensor, {})[role] = axis.dim
    return dims


def fan_in_of(shape: tuple[int, ...], dims: Mapping[str, int]) -> int:
    """Return the number of inputs of one output: the product of all dims but that of the rows."""
    rows = dims.get("writer", 0)
    return math.prod(shape[:rows]) * math.prod(shape[rows + 1 :])


def factors_of(
    request: Widen,
    weights: Mapping[str, Mapping[str, int]],
    shapes: Mapping[str, tuple[int, ...]],
    found: Feasible,
    variance_of: VarianceOf,
) -> tuple[dict[str, float], list[str]]:
    """Return the factor of each weight, by rescaling and η, and what to warn of."""
    factors: dict[str, float] = {}
    warnings: list[str] = []
    for name, dims in weights.items():
        rescaling = rescaling_for(request, name)
        needs_variance = rescaling in USES_VARIANCE
        layer = LayerStatistics(
            fan_in=fan_in_of(shapes[name], dims),
            new_fan_in=fan_in_of(found.sizes.shapes.get(name, shapes[name]), dims),
            variance=variance_of(name) if needs_variance else math.nan,
            gain=setting_for(request.gain, (layer_of(name),), 1.0),
        )
        factor, warning = rescaling_factor(rescaling, layer)
        factors[name] = factor * found.eta.factors.get(name, 1.0)
        if warning:
            warnings.append(f"{layer_of(name)}: {warning}")
    return times(factors, found.scales.factors), warnings
