"""The report on a surgery and the findings of an inspection, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.blocks import ResidualBlock
from fxgrow.channels.explain import Explanation, explain
from fxgrow.channels.groups import ChannelGroup
from fxgrow.grow.data.expected import GroupGrowth
from fxgrow.plan.init import told_init
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import GroupPlan, Refusal
from fxgrow.verification.findings import Verification
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

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """What was asked for and did not grow, and why, of all steps; groups are in the plan."""
        return tuple(refusal for step in self.plan.steps for refusal in step.refused)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data; README.md describes the fields."""
        plan = self.plan.to_dict()
        steps = [*plan["after"], plan]
        return {
            "schema": REPORT_SCHEMA,
            "fxgrow": __version__,
            "request": _request(plan["request"]),
            "before": [_request(step["request"]) for step in plan["after"]],
            "groups": [_group_plan(group) for step in self.plan.steps for group in step.groups],
            **{
                key: [entry for step in steps for entry in step[key]]
                for key in ("blocks", "kernels", "refused")
            },
            "parameters": [steps[0]["parameters"][0], plan["parameters"][1]],
            "flops": [steps[0]["flops"][0], plan["flops"][1]],
            "tracer": ", ".join(dict.fromkeys(scope["tracer"] for scope in plan["scopes"])),
            "warnings": list(self.warnings),
            "verification": plain(self.verification),
        }

    def __str__(self) -> str:
        from fxgrow.api.report.tables import as_text, report_table

        return as_text(report_table(self.plan, self.verification, self.warnings))


def _group_plan(group: GroupPlan) -> dict[str, Any]:
    """Return what a report tells of a group."""
    told: dict[str, Any] = plain(group)
    return told | {"alpha_beta": group.alpha_beta}


def _request(request: dict[str, Any]) -> dict[str, Any]:
    """Return what a report tells of a request: a method that computes from data by its name."""
    if isinstance(request.get("init"), str):
        return request | {"init": told_init(request["init"])}
    return request


@dataclass(frozen=True)
class Growth:
    """What new channels would gain in each group, to first order.

    Attributes:
        method: the class of the init that computed it.
        groups: what each group's would gain, in the order of the network.
    """

    method: str
    groups: tuple[GroupGrowth, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON-able data."""
        rows = [
            {
                "name": group.name,
                "width": group.width,
                "channels": len(group.gains),
                "gain": group.gain,
                "gain_per_thousand": group.gain_per_thousand,
                "parameters": group.parameters,
                "strengths": list(group.strengths),
                "gains": list(group.gains),
                "reason": group.reason,
            }
            for group in self.groups
        ]
        data: dict[str, Any] = plain(
            {
                "schema": REPORT_SCHEMA,
                "fxgrow": __version__,
                "method": self.method,
                "groups": rows,
            }
        )
        return data

    def __str__(self) -> str:
        from fxgrow.api.report.growth import growth_table
        from fxgrow.api.report.tables import as_text

        return as_text(growth_table(self.to_dict()))


@dataclass(frozen=True)
class Inspection:
    """What :func:`fxgrow.inspect` found.

    Attributes:
        parts: channels, groups and blocks of the network, or of each part of it that could be
            followed.
        warnings: what the user should know.
        growth: what new channels would gain, if that was asked for.
    """

    parts: tuple[Analysis, ...]
    warnings: tuple[str, ...] = ()
    growth: Growth | None = None

    def why(self, layer: str) -> Explanation:
        """Trace why a layer's channels are what they are.

        Args:
            layer: a layer by its module path, a parameter by its name, or a channel group.

        Returns:
            The groups that the layer's rows and columns belong to, and the chains of operations
            that couple them to what pins them, to what makes them a stream, and to other layers;
            ``str()`` is a text.

        Raises:
            PlanError: the network has no such layer; the nearest are named.

        Example:
            >>> import torch, fxgrow
            >>> net = torch.nn.Sequential(
            ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
            ... )
            >>> side = fxgrow.inspect(net).why("0").sides[0]
            >>> side.kind, [str(chain) for chain in side.partners]
            ('hidden', ['0 rows – (aten.addmm at 2) – 2 columns'])
        """
        inside = (p for p in self.parts if layer.startswith(f"{p.traced.module}."))
        return explain(next(inside, self.parts[0]), layer)

    def to_dict(self) -> dict[str, Any]:
        """Return groups, blocks (with their pairs), pins and growth as JSON-able data."""
        growth = {} if self.growth is None else {"growth": self.growth.to_dict()}
        return self._found() | growth

    def _found(self) -> dict[str, Any]:
        """Return what was found of channels and blocks as data."""
        traced = [part.traced for part in self.parts]
        return {
            "schema": REPORT_SCHEMA,
            "fxgrow": __version__,
            "tracer": ", ".join(dict.fromkeys(found.tracer for found in traced)),
            "untraceable": next((t.untraceable for t in traced if t.untraceable), ""),
            "inputs": ["x".join(map(str, s)) for found in traced for s in found.input_shapes],
            "inputs_inferred": all(found.inferred for found in traced),
            "modules": [found.module for found in traced if found.module],
            "warnings": list(self.warnings),
            "parameters": sum(p.numel() for p in traced[0].standin.parameters()),
            "groups": [_group(part, group) for part in self.parts for group in part.groups],
            "blocks": [_block(block) for part in self.parts for block in part.blocks],
        }

    def __str__(self) -> str:
        from fxgrow.api.report.inspection import inspection_table
        from fxgrow.api.report.tables import as_text

        table = as_text(inspection_table(self.to_dict()))
        return table if self.growth is None else f"{table}\n\n{self.growth}"


def _group(part: Analysis, group: ChannelGroup) -> dict[str, Any]:
    """Return a channel group as JSON-able data."""
    return {
        "name": group.name,
        "width": group.width,
        "channels": len(group.channels),
        "described_width": group.described_width,
        "kind": group.kind,
        "block": part.block_of(group),
        "writers": list(group.writers),
        "carriers": list(group.carriers),
        "readers": list(group.readers),
        "reason": group.reason,
        "needed": group.pin.remedy if group.pin else "",
    }


def _block(block: ResidualBlock) -> dict[str, Any]:
    """Return a residual block as JSON-able data."""
    found: dict[str, Any] = plain(block)
    return {key: found[key] for key in ("name", "skip", "preactivation", "layers", "pairs")}
