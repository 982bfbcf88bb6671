"""Plans for models with a configuration: the most that a ``config.json`` can say.

A configuration has one number for all layers, and mostly none for the size of heads beside that of
the whole. What of a plan no configuration describes is left out of it, a kind of groups at a time,
until one describes the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from fxgrow.api.widen import carry_out
from fxgrow.errors import FxgrowWarning, PlanError, SourceError
from fxgrow.files.checkpoint import Source
from fxgrow.files.checkpoint.saving import output_format
from fxgrow.files.configuration import grown_config
from fxgrow.files.pretrained import is_pretrained
from fxgrow.files.ungoverned import UngovernedError, glob_of
from fxgrow.files.written import check_outputs
from fxgrow.modules.architectures import Architecture
from fxgrow.modules.calling import Arguments
from fxgrow.modules.uninitialised import Limit
from fxgrow.plan.schema import Plan

MakeWithout: TypeAlias = Callable[[Sequence[str]], Plan]
_MOST_KINDS = 12  # of groups that are left out


def is_described(source: Source, architecture: Architecture | None, out: Path) -> bool:
    """Return whether what is written has a ``config.json`` that must describe it."""
    known = is_pretrained(architecture)
    return known and output_format(source, out, configured=known) == "directory"


def config_of(
    architecture: Architecture, plan: Plan, grown: nn.Module, inputs: Arguments | None
) -> dict[str, Any]:
    """Return the configuration of a grown model, whose network computes the same.

    Args:
        architecture: a class of transformers with the old configuration.
        plan: how the model grew.
        grown: what became of it.
        inputs: what both are run on; None compares sizes alone.

    Raises:
        UngovernedError: there is none.
    """
    runs = inputs is not None and _runs(grown, inputs)

    def is_same(config: Mapping[str, Any]) -> bool:
        if not runs:
            return True
        named = replace(architecture, arguments={"config": config})
        try:
            model = named.build("cpu", Limit.of(grown.state_dict())).eval()
            model.load_state_dict(grown.state_dict(), strict=False, assign=True)
            check_outputs(grown, model, inputs)
        except Exception:  # a class may raise anything for numbers that do not go together
            return False
        return True

    return grown_config(architecture, plan, grown, is_same)


def _runs(model: nn.Module, inputs: Arguments) -> bool:
    """Return whether a model runs: one whose weights have several dtypes may not."""
    try:
        check_outputs(model, model, inputs)
    except Exception:  # whatever its code raises
        return False
    return True


def fitted_plan(
    architecture: Architecture, model: nn.Module, make: MakeWithout, inputs: Arguments | None
) -> Plan:
    """Return the plan for the most that a configuration can say.

    Args:
        architecture: a class of transformers with the old configuration.
        model: the old model.
        make: returns the plan without groups whose names match some globs.
        inputs: what the old and the new model are run on.

    Returns:
        The plan, with a warning for what was left out.

    Raises:
        SourceError: no part of the plan can be described.
        PlanError: there is no plan.
    """
    plan = made = make(())
    problem = _problem(architecture, model, plan, inputs)
    first, left = problem, dict[str, str]()
    while problem is not None and len(left) < _MOST_KINDS:
        found = problem.groups or _otherwise(architecture, model, make, inputs, [*left], plan)
        if not found or found in left:
            return _one_by_one(architecture, model, make, inputs, made, first or problem)
        left[found] = f"{problem.reason.partition(': ')[2]}. {problem.wider}"
        try:
            plan = make([*left])
        except PlanError:
            raise first or problem from None
        problem = _problem(architecture, model, plan, inputs)
    if problem is not None:
        raise problem
    return _noted(plan, left)


def _noted(plan: Plan, left: Mapping[str, str]) -> Plan:
    """Return a plan that tells what it leaves, and why."""
    notes = [
        f"left as they are: {groups}, because {reason.rstrip()} Write the weights alone to grow "
        "them too: -o model.safetensors."
        for groups, reason in left.items()
    ]
    return replace(plan, warnings=(*plan.warnings, *notes))


def _one_by_one(
    architecture: Architecture,
    model: nn.Module,
    make: MakeWithout,
    inputs: Arguments | None,
    plan: Plan,
    first: UngovernedError,
) -> Plan:
    """Return the plan for those kinds of groups that a configuration describes, found one by one.

    Raises:
        UngovernedError: it is ``first``, why there is no configuration for all of ``plan``: there
            is none for any of its groups.
    """
    kinds = list(dict.fromkeys(glob_of(group.name) for group in plan.groups))
    best, kept = None, list[str]()
    for kind in kinds[:_MOST_KINDS]:
        try:
            tried = make([other for other in kinds if other not in (*kept, kind)])
            problem = _problem(architecture, model, tried, inputs)
        except (PlanError, SourceError):
            continue
        if problem is None:
            best, kept = tried, [*kept, kind]
    if best is None:
        raise first
    reason = f"{first.reason.partition(': ')[2]}. {first.wider}"
    return _noted(best, {", ".join(kind for kind in kinds if kind not in kept): reason})


def _problem(
    architecture: Architecture, model: nn.Module, plan: Plan, inputs: Arguments | None
) -> UngovernedError | None:
    """Return why no configuration describes what a plan makes of a model, or None if one does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxgrowWarning)
        grown = carry_out(plan, model, inputs, verify="none").model.to("cpu")
    try:
        config_of(architecture, plan, grown, inputs)
    except UngovernedError as error:
        return error
    return None


def _otherwise(
    architecture: Architecture,
    model: nn.Module,
    make: MakeWithout,
    inputs: Arguments | None,
    left: Sequence[str],
    plan: Plan,
) -> str:
    """Return groups without which a configuration computes the same, or ""."""
    for groups in dict.fromkeys(glob_of(group.name) for group in plan.groups):
        try:
            problem = _problem(architecture, model, make([*left, groups]), inputs)
        except (PlanError, SourceError):
            continue
        if problem is None or problem.groups not in ("", groups):
            return groups
    return ""
