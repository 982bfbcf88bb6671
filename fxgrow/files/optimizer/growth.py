"""Grow an optimizer: the one that trains, in place, or what ``optimizer.state_dict()`` returned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxgrow.errors import PlanError, warn
from fxgrow.files.optimizer.order import names_by_group
from fxgrow.files.optimizer.steps import Member, grow_groups, grow_states
from fxgrow.modules.calling import tensors_in
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.schema import Plan

if TYPE_CHECKING:
    from fxgrow.api.widen import Grown


@exclusive
def grow_optimizer_(optimizer: Optimizer, model: nn.Module, grown: Grown) -> None:
    """Let an optimizer go on with a grown network, in place.

    It then holds the parameters of ``grown.model`` in the same groups with the same settings, and
    its averages have grown with them: see :mod:`fxgrow.files.optimizer.state` for how. It is
    changed and not copied, so that schedulers, gradient scalers and hooks that know it stay right.
    Parameters that are none of the model's (a loss's own) stay as they are.

    Args:
        optimizer: any of torch's but LBFGS, or another that keeps such buffers; it must hold
            parameters of ``model``, in its groups alone.
        model: the network that was grown.
        grown: what it became: the result of :func:`fxgrow.widen`, :func:`fxgrow.deepen` or
            another growth.

    Raises:
        PlanError: the optimizer holds no parameter of the model, or keeps parameters where they
            cannot be exchanged (LBFGS); nothing is changed.

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> grown = fxgrow.widen(net, "2x")
        >>> fxgrow.grow_optimizer_(optimizer, net, grown)
        >>> optimizer.state[grown.model[0].weight]["exp_avg"].shape
        torch.Size([16, 4])
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    held = list(itertools.chain(*(group["params"] for group in optimizer.param_groups)))
    if names.keys().isdisjoint(held):
        raise PlanError(
            "the optimizer holds no parameter of the model.",
            way_out="Give the model that it trains, as it was before it grew.",
        )
    _check_places(optimizer, held)
    new = dict(grown.model.named_parameters(remove_duplicate=False))
    for index, parameter in enumerate(held):
        if parameter not in names:
            names[parameter] = f"(parameter {index} of the optimizer)"
            new[names[parameter]] = parameter
    tensors = named_tensors(model)
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    after = dict(grown.model.named_parameters())
    new_groups = grow_groups(grown.plan, groups, tensors, after)
    states = {names[p]: state for p, state in optimizer.state.items() if p in names}
    new_states, notes = grow_states(grown.plan, states, tensors)
    optimizer.state.clear()
    optimizer.state.update((new[name], dict(state)) for name, state in new_states.items())
    for group, old_names, members in zip(optimizer.param_groups, groups, new_groups, strict=True):
        if "param_names" in group:
            stored = dict(zip(old_names, group["param_names"], strict=True))
            group["param_names"] = _stored_names(members, stored)
        group["params"][:] = [new[name] for name, _ in members]
        if _takes_all_or_none(group):
            _fill_momenta([(optimizer.state[p], p) for p in group["params"] if p.requires_grad])
    for note in notes:
        warn(f"the optimizer: {note}")


def _takes_all_or_none(group: Mapping[str, Any]) -> bool:
    """Return whether a group is of fused SGD, whose parameters all have a momentum, or none has."""
    return bool(group.get("fused") and group.get("momentum"))


def _fill_momenta(members: Sequence[tuple[dict[str, Any], Tensor]]) -> None:
    """Give parameters a momentum of zeros where others have one, in place.

    The first step is as it would be without one; with dampening, it is dampened as later ones are.

    Args:
        members: the state and the parameter of each.
    """
    name = "momentum_buffer"
    there = [state[name].device for state, _ in members if state.get(name) is not None]
    for state, parameter in members if there else ():
        if state.get(name) is None:
            state[name] = torch.zeros_like(parameter, device=there[0])


def _check_places(optimizer: Optimizer, held: Sequence[Tensor]) -> None:
    """Return if an optimizer keeps its parameters nowhere but in its groups and states.

    Raises:
        PlanError: it has a list of its own, of which it would go on to change the old ones.
    """
    ids = {id(parameter) for parameter in held}
    for attribute, value in vars(optimizer).items():
        if attribute in ("param_groups", "state", "defaults"):
            continue
        if any(id(tensor) in ids for tensor in tensors_in(value)):
            kind = type(optimizer).__name__
            raise PlanError(
                f"{kind} keeps the parameters in {attribute} too, so it cannot go on with others.",
                name=kind,
                way_out=f"Make a new one: torch.optim.{kind}(grown.model.parameters()).",
            )


def grow_state_dict(
    plan: Plan, saved: Mapping[str, Any], before: nn.Module, after: nn.Module
) -> tuple[dict[str, Any], list[str]]:
    """Return what ``optimizer.state_dict()`` returned, as it fits the grown network.

    It loads into an optimizer whose groups are made of the grown network as the old ones were of
    the old network.

    Args:
        plan: the plan.
        saved: the optimizer's state_dict.
        before: the old network.
        after: the grown network.

    Returns:
        The new state_dict, and what the user should know. Where it cannot be told which parameter
        a state is for, the states are left out: training can go on, with averages that start anew.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in before.named_parameters()}
    try:
        old_groups = names_by_group(saved, shapes)
    except PlanError as error:
        notes = [f"its state was emptied, because {error.message}. {error.way_out}".rstrip()]
        return {**saved, "state": {}}, notes if saved["state"] else []
    param_groups = saved["param_groups"]
    stored_keys = itertools.chain(*(group["params"] for group in param_groups))
    key_of = dict(zip(itertools.chain(*old_groups), stored_keys, strict=True))
    tensors = named_tensors(before)
    states = {name: saved["state"][key] for name, key in key_of.items() if key in saved["state"]}
    new_states, notes = grow_states(plan, states, tensors)
    new_groups = grow_groups(plan, old_groups, tensors, dict(after.named_parameters()))
    flat = list(itertools.chain(*new_groups))
    keys: Sequence[object] = range(len(flat))
    if all(isinstance(key, str) for key in key_of.values()):
        keys = _stored_names(flat, key_of)
    key_after = {name: key for (name, _), key in zip(flat, keys, strict=True)}
    grown_groups = []
    grown_states = {key_after[name]: dict(state) for name, state in new_states.items()}
    parameters = dict(after.named_parameters())
    for group, names, members in zip(param_groups, old_groups, new_groups, strict=True):
        changed = {**group, "params": [key_after[name] for name, _ in members]}
        if "param_names" in group:
            stored = dict(zip(names, group["param_names"], strict=True))
            changed["param_names"] = _stored_names(members, stored)
        grown_groups.append(changed)
        if _takes_all_or_none(group):
            trained = [name for name, _ in members if parameters[name].requires_grad]
            _fill_momenta(
                [(grown_states.setdefault(key_after[n], {}), parameters[n]) for n in trained]
            )
    return {**saved, "state": grown_states, "param_groups": grown_groups}, notes


def _stored_names(members: Sequence[Member], stored: Mapping[str, str]) -> list[str]:
    """Return new names as the optimizer stores them, under the prefix of its old ones."""
    prefixes = (s.removesuffix(name) for name, s in stored.items() if s.endswith(name))
    prefix = next(prefixes, "")
    return [stored[old] if old == name else prefix + name for name, old in members]
