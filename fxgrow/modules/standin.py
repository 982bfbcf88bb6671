"""Copies of module trees with other tensors in them: on meta, in float64, or grown."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CellType, FunctionType, MappingProxyType, MethodType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.weight_norm import WeightNorm

from fxgrow.errors import TraceError
from fxgrow.modules.added_hooks import HookNote
from fxgrow.modules.states import itself, mapped, plain_tensors
from fxgrow.modules.tensors import modules_of, named_tensors

_NONE = object()
_PLAIN = frozenset((bool, int, float, str, NoneType))
_STRINGS = frozenset((str,))
_FILLED = frozenset((dict, OrderedDict, set, list))
_OWN = frozenset(vars(nn.Module()))  # attributes of every module
_SET_STATE = nn.Module.__setstate__
_COMPILED = "_compiled_call_impl"  # what module.compile() calls
_NEW = object().__reduce_ex__(4)[0]  # how objects are copied whose class says nothing of it


def stand_in(
    model: nn.Module,
    replacements: Mapping[str, Tensor] | None = None,
    shared: Mapping[int, object] = MappingProxyType({}),
    views: Sequence[tuple[nn.Module, nn.Module]] = (),
) -> nn.Module:
    """Return a copy of a module tree with other tensors in place of its own.

    Ties, hooks, flags and classes survive, because this is a deep copy that finds the new tensors
    where it would copy the old ones.

    Args:
        model: the module; only read.
        replacements: new tensor by fully qualified name; None puts every parameter and buffer on
            the meta device. Tensors that are not named are copied.
        shared: objects by their ids that are not copied.
        views: modules, each with the one of the tree that takes its place: what refers to it (a
            ``forward`` that was bound to it) is to refer to the copy of that one.

    Raises:
        TraceError: some attribute cannot be copied, or a module is compiled code.
    """
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TraceError(
                f"{name or 'the model'} is a TorchScript program, which is compiled code.",
                name=name,
                way_out="Give the module that it was compiled from, and compile the grown one.",
            )
        own = vars(part).get("forward")
        closed = own is not None and _closes_over(own, {id(module) for module in model.modules()})
        if closed and _recipe(part) is not None:  # what torch.compile wraps is made anew
            raise TraceError(
                f"{name or 'the model'} has a forward of its own that holds on to the module, so "
                "that a copy would run the original.",
                name=name,
                way_out="Bind it: module.forward = types.MethodType(forward, module); or define it "
                "in the class.",
            )
    try:
        return _deep_copy(model, _found_by_copy(model, replacements, shared), views)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise TraceError(
            f"the model cannot be copied: {first_line(error)}.",
            way_out="Remove what does not survive copy.deepcopy.",
        ) from error


def _closes_over(function: object, modules: Collection[int]) -> bool:
    """Return whether a function's closure refers to some modules, which no copy of it changes.

    Args:
        function: any; what it is bound to, and the arguments of a partial, are copied with it.
        modules: their ids.
    """
    while isinstance(function, (MethodType, partial)):
        function = function.__func__ if isinstance(function, MethodType) else function.func
    if not isinstance(function, FunctionType):
        return False
    held = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    return any(value is not function and _refers(value, modules) for value in held)


def _refers(value: object, modules: Collection[int]) -> bool:
    """Return whether a value is one of some modules, is bound to one, or closes over one."""
    if isinstance(value, partial):
        given = (value.func, *value.args, *value.keywords.values())
        return any(_refers(one, modules) for one in given)
    bound = id(getattr(value, "__self__", None)) in modules
    return bound or id(value) in modules or _closes_over(value, modules)


def _is_empty(cell: CellType) -> bool:
    """Return whether a name of a closure has no value yet."""
    try:
        return cell.cell_contents is _NONE
    except ValueError:
        return True


def _found_by_copy(
    model: nn.Module, replacements: Mapping[str, Tensor] | None, shared: Mapping[int, object]
) -> dict[int, Any]:
    """Return what a deep copy finds, by the ids of what it would copy; see :func:`stand_in`."""
    memo: dict[int, Any] = dict(shared)
    for name, tensor in named_tensors(model).items():
        if id(tensor) in memo or (replacements is not None and name not in replacements):
            continue
        fresh = _on_meta(tensor) if replacements is None else replacements[name]
        if type(tensor) is nn.Parameter and type(fresh) is Tensor:  # as nn.Parameter does, sooner
            fresh = Tensor._make_subclass(nn.Parameter, fresh, tensor.requires_grad)
        elif isinstance(tensor, nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fresh
    for module in modules_of(model):
        for value in vars(module).values():  # what a forward computed of others cannot be copied
            for held in plain_tensors(value):
                if not held.is_leaf and id(held) not in memo:
                    memo[id(held)] = held.detach()
    return memo


def with_computed_weights(model: nn.Module) -> nn.Module:
    """Return a module whose weight-normed layers have computed their weights of what they hold now.

    They do so before each forward; until then their ``weight`` would be that of another network.
    """
    for module in modules_of(model):
        for hook in module._forward_pre_hooks.values() if module._forward_pre_hooks else ():
            if isinstance(hook, WeightNorm):
                with torch.no_grad():
                    setattr(module, hook.name, hook.compute_weight(module))
    return model


def _on_meta(tensor: Tensor) -> Tensor:
    """Return an empty tensor on the meta device that is like another one."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return torch.empty_like(tensor, device="meta")
    strides = tensor.stride()  # torch.empty_like is ten times as slow on the meta device
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")


def _deep_copy(
    model: nn.Module, memo: dict[int, Any], views: Sequence[tuple[nn.Module, nn.Module]] = ()
) -> nn.Module:
    """Return what ``copy.deepcopy(model, memo)`` does, three times as fast.

    Most of a module tree is numbers, strings and empty dicts of hooks, for each of which
    ``copy.deepcopy`` takes the same trouble as for a tensor. What modules hold is copied from the
    leaves up, so that no module is ever seen unfinished by the ``__deepcopy__`` of one around it.
    """
    states = []  # ids are only unique among the living
    begun: dict[int, nn.Module] = {}
    tree = {id(module) for module in modules_of(model)} if views else set()
    for old, view in views:  # a graph may have taken the place of one
        if id(view) in tree and _recipe(view) is not None:
            begun[id(view)] = memo[id(old)] = memo[id(view)] = type(view).__new__(type(view))
    for module in reversed([*modules_of(model)]):
        if id(module) in memo and id(module) not in begun:
            continue
        recipe = _recipe(module)
        if recipe is None:
            continue
        states.append(recipe[2])
        kind: Any = type(module)
        fresh: Any = begun[id(module)] if id(module) in begun else kind.__new__(kind)
        memo[id(module)] = fresh
        # What is compiled is bound to the original; some classes keep it in copies (Lightning's).
        kept = {key: value for key, value in recipe[2].items() if key != _COMPILED}
        copies = _copied_entries(kept, memo)
        if kind.__setstate__ is _SET_STATE:  # it adds what modules from former versions lack
            fresh.__dict__.update(copies)
        else:
            fresh.__setstate__(copies)
    return copy.deepcopy(model, memo)


def _recipe(module: nn.Module) -> Any:
    """Return how a module is copied, or None where its class has a way of its own for that."""
    if hasattr(module, "__deepcopy__"):
        return None
    recipe: Any = module.__reduce_ex__(4)
    plain = recipe[0] is _NEW and recipe[1] == (type(module),) and not any(recipe[3:])
    return recipe if plain else None


def _copied_entries(entries: Mapping[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """Return a dict with copies; numbers, strings, what is empty and what is known at once."""
    copies: dict[str, Any] = {}
    for key, value in entries.items():
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, value))):
            copies[key] = value
        elif (known := memo.get(id(value))) is not None:
            copies[key] = known
        elif kind in _FILLED and not value:
            copies[key] = memo[id(value)] = kind()
        elif kind is dict and _STRINGS.issuperset(map(type, value)):
            copies[key] = memo[id(value)] = {}
            copies[key].update(_copied_entries(value, memo))
        else:
            copies[key] = copy.deepcopy(value, memo)
    return copies


def in_eval_mode(model: nn.Module) -> nn.Module:
    """Return a model after ``model.eval()``, which takes long and often has nothing to do."""
    plain = (nn.Module.train, nn.Module.eval)
    for module in modules_of(model):
        kind = type(module)
        if module.training or (kind.train, kind.eval) != plain:
            return model.eval()
    return model


def set_training(model: nn.Module, *, mode: bool) -> None:
    """Put a model into train mode or eval mode, but for dropout, which is off in both."""
    model.train(mode)
    for module in model.modules():
        if isinstance(module, _DropoutNd) or type(module).__name__ == "StochasticDepth":
            module.eval()
        elif isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
            module.training = False  # its dropout is no module


@contextlib.contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Restore, at the end, the training flag of each submodule of its own."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def keeping_state(model: nn.Module) -> Iterator[None]:
    """Restore, at the end, the tensors and attributes that a forward replaced or added.

    A table made for another size; a state that begins anew in each run. Hooks that it registered go
    with the attribute in which it noted that they are there: the next run registers them again.
    """
    modules = [*modules_of(model)]
    hooks = HookNote(modules)
    tensors: list[dict[str, Any]] = [
        x for module in modules for x in (module._buffers, module._parameters) if type(x) is dict
    ]
    held = [(own, dict(own)) for own in tensors]
    told = [
        (own, {key: mapped(x, itself) for key, x in own.items() if key not in _OWN})
        for own in map(vars, modules)
    ]
    try:
        yield
    finally:
        for own, before in held:
            if len(own) > len(before) or any(x is not own.get(name) for name, x in before.items()):
                own.clear()
                own.update(before)
        for attributes, before in told:
            for name in attributes.keys() - before.keys() - _OWN:
                del attributes[name]
            attributes.update(before)
        hooks.remove_added()


@contextlib.contextmanager
def keeping_attributes(modules: Iterable[nn.Module], kind: type) -> Iterator[None]:
    """Restore, at the end, the plain attributes in which objects of a kind were put."""
    before = [
        (own, {key: mapped(x, itself) for key, x in own.items()}) for own in map(vars, modules)
    ]
    try:
        yield
    finally:
        for attributes, known in before:
            changed = [key for key, x in attributes.items() if known.get(key, _NONE) is not x]
            for key in changed:
                if _holds(kind, attributes[key]) and key in known:
                    attributes[key] = known[key]
                elif _holds(kind, attributes[key]):
                    del attributes[key]


def _holds(kind: type, value: object) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return any(_holds(kind, item) for item in value)
    return isinstance(value, kind)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
