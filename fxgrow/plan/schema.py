"""What a plan is: plain, frozen data, JSON both ways, without tensors.

A plan says what was asked for, what happens to each channel group, and which edits turn the old
tensors into new ones. It can be written on one machine and carried out on another, on a live
module, a state_dict or (given names and tensors) anything else. What is read is checked: see
:mod:`fxgrow.plan.checks`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fxgrow.errors import PlanError, shown
from fxgrow.plan.bounds import check_extent
from fxgrow.plan.checks import MOST_STEPS, check_plan
from fxgrow.plan.edits import ModuleEdit, Multiplier, NormGain, Rearrangement, SizeEdit, TensorEdit

SCHEMA = 1

Where = Literal["hidden", "stream", "all"]
Grouped = Literal["width", "count"]
Verdict = Literal["exact", "scaled", "no"]
GroupKind = Literal["hidden", "stream", "pinned"]


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    The fields are the arguments of :func:`fxgrow.widen`, but for ``blocks`` and ``method``, which
    are those of :func:`fxgrow.deepen`, ``size``, which is that of :func:`fxgrow.morph_kernel`, and
    ``target``, which is that of :func:`fxgrow.convert`. A plan uses those of one of the four.
    """

    width: str | dict[str, str]
    rescaling: str = "none"
    pairing: str = "vv_z_negz"
    init: str = "copy_uniform"
    where: Where = "hidden"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    gain: float = 1.0
    noise: float = 0.0
    multiple_of: int = 1
    grouped: Grouped = "width"
    seed: int = 0
    compensate: bool = False
    split_noise: float = 0.1
    module: str = ""
    blocks: dict[str, str] = field(default_factory=dict)
    method: str = ""
    size: str | dict[str, str] = ""
    target: str = ""


@dataclass(frozen=True)
class Scope:
    """What was followed: the whole network or a submodule, on which inputs.

    Attributes:
        module: its fully qualified name; "" for the whole.
        inputs: shapes of its inputs.
        inputs_inferred: whether these were inferred.
        tracer: ``torch.fx``, or ``dispatch`` where there is no fx graph.
    """

    module: str
    inputs: tuple[tuple[int, ...], ...]
    inputs_inferred: bool
    tracer: str


@dataclass(frozen=True)
class GroupPlan:
    """What happens to one channel group; the fields are those of the report."""

    name: str
    width: tuple[int, int]
    kind: GroupKind
    block: str | None
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    factors: dict[str, float]
    alpha: float | None
    beta: float | None
    alpha_beta: float | None
    absorbed_by: tuple[str, ...]
    gain: float
    preserves: Verdict
    reason: str
    pairing: str


@dataclass(frozen=True)
class BlockPlan:
    """A block that a deepening inserts.

    Attributes:
        name: its fully qualified name.
        like: the block it is a copy of in structure.
        method: how it is kept from changing anything: ``r2deeper``, ``zero_last``, ``net2deeper``
            or ``read_by_zeros``.
        zeroed: the tensors that make its branch zero, or its layers identities.
        preserves: what becomes of the function in eval mode.
        reason: why so, where it needs one.
        parameters: how many it brings.
        in_training: what becomes of the function in train mode; where it changes, that is measured
            and not judged.
    """

    name: str
    like: str
    method: str
    zeroed: tuple[str, ...]
    preserves: Verdict
    reason: str
    parameters: int
    in_training: Verdict = "exact"


@dataclass(frozen=True)
class KernelPlan:
    """A layer whose kernel grows.

    Attributes:
        name: the layer.
        before, after: kernel sizes, a number for each dim of space.
        padding: before and after, a number for each dim of space, or ``same`` or ``valid``.
        preserves: what becomes of the function.
        reason: why so, where it needs one.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    padding: tuple[tuple[int, ...] | str, tuple[int, ...] | str]
    preserves: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Refusal:
    """A group, stage or layer that was asked for and cannot grow, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """A whole surgery. See the attributes' own classes for their meaning.

    Attributes:
        request: what was asked for.
        groups: every group that grows.
        refused: every selected group that does not.
        tensors: edits by fully qualified name.
        modules: attribute edits.
        sizes: sizes that the network's own code fixes; the grown network is then a GraphModule.
        multipliers: what ``compensate`` inserts into the graph of the grown network.
        prediction: what turns the graph of the old network into the function that the grown one
            is predicted to compute; empty if that is the old function.
        norms: norms that absorb a gain, for the prediction in train mode.
        aliases: tied tensors: other name -> the name under which the edit is listed.
        source: fingerprint: shape and dtype of every tensor by name.
        inputs: input shapes the network was followed on.
        inputs_inferred: whether those were inferred.
        tracer: ``torch.fx``, or ``dispatch`` where there is no fx graph.
        parameters, flops: before and after.
        warnings: what the user should know.
        fxgrow, schema: versions.
        submodules: where not the whole network was followed: the parts that were, whose inputs
            the above are, one after the other.
        rearrangements: modules that get new ones among those that they hold.
        blocks: every block that is inserted.
        kernels: every layer whose kernel grows.
        after: plans that are carried out first, oldest first; this one is for what they make.
        names: where the tensors become those of a given architecture: for each of its tensors, in
            order, the name before, "" for a new one. Such a plan makes tensors, and no module.
    """

    # Of this and of all that it is made of: nothing is converted, left over or not finite.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, str_max_length=1 << 16
    )

    request: Request
    groups: tuple[GroupPlan, ...]
    refused: tuple[Refusal, ...]
    tensors: dict[str, TensorEdit]
    modules: tuple[ModuleEdit, ...]
    multipliers: tuple[Multiplier, ...]
    prediction: tuple[Multiplier, ...]
    norms: tuple[NormGain, ...]
    aliases: dict[str, str]
    source: dict[str, tuple[tuple[int, ...], str]]
    inputs: tuple[tuple[int, ...], ...]
    inputs_inferred: bool
    tracer: str
    parameters: tuple[int, int]
    flops: tuple[int, int]
    warnings: tuple[str, ...]
    fxgrow: str
    schema: int = SCHEMA
    sizes: tuple[SizeEdit, ...] = ()
    submodules: tuple[Scope, ...] = ()
    rearrangements: tuple[Rearrangement, ...] = ()
    blocks: tuple[BlockPlan, ...] = ()
    kernels: tuple[KernelPlan, ...] = ()
    after: tuple[Plan, ...] = ()
    names: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[Plan, ...]:
        """The plans to carry out one after the other, this one last."""
        return (*self.after, replace(self, after=()) if self.after else self)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The parts that were followed, or the whole network as the only one."""
        whole = Scope("", self.inputs, self.inputs_inferred, self.tracer)
        return self.submodules or (whole,)

    @property
    def makes_graphs(self) -> bool:
        """Whether this plan puts graphs in place of code, without what is carried out before it."""
        calls = any(edit.caller is not None for edit in self.rearrangements)
        return bool(self.sizes or self.multipliers or calls)

    @property
    def changes(self) -> tuple[GroupPlan | BlockPlan | KernelPlan, ...]:
        """What this plan makes grow, without what is carried out before it."""
        return (*self.groups, *self.blocks, *self.kernels)

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
        data: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return data

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that :meth:`to_dict` described.

        Raises:
            PlanError: the data is not a plan of this version, or says what no planner would say;
                the message names the field.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"a plan is a mapping of its fields, not a {type(data).__name__}.")
        found = data.get("schema")
        if type(found) is not int or found != SCHEMA:
            raise PlanError(
                f"this is not a plan of schema {SCHEMA} (its schema is {shown(repr(found))}).",
                way_out="Make the plan anew with this version of fxgrow.",
            )
        check_extent(dict(data))
        try:
            # As JSON it is data alone, whatever it was read from.
            plan = _ADAPTER.validate_json(json.dumps(dict(data)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = shown(".".join(str(part) for part in first["loc"]) or "text")
            raise PlanError(f"the plan's {place} is wrong: {shown(first['msg'])}.") from error
        except RecursionError as error:
            raise PlanError("the plan is nested too deeply.") from error
        except (TypeError, ValueError) as error:
            raise PlanError(f"the plan is made of other than JSON: {shown(str(error))}.") from error
        check_plan(plan)
        return plan

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Raises:
            PlanError: the text is not a plan.
        """
        try:
            data = json.loads(text)
        except RecursionError as error:
            raise PlanError("the plan is nested too deeply.") from error
        except (TypeError, ValueError) as error:
            raise PlanError(f"the plan is not JSON: {shown(str(error))}.") from error
        if not isinstance(data, dict):
            raise PlanError("the plan is not a JSON object.")
        return cls.from_dict(data)

    def apply(self, model: Any, *, like: Any = None) -> Any:
        """Return a grown copy of ``model``; see :func:`fxgrow.apply.apply_to_module`."""
        executor = importlib.import_module("fxgrow.apply.module")  # the one way up, and a late one
        return executor.apply_to_module(self, model, like=like)


_ADAPTER: TypeAdapter[Plan] = TypeAdapter(Plan)


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
