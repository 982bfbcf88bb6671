"""The Python API: compose tracing, planning, surgery and verification."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import nn

from fxgrow.api.arguments import (
    check_sides,
    check_tensors,
    checked_budget,
    effort_of,
    globs,
    number,
    one_of,
    refuse_data_driven_by_layer,
    whole,
)
from fxgrow.api.following import example_of, follow_on
from fxgrow.api.left_out import left_out, tied_twins
from fxgrow.api.report.data import Report
from fxgrow.api.requirements import counted, require_exact, require_values, strictly
from fxgrow.apply.composition import following, grown_by
from fxgrow.apply.module import apply_to_module, check_source
from fxgrow.apply.normed import weight_at
from fxgrow.errors import UsageError, warn
from fxgrow.grow.data import DataDriven
from fxgrow.grow.data.calibration import calibrate_new_, new_entries
from fxgrow.grow.sizes.narrow import at_other_widths
from fxgrow.grow.sizes.widths import Width, check_globs, checked_widths
from fxgrow.grow.widen.submodules import plan_parts
from fxgrow.grow.widen.untie import plan_untied
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.tensors import named_tensors, variance
from fxgrow.plan.init import Init, PlacedInit, copy_rows, init_name
from fxgrow.plan.inits_by_layer import Inits, find_inits, inits_names
from fxgrow.plan.inits_by_side import init_for
from fxgrow.plan.presets import settings
from fxgrow.plan.requests import Grouped, Where, Widen
from fxgrow.plan.rescaling import check_gain, gain_by_layer
from fxgrow.plan.schema import Plan
from fxgrow.verification.attributes import check_fit
from fxgrow.verification.fault import failure
from fxgrow.verification.findings import Effort, Verification
from fxgrow.verification.measure import Task, measure

Progress: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Grown:
    """A grown network with the plan it came from and the report on it.

    Attributes:
        model: the grown module.
        plan: what was done, as data.
        report: what was measured.
        init: what filled the new weights.
    """

    model: nn.Module
    plan: Plan
    report: Report
    init: Init = field(repr=False, default=copy_rows)


def silent(step: str) -> None:
    """Say nothing of a step."""
    del step


@exclusive
def plan(
    model: nn.Module,
    width: Width | Mapping[str, Width] = "2x",
    example_inputs: object = None,
    rescaling: str | Mapping[str, str] | None = None,
    pairing: str | Mapping[str, str] | None = None,
    init: Inits = "copy_rows",
    where: Where = "hidden",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    gain: float | str | Mapping[str, float | str] = 1.0,
    noise: float = 0.0,
    multiple_of: int = 1,
    grouped: Grouped = "width",
    seed: int = 0,
    compensate: bool = False,
    *,
    module: str = "",
    preset: str | None = None,
    split_noise: float = 0.1,
    untie: bool = False,
    output_init: str | Init | None = None,
    input_init: str | Init | None = None,
    budget: str | int = "",
    after: Plan | None = None,
    progress: Progress = silent,
) -> Plan:
    """Return the plan that :func:`widen` would carry out; the arguments are the same.

    Raises:
        TraceError: the network cannot be followed.
        PlanError: the request is malformed, or nothing that it selects can grow.
    """
    chosen_rescaling, chosen_pairing = settings(preset, rescaling, pairing)
    find_inits(init)
    check_sides(init, [side for side in (output_init, input_init) if side is not None])
    if isinstance(init, DataDriven):
        is_asked = pairing is not None or preset is not None
        chosen_pairing = init.paired(chosen_pairing if is_asked else None)
    elif budget:
        raise UsageError(
            "a budget is spent where new channels gain most, which only an init from data tells.",
            way_out="Give one: --init tiny --data batches.pt.",
        )
    refuse_data_driven_by_layer(init)
    limited = init if isinstance(init, DataDriven) else None
    request = Widen(
        width=checked_widths(width),
        rescaling=chosen_rescaling,
        pairing=chosen_pairing,
        init=inits_names(init),
        where=one_of("where", where, ("hidden", "stream", "all")),  # type: ignore[arg-type]
        include=globs(include),
        exclude=globs(exclude),
        gain=gain_by_layer(gain),
        noise=number("noise", noise),
        multiple_of=whole("multiple_of", multiple_of),
        grouped=one_of("grouped", grouped, ("width", "count")),  # type: ignore[arg-type]
        seed=whole("seed", seed),
        compensate=bool(compensate),
        split_noise=number("split_noise", split_noise),
        module=module,
        untie=bool(untie),
        output_init=None if output_init is None else init_name(output_init),
        input_init=None if input_init is None else init_name(input_init),
        budget=checked_budget(budget),
        keep=None if limited is None else limited.keep,
        threshold=0.0 if limited is None else float(limited.threshold),
    )
    check_gain(request.gain, chosen_rescaling)
    if not (math.isfinite(request.split_noise) and request.split_noise >= 0):
        raise UsageError(f"split_noise must not be negative, but it is {request.split_noise}.")
    notes = check_tensors(named_tensors(model))
    progress("following the channels")
    analyses, parts = follow_on(grown_by(after, model), example_inputs, module, init)
    if request.untie:
        first = plan_untied(grown_by(after, model), example_inputs, module, analyses)
        after = following(after, first)
        analyses, parts = follow_on(grown_by(after, model), example_inputs, module, init)
    analyses = tuple(map(at_other_widths, analyses))
    check_globs(request, analyses)
    progress("planning")
    source = functools.cache(lambda: model if after is None else apply_to_module(after, model))
    weights = functools.cache(lambda: named_tensors(source()))
    make = plan_parts
    if isinstance(init, DataDriven):
        make = functools.partial(init.plan, source(), progress=progress)
    parted = {name: p for part in analyses for name, p in part.channels.normed.items()}
    made = make(analyses, request, lambda name: variance(weight_at(name, weights(), parted)))
    told = (*parts, *made.warnings, *left_out(made, analyses), *tied_twins(made), *notes)
    return following(after, replace(made, warnings=told))


@exclusive
def widen(
    model: nn.Module,
    width: Width | Mapping[str, Width] = "2x",
    example_inputs: object = None,
    rescaling: str | Mapping[str, str] | None = None,
    pairing: str | Mapping[str, str] | None = None,
    init: Inits = "copy_rows",
    where: Where = "hidden",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    gain: float | str | Mapping[str, float | str] = 1.0,
    noise: float = 0.0,
    multiple_of: int = 1,
    grouped: Grouped = "width",
    seed: int = 0,
    strict: bool = False,
    compensate: bool = False,
    verify: bool | Effort = True,
    *,
    calibration: Iterable[object] | None = None,
    module: str = "",
    preset: str | None = None,
    split_noise: float = 0.1,
    untie: bool = False,
    output_init: str | Init | None = None,
    input_init: str | Init | None = None,
    budget: str | int = "",
    after: Plan | None = None,
    progress: Progress = silent,
) -> Grown:
    """Make a trained network wider without changing what it computes.

    Args:
        model: any module; it is not touched.
        width: ``"2x"``, ``"1.5x"``, ``"+32"``, ``"256"`` (or 256), or a mapping of globs over
            group names to such, of which the first match counts.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for
            ``forward``; None takes those of the first batch where ``init`` has batches, and else
            infers an input from the first layer.
        rescaling: what happens to old weights: ``none``, ``default_vt``,
            ``vt_constraint_old_shape``, ``vt_constraint_new_shape``, ``vt_output``; or a mapping
            of globs over layers to such, of which the first match counts, and ``none`` where none
            matches: ``{"fc": "vt_output", "*": "default_vt"}``. None (default) is the preset's,
            else ``none``.
        pairing: how new channels cancel: ``vv_z_negz``, ``v_zero``, ``zero_z``, ``replicate``,
            ``replicate_random``, ``copy_pair``, ``none``; or a mapping of globs over the names of
            groups and their writers to such. None (default) is the preset's, else the own one of an
            init that computes its weights from data (``zero_z`` of :class:`fxgrow.GradMax`,
            ``none`` of :class:`fxgrow.Tiny`), else ``vv_z_negz``.
        init: what fills new weights: ``copy_rows``, ``copy_uniform``, ``copy_normal``,
            ``kaiming``, ``kaiming_normal``, ``lecun``, ``lecun_normal``, ``zeros``, a name given
            by :func:`fxgrow.register_init`, ``"package.module:function"``, a callable
            ``(tensor, reference, fan_in) -> None``, or an init that computes them from data:
            :class:`fxgrow.GradMax`, :class:`fxgrow.Tiny`. Or a mapping of globs over layers to
            any of these but the last; ``copy_rows`` where none matches.
        where: ``hidden`` groups, ``stream`` groups (carried by residual additions) or ``all``.
        include: globs over the names of groups and their writers; only these grow.
        exclude: globs likewise; these do not grow.
        gain: of the constraint rescalings; a number or a nonlinearity's name (``"relu"``), or a
            mapping of globs over layers to such.
        noise: standard deviation of extra noise on the new columns, relative to theirs. Twins do
            not need it to part, and it breaks preservation.
        multiple_of: new widths are rounded up to a multiple of this.
        grouped: whether a grouped convolution grows inside each group (``width``) or by whole
            groups (``count``). A group norm grows by whole groups; only under ``count`` does one
            of a single group, and one whose groups could hold the copies that a pairing makes.
        seed: of the new weights; each tensor draws from (seed, its name) alone.
        strict: refuse whatever does not preserve the function exactly.
        compensate: restore the function, keeping rescaled weights: by the weights of norms and
            of layers that touch no widened group, where these can take the factor up, and else by
            multipliers in the graph.
        verify: how thoroughly to measure the result before it is returned: ``"full"`` (the same
            as True), ``"quick"`` (one small input, eval mode, the given weights alone) or
            ``"none"`` (False).
        calibration: batches of inputs (a tensor, a tuple of arguments or a dict each) whose
            statistics the new channels of batch norms take; without, these begin with mean 0 and
            variance 1. The function is the same with either; with data, new channels are in eval
            mode what they are in train mode.
        module: follow and widen this submodule alone, by its fully qualified name; the example
            inputs are then its, and it is its outputs that are kept and compared. Without, the
            whole, or, where that cannot be followed, the largest submodules that can.
        preset: ``vt``, ``r2wider``, ``net2wider``, ``netmorph`` or ``random``: rescaling and
            pairing together, for those of the two that are None, and for what their globs leave
            open.
        split_noise: where channels are copied, the relative standard deviation of the zero-sum
            noise that makes the copies' columns unequal, so that they part in training.
        untie: first give what reads a tied parameter (a head that shares the table of an
            embedding) a copy of its own, so that either side grows by itself. Without, such a
            stream grows where the weight of a norm before the reader can silence new channels.
        output_init: what fills new outputs of layers (rows V and entries of biases), as ``init``
            does, which it stands for there; None for ``init``.
        input_init: what fills new inputs of layers (columns Z), likewise.
        budget: how many parameters the new channels may bring: ``"+10%"`` of the present ones, or
            a number, ``"+50000"`` or 50000. They go where they gain most per parameter, which only
            an init from data tells; ``width`` (2x by default) is then the most that each group
            gets.
        after: a plan to carry out first; this one is then for what it makes, and contains it.
        progress: called with the name of each step as it begins.

    Returns:
        The grown network, the plan and the report. The network has the class of ``model``, or is
        a :class:`torch.fx.GraphModule` where multipliers had to be inserted.

    Raises:
        TraceError: the network cannot be followed.
        PlanError: the request is malformed, or nothing that it selects can grow.
        NotPreservedError: ``strict``, and the plan predicts a change of the output.
        VerificationError: the grown network does not compute what the plan predicts.

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> grown = fxgrow.widen(net, "2x")
        >>> grown.model[0].out_features, grown.report.verification.verdict
        (16, 'preserved')
    """
    with strictly(strict):
        made = plan(
            model, width, example_inputs, preset=preset, rescaling=rescaling, pairing=pairing,
            init=init, where=where, include=include, exclude=exclude, gain=gain, noise=noise,
            multiple_of=multiple_of, grouped=grouped, seed=seed, compensate=compensate,
            split_noise=split_noise, module=module, untie=untie, output_init=output_init,
            input_init=input_init, budget=budget, after=after, progress=progress,
        )  # fmt: skip
    finish = None
    if calibration is not None:
        finish = functools.partial(
            calibrate_new_, entries=new_entries(made), batches=list(calibration)
        )
    return carry_out(
        made, model, example_inputs, init=init, output_init=output_init, input_init=input_init,
        strict=strict, verify=verify, finish=finish, progress=progress,
    )  # fmt: skip


@exclusive
def carry_out(
    made: Plan,
    model: nn.Module,
    example_inputs: object = None,
    *,
    init: Inits | None = None,
    output_init: str | Init | None = None,
    input_init: str | Init | None = None,
    strict: bool = False,
    verify: bool | Effort = True,
    finish: Callable[[nn.Module], None] | None = None,
    progress: Progress = silent,
) -> Grown:
    """Carry a plan out on the network it was made for, and measure the result.

    Args:
        made: the plan.
        model: the network; it is not touched.
        example_inputs: inputs to measure on; None takes those of the plan.
        init: the callable the plan was made with, if it was one.
        output_init: likewise.
        input_init: likewise.
        strict: refuse whatever does not preserve the function exactly.
        verify: how thoroughly to measure the result, as for :func:`widen`.
        finish: called with the grown network, to change it in place before it is measured.
        progress: called with the name of each step as it begins.

    Raises:
        PlanError: the plan is for another network.
        NotPreservedError, VerificationError: as for :func:`widen`.
    """
    effort = effort_of(verify)
    check_source(made.steps[0], model)
    if strict:
        require_exact(made)
    if effort != "none":
        require_values(model)
    fill = init_for(made.request.drawing, init, output_init, input_init)
    if example_inputs is None and not any(scope.inputs_inferred for scope in made.scopes):
        example_inputs = example_of(fill, getattr(made.request, "module", ""))
    if isinstance(fill, DataDriven):
        fill = fill.computed_for(made)
    progress("growing the weights")
    grown = apply_to_module(made, model, fill)
    check_fit(made, model, grown)
    if finish is not None:
        finish(grown)
    verification = Verification("skipped")
    if effort != "none":
        progress("verifying")
        task = Task(made, model, grown, example_inputs, fill, finish, effort, progress)
        verification = measure(task)
        if verification.verdict == "failed":
            raise failure(task, verification)
    if isinstance(fill, PlacedInit):
        verification = replace(verification, notes=verification.notes + fill.notes)
    for text in made.warnings:
        warn(text)
    made = counted(made, model, grown)
    return Grown(grown, made, Report(made, verification, made.warnings), fill)
