"""The command that makes networks deeper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fxgrow.cli import options as opt
from fxgrow.cli.arguments import width_label
from fxgrow.cli.base import app
from fxgrow.cli.growing import Settings, effort_of, grow
from fxgrow.cli.terminal import Steps
from fxgrow.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from fxgrow.plan.schema import Plan


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "fxgrow deepen model.pt --stage layer3 --blocks +2\n\n"
    "fxgrow deepen model.pt --blocks layer3=+4 --blocks layer4=2x --method zero_last\n\n"
    "fxgrow deepen model.pt --stage layer3.0 --blocks +1 --dry-run --plan plan.json"
)
def deepen(
    source: opt.SourceFile,
    blocks: opt.Blocks,
    stage: opt.Stages = None,
    method: opt.Method = "r2deeper",
    init: opt.Init = "copy_rows",
    seed: opt.Seed = 0,
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
    """Make a trained network deeper without changing what it computes.

    New blocks return what they get, and can be trained from the first step. Nothing is written
    before the result has been measured against the original.
    """
    wanted = parse_blocks(stage or (), blocks)

    def make(model: nn.Module, inputs: object, first: Plan | None, steps: Steps) -> Plan:
        from fxgrow.api.deepen import plan_deepening

        return plan_deepening(
            model, wanted, inputs, method, init, seed, module=module, after=first, progress=steps
        )

    settings = Settings(
        source, after, arch, arch_arg, input_shape, trust_pickle, output, strict,
        effort_of(verify, no_verify=no_verify), device, dry_run, plan, report, force,
    )  # fmt: skip
    grow(settings, width_label(wanted), make, init)


def parse_blocks(stages: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """Read ``--stage`` and ``--blocks``: numbers for stages in order, or ``STAGE=NUMBER`` pairs.

    Raises:
        UsageError: a number lacks a stage, a stage lacks a number, or one is given twice.

    Example:
        >>> parse_blocks(["layer3"], ["+2"]), parse_blocks([], ["layer3=+2", "layer4=2x"])
        ({'layer3': '+2'}, {'layer3': '+2', 'layer4': '2x'})
    """
    plain = [text for text in texts if "=" not in text]
    if len(plain) != len(stages) and not (len(plain) == 1 and stages):
        raise UsageError(
            f"there are {len(stages)} stages and {len(plain)} numbers of blocks for them.",
            way_out="Write --stage layer3 --blocks +2, or --blocks layer3=+2.",
        )
    numbers = plain * len(stages) if len(plain) == 1 else plain
    pairs = [*zip(stages, numbers, strict=True)]
    pairs += [(text.partition("=")[0], text.partition("=")[2]) for text in texts if "=" in text]
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"there are two numbers of blocks for {twice}.", name=twice)
    return found
