"""Carry an optimizer's states and groups through the steps of a plan, by names of parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from fxgrow.apply.module import apply_to_state_dict
from fxgrow.apply.tensors import Lookup
from fxgrow.errors import PlanError, listed
from fxgrow.files.optimizer.buffers import State
from fxgrow.files.optimizer.state import grow_state
from fxgrow.plan.init import zeros
from fxgrow.plan.names import names_after, tensor_origins
from fxgrow.plan.schema import Plan

Member: TypeAlias = tuple[str, str]  # a parameter's new name and its old one, "" if it is new


def grow_states(
    plan: Plan, states: Mapping[str, State], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, State], list[str]]:
    """Return what an optimizer keeps after a plan.

    Args:
        plan: the plan.
        states: by the old names of parameters. What is none of the network's stays as it is.
        tensors: the old network's parameters and buffers by name.

    Returns:
        The states by new names (a new parameter has none, so that the optimizer begins one), and
        what the user should know.
    """
    current, names = dict(states), list(tensors)
    lost: dict[str, list[str]] = {}
    for index, step in enumerate(plan.steps):
        lookup = _weights_before(plan.steps[:index], tensors)
        known = set(names)
        grown = {name: state for name, state in current.items() if name not in known}
        moved = names_after(names, step)
        for name, before, is_new in moved:
            copied = step.aliases.get(name, name) in step.untied
            if (is_new and not copied) or before not in current:
                continue
            edit = step.tensors.get(step.aliases.get(name, name))
            try:
                state = current[before]
                grown[name] = state if edit is None else grow_state(edit, state, lookup)
            except PlanError as error:
                lost.setdefault(error.message, []).append(name)
        current, names = grown, [name for name, _, _ in moved]
    return current, [
        f"the state of {listed(found)} was dropped and starts anew, because {reason}."
        for reason, found in lost.items()
    ]


def _weights_before(steps: Sequence[Plan], tensors: Mapping[str, Tensor]) -> Lookup:
    """Return what looks up an old tensor after some steps; they are carried out if it is asked."""

    @functools.cache
    def weights() -> Mapping[str, Tensor]:
        found = tensors
        for step in steps:  # only old entries are asked for, so that any init will do
            found = apply_to_state_dict(step, found, zeros)
        return found

    return lambda name: weights()[name]


def grow_groups(
    plan: Plan,
    groups: Sequence[Sequence[str]],
    names: Iterable[str],
    parameters: Mapping[str, Tensor],
) -> list[list[Member]]:
    """Return the parameters of each group after a plan.

    A new parameter joins the group of the one that it is like. A group that was in the network's
    order is so again; in any other, what is new comes last.

    Args:
        plan: the plan.
        groups: the old names in each group. What is none of the network's stays in its place.
        names: of all the old network's parameters and buffers, in its order.
        parameters: the grown network's, by name, in its order.
    """
    before = list(names)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    origins = tensor_origins(before, plan.steps)
    name_after = {old: name for name, (old, is_new) in origins.items() if not is_new}
    group_of = {name: index for index, group in enumerate(groups) for name in group}
    result = [[(name_after.get(name, name), name) for name in group] for group in groups]
    for name, (like, is_new) in origins.items():
        if is_new and like in group_of and name in trained:
            result[group_of[like]].append((name, ""))
    place = dict(zip(parameters, range(len(parameters)), strict=True))
    for group, members in zip(groups, result, strict=True):
        if _in_order(group, before):
            members.sort(key=lambda member: place.get(member[0], len(place)))
    return result


def _in_order(group: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether all of a group are among some names, and stand in their order."""
    held = set(group)
    return list(group) == [name for name in names if name in held]
