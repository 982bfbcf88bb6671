"""The commands that make networks grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxgrow.cli import options as opt
from fxgrow.cli.arguments import inputs_of, parse_shapes, parse_widths, plan_label, width_label
from fxgrow.cli.base import app
from fxgrow.cli.growing import Settings, grow
from fxgrow.cli.outputs import check_outputs, check_report_name
from fxgrow.cli.run import Outputs, Run, read_plan, show
from fxgrow.cli.terminal import Steps
from fxgrow.plan.presets import settings

if TYPE_CHECKING:
    from torch import nn

    from fxgrow.plan.schema import Plan


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "fxgrow widen model.pt --width 2x\n\n"
    "fxgrow widen model.pt --width 1.5x --rescaling default_vt --report report.html\n\n"
    "fxgrow widen model.pt --width 'layer4.*=2x' --width '*=+16' --multiple-of 8\n\n"
    "fxgrow widen model.pt --width 2x --dry-run --plan plan.json"
)
def widen(
    source: opt.SourceFile,
    width: opt.Widths,
    where: opt.Where = "hidden",
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    multiple_of: opt.MultipleOf = 1,
    grouped: opt.Grouped = "width",
    preset: opt.Preset = None,
    rescaling: opt.Rescaling = None,
    pairing: opt.Pairing = None,
    init: opt.Init = "copy_uniform",
    gain: opt.Gain = "1",
    noise: opt.Noise = 0.0,
    split_noise: opt.SplitNoise = 0.1,
    seed: opt.Seed = 0,
    compensate: opt.Compensate = False,
    after: opt.AfterPlan = None,
    arch: opt.Arch = None,
    arch_arg: opt.ArchArguments = None,
    module: opt.Module = "",
    input_shape: opt.InputShapes = None,
    trust_pickle: opt.TrustPickle = False,
    output: opt.Output = None,
    strict: opt.Strict = False,
    no_verify: opt.NoVerify = False,
    dry_run: opt.DryRun = False,
    plan: opt.PlanOutput = None,
    report: opt.ReportOutput = None,
    force: opt.Force = False,
) -> None:
    """Make a trained network wider without changing what it computes.

    Nothing is written before the result has been measured against the original. In a training
    checkpoint, moving averages and the optimizer's state grow too.
    """
    widths = parse_widths(width)

    def make(model: nn.Module, inputs: object, first: Plan | None, steps: Steps) -> Plan:
        from fxgrow.api.widen import plan as make_plan

        return make_plan(
            model, widths, inputs, *settings(preset, rescaling, pairing), init=init,
            where=where, include=include or (), exclude=exclude or (),  # type: ignore[arg-type]
            gain=gain, noise=noise, multiple_of=multiple_of, grouped=grouped, seed=seed,  # type: ignore[arg-type]
            compensate=compensate, split_noise=split_noise, module=module, after=first,
            progress=steps,
        )  # fmt: skip

    common = Settings(
        source, after, arch, arch_arg, input_shape, trust_pickle, output, strict, no_verify,
        dry_run, plan, report, force,
    )  # fmt: skip
    grow(common, width_label(widths), make, init)


@app.command(epilog="[b]Example[/b]\n\nfxgrow apply plan.json model.pt -o wider.pt")
def apply(
    plan: opt.PlanFile,
    source: opt.SourceFile,
    init: opt.PlanInit = None,
    arch: opt.Arch = None,
    arch_arg: opt.ArchArguments = None,
    input_shape: opt.InputShapes = None,
    trust_pickle: opt.TrustPickle = False,
    output: opt.Output = None,
    strict: opt.Strict = False,
    no_verify: opt.NoVerify = False,
    report: opt.ReportOutput = None,
    force: opt.Force = False,
) -> None:
    """Carry out a plan, on the network it was made for or on other weights of the same shapes."""
    shapes = parse_shapes(input_shape or ())
    check_report_name(report)
    with Run() as run:
        from fxgrow.api.widen import carry_out
        from fxgrow.files.checkpoint import default_output
        from fxgrow.files.checkpoint.reading import about

        made = read_plan(plan)
        files = Outputs(output or default_output(source, plan_label(made)), report=report)
        check_outputs((files.out, report), [source, plan], force=force)
        opened = run.open(source, arch, arch_arg, trust_pickle=trust_pickle)
        inputs = inputs_of(shapes, opened)
        with about(source):
            grown = carry_out(
                made, opened.model, inputs, init=init, strict=strict, verify=not no_verify,
                progress=run.steps,
            )  # fmt: skip
        files.write(run, opened, grown, inputs, force=force)
    show(files, opened, grown)
