"""Put a copy in the place of a tied parameter, under some of its names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fxgrow.apply.graph import module_at
from fxgrow.errors import PlanError, shown
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.schema import Plan


def untie(grown: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Give the names that a step unties parameters of their own, in place.

    Args:
        grown: a copy of the network, still tied.
        plan: the step.
        tensors: the copies, by the first of their names.

    Raises:
        PlanError: a name is that of no tied parameter, or one module has it under both names.
    """
    for first, source in plan.untied.items():
        before = named_tensors(grown)
        tied = before.get(source)
        if not isinstance(tied, nn.Parameter) or before.get(first) is not tied:
            raise _unfit(first, f"is not the same parameter as {source}")
        copy = nn.Parameter(tensors[first], requires_grad=tied.requires_grad)
        for name in (first, *(n for n, known in plan.aliases.items() if known == first)):
            owner, _, local = name.rpartition(".")
            module_at(grown, owner)._parameters[local] = copy
        if named_tensors(grown)[source] is not tied:
            raise _unfit(first, f"is held by one module under the name of {source} as well")


def _unfit(name: str, why: str) -> PlanError:
    """Return the error for a network that does not have a tie that a plan is for."""
    return PlanError(
        f"the plan does not fit: {shown(name)} {shown(why)}.",
        name=name,
        way_out="Apply the plan to the network it was made for.",
    )
