"""The command that turns a checkpoint into one for a larger architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fxgrow.cli import options as opt
from fxgrow.cli.arguments import inputs_of, parse_shapes
from fxgrow.cli.base import app
from fxgrow.cli.growing import effort_of
from fxgrow.cli.outputs import check_outputs, check_report_names
from fxgrow.cli.run import CommandRun, Outputs, move, show, tell_plan
from fxgrow.cli.terminal import print_table
from fxgrow.errors import SourceError, UsageError

if TYPE_CHECKING:
    from fxgrow.files.models import OpenedModel


_FromArch = Annotated[
    str | None,
    opt.source(
        "--from",
        "--arch",
        metavar="ARCH",
        help="The architecture of SOURCE, where it is not recognised from the weights.",
    ),
]
_Target = Annotated[
    str | None,
    opt.growth(
        "--to",
        metavar="ARCH",
        help="The larger architecture: resnet34, torchvision:resnet34, timm:resnet50d, "
        "package.module:callable, or the config.json of a model of transformers. It is built with "
        "the arguments of SOURCE (num_classes).",
    ),
]
_TargetArguments = Annotated[
    list[str] | None,
    opt.growth(
        "--to-arg",
        metavar="KEY=VALUE",
        help="An argument of the larger architecture. May be repeated.",
    ),
]
_ListTargets = Annotated[
    bool,
    opt.growth(
        "--list", help="Show which torchvision architectures SOURCE can become, and what they cost."
    ),
]


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "fxgrow convert resnet18.pt --to resnet34\n\n"
    "fxgrow convert vit_b_16.pt --to vit_l_16 -o larger.safetensors\n\n"
    "fxgrow convert weights.pt --from timm:resnet50d --to timm:resnet101d\n\n"
    "fxgrow convert bert/ --to larger/config.json -o larger-bert\n\n"
    "fxgrow convert resnet18.pt --list"
)
def convert(
    source: opt.SourceFile,
    to: _Target = None,
    to_arg: _TargetArguments = None,
    list_targets: _ListTargets = False,
    pairing: opt.Pairing = None,
    init: opt.Init = "copy_rows",
    split_noise: opt.SplitNoise = 0.1,
    seed: opt.Seed = 0,
    arch: _FromArch = None,
    arch_arg: opt.ArchArguments = None,
    input_shape: opt.InputShapes = None,
    trust_pickle: opt.TrustPickle = False,
    output: opt.Output = None,
    verify: opt.Verify = "full",
    no_verify: opt.NoVerify = False,
    device: opt.Device = "cpu",
    dry_run: opt.DryRun = False,
    plan: opt.PlanOutput = None,
    report: opt.ReportOutput = None,
    force: opt.Force = False,
) -> None:
    """Turn a checkpoint into one for a larger architecture that computes the same.

    Widths, depths and kernels follow from the two architectures. Blocks that only the larger one
    has add nothing at first, and can be trained from the first step. Groups of convolutions may be
    fewer and wider there, if each of the old ones fits whole into one of them. The result loads
    into the larger architecture as it is.
    """
    shapes = parse_shapes(input_shape or ())
    reports = tuple(report or ())
    check_report_names(reports)
    effort = effort_of(verify, no_verify=no_verify)
    if (to is None) != list_targets:
        raise UsageError(
            "a conversion needs a target.",
            way_out="Give --to ARCH, or --list to see what the source can become.",
        )
    with CommandRun() as run:
        from fxgrow.api.convert import convert_by, plan_for_target
        from fxgrow.files.checkpoint import default_output
        from fxgrow.files.checkpoint.reading import about
        from fxgrow.files.pretrained import target_architecture
        from fxgrow.modules.architectures import parse_arguments

        if to is None:
            _list(run, run.open(source, arch, arch_arg, trust_pickle=trust_pickle))
            return
        label = to.removesuffix("/config.json").rpartition(":")[2].rpartition("/")[2]
        files = Outputs(output or default_output(source, label), plan, reports)
        wanted = (None if dry_run else files.out, plan, *reports)
        check_outputs(wanted, [source], force=force)
        opened = run.open(source, arch, arch_arg, trust_pickle=trust_pickle)
        architecture = target_architecture(to, opened.architecture, parse_arguments(to_arg or ()))
        target = architecture.build("cpu").eval()
        inputs = inputs_of(shapes, opened)
        for network in (opened.model, target):
            move(network, device)
        with about(source):
            made = plan_for_target(
                opened.model, target, inputs, pairing or "vv_z_negz", init, seed,
                split_noise=split_noise, name=architecture.name, progress=run.steps,
            )  # fmt: skip
        if dry_run:
            tell_plan(run, made, files, strict=False, force=force)
            return
        with about(source):
            grown = convert_by(
                made, opened.model, target, inputs, init=init,
                verify=effort, progress=run.steps,  # type: ignore[arg-type]
            )  # fmt: skip
        for network in (opened.model, grown.model):
            move(network, "cpu")
        opened.become(architecture)
        files.write(run, opened, grown, inputs, force=force)
    show(files, opened, grown)


def _list(run: CommandRun, opened: OpenedModel) -> None:
    """Print what a source can become."""
    from fxgrow.api.convert import list_targets
    from fxgrow.api.report.tables import targets_table

    if opened.architecture is None:
        raise SourceError(
            "what a pickled module can become is not known.", way_out="Name a target with --to."
        )
    found = list_targets(opened.model, opened.architecture, progress=run.steps)
    if not found:
        typer.echo(
            f"there is no larger relative of {opened.architecture} in torchvision. Name a target "
            "of another library (--to timm:NAME) or of your own (--to package.module:callable), or "
            "grow without one: fxgrow widen, fxgrow deepen."
        )
        return
    print_table(targets_table(opened.architecture, found))
