"""Make a plan: widths, sizes, a run at the new sizes, matching, factors, gains, verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.errors import PlanError, UsageError, listed
from fxgrow.grow.match.axis_edits import axis_edits
from fxgrow.grow.match.group_norms import warnings_of
from fxgrow.grow.norms.folding import Fold, folded
from fxgrow.grow.norms.gains import owed_for, propagate_gains
from fxgrow.grow.norms.payers import Payment
from fxgrow.grow.norms.scales import times
from fxgrow.grow.sizes.resize import Sizes
from fxgrow.grow.sizes.widths import asked_by_ratio, select
from fxgrow.grow.widen.factors import (
    VarianceOf as VarianceOf,
)
from fxgrow.grow.widen.factors import (
    factors_of,
    fan_in_of,
    pairing_for,
    rescaling_for,
    weights_of,
)
from fxgrow.grow.widen.feasible import Attempts, Feasible
from fxgrow.grow.widen.prediction import multipliers
from fxgrow.grow.widen.single import worked_out
from fxgrow.labels.gains import Absorbed, GainFlow, Mismatch, Verdict
from fxgrow.labels.offsets import offsets_of
from fxgrow.labels.space import Role
from fxgrow.labels.trace import Tracer
from fxgrow.modules.collection import uncollected
from fxgrow.modules.tensors import aliases_of, layer_of, named_tensors
from fxgrow.plan.by_layer import values_in
from fxgrow.plan.edits import Absorption, AxisEdit, ModuleEdit, Multiplier, TensorEdit
from fxgrow.plan.fingerprint import fingerprint
from fxgrow.plan.in_memory import AS_GRAPH, UNHELD
from fxgrow.plan.pairing import PAIRINGS, cancels, drawing, seeded
from fxgrow.plan.presets import DEFAULTS
from fxgrow.plan.requests import Widen
from fxgrow.plan.rescaling import RESCALINGS
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import GroupPlan, Scope
from fxgrow.version import __version__


def make_plan(analysis: Analysis, request: Widen, variance_of: VarianceOf) -> Plan:
    """Return the plan for a request.

    Args:
        analysis: of the network at its present sizes.
        request: what is asked for.
        variance_of: returns the unbiased variance of a weight by name; called only for
            rescalings that need it.

    Raises:
        PlanError: the request is malformed or nothing that it selects can grow.
    """
    if not (request.noise >= 0 and math.isfinite(request.noise)):
        raise UsageError(f"the noise must not be negative, but it is {request.noise}.")
    for name in values_in(request.rescaling):
        RESCALINGS[name]  # an unknown name is refused before any work
    widths, refused = select(analysis.groups, request)
    with uncollected():
        analysis, found = worked_out(analysis, lambda some: attempts_for(some, request), widths)
        found = replace(found, refused=refused + found.refused)
        return plan_of(analysis, request, found, variance_of)


def attempts_for(analysis: Analysis, request: Widen) -> Attempts:
    """Return all that the search for sizes depends on but the widths."""
    standin = analysis.traced.standin
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(standin).items()}
    own = {group.name: pairing_for(request, group) for group in analysis.groups}
    default = DEFAULTS[1] if isinstance(request.pairing, dict) else request.pairing
    return Attempts(
        analysis,
        shapes,
        request.grouped,
        seeded(PAIRINGS[default], request.seed),
        eps_attributes(standin),
        rescaled=frozenset(name for name in shapes if rescaling_for(request, name) != "none"),
        pairings={
            name: seeded(PAIRINGS[pairing], request.seed)
            for name, pairing in own.items()
            if pairing != default
        },
        rounded=asked_by_ratio(analysis.groups, request),
    )


def plan_of(analysis: Analysis, request: Widen, found: Feasible, variance_of: VarianceOf) -> Plan:
    """Return the plan that takes a network to sizes that work out.

    Args:
        analysis: of the network at its present sizes.
        request: what is asked for.
        found: the sizes, and the run at these.
        variance_of: as for :func:`make_plan`.

    Raises:
        PlanError: an old channel loses a position, or what a rescaling does cannot be told.
    """
    traced = analysis.traced
    tensors = named_tensors(traced.standin)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    sizes, resized = found.sizes, found.resized
    edits = axis_edits(
        analysis.present.channels, resized.channels, found.matching, found.padding.values(),
        found.zero_channels.values(), analysis.silenced,
    )  # fmt: skip
    roles = weights_of(analysis, sizes)
    factors, warnings = factors_of(request, roles, shapes, found, variance_of)
    with_eps, eta, scales = eps_attributes(traced.standin), found.eta, found.scales
    owed = owed_for(analysis.silenced, factors, scales.owed)

    def flow_with(paid: Payment) -> GainFlow:
        return propagate_gains(
            analysis.tape, times(factors, paid.factors), with_eps, eta.statistics,
            eta.undone | scales.undone, owed=times(owed, paid.owed), passed=paid.owed.keys(),
            numbers=scales.numbers,
        )  # fmt: skip

    flow, paid, folds = flow_with(Payment()), Payment(), tuple[Fold, ...]()
    if request.compensate and flow.mismatches:
        flow, paid, folds = folded(analysis.tape, roles, flow, flow_with)
    eps_edits = _eps_edits(flow)
    multiplied, predicted = _multiplied(analysis, request, found, flow)
    aliases = aliases_of(tensors)
    growing = [group for group in analysis.groups if group.name in sizes.widths]
    layouts = [_layout(analysis, request, group, found) for group in growing]
    groups = tuple(
        _group_plan(analysis, request, group, sizes, factors, flow, folds, *layout)
        for group, layout in zip(growing, layouts, strict=True)
    )
    in_graph = any(edit.node for edit in resized.sizes)
    tracer: Tracer = "torch.fx" if in_graph else traced.tracer  # such a graph ran
    scope = Scope(traced.module, traced.input_shapes, traced.inferred, tracer)
    batch = traced.input_shapes[0][0] if traced.inferred else 1
    edited = _tensor_edits(
        analysis, shapes, sizes, edits, times(factors, paid.factors), flow, roles, aliases
    )
    return Plan(
        request=request,
        groups=groups,
        refused=found.refused,
        tensors=edited,
        modules=(*resized.modules, *eps_edits),
        multipliers=multiplied,
        prediction=predicted,
        aliases=aliases,
        source=fingerprint(traced.standin, edited),
        scopes=(scope,),
        parameters=_parameter_counts(traced.standin.parameters(), shapes, tensors, sizes),
        flops=(analysis.flops // batch, resized.tape.flops // batch),
        warnings=(*warnings, *_warnings(analysis, found, eps_edits)),
        fxgrow=__version__,
        sizes=resized.sizes,
    )


def _multiplied(
    analysis: Analysis, request: Widen, found: Feasible, flow: GainFlow
) -> tuple[tuple[Multiplier, ...], tuple[Multiplier, ...]]:
    """Return the multipliers to be inserted, and those that tell what becomes of the function.

    Raises:
        PlanError: what becomes of it cannot be told, or there is no graph for multipliers.
    """
    if not request.compensate:
        return (), multipliers(analysis, flow)
    if found.resized.sizes and flow.mismatches:
        raise PlanError(
            "multipliers cannot be put into a graph whose sizes are rewritten.",
            way_out="Use --rescaling none.",
        )
    return tuple(replace(m, factor=1 / m.factor) for m in multipliers(analysis, flow)), ()


def _warnings(
    analysis: Analysis, found: Feasible, eps_edits: Iterable[ModuleEdit]
) -> Iterator[str]:
    """Yield what to warn of, but for factors."""
    for edit in eps_edits:
        yield (
            f"{edit.module}.{edit.attribute} becomes {edit.after:.3g}; {UNHELD} it, "
            "fxgrow.load sets it"
        )
    rewritten = [edit for edit in found.resized.sizes if edit.node]
    in_code = dict.fromkeys(edit.module for edit in found.resized.sizes if edit.at)
    if in_code:
        places = [place or "the model" for place in in_code]
        yield (
            f"the code of {listed(places)} fixes "
            "sizes that no graph can be made of: hooks of fxgrow's give its calls the new ones; "
            f"{UNHELD} them, fxgrow.load sets them"
        )
    if rewritten:
        yield (
            f"{analysis.traced.module or 'the result'} {AS_GRAPH}: "
            f"its code fixes sizes that had to be rewritten in its graph "
            f"({listed([edit.node for edit in rewritten])})"
        )
    yield from warnings_of(analysis.channels.norm_groups, found.sizes.norm_groups)


def _tensor_edits(
    analysis: Analysis,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Sizes,
    edits: Mapping[str, list[AxisEdit]],
    factors: Mapping[str, float],
    flow: GainFlow,
    weights: Mapping[str, Mapping[str, int]],
    aliases: Mapping[str, str],
) -> dict[str, TensorEdit]:
    """Return the edit of every tensor that changes, in the order of the state_dict."""
    kept = [norm for norm in flow.absorbed.values() if norm.running_var]
    absorptions = dict(item for norm in kept for item in _absorptions(norm))
    normed = analysis.channels.normed
    directions = {layer_of(parts.direction): parts.direction for parts in normed.values()}
    found: dict[str, TensorEdit] = {}
    split = {name for silenced in analysis.silenced for name in silenced.weights}
    offsets = offsets_of(analysis.tape)
    for name, shape in shapes.items():
        if name in aliases:
            continue
        new_shape = sizes.shapes.get(name, shape)
        parts = normed.get(name)
        whole = name if parts is None else parts.direction
        scale = math.prod(by.get(whole, 1.0) for by in (factors, flow.vectors, flow.owed))
        axes = tuple(edits.get(name, ()))
        if not axes and scale == 1.0 and name not in absorptions and not edits.get(whole):
            continue
        layer = layer_of(name)
        owner = name if name in weights else directions.get(layer, f"{layer}.weight")
        fan_in = fan_in_of(
            sizes.shapes.get(owner, shapes.get(owner, shape)), weights.get(owner, {})
        )
        if parts is not None and name == parts.direction:
            scale = 1.0  # the length takes it
        offset = offsets.get(name, 0.0) if scale != 1.0 or (axes and name in split) else 0.0
        found[name] = TensorEdit(
            shape, new_shape, scale, axes, fan_in, absorptions.get(name),
            offset=offset, normed=parts,
        )  # fmt: skip
    return found


def eps_attributes(standin: nn.Module) -> dict[str, dict[str, float]]:
    """Return the attributes of each module that may be its eps, and can be set."""
    return {
        name: {k: v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)}
        for name, module in standin.named_modules()
    }


def _eps_edits(flow: GainFlow) -> tuple[ModuleEdit, ...]:
    """Return the eps of the norms that absorb a gain s without statistics: s² times the old."""
    return tuple(
        ModuleEdit(norm.layer, norm.attribute, norm.eps, norm.eps * norm.gain**2)
        for norm in flow.absorbed.values()
        if not norm.running_var
    )


def _absorptions(norm: Absorbed) -> Iterable[tuple[str, Absorption]]:
    """Yield the absorption of each of a norm's tensors."""
    for part, name in (
        ("weight", norm.weight),
        ("running_mean", norm.running_mean),
        ("running_var", norm.running_var),
    ):
        yield name, Absorption(part, norm.gain, norm.eps, norm.running_var)  # type: ignore[arg-type]


def _group_plan(
    analysis: Analysis,
    request: Widen,
    group: ChannelGroup,
    sizes: Sizes,
    factors: Mapping[str, float],
    flow: GainFlow,
    folds: Sequence[Fold],
    pairing: str,
    note: str,
) -> GroupPlan:
    """Return what happens to one group, with its verdict."""
    own = dict.fromkeys(analysis.channels.axes[axis].tensor for axis in group.axes)
    alpha, beta = (_common_factor(analysis, group, role, factors) for role in ("writer", "reader"))
    touching = {name for name in own if name in factors}
    mismatches = [m for m in flow.mismatches if m.sources & touching]
    verdict, reason = _verdict(request, pairing, mismatches)
    undone = "; ".join(dict.fromkeys(map(str, (f for f in folds if f.sources & touching))))
    reason = "; ".join(filter(None, (reason, undone)))
    if verdict == "exact":
        reason = "; ".join(filter(None, (note, reason)))
    return GroupPlan(
        name=group.name,
        width=(group.width, sizes.widths[group.name]),
        kind=group.kind,
        block=analysis.block_of(group),
        writers=group.writers,
        readers=group.readers,
        factors={layer_of(name): factors[name] for name in own if name in factors},
        alpha=alpha,
        beta=beta,
        absorbed_by=tuple(n.layer for n in flow.absorbed.values() if n.sources & touching),
        gain=math.prod(m.gain for m in mismatches),
        preserves=verdict,
        reason=reason,
        pairing=pairing,
    )


def _common_factor(
    analysis: Analysis, group: ChannelGroup, role: Role, factors: Mapping[str, float]
) -> float | None:
    """Return the factor of all weights in which a group has axes of a role, if it is one."""
    axes = [analysis.channels.axes[axis] for axis in group.axes
            if analysis.channels.roles[axis] == role]  # fmt: skip
    found = {factors[axis.tensor] for axis in axes if axis.tensor in factors}
    return found.pop() if len(found) == 1 else None


def _layout(
    analysis: Analysis, request: Widen, group: ChannelGroup, found: Feasible
) -> tuple[str, str]:
    """Return how a group's new channels are laid out, and why so if a norm asks for it."""
    if group.channels[0] in found.copied:
        places = [place for place in analysis.mixers_of(group) if "norm" not in place.split()[0]]
        over = f"{places[0]}, which is" if places else "a norm"
        return "replicate", f"whole copies, for {over} over all its channels"
    asked, padding = pairing_for(request, group), found.padding.get(group.name)
    if padding is None:
        touched = {analysis.channels.axes[axis].tensor for axis in group.axes}
        norm = next((weight for weight in found.sizes.norm_groups if weight in touched), "")
        return asked, f"whole new groups, for {layer_of(norm)}" if norm else ""
    own = PAIRINGS[asked]
    eta = math.sqrt(padding.ratio)
    held = "the mean of the old channels" if padding.holds == "mean" else "zero"
    taken = "the writers are multiplied by 1/η" if found.eta.factors else "its eps by η²"
    copies = f"besides {padding.copies} whole copies, " if padding.copies > 1 else ""
    return (
        asked if drawing(own) is own else "vv_z_negz",
        f"{copies}new channels carry {held}, for a norm over all channels: its weight, or "
        f"what reads it, is multiplied by η = {eta:.6g}, {taken}",
    )


def _verdict(request: Widen, pairing: str, mismatches: list[Mismatch]) -> tuple[Verdict, str]:
    """Return what becomes of the function, and why."""
    if not cancels(pairing):
        return "no", f"pairing {pairing!r}: the new channels do not cancel"
    if request.noise:
        return "no", f"noise {request.noise:g}: the new columns of twins do not cancel"
    if not mismatches:
        return "exact", ""
    reasons = "; ".join(dict.fromkeys(m.reason for m in mismatches))
    if request.compensate:
        return "exact", f"compensated by a multiplier ({reasons})"
    return ("no" if any(m.verdict == "no" for m in mismatches) else "scaled"), reasons


def _parameter_counts(
    parameters: Iterable[Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    sizes: Sizes,
) -> tuple[int, int]:
    """Return the number of parameters before and after."""
    ids = {id(parameter) for parameter in parameters}
    names = {id(t): n for n, t in reversed([*tensors.items()]) if id(t) in ids}.values()
    before = sum(math.prod(shapes[name]) for name in names)
    return before, sum(math.prod(sizes.shapes.get(name, shapes[name])) for name in names)
