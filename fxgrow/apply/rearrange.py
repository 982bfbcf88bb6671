"""Put new modules into modules, and carry names across: no tensor is made here."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from fxgrow.apply.calls import with_calls
from fxgrow.apply.graph import module_at, with_part
from fxgrow.errors import PlanError, shown
from fxgrow.modules.standin import stand_in
from fxgrow.plan.edits import Rearrangement
from fxgrow.plan.schema import Plan

_FITTING = "Apply the plan to the network it was made for."


def rearranged(model: nn.Module, rearrangements: Sequence[Rearrangement]) -> nn.Module:
    """Return a view of a model with other modules in some of its modules.

    Args:
        model: the model; not touched. The view shares all that it keeps.
        rearrangements: in any order; none is in a module that another one renames.

    Returns:
        The model itself if nothing is rearranged. New modules have tensors on the meta device.

    Raises:
        PlanError: the model has no such module, or holds others there, or the new ones cannot be
            called in its graph.
    """
    held = _held(model) if rearrangements else {}
    for edit in rearrangements:
        path = edit.container.split(".") if edit.container else []
        old, model = model, _with_children(model, path, edit, held)
        if edit.caller is not None:
            part = with_calls(module_at(old, edit.caller), module_at(model, edit.caller), edit)
            model = with_part(model, edit.caller, part)  # every module on the path is the view's
    return model


def _held(model: nn.Module) -> dict[int, object]:
    """Return the objects that several modules hold, such as a configuration: copies share them."""
    seen: set[int] = set()
    held: dict[int, object] = {}
    for module in model.modules():
        for value in {id(value): value for value in vars(module).values()}.values():
            plain = isinstance(value, (type, nn.Module, Tensor)) or not hasattr(value, "__dict__")
            if not plain and id(value) in seen:
                held[id(value)] = value
            seen.add(id(value))
    return held


def _with_children(
    module: nn.Module, path: Sequence[str], edit: Rearrangement, held: Mapping[int, object]
) -> nn.Module:
    """Return a copy of a module that shares all but what lies on the path to the container."""
    view = copy.copy(module)
    if path:
        inner = module._modules.get(path[0])
        if inner is None:
            raise PlanError(
                f"the network has no module {shown(edit.container)}.",
                name=edit.container,
                way_out=_FITTING,
            )
        modules = {**module._modules, path[0]: _with_children(inner, path[1:], edit, held)}
    else:
        _check_children(module, edit)
        modules = {}
        for child in edit.children:
            inner = module._modules[child.source]
            if child.new and inner is not None:
                inner = stand_in(inner, shared=held)
            modules[child.name] = inner
    vars(view)["_modules"] = modules
    return view


def _check_children(module: nn.Module, edit: Rearrangement) -> None:
    """Check that a module holds what a rearrangement says, and has room for what is new.

    Raises:
        PlanError: it does not, or has something else of a new name.
    """
    held = module._modules
    for child in edit.children:
        if child.source not in held or (child.new and held[child.source] is None):
            raise _unfit(edit, f"it holds none called {child.source}")
        if child.name not in held and hasattr(module, child.name):
            raise _unfit(edit, f"it has something else that is called {child.name}")
    kept = {child.source for child in edit.children if not child.new}
    lost = next((name for name in held if name not in kept), None)
    if lost is not None:
        raise _unfit(edit, f"it holds {lost}, too")


def _unfit(edit: Rearrangement, why: str) -> PlanError:
    """Return the error for a module that does not hold what a rearrangement says."""
    where = edit.container or "the network"
    return PlanError(
        f"the modules of {shown(where)} are not those of the plan: {shown(why)}.",
        name=edit.container,
        way_out=_FITTING,
    )


def new_names(
    names: Iterable[str], rearrangements: Sequence[Rearrangement]
) -> list[tuple[str, str, bool]]:
    """Return every name after a rearrangement, with the name it comes from and whether it is new.

    Args:
        names: of tensors (or modules) before, in the order of the modules.
        rearrangements: as for :func:`rearranged`.

    Returns:
        (name after, name before, new) in the order of the modules after; for what is new, the name
        before is that of what it is like.
    """
    found = [(name, name, False) for name in names]
    for edit in rearrangements:
        prefix = f"{edit.container}." if edit.container else ""
        held = {child.source for child in edit.children}
        own: list[tuple[str, str, bool]] = []  # tensors of the container itself
        children: dict[str, list[tuple[str, str, bool]]] = {}
        for entry in found:
            if entry[0].startswith(prefix):
                local = entry[0].removeprefix(prefix).partition(".")[0]
                (children.setdefault(local, []) if local in held else own).append(entry)
        moved = [
            (
                f"{prefix}{child.name}{name.removeprefix(prefix + child.source)}",
                old,
                new or child.new,
            )
            for child in edit.children
            for name, old, new in children.get(child.source, ())
        ]
        first = next((i for i, e in enumerate(found) if e[0].startswith(prefix)), len(found))
        rest = [entry for entry in found if not entry[0].startswith(prefix)]
        found = [*rest[:first], *own, *moved, *rest[first:]]
    return found


def names_after(names: Iterable[str], step: Plan) -> list[tuple[str, str, bool]]:
    """Return every name after one step of a plan: (name after, name before, new).

    Args:
        names: of tensors before, in the order of the modules.
        step: the step.
    """
    if not step.names:
        return new_names(names, step.rearrangements)
    known, found = set(names), []
    for after, before in step.names.items():
        edit = step.tensors.get(step.aliases.get(after, after))
        like = before or (edit.source if edit is not None else "")
        if like in known:
            found.append((after, like, not before))
    return found


def carried_names(names: Iterable[str], plan: Plan) -> dict[str, str]:
    """Return each name after all steps of a plan, and the name before the first that it comes from.

    Args:
        names: of tensors before, in the order of the modules.
        plan: the plan; of what it makes new, the name before is that of what it is like.
    """
    found = {name: name for name in names}
    for step in plan.steps:
        found = {name: found[before] for name, before, _ in names_after(found, step)}
    return found
