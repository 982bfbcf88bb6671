"""Put new modules into modules: no tensor is made here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from fxgrow.apply.calls import with_calls
from fxgrow.apply.graph import module_at, with_submodule
from fxgrow.errors import PlanError, shown
from fxgrow.modules.standin import stand_in
from fxgrow.plan.edits import Rearrangement

_FITTING = "Apply the plan to the network it was made for."


Views: TypeAlias = list[tuple[nn.Module, nn.Module]]


def rearranged(
    model: nn.Module, rearrangements: Sequence[Rearrangement]
) -> tuple[nn.Module, Views]:
    """Return a view of a model with other modules in some of its modules.

    Args:
        model: the model; not touched. The view shares all that it keeps.
        rearrangements: in any order; none is in a module that another one renames.

    Returns:
        The model itself if nothing is rearranged, and the modules whose place others take in it,
        with these: what refers to them is to refer to the others in a copy of the view
        (:func:`stand_in`). New modules have tensors on the meta device.

    Raises:
        PlanError: the model has no such module, or holds others there, or the new ones cannot be
            called in its graph.
    """
    held = _held(model) if rearrangements else {}
    views: Views = []
    for edit in rearrangements:
        path = edit.container.split(".") if edit.container else []
        old, model = model, _with_children(model, path, edit, held, views)
        if edit.caller is not None:
            calling = with_calls(module_at(old, edit.caller), module_at(model, edit.caller), edit)
            model = with_submodule(model, edit.caller, calling)  # whose path is the view's own
    return model, views


def _held(model: nn.Module) -> dict[int, object]:
    """Return the objects that several modules hold, such as a configuration: copies share them.

    And all modules, for a block may refer to one that does not hold it, or to what holds it.
    """
    seen: set[int] = set()
    held: dict[int, object] = {id(module): module for module in model.modules()}
    for module in model.modules():
        for value in {id(value): value for value in vars(module).values()}.values():
            plain = isinstance(value, (type, nn.Module, Tensor)) or not hasattr(value, "__dict__")
            if not plain and id(value) in seen:
                held[id(value)] = value
            seen.add(id(value))
    return held


def _with_children(
    module: nn.Module, path: Sequence[str], edit: Rearrangement, held: Mapping[int, object],
    views: Views,
) -> nn.Module:  # fmt: skip
    """Return a copy of a module that shares all but what lies on the path to the container."""
    view = copy.copy(module)
    views[:] = [(old, view if new is module else new) for old, new in views] + [(module, view)]
    if path:
        inner = module._modules.get(path[0])
        if inner is None:
            raise PlanError(
                f"the network has no module {shown(edit.container)}.",
                name=edit.container,
                way_out=_FITTING,
            )
        modules = {**module._modules, path[0]: _with_children(inner, path[1:], edit, held, views)}
    else:
        _check_children(module, edit)
        modules = {}
        for child in edit.children:
            inner = module._modules[child.source]
            if child.new and inner is not None:
                own = set(map(id, inner.modules()))
                inner = stand_in(inner, shared={n: x for n, x in held.items() if n not in own})
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
