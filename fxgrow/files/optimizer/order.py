"""Which parameter each entry of an optimizer's state_dict is for.

A state_dict numbers parameters in the order of its groups and says no more, unless the optimizer
was given ``named_parameters()``. A group has its parameters in the order of the module, as a rule;
so the assignment is searched for in which the shapes of the states fit and every group keeps that
order. Several such assignments are none: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fxgrow.errors import PlanError
from fxgrow.files.checkpoint.weights import bare_names
from fxgrow.files.optimizer.buffers import Shape, shape_of

Place: TypeAlias = tuple[int, ...]  # how many parameters of each group have been assigned
_LEFT_OUT = -1
_MOST_GROUPS = 2000  # one for each parameter is usual
_WIDEST = 1000  # places that are kept at once: beyond, the shapes hardly tell


@dataclass
class _Way:
    """How a place was reached.

    Attributes:
        count: in how many ways; 2 stands for several.
        before: the place before.
        group: the group that the last parameter went to.
    """

    count: int
    before: Place
    group: int


def names_by_group(saved: Mapping[str, Any], parameters: Mapping[str, Shape]) -> list[list[str]]:
    """Return, for each of an optimizer's groups, the names of its parameters.

    Args:
        saved: the optimizer's state_dict.
        parameters: shapes of the module's parameters by name, in its order.

    Raises:
        PlanError: no assignment fits, or several do.
    """
    groups, states = saved["param_groups"], saved["state"]
    _check_form(groups, states)
    named = [group.get("param_names", group["params"]) for group in groups]
    if all(isinstance(name, str) for names in named for name in names):
        return _as_named(named, parameters)
    shapes = [[shape_of(states.get(key, {})) for key in group["params"]] for group in groups]
    return assigned(shapes, parameters)


def _check_form(groups: Any, states: Mapping[object, object]) -> None:
    """Return if groups and states have the form in which torch's optimizers save them.

    Raises:
        PlanError: they have another.
    """
    plain = isinstance(groups, list) and all(
        isinstance(group, Mapping) and _are_keys(group.get("params")) for group in groups
    )
    known = plain and all(
        isinstance(names, list)
        and len(names) == len(group["params"])
        and all(isinstance(name, (int, str)) for name in names)
        for group in groups
        for names in [group.get("param_names", group["params"])]
    )
    if not known or not all(isinstance(state, Mapping) for state in states.values()):
        raise PlanError("it is not in the form of torch's optimizers")


def _are_keys(items: object) -> bool:
    """Return whether these are numbers or names of parameters, each once."""
    if not isinstance(items, list) or not all(isinstance(item, (int, str)) for item in items):
        return False
    return len(set(items)) == len(items)


def _as_named(named: Sequence[Sequence[str]], parameters: Mapping[str, Shape]) -> list[list[str]]:
    """Return the names that the groups have, without the prefixes of wrappers.

    Raises:
        PlanError: a name is none of the module's.
    """
    flat = [name for names in named for name in names]
    bare = dict(
        zip(flat, flat if set(flat) <= parameters.keys() else bare_names(flat), strict=True)
    )
    for name in flat:
        if bare[name] not in parameters:
            raise PlanError(f"it has a parameter {name}, which the model has not", name=name)
    return [[bare[name] for name in names] for names in named]


def assigned(
    shapes: Sequence[Sequence[Shape | None]], parameters: Mapping[str, Shape]
) -> list[list[str]]:
    """Return the only assignment in which shapes fit and each group keeps the module's order.

    Args:
        shapes: for each group, the shapes of its parameters; None fits any.
        parameters: the module's, in its order; some may be in no group.

    Raises:
        PlanError: there is none, or more than one.
    """
    spare = len(parameters) - sum(map(len, shapes))
    if spare < 0:
        raise PlanError("the shapes of its state are not those of the model's parameters")
    if len(shapes) > _MOST_GROUPS:
        raise _several()
    steps = _ways(shapes, list(parameters.values()), spare)
    end: Place = tuple(map(len, shapes))
    if end not in steps[-1]:
        raise PlanError("the shapes of its state are not those of the model's parameters")
    if steps[-1][end].count > 1:
        raise _several()
    names: list[list[str]] = [[] for _ in shapes]
    for name, step in zip(reversed(list(parameters)), reversed(steps[1:]), strict=True):
        if step[end].group != _LEFT_OUT:
            names[step[end].group].insert(0, name)
        end = step[end].before
    return names


def _ways(
    shapes: Sequence[Sequence[Shape | None]], parameters: Sequence[Shape], spare: int
) -> list[dict[Place, _Way]]:
    """Return how far each group can be filled before the first parameter and after each.

    Args:
        shapes: for each group, the shapes of its parameters; None fits any.
        parameters: the shapes of the module's.
        spare: how many of these are in no group.

    Raises:
        PlanError: there are too many ways to follow.
    """
    start: Place = (0,) * len(shapes)
    steps = [{start: _Way(1, start, _LEFT_OUT)}]
    for index, shape in enumerate(parameters):
        reached: dict[Place, _Way] = {}
        for place, way in steps[-1].items():
            if index - sum(place) < spare:
                _reach(reached, place, _Way(way.count, place, _LEFT_OUT))
            for group, wanted in enumerate(shapes):
                if place[group] < len(wanted) and wanted[place[group]] in (None, shape):
                    after = (*place[:group], place[group] + 1, *place[group + 1 :])
                    _reach(reached, after, _Way(way.count, place, group))
        if len(reached) > _WIDEST:
            raise _several()
        steps.append(reached)
    return steps


def _reach(reached: dict[Place, _Way], place: Place, way: _Way) -> None:
    """Record one more way to a place."""
    known = reached.setdefault(place, way)
    if known is not way:
        known.count = 2


def _several() -> PlanError:
    return PlanError(
        "the shapes of its state fit the model's parameters in more than one way",
        way_out="Build the optimizer from model.named_parameters(), so that it keeps their names.",
    )
