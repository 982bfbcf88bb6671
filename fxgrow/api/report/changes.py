"""What a report says of growth that is not that of channel groups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from fxgrow.api.report.elements import new_table, reasons, some, verdict_text
from fxgrow.grow.kernels.taps import told
from fxgrow.plan.requests import Convert, Deepen, MorphKernel
from fxgrow.plan.step import BlockPlan, KernelPlan


def kernels_line(request: MorphKernel) -> Text:
    """Return what was asked for of kernels."""
    size = request.size
    shown = size if isinstance(size, str) else ", ".join(f"{g}={s}" for g, s in size.items())
    settings = {
        "kernel size": shown,
        "include": ", ".join(request.include),
        "exclude": ", ".join(request.exclude),
    }
    return Text(", ".join(f"{name} {value}" for name, value in settings.items() if value))


def kernels_table(kernels: Sequence[KernelPlan]) -> RenderableType:
    """Return the table of the layers whose kernels grow, alike ones that follow in one row."""
    table = new_table("layers", "kernel", "padding", "verdict", right=("kernel", "padding"))
    for cells, alike in groupby(kernels, key=_kernel_cells):
        table.add_row(
            Text(some([kernel.name for kernel in alike], 4)),
            *map(Text, cells[:2]),
            verdict_text(cells[2]),
        )
    return _with_reasons(table, kernels)


def _kernel_cells(kernel: KernelPlan) -> tuple[str, str, str]:
    before, after = kernel.padding
    return (
        f"{told(kernel.before)} → {told(kernel.after)}",
        f"{told(before)} → {told(after)}",
        kernel.preserves,
    )


def blocks_line(request: Deepen) -> Text:
    """Return what was asked for of blocks."""
    blocks = ", ".join(f"{stage}={number}" for stage, number in request.blocks.items())
    return Text(
        f"blocks {blocks}, method {request.method}, init {request.init}, seed {request.seed}"
    )


def target_line(request: Convert) -> Text:
    """Return what was asked for of an architecture."""
    return Text(
        f"target {request.target}, pairing {request.pairing}, init {request.init}, "
        f"seed {request.seed}"
    )


def blocks_table(blocks: Sequence[BlockPlan]) -> RenderableType:
    """Return the table of new blocks, those that are like the same one together."""
    table = new_table(
        "new block", "like", "begins as the identity by", "parameters", "verdict",
        right=("parameters",),
    )  # fmt: skip
    for (like, silenced, verdict), alike in groupby(blocks, key=_block_cells):
        same = list(alike)
        table.add_row(
            Text(some([block.name for block in same], 4), overflow="fold"),
            Text(like, overflow="fold"),
            Text(silenced, overflow="fold"),
            f"{sum(block.parameters for block in same):,}",
            verdict_text(verdict),
        )
    return _with_reasons(table, blocks)


def _block_cells(block: BlockPlan) -> tuple[str, str, str]:
    """Return the cells of a row that blocks may share; names of layers are those in the block."""
    inside = ", ".join(name.removeprefix(f"{block.name}.") for name in block.zeroed)
    return block.like, f"{_HOW.get(block.method, block.method)}: {inside}", block.preserves


_HOW = {
    "r2deeper": "twins that cancel in",
    "zero_last": "zero",
    "net2deeper": "layers that pass on what they get",
    "read_by_zeros": "drawn, and read by zeros",
}


def _with_reasons(
    table: RenderableType, changes: Sequence[BlockPlan | KernelPlan]
) -> RenderableType:
    """Return a table with what a reader should know of its rows, alike ones together."""
    told = [(change.name, change.reason) for change in changes if change.reason]
    return Group(table, Text("note:"), reasons(told)) if told else table
