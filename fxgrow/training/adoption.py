"""Make a module what a grown copy of it is, in place: whoever holds it or its parts goes on.

Module objects stay where there was one before, with their hooks, flags and attributes; what a plan
changed (parameters, buffers, attributes, modules that they hold, code) is taken from the copy. A
parameter that no plan changed stays the same object.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

from torch import Tensor, fx, nn

from fxgrow.apply.module import set_attributes
from fxgrow.errors import PlanError
from fxgrow.labels.in_code import change_sizes, sizes_in_code
from fxgrow.modules.standin import with_computed_weights
from fxgrow.modules.tensors import modules_of, named_tensors
from fxgrow.plan.names import module_origins, names_after, tensor_origins
from fxgrow.plan.schema import Plan
from fxgrow.training.generated import generated_class

_HELD = (  # what a surgery may change in the dicts of a module
    "_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks",
    "_forward_hooks_always_called",
)  # fmt: skip


def keep_unchanged(model: nn.Module, grown: nn.Module, plan: Plan) -> None:
    """Put the old object of every tensor that no step of a plan changes into the grown copy."""
    before, after = named_tensors(model), named_tensors(grown)
    kept = {name: name for name in before}
    for step in plan.steps:
        kept = {
            name: kept[old]
            for name, old, is_new in names_after(kept, step)
            if not is_new and step.aliases.get(name, name) not in step.tensors
        }
    same = {id(after[name]): before[old] for name, old in kept.items() if name in after}
    for module in modules_of(grown):
        _exchange(module, same)


def _refer(
    module: nn.Module, like: nn.Module | None, held: Collection[int], others: Mapping[int, Any]
) -> None:
    """Have a module that is new refer to the network, where it refers to the copy that it is of.

    Args:
        module: the module.
        like: the module of the network that it is a copy of.
        held: the ids of all modules in the grown copy.
        others: what continues modules of that, by their ids.
    """
    for name, value in vars(module).items():
        if name in _HELD:
            continue
        theirs = None if like is None else vars(like).get(name)
        if isinstance(value, nn.Module) and isinstance(theirs, nn.Module) and id(value) not in held:
            vars(module)[name] = theirs  # of what the network is itself a part of
        else:
            vars(module)[name] = _with_others(value, others)


def _exchange(module: nn.Module, others: Mapping[int, Tensor]) -> None:
    """Put other tensors in place of some, wherever a module holds them."""
    for held in (module._parameters, module._buffers):
        for local, tensor in held.items():
            if id(tensor) in others:
                held[local] = others[id(tensor)]  # type: ignore[assignment]
    for name, value in vars(module).items():
        if name not in _HELD and isinstance(value, (Tensor, list, tuple, dict)):
            changed = _with_others(value, others)
            if changed is not value:
                vars(module)[name] = changed


def _with_others(value: Any, others: Mapping[int, Any]) -> Any:
    """Return a value with other objects in place of some, also where it only refers to them."""
    if id(value) in others:
        return others[id(value)]
    if isinstance(value, weakref.ref):
        other = others.get(id(value()))
        return value if other is None else weakref.ref(other)
    if isinstance(value, MethodType):
        other = others.get(id(value.__self__))
        return value if other is None else MethodType(value.__func__, other)
    if type(value) in (list, tuple):
        items = [_with_others(item, others) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if type(value) is dict:
        found = {key: _with_others(item, others) for key, item in value.items()}
        return value if all(found[key] is value[key] for key in value) else found
    return value


def adopt(model: nn.Module, grown: nn.Module, plan: Plan) -> None:
    """Make a module what its grown copy is, in place.

    Args:
        model: the module.
        grown: what the plan made of it, which is taken apart.
        plan: the plan.

    Raises:
        PlanError: its code is to change, and its forward is not that of its class.
    """
    old_of = _counterparts(model, grown, plan)
    _check_code(grown, old_of)
    before = dict(named_tensors(model))
    pairs = [(old_of[id(new)], new) for new in modules_of(grown) if id(new) in old_of]
    after = named_tensors(grown)
    others = {
        id(before[old]): after[name]
        for name, (old, is_new) in tensor_origins(before, plan.steps).items()
        if not is_new and name in after and before[old] is not after[name]
    }
    every = [*modules_of(grown)]
    held, likes = {id(new) for new in every}, _likes(model, grown, plan)
    for old, new in pairs:
        _take_over(old, new, old_of)
    for new in every:
        if id(new) in old_of:
            continue
        for local, child in new._modules.items():
            if child is not None and id(child) in old_of:
                new._modules[local] = old_of[id(child)]
        _refer(new, likes.get(id(new)), held, old_of)
    for old, _ in pairs:
        _exchange(old, others)
    _set_attributes(model, plan)
    with_computed_weights(model)


def _counterparts(model: nn.Module, grown: nn.Module, plan: Plan) -> dict[int, nn.Module]:
    """Return the old module that each module of a grown copy continues, by the id of the latter."""
    old = dict(model.named_modules(remove_duplicate=False))
    new = dict(grown.named_modules(remove_duplicate=False))
    found: dict[int, nn.Module] = {}
    taken: dict[int, int] = {}
    for name, (before, is_new) in module_origins(old, plan.steps).items():
        if is_new or name not in new:  # a graph does not hold what it never calls
            continue
        mine, theirs = new[name], old[before]
        if _continues(theirs, mine) and taken.setdefault(id(theirs), id(mine)) == id(mine):
            found.setdefault(id(mine), theirs)
    return found


def _likes(model: nn.Module, grown: nn.Module, plan: Plan) -> dict[int, nn.Module]:
    """Return the module that each new one in a grown copy is like, by the id of the latter."""
    old = dict(model.named_modules(remove_duplicate=False))
    new = dict(grown.named_modules(remove_duplicate=False))
    origins = module_origins(old, plan.steps).items()
    return {
        id(new[name]): old[before] for name, (before, is_new) in origins if is_new and name in new
    }


def _continues(old: nn.Module, new: nn.Module) -> bool:
    """Return whether a module can become what another one is: by its class, or by a graph."""
    return type(old) is type(new) or type(new) is nn.Module or isinstance(new, fx.GraphModule)


def _check_code(grown: nn.Module, old_of: Mapping[int, nn.Module]) -> None:
    """Return if all code that changes is that of classes.

    Raises:
        PlanError: a module has a forward of its own, which would go on to run.
    """
    for new in modules_of(grown):
        old = old_of.get(id(new))
        if isinstance(new, fx.GraphModule) and old is not None and "forward" in vars(old):
            kind = type(old).__name__
            raise PlanError(
                f"sizes in the code of {kind} are to change, but something has put a forward of its"
                " own into this module (as accelerate does for mixed precision).",
                way_out="Grow it before that, or choose layers whose sizes are attributes "
                "(include=, where=).",
            )


def _take_over(old: nn.Module, new: nn.Module, old_of: Mapping[int, nn.Module]) -> None:
    """Give a module the tensors, the modules and the code of another one."""
    for held, theirs in ((old._parameters, new._parameters), (old._buffers, new._buffers)):
        for local, tensor in theirs.items():
            if tensor is not None or local not in held:
                _inherit(held.get(local), tensor)
                held[local] = tensor  # type: ignore[assignment]
    old._non_persistent_buffers_set |= new._non_persistent_buffers_set
    children = {
        local: child if child is None else old_of.get(id(child), child)
        for local, child in new._modules.items()
    }
    if isinstance(new, fx.GraphModule) or type(new) is not type(old):
        # What a graph does not call, it does not hold.
        children = {**old._modules, **children}
    old._modules.clear()
    old._modules.update(children)
    told = sizes_in_code(new)
    if told is not None:
        known = sizes_in_code(old)
        for table in told.tables[len(known.tables) if known is not None else 0 :]:
            change_sizes(old, table.values())
    if isinstance(new, fx.GraphModule):
        old.__class__ = generated_class(type(old), new)
        if isinstance(old, fx.GraphModule):
            vars(old).update(
                {key: vars(new)[key] for key in ("_graph", "_code") if key in vars(new)}
            )


def _inherit(old: Tensor | None, new: Tensor | None) -> None:
    """Give a new tensor the hooks and the attributes of the one whose place it takes."""
    if old is None or new is None or old is new:
        return
    vars(new).update({key: value for key, value in vars(old).items() if key not in vars(new)})
    if isinstance(new, nn.Parameter):
        for held in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(old, held, None):
                setattr(new, held, getattr(old, held))  # whose handles remove them from there


def _set_attributes(model: nn.Module, plan: Plan) -> None:
    """Set what the steps of a plan say of the attributes of modules that were there before."""
    steps = plan.steps
    for index, step in enumerate(steps):
        # A step names the modules that it edits as they are called after it.
        origins = module_origins([edit.module for edit in step.modules], steps[index + 1 :])
        last = {old: name for name, (old, is_new) in origins.items() if not is_new}
        edits = [replace(e, module=last[e.module]) for e in step.modules if e.module in last]
        set_attributes(model, tuple(edits))


@contextlib.contextmanager
def undone_on_error(models: Sequence[nn.Module]) -> Iterator[None]:
    """Restore module trees as they were if an error is raised within: all but values in tensors."""
    held = []
    for module in itertools.chain.from_iterable(map(modules_of, models)):
        names = (*_HELD, "_load_state_dict_post_hooks")
        kept = {name: dict(vars(module)[name]) for name in names if name in vars(module)}
        held.append((module, type(module), dict(vars(module)), kept))
    try:
        yield
    except BaseException:
        for module, kind, attributes, kept in held:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for name, entries in kept.items():
                attributes[name].clear()
                attributes[name].update(entries)
        raise
