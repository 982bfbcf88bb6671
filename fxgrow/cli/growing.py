"""What every command that makes a network grow does: read, plan, carry out, write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fxgrow.cli.arguments import inputs_of, parse_shapes, plan_label
from fxgrow.cli.data import DataInit
from fxgrow.cli.outputs import check_outputs, check_report_names
from fxgrow.cli.run import CommandRun, Outputs, move, read_plan, show, tell_plan
from fxgrow.errors import SourceError, UsageError, VerificationError

if TYPE_CHECKING:
    from fxgrow.files.models import OpenedModel
    from fxgrow.plan.schema import Plan

EFFORTS = ("full", "quick", "none")
_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pt2", ".json")
_NO_CONFIG = "what is computed from data differs by layer, which no config.json can say."
_WEIGHTS_ALONE = "Write the weights alone: -o model.safetensors."
# From the network, example inputs, the plan before and what shows progress.
MakePlan: TypeAlias = "Callable[..., Plan]"


@dataclass(frozen=True)
class Settings:
    """The options that these commands have in common; see :mod:`fxgrow.cli.options`.

    ``after`` is a plan that is read and given to what makes the plan.
    """

    source: Path
    after: Path | None
    arch: str | None
    arch_arg: Sequence[str] | None
    input_shape: Sequence[str] | None
    trust_pickle: bool
    output: Path | None
    strict: bool
    verify: str
    device: str
    dry_run: bool
    plan: Path | None
    report: Sequence[Path] | None
    force: bool


def effort_of(verify: str, *, no_verify: bool) -> str:
    """Return how thoroughly to measure, by the two options that tell it.

    Raises:
        UsageError: it is none of the three words, or the two contradict each other.
    """
    if verify not in EFFORTS:
        raise UsageError(f"--verify is {verify!r}.", way_out=f"Known: {', '.join(EFFORTS)}.")
    if no_verify and verify == "quick":
        raise UsageError("--no-verify and --verify quick contradict each other.")
    return "none" if no_verify else verify


def grow(
    settings: Settings,
    label: str,
    make: MakePlan,
    init: str | dict[str, str] | DataInit | None = None,
    sides: tuple[str | None, str | None] = (None, None),
    *,
    adapts: bool = False,
) -> None:
    """Plan, and unless that is all, carry it out, write the result and tell of it.

    Args:
        settings: the common options.
        label: what a default output is called after; "" for what the plan before asks for.
        make: returns the plan.
        init: what fills new weights, also by layer; None takes what the plan names. One from data
            is made when the network is there.
        sides: what fills new outputs and new inputs, where it is another.
        adapts: whether ``make`` leaves groups out that it is given the globs of, so that a
            ``config.json`` can describe the result.

    Raises:
        FxgrowError: it cannot be done; nothing was written.
    """
    shapes = parse_shapes(settings.input_shape or ())
    reports = tuple(settings.report or ())
    check_report_names(reports)
    if settings.dry_run and settings.output:
        raise UsageError(
            "--dry-run makes no network that -o could name.",
            way_out="Leave out one of the two; --plan and --report are written.",
        )
    source, after = settings.source, settings.after
    with CommandRun() as run:
        from fxgrow.api.requirements import strictly
        from fxgrow.api.widen import carry_out
        from fxgrow.files.checkpoint import default_output
        from fxgrow.files.checkpoint.foreign import refuse_foreign_output
        from fxgrow.files.checkpoint.reading import about

        first = None if after is None else read_plan(after)
        applied = after if first is not None and not label else None  # it is all that is done
        if first is not None:
            label = label or plan_label(first)
        if settings.output is not None:
            refuse_foreign_output(settings.output)
        files = Outputs(settings.output or default_output(source, label), settings.plan, reports)
        wanted = (None if settings.dry_run else files.out, files.plan, *reports)
        read = [path for path in (source, after) if path is not None]
        check_outputs(wanted, read, force=settings.force)
        own_config = adapts and not settings.dry_run and settings.arch is None
        if isinstance(init, DataInit) and own_config and _writes_config(source, files.out):
            raise UsageError(_NO_CONFIG, way_out=_WEIGHTS_ALONE)  # before minutes of loading
        opened = run.open(
            source, settings.arch, settings.arch_arg, trust_pickle=settings.trust_pickle
        )
        inputs = inputs_of(shapes, opened)
        move(opened.model, settings.device)
        fill = init(opened.model) if isinstance(init, DataInit) else init
        with about(source), strictly(settings.strict):
            plan = functools.partial(make, opened.model, inputs, first, run.steps)
            made = _fitted(opened, plan, files.out, inputs, init) if adapts else plan()
        if settings.dry_run:
            tell_plan(run, made, files, strict=settings.strict, force=settings.force)
            return
        with about(source), _carrying_out(applied):
            grown = carry_out(
                made, opened.model, inputs, init=fill, output_init=sides[0], input_init=sides[1],
                strict=settings.strict, verify=settings.verify, progress=run.steps,  # type: ignore[arg-type]
            )  # fmt: skip
        for network in (opened.model, grown.model):
            move(network, "cpu")
        files.write(run, opened, grown, inputs, force=settings.force)
    show(files, opened, grown)


@contextmanager
def _carrying_out(plan: Path | None) -> Iterator[None]:
    """Let every error of a plan that was read name its file: nothing can be left out of it.

    Args:
        plan: the file; None where the plan was made just now.

    Raises:
        FxgrowError: what the code inside raised.
    """
    if plan is None:
        yield
        return
    from fxgrow.files.checkpoint.reading import about

    try:
        with about(plan):
            yield
    except VerificationError as error:
        way_out = (
            "The plan does not fit this network, or was edited: make it anew. If it is as fxgrow "
            "wrote it, please report this."
        )
        raise VerificationError(error.message, name=error.name, way_out=way_out) from error


def _writes_config(source: Path, out: Path) -> bool:
    """Return whether a directory of transformers' is to become another one."""
    from fxgrow.files.checkpoint.reading import read_json

    config = source / "config.json"
    if out.suffix in _FILES or not config.is_file():
        return False
    try:
        found = read_json(config)
    except SourceError:
        return False  # which reading the directory will tell
    return isinstance(found, dict) and "model_type" in found


def _fitted(
    opened: OpenedModel,
    make: MakePlan,
    out: Path,
    inputs: object,
    init: object,
) -> Plan:
    """Return a plan, of which a configuration tells all if one is written."""
    from fxgrow.files.fitting import fitted_plan, is_described

    if opened.architecture is None or not is_described(opened.source, opened.architecture, out):
        return make()
    if isinstance(init, DataInit):
        raise UsageError(_NO_CONFIG, way_out=_WEIGHTS_ALONE)
    given: Any = opened.inputs if inputs is None else inputs
    return fitted_plan(opened.architecture, opened.model, make, given)
