"""What a plan is: plain, frozen data, JSON both ways, without tensors.

A plan says what was asked for, what happens to each channel group, and which edits turn the old
tensors into new ones. It can be written on one machine and carried out on another, on a live
module, a state_dict or (given names and tensors) anything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from fxgrow.errors import PlanError
from fxgrow.labels.space import Role

SCHEMA = 1

Where = Literal["hidden", "stream", "all"]
Grouped = Literal["width", "count"]
Verdict = Literal["exact", "scaled", "no"]
RunKind = Literal["old", "share", "new", "minus", "zero", "one", "mean"]


@dataclass(frozen=True)
class Request:
    """What the user asked for; the fields are the arguments of :func:`fxgrow.widen`."""

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


@dataclass(frozen=True)
class Run:
    """A run of consecutive new positions of an axis.

    Attributes:
        kind: ``old``: copies of the old positions from ``start`` on; ``share``: the old positions
            divided by the number of shares each has in the axis, plus noise that sums to zero
            over them; ``new`` / ``minus``: the freshly drawn slices from ``start`` on, or their
            negatives; ``zero`` / ``one``; ``mean``: the mean of all old positions.
        start: first old position, or first drawn slice.
        length: number of positions.
    """

    kind: RunKind
    start: int
    length: int


@dataclass(frozen=True)
class AxisEdit:
    """How one dim of a tensor grows.

    Attributes:
        dim: the dim.
        role: what it is to the channels. Readers grow before writers, so that new rows are
            whole.
        groups: the axis is read as (groups, positions per group): a grouped convolution's input.
        runs: what the new positions hold, in order.
    """

    dim: int
    role: Role
    groups: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Absorption:
    """How a norm's tensor takes up a gain s of its input, exactly in eval mode.

    running_mean is multiplied by s, running_var becomes s²·(running_var + eps) − eps; where that
    is negative it becomes 0 and the weight is multiplied by √eps / (s·√(running_var + eps)).

    Attributes:
        part: which of the norm's tensors this is.
        gain: s.
        eps: the norm's eps.
        variance: fully qualified name of its running_var.
    """

    part: Literal["weight", "running_mean", "running_var"]
    gain: float
    eps: float
    variance: str


@dataclass(frozen=True)
class TensorEdit:
    """How one parameter or buffer changes.

    Attributes:
        shape, new_shape: before and after.
        scale: factor on the old values.
        axes: the dims that grow, readers first.
        fan_in: of the layer after growth, for the init.
        absorption: what a norm's tensor takes up first, or None.
    """

    shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    scale: float = 1.0
    axes: tuple[AxisEdit, ...] = ()
    fan_in: int = 1
    absorption: Absorption | None = None


@dataclass(frozen=True)
class ModuleEdit:
    """An attribute of a module that must follow its tensors (``out_channels``, ``groups``…).

    One of an object that the module holds is dotted: ``config.num_attention_heads``.
    """

    module: str
    attribute: str
    before: int | float | tuple[int, ...]
    after: int | float | tuple[int, ...]


@dataclass(frozen=True)
class Multiplier:
    """A scalar on one edge of the fx graph.

    Attributes:
        producer, consumer: names of the fx nodes at the ends of the edge.
        factor: what the value is multiplied by on its way.
        module: the submodule whose graph this is; "" for the whole network's.
    """

    producer: str
    consumer: str
    factor: float
    module: str = ""


@dataclass(frozen=True)
class Scope:
    """What was followed: the whole network or a submodule, on which inputs.

    Attributes:
        module: its fully qualified name; "" for the whole.
        inputs: shapes of its inputs.
        inputs_inferred: whether these were inferred.
        tracer: what followed the computation.
    """

    module: str
    inputs: tuple[tuple[int, ...], ...]
    inputs_inferred: bool
    tracer: str


@dataclass(frozen=True)
class SizeEdit:
    """Sizes in a call of the network's own code, rewritten in its graph.

    Attributes:
        node: name of the fx node.
        function: what it calls (``view``).
        before, after: the sizes among its arguments; None where a slice has no bound.
        module: the submodule whose graph this is; "" for the whole network's.
    """

    node: str
    function: str
    before: tuple[int | None, ...]
    after: tuple[int | None, ...]
    module: str = ""


@dataclass(frozen=True)
class NormGain:
    """A norm that absorbs a gain exactly in eval mode, and up to its eps in train mode.

    In train mode it computes what the old network would compute with eps / gain².
    """

    module: str
    gain: float


@dataclass(frozen=True)
class GroupPlan:
    """What happens to one channel group; the fields are those of the report."""

    name: str
    width: tuple[int, int]
    kind: str
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
class Refusal:
    """A group that was asked for and cannot grow, and why."""

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
        tracer: what followed the computation.
        parameters, flops: before and after.
        warnings: what the user should know.
        fxgrow, schema: versions.
        submodules: where not the whole network was followed: the parts that were, whose inputs
            the above are, one after the other.
    """

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

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The parts that were followed, or the whole network as the only one."""
        whole = Scope("", self.inputs, self.inputs_inferred, self.tracer)
        return self.submodules or (whole,)

    @property
    def preserves(self) -> Verdict:
        """The worst verdict of any group: ``exact``, ``scaled`` or ``no``."""
        found = {group.preserves for group in self.groups}
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
            PlanError: the data is not a plan of this version; the message names the field.
        """
        found = data.get("schema")
        if found != SCHEMA:
            raise PlanError(
                f"this is not a plan of schema {SCHEMA} (its schema is {found!r}).",
                way_out="Make the plan anew with this version of fxgrow.",
            )
        try:
            return _ADAPTER.validate_python(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise PlanError(f"the plan's {field or 'text'} is wrong: {first['msg']}.") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Raises:
            PlanError: the text is not a plan.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"the plan is not JSON: {error}.") from error
        if not isinstance(data, dict):
            raise PlanError("the plan is not a JSON object.")
        return cls.from_dict(data)

    def apply(self, model: Any) -> Any:
        """Return a grown copy of ``model``; see :func:`fxgrow.apply.apply_to_module`."""
        from fxgrow.apply import apply_to_module

        return apply_to_module(self, model)


_ADAPTER: TypeAdapter[Plan] = TypeAdapter(Plan)
