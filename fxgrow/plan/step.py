"""One step of a plan: what was asked for, what was followed, the edits, and what readers want.

Plain, frozen data without tensors. A step says nothing of what is carried out before it: that a
:class:`fxgrow.plan.schema.Plan` adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fxgrow.errors import listed
from fxgrow.labels.gains import Verdict
from fxgrow.labels.trace import Traced, Tracer
from fxgrow.plan.edits import ModuleEdit, Multiplier, NormGain, Rearrangement, SizeEdit, TensorEdit
from fxgrow.plan.requests import Request

if TYPE_CHECKING:
    from pydantic import ConfigDict, GetCoreSchemaHandler

GroupKind = Literal["hidden", "stream", "pinned"]


class _ByVerb:
    """Has pydantic tell requests apart by their verb; loading it takes a fifth of all imports."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> Any:
        from pydantic import Field

        return handler.generate_schema(Annotated[source, Field(discriminator="verb")])


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
    tracer: Tracer

    @classmethod
    def of(cls, traced: Traced) -> Scope:
        """Return what a trace followed."""
        return cls(traced.module, traced.input_shapes, traced.inferred, traced.tracer)


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
    absorbed_by: tuple[str, ...]
    gain: float
    preserves: Verdict
    reason: str
    pairing: str

    @property
    def alpha_beta(self) -> float | None:
        """The factor of writers and readers together; None where layers differ."""
        return None if self.alpha is None or self.beta is None else self.alpha * self.beta


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


def told_refusals(refused: Sequence[Refusal], most: int = 3) -> str:
    """Return why groups cannot grow, those of one reason together; cut after some reasons.

    Example:
        >>> told_refusals([Refusal("a", "no"), Refusal("b", "never"), Refusal("c", "no")])
        'a, c: no. b: never.'
    """
    names: dict[str, list[str]] = {}
    for one in refused:
        names.setdefault(one.reason, []).append(one.name)
    told = [f"{listed(some, 3)}: {reason}." for reason, some in names.items()]
    if len(told) > most:
        told[most:] = [f"And {len(told) - most} other reasons."]
    return " ".join(told)


@dataclass(frozen=True)
class PlanStep:
    """One surgery. See the attributes' own classes for their meaning.

    Attributes:
        request: what was asked for.
        scopes: what was followed: the whole network, or parts that have no module in common.
        source: fingerprint: shape and dtype of every tensor by name.
        tensors: edits by fully qualified name.
        parameters, flops: before and after.
        fxgrow: version.
        groups: every group that grows.
        blocks: every block that is inserted.
        kernels: every layer whose kernel grows.
        refused: every selected group, stage or layer that does not grow.
        modules: attribute edits.
        sizes: sizes that the network's own code fixes; the grown network is then a GraphModule.
        multipliers: what ``compensate`` inserts into the graph of the grown network.
        prediction: what turns the graph of the old network into the function that the grown one
            is predicted to compute; empty if that is the old function.
        rearrangements: modules that get new ones among those that they hold.
        aliases: tied tensors: other name -> the name under which the edit is listed.
        untied: tied tensors that become two: the name of what gets a copy -> the name of what it
            is a copy of.
        names: where the tensors become those of a given architecture: for each of its tensors, in
            order, the name before, "" for a new one. Such a plan makes tensors, and no module.
        warnings: what the user should know.
    """

    # Of this and of all that it is made of: nothing is converted, left over or not finite.
    __pydantic_config__: ClassVar[ConfigDict] = {
        "strict": True, "extra": "forbid", "allow_inf_nan": False, "str_max_length": 1 << 16
    }  # fmt: skip

    request: Annotated[Request, _ByVerb()]
    scopes: tuple[Scope, ...]
    source: dict[str, tuple[tuple[int, ...], str]]
    tensors: dict[str, TensorEdit]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    fxgrow: str
    groups: tuple[GroupPlan, ...] = ()
    blocks: tuple[BlockPlan, ...] = ()
    kernels: tuple[KernelPlan, ...] = ()
    refused: tuple[Refusal, ...] = ()
    modules: tuple[ModuleEdit, ...] = ()
    sizes: tuple[SizeEdit, ...] = ()
    multipliers: tuple[Multiplier, ...] = ()
    prediction: tuple[Multiplier, ...] = ()
    rearrangements: tuple[Rearrangement, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def norms(self) -> tuple[NormGain, ...]:
        """The norms whose running statistics take up a gain, for the prediction in train mode."""
        taken = (edit.absorption for edit in self.tensors.values())
        return tuple(
            NormGain(absorption.variance.rpartition(".")[0], absorption.gain)
            for absorption in taken
            if absorption is not None and absorption.part == "running_var"
        )

    @property
    def makes_graphs(self) -> bool:
        """Whether this puts graphs in place of code."""
        calls = any(edit.caller is not None for edit in self.rearrangements)
        return bool(self.sizes or self.multipliers or calls)

    @property
    def changes(self) -> tuple[GroupPlan | BlockPlan | KernelPlan, ...]:
        """What this makes grow."""
        return (*self.groups, *self.blocks, *self.kernels)
