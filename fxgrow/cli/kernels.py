"""The command that enlarges kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxgrow.cli import options as opt
from fxgrow.cli.arguments import kernel_label, parse_widths
from fxgrow.cli.base import app
from fxgrow.cli.growing import Settings, effort_of, grow
from fxgrow.cli.terminal import Steps

if TYPE_CHECKING:
    from torch import nn

    from fxgrow.plan.schema import Plan


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "fxgrow morph-kernel model.pt --include 'layer4.*.conv1' --size 5\n\n"
    "fxgrow morph-kernel model.pt --size 'layer1.*=5' --size 'layer4.*=+2' --report report.html\n\n"
    "fxgrow morph-kernel model.pt --include 'layer1.*' --size 5 --after plan.json --plan both.json "
    "--dry-run"
)
def morph_kernel(
    source: opt.SourceFile,
    size: opt.KernelSizes,
    include: opt.IncludeLayers = None,
    exclude: opt.ExcludeLayers = None,
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
    """Enlarge kernels of convolutions without changing what the network computes.

    Zeros are put around the old taps, and the padding grows to match; the new taps can be trained
    from the first step. Kernels grow by even differences, and by odd ones where padding='same' or
    an output padding allows it. Nothing is written before the result has been measured.
    """
    sizes = parse_widths(size, "size")

    def make(model: nn.Module, inputs: object, first: Plan | None, steps: Steps) -> Plan:
        from fxgrow.api.kernels import plan as make_plan

        return make_plan(
            model, sizes, inputs, include or (), exclude or (), module=module, after=first,
            progress=steps,
        )  # fmt: skip

    settings = Settings(
        source, after, arch, arch_arg, input_shape, trust_pickle, output, strict,
        effort_of(verify, no_verify=no_verify), device, dry_run, plan, report, force,
    )  # fmt: skip
    grow(settings, kernel_label(sizes), make)
