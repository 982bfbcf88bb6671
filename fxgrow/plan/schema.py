"""What a plan is: plain, frozen data, JSON both ways, without tensors.

A plan says what was asked for, what happens to each channel group, and which edits turn the old
tensors into new ones. It can be written on one machine and carried out on another, on a live
module, a state_dict or (given names and tensors) anything else. What is read is checked: see
:mod:`fxgrow.plan.checks`.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fxgrow.errors import PlanError, shown
from fxgrow.labels.gains import Verdict
from fxgrow.plan.bounds import check_extent, check_number, refuse
from fxgrow.plan.checks import check_step
from fxgrow.plan.step import PlanStep
from fxgrow.plan.told import check_told
from fxgrow.plan.upgrade import is_old, upgraded, with_inits

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MOST_STEPS = 64


@dataclass(frozen=True)
class Plan(PlanStep):
    """A whole surgery, of one step or of several.

    The fields that every :class:`fxgrow.plan.step.PlanStep` has are those of the last step.

    Attributes:
        after: plans of one step that are carried out first, oldest first; this one is for what
            they make.
        schema: version of the JSON.
    """

    after: tuple[Plan, ...] = ()
    schema: Literal[2] = 2

    @property
    def steps(self) -> tuple[Plan, ...]:
        """The plans to carry out one after the other, this one last."""
        return (*self.after, replace(self, after=()) if self.after else self)

    @property
    def preserves(self) -> Verdict:
        """The worst verdict of any group, block or kernel: ``exact``, ``scaled`` or ``no``.

        What is predicted to change is never ``exact``, whoever makes it change.
        """
        found = {part.preserves for step in self.steps for part in step.changes}
        if found <= {"exact"} and any(step.prediction for step in self.steps):
            return "scaled"
        return "no" if "no" in found else "scaled" if "scaled" in found else "exact"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able data."""
        data: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return data

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that :meth:`to_dict` described, here or in a version of schema 1.

        Raises:
            PlanError: the data is not a plan of these versions, or says what no planner would say;
                the message names the field.
        """
        from pydantic import ValidationError  # late, as the adapter is made late

        if not isinstance(data, Mapping):
            raise PlanError(f"a plan is a mapping of its fields, not a {type(data).__name__}.")
        schema = data.get("schema")
        if type(schema) is not int or schema not in (1, 2):
            raise PlanError(
                f"this is not a plan of schema 1 or 2 (its schema is {shown(repr(schema))}).",
                way_out="Make the plan anew with this version of fxgrow.",
            )
        check_number(data)
        check_extent(dict(data))
        try:
            text = json.dumps(dict(data))  # as JSON it is data alone, whatever it was read from
            read = json.loads(text)
            read = with_inits(upgraded(read) if is_old(read) else read)
            plan = _adapter().validate_json(json.dumps(read))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = shown(
                _place(read, first["loc"], is_missing=first["type"] == "missing") or "text"
            )
            raise PlanError(f"the plan's {place} is wrong: {shown(first['msg'])}.") from error
        except RecursionError as error:
            raise PlanError("the plan is nested too deeply.") from error
        except (TypeError, ValueError) as error:
            raise PlanError(f"the plan is made of other than JSON: {shown(str(error))}.") from error
        plan._check()
        return plan

    def _check(self) -> None:
        """Return if the plan, of the right types, says nothing that no planner would say.

        Raises:
            PlanError: it does; the message names the field.
        """
        if len(self.after) >= MOST_STEPS:
            refuse("after", f"there can be {MOST_STEPS} steps, with the last one")
        for index, step in enumerate(self.after):
            if step.after:
                refuse(f"after.{index}.after", "what is carried out first has nothing before it")
            check_step(step, f"after.{index}.")
        check_step(self)

    def check_told(self) -> None:
        """Return if what the plan tells of groups, blocks and kernels is what its edits do.

        Raises:
            PlanError: it is not, as after an edit by hand; the message names the field.
        """
        for index, step in enumerate(self.after):
            check_told(step, f"after.{index}.")
        check_told(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Raises:
            PlanError: the text is not a plan, or one that tells another thing than it does.
        """
        try:
            data = json.loads(text)
        except RecursionError as error:
            raise PlanError("the plan is nested too deeply.") from error
        except (TypeError, ValueError) as error:
            raise PlanError(f"the plan is not JSON: {shown(str(error))}.") from error
        if not isinstance(data, dict):
            raise PlanError("the plan is not a JSON object.")
        plan = cls.from_dict(data)
        plan.check_told()
        return plan

    def apply(
        self,
        model: Any,
        *,
        like: Any = None,
        init: Any = None,
        output_init: Any = None,
        input_init: Any = None,
    ) -> Any:
        """Return a grown copy of a network; the network itself is not touched.

        Args:
            model: the module that the plan was made for, or one with other weights of the same
                shapes.
            like: the same network with other weights (that of which this is a moving average),
                whose new weights this one gets too.
            init: what fills new weights, where the plan names what is not run unasked: the function
                of yours that it was made with, or a :class:`fxgrow.GradMax` or
                :class:`fxgrow.Tiny` with the batches, which computes them again unless it made the
                plan. None (default) is the registered one that the plan names.
            output_init: likewise, where the plan has one of its own for new outputs.
            input_init: likewise, for new inputs.

        Raises:
            PlanError: the plan is for another network, or was not made with this init.
        """
        fill = None
        if not (init is None and output_init is None and input_init is None):
            sides = importlib.import_module("fxgrow.plan.inits_by_side")  # late, as it needs torch
            fill = sides.init_for(self.request.drawing, init, output_init, input_init)
            placed = importlib.import_module("fxgrow.plan.init").PlacedInit
            if isinstance(fill, placed):  # which may compute them
                importlib.import_module("fxgrow.api.recomputed").computed_again(self, model, fill)
        executor = importlib.import_module("fxgrow.apply.module")  # the one way up, and a late one
        grown = executor.apply_to_module(self, model, fill, like=like)
        judge = importlib.import_module("fxgrow.verification.attributes")
        judge.check_fit(self, model, grown)
        return grown


@functools.cache
def _adapter() -> TypeAdapter[Plan]:
    """Return what turns plans into data and back, made when the first is read or written."""
    from pydantic import TypeAdapter

    return TypeAdapter(Plan)


def _place(data: object, found: Sequence[int | str], *, is_missing: bool) -> str:
    """Return which field of a plan is wrong, as the plan has it.

    Args:
        data: the plan as JSON.
        found: what pydantic says, which also names the kinds that a field may be of.
        is_missing: whether the last of these is what the plan lacks.
    """
    parts = []
    for part in found:
        is_index = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if is_index or (isinstance(data, dict) and part in data):
            data = data[part]  # type: ignore[index]
            parts.append(str(part))
    return ".".join((*parts, str(found[-1])) if is_missing else parts)


def plans_of(record: Mapping[str, Any]) -> tuple[Plan, ...]:
    """Return the steps that a network has been through, as a record in a file of weights tells.

    Args:
        record: its ``plans`` are a list of what :meth:`Plan.to_dict` returned, oldest first.

    Raises:
        PlanError: it holds something else, or more steps than one plan can make.
    """
    found = record.get("plans", ())
    if not isinstance(found, (list, tuple)):
        raise PlanError(f"the record's plans are a {type(found).__name__}, not a list.")
    if len(found) > MOST_STEPS:
        raise PlanError(f"the record has {len(found)} plans, and there can be {MOST_STEPS}.")
    steps = tuple(step for data in found for step in Plan.from_dict(data).steps)
    if len(steps) > MOST_STEPS:
        raise PlanError(f"the record's plans make {len(steps)} steps, not at most {MOST_STEPS}.")
    return steps
