"""The commands that look at networks and compare them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fxgrow.cli import data_options as data_opt
from fxgrow.cli import options as opt
from fxgrow.cli.arguments import inputs_of, parse_shapes
from fxgrow.cli.base import app
from fxgrow.cli.data import DataInit
from fxgrow.cli.run import CommandRun
from fxgrow.cli.terminal import print_table
from fxgrow.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from fxgrow.plan.schema import Plan
    from fxgrow.verification.findings import Verification

_EXACT = 1e-10  # relative, in float64


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "fxgrow inspect model.pt\n\n"
    "fxgrow inspect model.pt --all\n\n"
    "fxgrow inspect model.pt --why layer3.0.conv2\n\n"
    "fxgrow inspect model.pt --growth --data batches.pt"
)
def inspect(
    source: opt.SourceFile,
    why: opt.Why = None,
    every: opt.Every = False,
    growth: data_opt.GrowthTable = False,
    data: data_opt.Data = None,
    loss: data_opt.Loss = None,
    method: data_opt.DataMethod = "tiny",
    include: data_opt.GrowthInclude = None,
    exclude: data_opt.GrowthExclude = None,
    as_json: opt.AsJson = False,
    arch: opt.Arch = None,
    arch_arg: opt.ArchArguments = None,
    module: opt.Module = "",
    input_shape: opt.InputShapes = None,
    trust_pickle: opt.TrustPickle = False,
) -> None:
    """Show which channels change width together, and why some cannot.

    A group is a set of channels that layers write and read together. Hidden groups lie inside a
    branch and streams run along residual additions: both can grow. Pinned groups cannot; the
    table says why, and what would be needed. Groups that differ in the numbers of their names
    share a row, with * for these.
    """
    shapes = parse_shapes(input_shape or ())
    computed = _growth_of(growth, method, data, loss, why)
    if not growth and (include or exclude):
        raise UsageError("--include and --exclude are for --growth.", way_out="Give --growth too.")
    with CommandRun() as run:
        from fxgrow.api.inspection import inspect as inspect_model
        from fxgrow.api.report.data import plain
        from fxgrow.api.report.growth import growth_table
        from fxgrow.api.report.inspection import inspection_table
        from fxgrow.api.report.tables import terminal_width
        from fxgrow.files.checkpoint.reading import about

        opened = run.open(source, arch, arch_arg, trust_pickle=trust_pickle)
        run.steps("following the channels")
        inputs = inputs_of(shapes, opened)
        init = None if computed is None else computed(opened.model)
        with about(source):
            found = inspect_model(
                opened.model, inputs, module=module, growth=init, include=include or (),
                exclude=exclude or (), progress=run.steps,
            )  # fmt: skip
            explanation = None if why is None else found.why(why)
    if as_json:
        told = found.to_dict() if explanation is None else plain(explanation)
        typer.echo(json.dumps(told, indent=1))
        return
    if explanation is not None:
        typer.echo(explanation.text(every=every, width=terminal_width()))
        return
    if opened.architecture is not None:
        typer.echo(str(opened.architecture))
    if found.growth is not None:
        print_table(growth_table(found.growth.to_dict()))
        return
    print_table(inspection_table(found.to_dict(), every=every))


def _growth_of(
    growth: bool, method: str, data: Path | None, loss: str | None, why: str | None
) -> DataInit | None:
    """Return what computes the growth that is asked for, if it is.

    Raises:
        UsageError: the options do not go together.
    """
    if not growth:
        if data is not None or loss is not None:
            raise UsageError("--data and --loss are for --growth.", way_out="Give --growth too.")
        return None
    if why is not None:
        raise UsageError("--why and --growth are two questions.", way_out="Ask one of them.")
    return DataInit(method, data, loss)


def _with_rescaling_told(found: Verification, plans: Sequence[Plan]) -> Verification:
    """Return measurements with a note where rescaled norms change train mode alone."""
    if found.eval is None or found.train is None:
        return found
    absorbed = any(e.absorption for plan in plans for e in plan.tensors.values())
    in_training_alone = found.eval.float64.max_rel <= _EXACT < found.train.float64.max_rel
    if not (absorbed and in_training_alone):
        return found
    from fxgrow.api.report.tables import TRAINING_EPS

    note = f"{TRAINING_EPS}, as the plan in the second file predicts; eval mode is the same."
    return replace(found, notes=(*found.notes, note))


@app.command(epilog="[b]Example[/b]\n\nfxgrow verify model.pt model-2x.pt")
def verify(
    before: opt.Before,
    after: opt.After,
    as_json: opt.AsJson = False,
    arch: opt.Arch = None,
    arch_arg: opt.ArchArguments = None,
    module: opt.Module = "",
    input_shape: opt.InputShapes = None,
    trust_pickle: opt.TrustPickle = False,
) -> None:
    """Compare what two networks compute; exit code 3 if they differ.

    In float64 and as saved, in eval and in train mode. They may differ by 100 times the rounding of
    BEFORE in its own dtype. ARCH is that of both; files that fxgrow wrote know theirs.
    """
    shapes = parse_shapes(input_shape or ())
    with CommandRun() as run:
        from fxgrow.api.report.data import plain
        from fxgrow.api.report.tables import verification_table
        from fxgrow.files.checkpoint.reading import about
        from fxgrow.verification.measure import UNRUN
        from fxgrow.verification.measure import verify as verify_models

        opened = run.open(before, arch, arch_arg, trust_pickle=trust_pickle)
        other = run.open(after, arch, arch_arg, trust_pickle=trust_pickle)
        run.steps("comparing")
        inputs = inputs_of(shapes, opened)
        with about(before):
            found = verify_models(opened.model, other.model, inputs, module)
        found = _with_rescaling_told(found, other.plans)
    if as_json:
        typer.echo(json.dumps(plain(found), indent=1))
    else:
        print_table(verification_table(found))
    unrun = next((note for note in found.notes if note.startswith(UNRUN)), "")
    if unrun:
        raise VerificationError(
            f"{after}, compared with {before}: {unrun.rstrip('.')}.",
            name=str(after),
            way_out="Is it the same network, grown? Else give inputs that both take "
            "(--input-shape).",
        )
    if found.verdict == "failed":
        raise VerificationError(
            f"{before} and {after} compute different functions.",
            name=str(after),
            way_out="The figures say by how much.",
        )
