"""Reports as tables for people: plain text, or a page of HTML (rich).

Names below a block are shown without the block's name, and consecutive blocks of which every
figure is the same share their rows, so that the table of a deep network fits a screen. Whatever
differs in any figure keeps a row of its own.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxgrow.api.report.changes import (
    blocks_line,
    blocks_table,
    kernels_line,
    kernels_table,
    target_line,
)
from fxgrow.api.report.elements import indented, new_table, reasons, some, verdict_text
from fxgrow.plan.by_layer import by_layer_text, setting_for
from fxgrow.plan.init import told_init
from fxgrow.plan.requests import Convert, Deepen, MorphKernel, Untie
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import GroupPlan
from fxgrow.verification.findings import ExactResult, ModeResult, Verification
from fxgrow.wording import worded

if TYPE_CHECKING:
    from fxgrow.grow.convert.planner import Possible

TEXT_WIDTH = 120
TRAINING_EPS = (
    "In train mode the eps of a norm weighs differently against rescaled batch statistics"
)


def as_text(renderable: RenderableType, width: int = TEXT_WIDTH) -> str:
    """Return a renderable as plain text, without colours and without trailing blanks."""
    console = Console(
        width=width, no_color=True, force_terminal=False, file=io.StringIO(), legacy_windows=False
    )
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def as_html(renderable: RenderableType, title: str, width: int = TEXT_WIDTH) -> str:
    """Return a renderable as a page of HTML that needs nothing else."""
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(Text(title, style="bold"))
    console.print(renderable)
    return console.export_html(inline_styles=True)


def terminal_width() -> int:
    """Return the width to print at: the terminal's (or COLUMNS), else that of plain text."""
    return shutil.get_terminal_size((TEXT_WIDTH, 24)).columns


def report_table(
    plan: Plan, verification: Verification, warnings: Sequence[str] = ()
) -> RenderableType:
    """Return what was done, what was measured and what the user should know as tables."""
    return Group(plan_table(plan, warnings), Text(), verification_table(verification))


def plan_table(plan: Plan, warnings: Sequence[str] = ()) -> RenderableType:
    """Return what a plan does to each group, what it refuses, and what it costs."""
    parts: list[RenderableType] = []
    for step in plan.steps:
        parts.append(_request_line(step))
        if step.groups:
            parts.append(_groups_table(step.groups))
            if other := _other_pairings(step):
                parts += [Text("paired otherwise:"), reasons(other)]
            if told := [(group.name, group.reason) for group in step.groups if group.reason]:
                parts += [Text("because:"), reasons(told)]
        if step.blocks:
            parts.append(blocks_table(step.blocks))
        if step.kernels:
            parts.append(kernels_table(step.kernels))
        if step.refused:
            what = "widened" if step.groups else "grown"
            told = [(refusal.name, refusal.reason) for refusal in step.refused]
            parts += [Text(f"not {what}:"), reasons(told)]
    if warnings:
        parts += [Text("warnings:", style="yellow"), indented(Text(worded("\n".join(warnings))))]
    return Group(*parts, Text(), _costs(plan))


def _other_pairings(step: Plan) -> list[tuple[str, str]]:
    """Return the groups whose new channels are laid out by another pairing than was asked for."""
    asked = getattr(step.request, "pairing", None)
    if asked is None:
        return []
    return [
        (group.name, group.pairing)
        for group in step.groups
        if group.pairing != setting_for(asked, (group.name, *group.writers), group.pairing)
    ]


def verification_table(found: Verification) -> RenderableType:
    """Return a verdict and the measurements it rests on."""
    headline = Text("verification: ").append(verdict_text(found.verdict))
    if found.eval is None:
        return headline
    headline.append(f", on inputs of {', '.join(dict.fromkeys(found.inputs))}")
    if found.effort == "quick":
        headline.append(" (quick: eval mode and the given weights alone)")
    modes = {"eval mode": found.eval, "train mode": found.train}
    measured = {name: result for name, result in modes.items() if result is not None}
    predicted = [result.predicted for result in measured.values()]
    predicted += [] if found.drawn is None else [found.drawn.predicted]
    changes = found.verdict != "changed" and any(errors.max_rel for errors in predicted)
    rounds = any(result.grown_rounding is not None for result in measured.values()) and any(
        result.rounding.max_rel for result in measured.values()
    )
    columns = ["float64", "relative", "as saved", "relative "]
    if changes:  # a line of 80 letters holds no more
        columns += ["predicted", "off prediction"]
    elif rounds:
        columns += ["rounding", "before", "ratio"]
    table = new_table("change in", *columns, right=columns)
    for name, result in measured.items():
        figures = _figures(result, changes=changes)
        figures[2:2] = [result.native.max_abs, result.native.max_rel]
        if rounds and not changes and result.grown_rounding is not None:
            figures += [result.grown_rounding.max_rel, result.rounding.max_rel, result.ratio]
        table.add_row(name, *map(_figure, figures))
    if found.drawn is not None:
        figures = _figures(found.drawn, changes=changes)
        figures[2:2] = [None, None]
        figures += [None] * (len(columns) - len(figures))
        table.add_row("drawn weights", *map(_figure, figures))
    return Group(headline, table, *_remarks(found, changes))


def _figures(result: ModeResult | ExactResult, *, changes: bool) -> list[float | None]:
    """Return what was measured in float64."""
    figures: list[float | None] = [result.float64.max_abs, result.float64.max_rel]
    return figures + ([result.predicted.max_rel, result.residual.max_rel] if changes else [])


def _figure(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.2g}"


def _remarks(found: Verification, changes: bool) -> Iterator[Text]:
    """Yield what there is to say of measurements, where there are any."""
    if found.verdict == "changed":
        yield Text("The plan says that the function changes, and cannot say by how much.")
    if found.verdict == "preserved" and changes:
        yield Text(f"{TRAINING_EPS}: the predicted change.")
    if found.without_gradient:
        names = some(found.without_gradient, 3)
        yield Text(f"new entries without a gradient in two steps: {names}")
    yield from (Text(f"note: {note}") for note in found.notes)


def _span(names: Sequence[str]) -> str:
    """Return the label of consecutive blocks that share their rows.

    Example:
        >>> _span(["a.0"]), _span(["a.0", "a.1"]), _span(["a.0", "a.1", "a.2"])
        ('a.0', 'a.0, a.1', 'a.0 … a.2 (×3)')
        >>> _span([f"encoder.layers.{i}" for i in range(12)])
        'encoder.layers.0 … 11 (×12)'
    """
    if len(names) < 3:
        return ", ".join(names)
    last = names[-1]
    stem = last.rstrip("0123456789")
    if len(last) > _LONG and names[0].startswith(stem):
        last = last.removeprefix(stem)
    return f"{names[0]} … {last} (×{len(names)})"


_LONG = 16  # letters, above which what names share is said once


def targets_table(architecture: object, targets: Sequence[Possible]) -> RenderableType:
    """Return what a network can become, and what it costs."""
    table = new_table("architecture", "parameters", "", right=("parameters",))
    for target in targets:
        cells = (target.name, size(target.parameters), target.reason or "exact")
        table.add_row(*cells, style="dim" if target.reason else "")
    return Group(Text(f"{architecture} can become:"), table)


def _groups_table(groups: Sequence[GroupPlan]) -> Table:
    """Return the table of the groups that grow, consecutive blocks with the same cells as one."""
    table = new_table(
        "block", "group", "width", "α", "β", "α·β", "absorbed by", "gain", "verdict",
        right=("width", "α", "β", "α·β", "gain"),
    )  # fmt: skip
    rows = [
        (block, tuple(_group_cells(group, block) for group in members))
        for block, members in groupby(groups, key=lambda group: group.block or "")
    ]
    for (cells, inside), same in groupby(rows, key=lambda row: (row[1], bool(row[0]))):
        names = [block for block, _ in same]
        shared = _span(names) if inside else "–"
        for index, (*figures, verdict) in enumerate(cells * (1 if inside else len(names))):
            texts = ("" if index and inside else shared, *figures)
            table.add_row(*(Text(x, overflow="fold") for x in texts), verdict_text(verdict))
    return table


def _group_cells(group: GroupPlan, block: str) -> tuple[str, ...]:
    old, new = group.width
    return (
        within(group.name, block),
        f"{old} → {new}",
        _factor(group.alpha, group, group.writers),
        _factor(group.beta, group, group.readers),
        _number(group.alpha_beta),
        ", ".join(within(name, block) for name in group.absorbed_by) or "–",
        _number(group.gain),
        group.preserves,
    )


def _factor(factor: float | None, group: GroupPlan, layers: Sequence[str]) -> str:
    """Return a factor, or the range of those of the layers where they share none."""
    found = [group.factors[layer] for layer in layers if layer in group.factors]
    if factor is not None or not found:
        return _number(factor)
    return f"{_number(min(found))}–{_number(max(found))}"


def _request_line(plan: Plan) -> Text:
    """Return what was asked for, defaults that mean nothing left out."""
    match request := plan.request:
        case Deepen():
            return blocks_line(request)
        case MorphKernel():
            return kernels_line(request)
        case Convert():
            return target_line(request)
        case Untie():
            return Text("tied parameters become two")
    settings = {
        "width": by_layer_text(request.width),
        "rescaling": by_layer_text(request.rescaling),
        "pairing": by_layer_text(request.pairing),
        "init": told_init(by_layer_text(request.init)),
        "keep": "" if request.keep is None else str(request.keep),
        "threshold": f"{request.threshold:g}" if request.threshold else "",
        "output init": request.output_init or "",
        "input init": request.input_init or "",
        "where": request.where,
        "include": ", ".join(request.include),
        "exclude": ", ".join(request.exclude),
        "gain": "" if request.gain == 1.0 else by_layer_text(request.gain),
        "noise": f"{request.noise:g}" if request.noise else "",
        "budget": request.budget,
        "multiple of": str(request.multiple_of) if request.multiple_of > 1 else "",
        "seed": str(request.seed),
    }
    text = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
    done = (", compensated" if request.compensate else "", ", untied" if request.untie else "")
    return Text(text + "".join(done))


def _costs(plan: Plan) -> Table:
    """Return parameters and FLOPs, before and after."""
    inferred = all(scope.inputs_inferred for scope in plan.scopes)
    shapes = [s[1:] if inferred else s for scope in plan.scopes for s in scope.inputs]
    sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
    told = "one input of" if inferred else "inputs of"
    first = plan.steps[0]
    grid = Table.grid(padding=(0, 2))
    for name, (before, after), note in (
        ("parameters", (first.parameters[0], plan.parameters[1]), ""),
        ("FLOPs", (first.flops[0], plan.flops[1]), f"for {told} {sizes}"),
    ):
        ratio = f"×{after / before:.2f}" if before else ""
        grid.add_row(name, f"{size(before)} → {size(after)}", ratio, note)
    return grid


def size(count: int) -> str:
    """Return a count in readable units.

    Example:
        >>> size(999), size(11_181_642), size(3_638_757_376)
        ('999', '11.18 M', '3.639 G')
    """
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return str(count)


def within(name: str, block: str) -> str:
    """Return a layer's name below its block, or the whole name of one outside.

    Example:
        >>> within("layer1.0.conv1", "layer1.0"), within("fc", "layer1.0")
        ('conv1', 'fc')
    """
    return name.removeprefix(f"{block}.") if block else name


def _number(number: float | None) -> str:
    """Return a factor with four digits.

    Example:
        >>> _number(1.0), _number(0.70710678), _number(None)
        ('1', '0.7071', '–')
    """
    return "–" if number is None else f"{number:.4g}"
