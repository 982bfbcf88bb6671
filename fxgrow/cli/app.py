"""The commands: widen, inspect, apply and verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fxgrow.cli import options as opt
from fxgrow.cli.arguments import inputs_of, open_source, parse_shapes, parse_widths, width_label
from fxgrow.cli.outputs import check_outputs, check_report_name, report_text, write_text
from fxgrow.cli.terminal import Notices, Steps, errors_in_one_line, print_table
from fxgrow.errors import SourceError, VerificationError
from fxgrow.presets import settings
from fxgrow.version import __version__

if TYPE_CHECKING:
    from fxgrow.api import Grown
    from fxgrow.files import Opened
    from fxgrow.plan.schema import Plan


class _Commands(TyperGroup):
    """The group of commands; what any of them raises becomes a line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with errors_in_one_line(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fxgrow {__version__}")
        raise typer.Exit


@app.callback()
def fxgrow(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="FXGROW_DEBUG", help="Show tracebacks of errors."),
    ] = False,
) -> None:
    """Grow trained PyTorch networks without changing what they compute."""
    del version, debug  # the group and the option's callback act on them


@dataclass
class _Run:
    """One run of a command: what it says on stderr while it works.

    Attributes:
        notices: prints warnings.
        steps: shows the step being taken.
    """

    notices: Notices = field(default_factory=Notices)
    steps: Steps = field(default_factory=Steps)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> _Run:
        self._stack.enter_context(self.notices.listening())
        self._stack.enter_context(self.steps)
        self.steps("loading torch")
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def open(
        self, path: Path, arch: str | None, arguments: Sequence[str] | None, *, trust_pickle: bool
    ) -> Opened:
        """Read a model and print what there is to know of it."""
        self.steps(f"reading {path.name}")
        opened = open_source(path, arch, arguments or (), trust_pickle=trust_pickle)
        for text in opened.warnings:
            self.notices.warn(text)
        return opened


@dataclass(frozen=True)
class _Outputs:
    """The files that a growth writes."""

    out: Path
    plan: Path | None = None
    report: Path | None = None

    def write(self, run: _Run, opened: Opened, grown: Grown, *, force: bool) -> None:
        """Write the model first, then what tells of it."""
        from fxgrow.files import write_grown

        run.steps(f"writing {self.out.name}")
        for text in write_grown(opened, grown, self.out, force=force):
            run.notices.warn(text)
        if self.plan is not None:
            write_text(self.plan, grown.plan.to_json())
        if self.report is not None:
            title = f"{opened.source.path} → {self.out}"
            write_text(self.report, report_text(grown.report, self.report, title))

    def tell(self, opened: Opened) -> None:
        """Say what was written and how to load it."""
        kind = opened.source.kind.replace("module", "pickled module")
        named = f" of {opened.architecture}" if opened.architecture is not None else ""
        typer.echo(f"\nwrote {self.out} (a {kind}{named})")
        for path, what in ((self.plan, "the plan"), (self.report, "the report")):
            if path is not None:
                typer.echo(f"wrote {path} ({what})")
        # A record never makes fxgrow import code of the user's: that is named anew.
        name = opened.architecture.name if opened.architecture is not None else ""
        own = f", arch={name!r}" if name and not name.startswith(("torchvision:", "timm:")) else ""
        typer.echo(f"load it with fxgrow.load({str(self.out)!r}{own})")


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

    Nothing is written before the result has been measured against the original.
    """
    widths, shapes = parse_widths(width), parse_shapes(input_shape or ())
    check_report_name(report)
    if dry_run and (output or report):
        raise SourceError("--dry-run writes only a plan.", way_out="Leave out -o and --report.")
    with _Run() as run:
        from fxgrow.api import carry_out
        from fxgrow.api import plan as make_plan
        from fxgrow.checkpoint import default_output
        from fxgrow.checkpoint.formats import sniff

        sniff(source)  # a missing source is a better reason to stop than its output
        files = _Outputs(output or default_output(source, width_label(widths)), plan, report)
        wanted = (plan,) if dry_run else (files.out, plan, report)
        check_outputs(wanted, [source], force=force)
        opened = run.open(source, arch, arch_arg, trust_pickle=trust_pickle)
        inputs = inputs_of(shapes, opened.model)
        made = make_plan(
            opened.model, widths, inputs, *settings(preset, rescaling, pairing), init=init,
            where=where, include=include or (), exclude=exclude or (),  # type: ignore[arg-type]
            gain=gain, noise=noise, multiple_of=multiple_of, grouped=grouped, seed=seed,  # type: ignore[arg-type]
            compensate=compensate, split_noise=split_noise, module=module,
            progress=run.steps,
        )  # fmt: skip
        if dry_run:
            _tell_plan(run, made, plan, strict=strict)
            return
        grown = carry_out(
            made, opened.model, inputs, init=init, strict=strict, verify=not no_verify,
            progress=run.steps,
        )  # fmt: skip
        files.write(run, opened, grown, force=force)
    _print_report(grown)
    files.tell(opened)


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
    with _Run() as run:
        from fxgrow.api import carry_out
        from fxgrow.checkpoint import default_output
        from fxgrow.checkpoint.formats import sniff

        made = _read_plan(plan)
        sniff(source)
        label = width_label(made.request.width)
        files = _Outputs(output or default_output(source, label), report=report)
        check_outputs((files.out, report), [source, plan], force=force)
        opened = run.open(source, arch, arch_arg, trust_pickle=trust_pickle)
        grown = carry_out(
            made, opened.model, inputs_of(shapes, opened.model), init=init, strict=strict,
            verify=not no_verify, progress=run.steps,
        )  # fmt: skip
        files.write(run, opened, grown, force=force)
    _print_report(grown)
    files.tell(opened)


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "fxgrow inspect model.pt\n\n"
    "fxgrow inspect model.pt --all\n\n"
    "fxgrow inspect model.pt --why layer3.0.conv2"
)
def inspect(
    source: opt.SourceFile,
    why: opt.Why = None,
    every: opt.Every = False,
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
    with _Run() as run:
        from fxgrow.api import inspect as inspect_model
        from fxgrow.report.data import plain
        from fxgrow.report.inspection import inspection_table
        from fxgrow.report.tables import terminal_width

        opened = run.open(source, arch, arch_arg, trust_pickle=trust_pickle)
        run.steps("following the channels")
        inputs = inputs_of(shapes, opened.model)
        found = inspect_model(opened.model, inputs, module=module)
        explanation = None if why is None else found.why(why)
    if as_json:
        data = found.to_dict() if explanation is None else plain(explanation)
        typer.echo(json.dumps(data, indent=1))
        return
    if explanation is not None:
        typer.echo(explanation.text(every=every, width=terminal_width()))
        return
    if opened.architecture is not None:
        typer.echo(str(opened.architecture))
    print_table(inspection_table(found, every=every))


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

    In float64 and as saved, in eval and in train mode. ARCH is that of both; files that fxgrow
    wrote know theirs.
    """
    shapes = parse_shapes(input_shape or ())
    with _Run() as run:
        from fxgrow.measure import verify as verify_models
        from fxgrow.report.data import plain
        from fxgrow.report.tables import verification_table

        opened = run.open(before, arch, arch_arg, trust_pickle=trust_pickle)
        other = run.open(after, arch, arch_arg, trust_pickle=trust_pickle)
        run.steps("comparing")
        inputs = inputs_of(shapes, opened.model)
        found = verify_models(opened.model, other.model, inputs, module)
    if as_json:
        typer.echo(json.dumps(plain(found), indent=1))
    else:
        print_table(verification_table(found))
    if found.verdict == "failed":
        raise VerificationError(
            f"{before} and {after} compute different functions.",
            name=str(after),
            way_out="The figures say by how much.",
        )


def _tell_plan(run: _Run, made: Plan, out: Path | None, *, strict: bool) -> None:
    """Show a plan and write it, instead of carrying it out.

    Raises:
        NotPreservedError: ``strict``, and the plan predicts a change of the output.
    """
    from fxgrow.api import require_exact
    from fxgrow.report.tables import plan_table

    if strict:
        require_exact(made)
    for text in made.warnings:
        run.notices.warn(text)
    if out is not None:
        write_text(out, made.to_json())
    print_table(plan_table(made))
    typer.echo(f"\nwrote {out} (the plan)" if out is not None else "\nnothing was written")


def _read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        SourceError: the file cannot be read.
        PlanError: it holds no plan.
    """
    from fxgrow.plan.schema import Plan

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text"
        raise SourceError(
            f"the plan {path} cannot be read: {reason}.",
            name=str(path),
            way_out="Make one with fxgrow widen --dry-run --plan plan.json.",
        ) from error
    return Plan.from_json(text)


def _print_report(grown: Grown) -> None:
    """Print the report; its warnings were printed when they came up."""
    from fxgrow.report.tables import report_table

    print_table(report_table(grown.report, with_warnings=False))


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack α
    app(prog_name="fxgrow")
