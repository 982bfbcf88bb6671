"""What the commands have in common: reading a model, telling of a plan, writing the outputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fxgrow.cli.outputs import report_text, write_text
from fxgrow.cli.terminal import Notices, Steps, discard_output, print_table, print_warning
from fxgrow.errors import SourceError, UsageError, listed, one_line, shown

if TYPE_CHECKING:
    from torch import nn

    from fxgrow.api.widen import Grown
    from fxgrow.files.models import OpenedModel
    from fxgrow.plan.schema import Plan

_OF_PLANS = frozenset({"request", "source", "tensors"})  # fields that every plan has
_OTHERS = {  # what else people have as JSON, by fields that it has
    "a report": frozenset({"request", "verification"}),
    "what `fxgrow inspect` found": frozenset({"groups", "untraceable"}),
    "a schedule of growth": frozenset({"schema", "stages"}),
    "an index of weights": frozenset({"weight_map"}),
    "the configuration of a model": frozenset({"model_type"}),
    "a configuration of timm's": frozenset({"architecture"}),
}


@dataclass
class CommandRun:
    """One run of a command: what it says on stderr while it works.

    Attributes:
        notices: prints warnings.
        steps: shows the step being taken.
    """

    notices: Notices = field(default_factory=Notices)
    steps: Steps = field(default_factory=Steps)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> CommandRun:
        self._stack.enter_context(self.notices.listening())
        self._stack.enter_context(self.steps)
        self.steps("loading torch")
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def open(
        self, path: Path, arch: str | None, arguments: Sequence[str] | None, *, trust_pickle: bool
    ) -> OpenedModel:
        """Read a model with the options of the command line, and print what to know of it.

        Raises:
            SourceError: the file or its architecture cannot be read.
            UsageError: the arguments have another form, or there is no architecture for them.
        """
        from fxgrow.files.models import open_model
        from fxgrow.modules.architectures import parse_arguments

        if arguments and arch is None:
            raise UsageError("--arch-arg says nothing without --arch.", way_out="Give --arch too.")
        given = parse_arguments(arguments or ())
        self.steps(f"reading {path.name}")
        opened = open_model(path, arch=arch, arch_arguments=given, trust_pickle=trust_pickle)
        for text in opened.warnings:
            self.notices.warn(text)
        return opened


@dataclass(frozen=True)
class Outputs:
    """The files that a growth writes."""

    out: Path
    plan: Path | None = None
    reports: Sequence[Path] = ()
    along: list[str] = field(default_factory=list)  # what grew with the weights

    def write(
        self, run: CommandRun, opened: OpenedModel, grown: Grown, inputs: object, *, force: bool
    ) -> None:
        """Write the model first, then what tells of it."""
        from fxgrow.files.models import write_grown

        run.steps(f"writing {self.out.name}")
        self.along.clear()
        for text in write_grown(
            opened, grown, self.out, inputs=inputs, force=force, tell=self.along.append
        ):
            run.notices.warn(text)
        if self.plan is not None:
            write_text(self.plan, grown.plan.to_json(), force=force)
        title = f"{opened.source.path} → {self.out}"
        for path in self.reports:
            write_text(path, report_text(grown.report, path, title), force=force)

    def told(self) -> list[str]:
        """Return a line on each file that tells of the growth."""
        reports = ((path, "the report") for path in self.reports)
        named = ((self.plan, "the plan"), *reports)
        return [f"wrote {path} ({what})" for path, what in named if path is not None]

    def tell(self, opened: OpenedModel) -> None:
        """Say what was written and how to load it."""
        kind = opened.source.kind.replace("module", "pickled module")
        written = "program" if self.out.suffix == ".pt2" else kind
        if ".safetensors" in self.out.suffixes and opened.source.kind != "state_dict":
            written = "state_dict"  # which is all that such a file holds
        kind = "directory" if self.out.is_dir() else written
        named = f" of {opened.architecture}" if opened.architecture is not None else ""
        typer.echo(f"\nwrote {self.out} (a {kind}{named})")
        if self.along:
            typer.echo(f"grown along: {'; '.join(self.along)}")
        for line in self.told():
            typer.echo(line)
        # A record never makes fxgrow import code of the user's: that is named anew.
        found = opened.architecture
        own = f", arch={found.name!r}" if found is not None and found.is_code else ""
        typer.echo(f"load it with fxgrow.load({str(self.out)!r}{own})")


def tell_plan(run: CommandRun, made: Plan, files: Outputs, *, strict: bool, force: bool) -> None:
    """Show a plan, and write it and reports on it, instead of carrying it out.

    Raises:
        NotPreservedError: ``strict``, and the plan predicts a change of the output.
    """
    from fxgrow.api.report.data import Report
    from fxgrow.api.report.tables import plan_table
    from fxgrow.api.requirements import require_exact
    from fxgrow.plan.init import is_from_data
    from fxgrow.verification.findings import Verification

    if strict:
        require_exact(made)
    for text in made.warnings:
        run.notices.warn(text)
    if files.plan is not None:
        if is_from_data(str(made.request.drawing.init)):
            run.notices.warn(
                f"{files.plan} says where channels go and holds no new weights, which come from "
                "data: give `fxgrow apply` the same --data."
            )
        write_text(files.plan, made.to_json(), force=force)
    report = Report(made, Verification("skipped"), made.warnings)
    for path in files.reports:
        write_text(path, report_text(report, path, "what would be done"), force=force)
    print_table(plan_table(made))
    told = files.told()
    typer.echo("\n" + ("\n".join(told) or "nothing was written"))


def move(model: nn.Module, device: str) -> None:
    """Move a network that was read from a file to a device, in place.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    try:
        if torch.device(device).type != "cpu" or any(p.is_cuda for p in model.parameters()):
            model.to(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"the device {device!r} cannot be used: {one_line(str(error))}.",
            name=device,
            way_out="Leave out --device, or name one that torch finds here.",
        ) from error


def read_plan(path: Path) -> Plan:
    """Read a plan, which may be anybody's.

    Raises:
        SourceError: the file cannot be read, or is no JSON.
        PlanError: it holds no plan, or one that says what no planner would say.
    """
    from fxgrow.files.checkpoint.reading import naming, read_json, refuse_source
    from fxgrow.plan.schema import Plan

    if _is_weights(path):
        refuse_source(path, "holds weights, not a plan", "The plan comes first: PLAN SOURCE.")
    with naming(path):
        data = read_json(path)
        _check_is_plan(path, data)
        plan = Plan.from_dict(data)
        plan.check_told()
        return plan


def _check_is_plan(path: Path, data: object) -> None:
    """Return unless JSON is something else that people have beside plans.

    Raises:
        SourceError: it is; the message says what.
    """
    from fxgrow.files.checkpoint.reading import refuse_source

    if not isinstance(data, dict) or _OF_PLANS.issubset(data):
        return
    written = "fxgrow widen SOURCE --width 2x --dry-run --plan PLAN.json writes a plan."
    for kind, fields in _OTHERS.items():
        if fields.issubset(data):
            refuse_source(path, f"is {kind}, not a plan", written)
    if _OF_PLANS.isdisjoint(data):
        held = listed([shown(str(key), 40) for key in data], 3) or "nothing"
        refuse_source(path, f"is no plan: it is a JSON object of {held}", written)


def _is_weights(path: Path) -> bool:
    """Return whether a file is of a format that weights are in."""
    from fxgrow.files.checkpoint.formats import sniff

    try:
        return bool(sniff(path))
    except SourceError:
        return False  # it is none, or cannot be read, which reading it will tell


def show(files: Outputs, opened: OpenedModel, grown: Grown) -> None:
    """Print the report, and say what was written; a warning if that cannot be printed any more."""
    from fxgrow.api.report.tables import report_table

    try:
        print_table(report_table(grown.plan, grown.report.verification))  # warnings were told
        files.tell(opened)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        print_warning(f"{files.out} was written, but not its report: {error.strerror}.")
