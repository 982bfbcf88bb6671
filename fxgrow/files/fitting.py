"""Plans for models with a configuration: the most that a ``config.json`` can say.

A configuration has one number for all layers, and mostly none for the size of heads beside that of
the whole. What of a plan no configuration describes is left out of it, a kind of groups at a time,
until one describes the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
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
from fxgrow.plan.in_memory import is_of_memory
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import Refusal

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
    tries = _Tries(architecture, model, make, inputs)
    problem = first = tries.problem(())
    left: dict[str, UngovernedError] = {}
    while problem is not None and len(left) < _MOST_KINDS:
        found = problem.groups or tries.otherwise(tuple(left))
        if not found or found in left:
            return tries.one_by_one(first or problem)
        left[found] = problem
        try:
            tries.plan(tuple(left))
        except PlanError:
            raise first or problem from None
        problem = tries.problem(tuple(left))
    if problem is not None:
        raise problem
    return tries.told(tries.plan(tuple(left)), left)


@dataclass
class _Tries:
    """Plans that leave some groups out, each made and tried once; see :func:`fitted_plan`."""

    architecture: Architecture
    model: nn.Module
    make: MakeWithout
    inputs: Arguments | None
    _plans: dict[tuple[str, ...], Plan] = field(default_factory=dict)
    _problems: dict[tuple[str, ...], UngovernedError | None] = field(default_factory=dict)

    def plan(self, left: tuple[str, ...]) -> Plan:
        """Return the plan without groups whose names match some globs."""
        if left not in self._plans:
            self._plans[left] = self.make(left)
        return self._plans[left]

    def problem(self, left: tuple[str, ...]) -> UngovernedError | None:
        """Return why no configuration describes what a plan makes, or None if one does."""
        if left not in self._problems:
            self._problems[left] = self._problem(self.plan(left))
        return self._problems[left]

    def _problem(self, plan: Plan) -> UngovernedError | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FxgrowWarning)
            grown = carry_out(plan, self.model, self.inputs, verify="none").model.to("cpu")
        try:
            config_of(self.architecture, plan, grown, self.inputs)
        except UngovernedError as error:
            return error
        return None

    def otherwise(self, left: tuple[str, ...]) -> str:
        """Return groups without which a configuration computes the same, or ""."""
        for groups in dict.fromkeys(glob_of(group.name) for group in self.plan(left).groups):
            try:
                problem = self.problem((*left, groups))
            except (PlanError, SourceError):
                continue
            if problem is None or problem.groups not in ("", groups):
                return groups
        return ""

    def one_by_one(self, first: UngovernedError) -> Plan:
        """Return the plan for those kinds of groups that a configuration describes, one by one.

        Raises:
            UngovernedError: it is ``first``, why there is no configuration for the whole plan:
                there is none for any of its groups.
        """
        kinds = list(dict.fromkeys(glob_of(group.name) for group in self.plan(()).groups))
        best, kept = None, list[str]()
        for kind in kinds[:_MOST_KINDS]:
            left = tuple(other for other in kinds if other not in (*kept, kind))
            try:
                problem = self.problem(left)
            except (PlanError, SourceError):
                continue
            if problem is None:
                best, kept = self.plan(left), [*kept, kind]
        if best is None:
            raise first
        return self.told(best, dict.fromkeys((kind for kind in kinds if kind not in kept), first))

    def told(self, plan: Plan, left: Mapping[str, UngovernedError]) -> Plan:
        """Return a plan with what was asked for, and what it leaves of that, and why.

        Args:
            plan: made without some groups.
            left: globs of their names, with the reason for each.
        """
        asked, grown = self.plan(()), {group.name for group in plan.groups}
        refused = [
            Refusal(group.name, problem.because)
            for group in asked.groups
            for problem in [_reason(group.name, left)]
            if problem is not None and group.name not in grown
        ]
        notes = [text for text in plan.warnings if not is_of_memory(text)]
        if left:
            wider = next((problem.wider for problem in left.values() if problem.wider), "")
            notes.append(
                f"left as they are: {', '.join(left)}, because no config.json describes them grown "
                f"(see the reasons in the report). {wider}Write the weights alone to grow them "
                "too: -o model.safetensors."
            )
        return replace(
            plan, request=asked.request, refused=(*plan.refused, *refused), warnings=tuple(notes)
        )


def _reason(name: str, left: Mapping[str, UngovernedError]) -> UngovernedError | None:
    """Return why a group is left; None if no glob is of its name."""
    return next((problem for glob, problem in left.items() if fnmatchcase(name, glob)), None)
