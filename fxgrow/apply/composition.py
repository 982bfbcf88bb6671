"""Several surgeries in one plan: each is planned for what those before it make."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fxgrow.apply.module import meta_module
from fxgrow.errors import PlanError
from fxgrow.plan.schema import Plan


def grown_by(plan: Plan | None, model: nn.Module) -> nn.Module:
    """Return what a plan makes of a network, on the meta device; without a plan, the network.

    Raises:
        PlanError: the plan is for another network, or changes what it computes, so that nothing
            after it could be judged.
    """
    if plan is None:
        return model
    for step in plan.steps:
        changed = next((part for part in step.changes if part.preserves != "exact"), None)
        if changed is not None or step.norms:
            name = changed.name if changed is not None else step.norms[0].module
            raise PlanError(
                f"the plan to carry out first does not keep what {name} computes in both modes.",
                name=name,
                way_out="Plan the exact steps first, and the one that rescales last.",
            )
    return meta_module(plan, model)


def following(first: Plan | None, second: Plan) -> Plan:
    """Return one plan that carries out two, the second made for what the first makes."""
    return second if first is None else replace(second, after=first.steps)
