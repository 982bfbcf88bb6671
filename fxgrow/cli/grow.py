"""The commands that make networks grow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from fxgrow.cli import data_options as data_opt
from fxgrow.cli import options as opt
from fxgrow.cli.arguments import (
    check_names,
    check_word,
    parse_by_layer,
    parse_widths,
    width_label,
)
from fxgrow.cli.base import app
from fxgrow.cli.data import METHODS, DataInit, data_init
from fxgrow.cli.growing import Settings, effort_of, grow
from fxgrow.cli.run import read_plan
from fxgrow.cli.terminal import Steps
from fxgrow.errors import UsageError
from fxgrow.plan.budget import budgeted
from fxgrow.plan.presets import settings
from fxgrow.plan.requests import Grouped, Where
from fxgrow.plan.rescaling import check_gain, gain_by_layer

if TYPE_CHECKING:
    from torch import nn

    from fxgrow.plan.schema import Plan


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "fxgrow widen model.pt --width 2x\n\n"
    "fxgrow widen model.pt --width 1.5x --rescaling default_vt --report report.html\n\n"
    "fxgrow widen model.pt --width 'layer4.*=2x' --width '*=+16' --multiple-of 8\n\n"
    "fxgrow widen model.pt --budget +10% --init tiny --data batches.pt\n\n"
    "fxgrow widen model.pt --width 2x --rescaling fc=vt_output --rescaling '*=default_vt'\n\n"
    "fxgrow widen model.pt --width 2x --dry-run --plan plan.json"
)
def widen(
    source: opt.SourceFile,
    width: opt.Widths = None,
    budget: data_opt.Budget = "",
    where: opt.Where = "hidden",
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    multiple_of: opt.MultipleOf = 1,
    grouped: opt.Grouped = "width",
    preset: opt.Preset = None,
    rescaling: opt.Rescalings = None,
    pairing: opt.Pairings = None,
    init: opt.Inits = None,
    output_init: opt.OutputInit = None,
    input_init: opt.InputInit = None,
    data: data_opt.Data = None,
    loss: data_opt.Loss = None,
    keep: data_opt.Keep = None,
    threshold: data_opt.Threshold = 0.0,
    gain: opt.Gains = None,
    noise: opt.Noise = 0.0,
    split_noise: opt.SplitNoise = 0.1,
    seed: opt.Seed = 0,
    compensate: opt.Compensate = False,
    untie: opt.Untie = False,
    after: opt.AfterPlan = None,
    arch: opt.Arch = None,
    arch_arg: opt.ArchArguments = None,
    module: opt.Module = "",
    input_shape: opt.InputShapes = None,
    trust_pickle: opt.TrustPickle = False,
    output: opt.Output = None,
    strict: opt.Strict = False,
    verify: opt.Verify = "full",
    no_verify: opt.NoVerify = False,
    device: opt.Device = "cpu",
    dry_run: opt.DryRun = False,
    plan: opt.PlanOutput = None,
    report: opt.ReportOutput = None,
    force: opt.Force = False,
) -> None:
    """Make a trained network wider without changing what it computes.

    Nothing is written before the result has been measured against the original. In a training
    checkpoint, moving averages and the optimizer's state grow too.
    """
    if not (width or budget):
        raise UsageError("how wide?", way_out="Give --width 2x, +32 or 256, or a --budget.")
    widths = parse_widths(width or ["2x"])
    rescalings, pairings = (
        parse_by_layer(texts, name)
        for texts, name in ((rescaling, "rescaling"), (pairing, "pairing"))
    )
    chosen, _ = settings(preset, rescalings, pairings)
    inits = parse_by_layer(init, "init") or "copy_rows"
    gains = parse_by_layer(gain, "gain") or "1"
    check_gain(gain_by_layer(gains), chosen)
    from_data = data_init(inits, data, loss, keep, threshold)
    for names in (inits, output_init, input_init):
        check_names(names, METHODS)
    if budget:
        budgeted(budget, 1)
        if from_data is None:
            raise UsageError(
                "a budget is spent where new channels gain most, which only data tells.",
                way_out=f"Give --init {' or --init '.join(METHODS)}, and --data.",
            )
    check_word("--where", where, get_args(Where))
    check_word("--grouped", grouped, get_args(Grouped))

    def make(
        model: nn.Module,
        inputs: object,
        first: Plan | None,
        steps: Steps,
        left_out: Sequence[str] = (),
    ) -> Plan:
        from fxgrow.api.widen import plan as make_plan

        return make_plan(
            model, widths, inputs, rescalings, pairings, preset=preset, budget=budget,
            init=from_data(model) if from_data else inits,
            where=where, include=include or (), exclude=(*(exclude or ()), *left_out),  # type: ignore[arg-type]
            gain=gains, noise=noise, multiple_of=multiple_of, grouped=grouped, seed=seed,  # type: ignore[arg-type]
            compensate=compensate, split_noise=split_noise, module=module, after=first,
            untie=untie, output_init=output_init, input_init=input_init, progress=steps,
        )  # fmt: skip

    common = Settings(
        source, after, arch, arch_arg, input_shape, trust_pickle, output, strict,
        effort_of(verify, no_verify=no_verify), device, dry_run, plan, report, force,
    )  # fmt: skip
    grow(
        common, budget or width_label(widths), make, from_data or inits, (output_init, input_init),
        adapts=True,
    )  # fmt: skip


@app.command(
    epilog="[b]Example[/b]\n\n"
    "fxgrow widen model.pt --width 2x --dry-run --plan plan.json\n\n"
    "fxgrow apply plan.json model.pt -o wider.pt"
)
def apply(
    plan: opt.PlanFile,
    source: opt.SourceFile,
    init: opt.PlanInits = None,
    output_init: opt.OutputInit = None,
    input_init: opt.InputInit = None,
    data: data_opt.Data = None,
    loss: data_opt.Loss = None,
    arch: opt.Arch = None,
    arch_arg: opt.ArchArguments = None,
    input_shape: opt.InputShapes = None,
    trust_pickle: opt.TrustPickle = False,
    output: opt.Output = None,
    strict: opt.Strict = False,
    verify: opt.Verify = "full",
    no_verify: opt.NoVerify = False,
    device: opt.Device = "cpu",
    report: opt.ReportOutput = None,
    force: opt.Force = False,
) -> None:
    """Carry out a plan, on the network it was made for or on other weights of the same shapes.

    A plan is what --dry-run --plan writes. It holds what is done to each tensor and the seed of new
    weights, and no weights: those of --init tiny or gradmax are computed again, from --data.
    """
    inits = parse_by_layer(init, "init")
    from_data = _from_data(plan, data, loss) if data is not None or loss else None
    common = Settings(
        source, plan, arch, arch_arg, input_shape, trust_pickle, output, strict,
        effort_of(verify, no_verify=no_verify), device, False, None, report, force,
    )  # fmt: skip

    def make(model: nn.Module, inputs: object, first: Plan | None, steps: Steps) -> Plan:
        if from_data is None:
            return cast("Plan", first)
        from fxgrow.api.recomputed import computed_again

        return computed_again(cast("Plan", first), model, from_data(model), inputs, steps)

    grow(common, "", make, from_data or inits, (output_init, input_init))


def _from_data(plan: Path, data: Path | None, loss: str | None) -> DataInit:
    """Return the init from data that a plan was made with.

    Raises:
        UsageError: it was made with none, or there is no data.
        SourceError, PlanError: the plan cannot be read.
    """
    from fxgrow.plan.init import told_init

    request = read_plan(plan).request
    method = told_init(str(request.drawing.init))
    if method not in METHODS:
        raise UsageError(
            f"--data and --loss say nothing of {plan}, whose new weights do not come from data.",
            way_out="Leave them out.",
        )
    limits = getattr(request, "keep", None), getattr(request, "threshold", 0.0)
    return DataInit(method, data, loss, *limits)
