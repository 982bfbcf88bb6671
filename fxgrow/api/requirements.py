"""What a plan and a network must be for what is asked of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from fxgrow.errors import NotPreservedError, PlanError, UnpredictedError
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.schema import Plan
from fxgrow.verification.measure import predictable


def require_exact(made: Plan) -> None:
    """Return if a plan preserves the function exactly.

    Raises:
        NotPreservedError: it does not; the first part that changes the output is named.
    """
    way_out = "Use --rescaling none, or --compensate where a multiplier can restore it."
    if not predictable(made):
        way_out = "Use another pairing than none, and no noise."
    for part in (part for step in made.steps for part in step.changes):
        if part.preserves != "exact":
            raise NotPreservedError(
                f"{part.name} would not be preserved: {part.reason}.",
                name=part.name,
                way_out=way_out,
            )
    if made.preserves != "exact":
        raise NotPreservedError("the output would change.", way_out=way_out)
    if not predictable(made):
        raise NotPreservedError("new channels would not cancel.", way_out=way_out)


@contextlib.contextmanager
def strictly(strict: bool) -> Iterator[None]:
    """Have a plan that would change the output be refused as ``strict`` refuses one.

    Raises:
        NotPreservedError: ``strict``, and how the output would change cannot even be predicted.
    """
    try:
        yield
    except UnpredictedError as error:
        if not strict:
            raise
        raise NotPreservedError(error.message, name=error.name, way_out=error.way_out) from error


def counted(made: Plan, model: nn.Module, grown: nn.Module) -> Plan:
    """Return a plan that tells how many parameters there were, and how many there are now.

    A plan that was read may have told otherwise: of that number nothing is made.
    """
    before, after = (sum(p.numel() for p in net.parameters()) for net in (model, grown))
    if made.after:
        first, *others = made.after
        first = replace(first, parameters=(before, first.parameters[1]))
        return replace(made, after=(first, *others), parameters=(made.parameters[0], after))
    return replace(made, parameters=(before, after))


def require_values(model: nn.Module) -> None:
    """Return if a network has values, so that it can be measured.

    Raises:
        PlanError: a tensor of it is on the meta device.
    """
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta:
            raise PlanError(
                f"{name} has a shape but no values (device meta), so nothing can be verified.",
                name=name,
                way_out="Load weights into the model first, or grow its shapes: verify=False.",
            )
