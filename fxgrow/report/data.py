"""The report on a surgery and the findings of an inspection, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from fxgrow.analysis import Analysis
from fxgrow.plan.schema import Plan
from fxgrow.verification import Verification
from fxgrow.version import __version__

REPORT_SCHEMA = 1


def plain(data: Any) -> Any:
    """Return dataclasses and tuples as JSON-able dicts and lists; infinity and NaN become None."""
    if is_dataclass(data):
        return {entry.name: plain(getattr(data, entry.name)) for entry in fields(data)}
    if isinstance(data, (list, tuple)):
        return [plain(item) for item in data]
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    return None if isinstance(data, float) and not math.isfinite(data) else data


@dataclass(frozen=True)
class Report:
    """What was done to each group, and what was measured.

    Attributes:
        plan: what was carried out.
        verification: what was measured.
        warnings: what the user should know, from the plan and from the surgery.
    """

    plan: Plan
    verification: Verification
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data; README.md describes the fields."""
        plan = self.plan.to_dict()
        return {
            "schema": REPORT_SCHEMA,
            "fxgrow": __version__,
            "request": plan["request"],
            "groups": [
                {key: value for key, value in group.items() if key != "pairing"}
                for group in plan["groups"]
            ],
            "refused": plan["refused"],
            "parameters": plan["parameters"],
            "flops": plan["flops"],
            "tracer": plan["tracer"],
            "warnings": list(self.warnings),
            "verification": plain(self.verification),
        }

    def __str__(self) -> str:
        from fxgrow.report.tables import as_text, report_table

        return as_text(report_table(self))


@dataclass(frozen=True)
class Inspection:
    """What :func:`fxgrow.inspect` found.

    Attributes:
        analysis: channels, groups and blocks.
    """

    analysis: Analysis

    def to_dict(self) -> dict[str, Any]:
        """Return groups, blocks (with their pairs) and pins as JSON-able data."""
        analysis = self.analysis
        return {
            "schema": REPORT_SCHEMA,
            "fxgrow": __version__,
            "tracer": analysis.traced.tracer,
            "untraceable": analysis.traced.untraceable,
            "inputs": ["x".join(map(str, shape)) for shape in analysis.traced.input_shapes],
            "inputs_inferred": analysis.traced.inferred,
            "groups": [
                {
                    "name": group.name,
                    "width": group.width,
                    "kind": group.kind,
                    "block": analysis.block_of(group),
                    "writers": list(group.writers),
                    "carriers": list(group.carriers),
                    "readers": list(group.readers),
                    "reason": group.reason,
                }
                for group in analysis.groups
            ],
            "blocks": [
                {
                    "name": block.name,
                    "skip": block.skip,
                    "preactivation": block.preactivation,
                    "layers": list(block.layers),
                    "pairs": [plain(pair) for pair in block.pairs],
                }
                for block in analysis.blocks
            ],
        }

    def __str__(self) -> str:
        from fxgrow.report.tables import as_text, inspection_table

        return as_text(inspection_table(self))
