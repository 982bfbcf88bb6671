"""Find what is at fault where a judgement failed: the first part that breaks, by halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from fxgrow.apply.module import apply_to_module
from fxgrow.channels.analysis import analyse
from fxgrow.errors import PlanError, VerificationError
from fxgrow.grow.kernels.planner import only_kernels
from fxgrow.grow.sizes.narrow import at_other_widths
from fxgrow.grow.widen.submodules import plan_parts
from fxgrow.labels.trace import trace
from fxgrow.modules.inputs import arranged
from fxgrow.modules.tensors import named_tensors, variance
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import Scope
from fxgrow.verification.findings import Verification
from fxgrow.verification.measure import Task, measure, way_out_of


def failure(task: Task, found: Verification) -> VerificationError:
    """Return the error for a failed verification, naming the first group that breaks."""
    made = task.plan
    task = replace(task, progress=lambda step: None)
    if made.after:
        first = replace(made.after[-1], after=made.after[:-1])
        between = apply_to_module(first, task.model)
        earlier = replace(task, plan=first, grown=between, finish=None)
        judged = measure(earlier)
        if judged.verdict == "failed":
            return failure(earlier, judged)
        return failure(replace(task, plan=replace(made, after=()), model=between), found)
    names = [change.name for change in made.groups or made.kernels]
    low, high = 0, len(names)  # the first `low` are good together, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            part = _narrowed(made, task.model, task.example_inputs, names[:middle])
            grown = apply_to_module(part, task.model, task.init)
            bad = measure(replace(task, plan=part, grown=grown)).verdict == "failed"
        except PlanError:
            break
        low, high = (low, middle) if bad else (middle, high)
    guilty = names[high - 1] if names else made.changes[0].name
    given = [result for result in (found.eval, found.train) if result is not None]
    residual = max(result.residual.max_rel for result in given)
    native = max(result.native.max_rel for result in given)
    where = ""
    if found.drawn is not None and found.drawn.residual.max_rel > residual:
        residual, where = found.drawn.residual.max_rel, " with drawn weights"
    return VerificationError(
        f"the grown network does not compute what was predicted: it is off by {residual:.3g} in "
        f"float64{where}, and as saved it differs from the old one by {native:.3g} (relative to "
        f"the largest output). The first part that breaks is {guilty}.",
        name=guilty,
        way_out=way_out_of(made, guilty),
    )


def _narrowed(made: Plan, model: nn.Module, example_inputs: object, names: Sequence[str]) -> Plan:
    """Return the same plan for some of its groups or kernels."""
    if not isinstance(made.request, Widen):
        return only_kernels(made, names)
    widths = {group.name: str(group.width[1]) for group in made.groups if group.name in names}
    request = replace(made.request, width=widths, include=tuple(names), exclude=(), where="all")
    tensors = named_tensors(model)
    analyses = [
        at_other_widths(analyse(trace(model, _inputs(model, scope, example_inputs), scope.module)))
        for scope in made.scopes
    ]
    return plan_parts(analyses, request, lambda name: variance(tensors[name]))


def _inputs(model: nn.Module, scope: Scope, example_inputs: object) -> object:
    """Return the inputs that a part was followed on; None if they were inferred."""
    if example_inputs is not None or scope.inputs_inferred:
        return example_inputs
    part = model.get_submodule(scope.module)
    return arranged(part, [torch.empty(shape, device="meta") for shape in scope.inputs])
