"""First states: tensors of zeros that modules hold in plain attributes, or in containers there.

``self.h = torch.zeros(1, batch, hidden)`` is no buffer, and yet it must have as many entries as the
layers have channels that it meets. Each has a name as a buffer has: that of its attribute, with
its place in a list, tuple or dict behind a dot (``states.0``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

_HELD = frozenset(vars(nn.Module()))  # attributes of every module
# Weights of recurrent layers, once more, and what torch.fx puts in a module that it traces.
_OTHERS = ("_flat_weights", "_tensor_constant")
_DEEPEST = 3  # containers in containers
_CONTAINERS = (dict, list, tuple)
_KINDS = frozenset((Tensor, *_CONTAINERS))
_PARTS = ("_v", "_g", "_orig")  # what hooks compute a weight of, which is then a plain attribute


def first_states(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the first states that a module holds itself, and their names there.

    Those on the meta device count, as the shapes of states that were seen to be zeros.
    """
    return [
        state
        for name, value in _candidates(module)
        if not any(name + part in module._parameters for part in _PARTS)
        for state in _zeros(name, value, _DEEPEST)
    ]


def _candidates(module: nn.Module) -> list[tuple[str, object]]:
    """Return the plain attributes of a module that may hold tensors; most modules have none."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if name not in _HELD
        and type(value) in _KINDS
        and (type(value) is Tensor or _may_hold(value))
        and not name.startswith(_OTHERS)
    ]


def _may_hold(value: Any) -> bool:
    """Return whether a container has tensors or containers in it."""
    items = value.values() if type(value) is dict else value
    return not _KINDS.isdisjoint(map(type, items))


def _zeros(name: str, value: object, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of zeros in an attribute's value."""
    if type(value) is Tensor:
        if _is_first(value):
            yield name, value
    elif isinstance(value, _CONTAINERS) and depth:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if type(item) in _KINDS and str(key) and "." not in str(key):  # a part of a name
                yield from _zeros(f"{name}.{key}", item, depth - 1)


def _is_first(tensor: Tensor) -> bool:
    """Return whether a tensor has a width, and holds zeros or nothing."""
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.numel() < 2:
        return False
    with _disable_current_modes():  # a run may be watched
        return tensor.is_meta or not bool(tensor.any())


def mapped(value: Any, change: Callable[[Tensor], Tensor], depth: int = _DEEPEST) -> Any:
    """Return an attribute's value with its plain tensors changed, in new containers.

    What holds no plain tensor is returned as it is.

    Args:
        value: of the attribute.
        change: is given each plain tensor.
        depth: how many containers may hold one another.
    """
    kind = type(value)
    if kind is Tensor:
        return change(value)
    if kind not in _CONTAINERS or not depth or not _may_hold(value):
        return value
    items = value.items() if kind is dict else enumerate(value)
    made = {key: mapped(item, change, depth - 1) for key, item in items}
    if not any(type(x) is Tensor or x is not value[key] for key, x in made.items()):
        return value
    return made if kind is dict else kind(made.values())


def plain_tensors(value: object) -> list[Tensor]:
    """Return the plain tensors in an attribute's value."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, note)
    return found


def itself(tensor: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return tensor


def values_in(module: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield a module's plain attributes that hold tensors with values, and these.

    Such are the constants of its code, and what a forward left there.
    """
    for name, value in _candidates(module):
        yield name, [x for x in plain_tensors(value) if not x.is_meta]


def is_carried(model: nn.Module, name: str) -> bool:
    """Return whether a module holds a tensor that is no first state, where one has that name."""
    module, path = _held_at(model, name)
    value: Any = vars(module).get(path[0]) if path[0] not in _HELD else None
    for part in path[1:]:
        if type(value) not in _CONTAINERS:
            return False
        items = value.items() if isinstance(value, dict) else enumerate(value)
        value = next((item for key, item in items if str(key) == part), None)
    return type(value) is Tensor and not _is_first(value)


def set_state(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put another tensor where a module holds a first state.

    Args:
        model: what holds the module; it is changed.
        name: the state's fully qualified name.
        tensor: what takes its place.
    """
    module, (attribute, *path) = _held_at(model, name)
    vars(module)[attribute] = _replaced(vars(module)[attribute], path, tensor)


def _held_at(model: nn.Module, name: str) -> tuple[nn.Module, list[str]]:
    """Return the module that holds a tensor of a fully qualified name, and what it calls it."""
    module, path = model, name.split(".")
    while len(path) > 1 and path[0] in module._modules:
        module = cast("nn.Module", module._modules[path.pop(0)])
    return module, path


def _replaced(value: Any, path: list[str], tensor: Tensor) -> object:
    """Return what holds a tensor with another one in its place, in new containers."""
    if not path:
        return tensor
    first, *rest = path
    if isinstance(value, dict):
        key: Any = next(key for key in value if str(key) == first)
    else:
        key = int(first)
    inner = _replaced(value[key], rest, tensor)
    if isinstance(value, dict):
        return value | {key: inner}
    return type(value)((*value[:key], inner, *value[key + 1 :]))
