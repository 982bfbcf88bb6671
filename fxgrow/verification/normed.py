"""Weights that are made of a direction and a length, put together for comparing.

What a plan says of a direction it says of the weight. What its two parts are by themselves is of no
consequence, and neither is what new columns do to a norm.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxgrow.labels.space import Normed
from fxgrow.plan.names import names_after
from fxgrow.plan.schema import Plan


def parts_of(plan: Plan, names: list[str]) -> tuple[set[Normed], set[Normed]]:
    """Return the weights made of parts whose parts a plan changes, before it and after it.

    Args:
        plan: the plan.
        names: of the tensors before it.
    """
    moves = []
    for step in plan.steps:
        moves.append((step, {name: old for name, old, _ in names_after(names, step)}))
        names = list(moves[-1][1])
    after: set[Normed] = set()
    for step, origins in moves:
        became: dict[str, list[str]] = {}
        for name, old in origins.items():
            became.setdefault(old, []).append(name)
        moved = {
            Normed(direction, length, parts.dim)
            for parts in after
            for direction, length in zip(
                became.get(parts.direction, ()), became.get(parts.length, ()), strict=False
            )
        }
        after = moved | _of_step(step)
    before: set[Normed] = set()
    for step, origins in reversed(moves):
        before = {
            Normed(origins[parts.direction], origins[parts.length], parts.dim)
            for parts in before | _of_step(step)
            if parts.direction in origins and parts.length in origins
        }
    return before, after


def _of_step(step: Plan) -> set[Normed]:
    """Return the weights whose parts a step changes, under all names that these have."""
    found = {edit.normed for edit in step.tensors.values() if edit.normed is not None}
    others: dict[str, list[str]] = {}
    for name, first in step.aliases.items():
        others.setdefault(first, []).append(name)
    for parts in [*found]:
        names = (others.get(name, ()) for name in (parts.direction, parts.length))
        found.update(Normed(a, b, parts.dim) for a, b in zip(*names, strict=False))
    return found


def put_together(tensors: Mapping[str, Tensor], every: set[Normed]) -> dict[str, Tensor]:
    """Return tensors with each weight in its direction's place."""
    found = dict(tensors)
    for parts in every:
        if parts.direction in tensors and parts.length in tensors:
            direction = tensors[parts.direction].detach()
            exact = direction.double()
            others = [dim for dim in range(exact.ndim) if dim != parts.dim]
            norm = exact.square().sum(others, keepdim=parts.dim is not None).sqrt()
            weight = tensors[parts.length].detach().double() * exact / norm
            found[parts.direction] = weight.to(direction.dtype)
    return found
