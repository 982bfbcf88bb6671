"""What a module is called with, and the tensors in nests of arguments and results."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from types import NoneType
from typing import Any, TypeAlias

import torch
from torch import Tensor

# What a network is called with: positional arguments, or keyword arguments.
Arguments: TypeAlias = tuple[Any, ...] | dict[str, Any]


_PLAIN = frozenset((NoneType, bool, int, float, str, torch.dtype, torch.device))  # hold no tensors


def arguments_of(example_inputs: object) -> Arguments:
    """Return example inputs as arguments: a mapping is keywords, a lone object is one argument."""
    if isinstance(example_inputs, Mapping):
        return dict(example_inputs)
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def call(function: Callable[..., Any], arguments: Arguments) -> Any:
    """Return what a function makes of its arguments."""
    return function(**arguments) if isinstance(arguments, dict) else function(*arguments)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return a nest of tuples, lists and dicts with every tensor replaced by its image."""
    return map_kind(Tensor, function, tree)


def map_kind(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a nest of tuples, lists and dicts with what is of one kind replaced by its image."""
    own = type(tree)
    if own in _PLAIN:
        return tree
    if isinstance(tree, kind):
        return function(tree)
    if own is tuple or own is list:
        return own([x if type(x) in _PLAIN else map_kind(kind, function, x) for x in tree])
    if own is dict:
        return {key: map_kind(kind, function, item) for key, item in tree.items()}
    return tree


def tensors_in(tree: object) -> list[Tensor]:
    """Return the tensors of a nest, in order.

    A nest is made of sequences, mappings, and objects with attributes (dataclasses, namespaces,
    distributions); modules and functions are none.
    """
    found: list[Tensor] = []
    _gather(tree, found)
    return found


def _gather(tree: object, found: list[Tensor]) -> None:
    if type(tree) in _PLAIN:
        return
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            if isinstance(item, Tensor):
                found.append(item)
            elif type(item) not in _PLAIN:
                _gather(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _gather(item, found)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for part in dataclasses.fields(tree):
            _gather(getattr(tree, part.name), found)
    else:
        _gather_from_object(tree, found, set())


def _gather_from_object(tree: object, found: list[Tensor], seen: set[int]) -> None:
    """Gather the tensors of what is no plain nest; objects may hold one another in a circle."""
    if id(tree) in seen or type(tree) in _PLAIN or isinstance(tree, (type, torch.nn.Module)):
        return
    seen.add(id(tree))
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            _gather_from_object(item, found, seen)
    elif isinstance(tree, (Sequence, Set, deque)) and not isinstance(tree, (str, bytes)):
        for item in tree:
            _gather_from_object(item, found, seen)
    elif hasattr(tree, "__dict__") and not callable(tree):
        for item in vars(tree).values():
            _gather_from_object(item, found, seen)
