"""What a module is called with, and the tensors in nests of arguments and results."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from types import NoneType, SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_DEPTH = 5  # of objects in objects
# What transformers returns besides logits for further calls of the decoder, as it does a cache.
_HANDED_ON = "encoder_last_hidden_state"
# What a network is called with: positional arguments, or keyword arguments.
Arguments: TypeAlias = tuple[Any, ...] | dict[str, Any]


_PLAIN = frozenset((NoneType, bool, int, float, str, torch.dtype, torch.device))  # hold no tensors


def arguments_of(example_inputs: object) -> Arguments:
    """Return example inputs as arguments: a mapping is keywords, a lone object is one argument."""
    if isinstance(example_inputs, Mapping):
        return dict(example_inputs)
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def on_meta(example_inputs: object) -> Arguments:
    """Return example inputs as arguments on the meta device; token ids and masks keep values."""
    arguments = arguments_of(example_inputs)
    moved: Arguments = pytree.tree_map_only(Tensor, _on_meta, arguments)
    return moved


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_meta:
        return tensor.to("meta")
    return tensor.detach().to("cpu")


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
    """Return the tensors of a nest of sequences, mappings, namespaces and dataclasses, in order."""
    found: list[Tensor] = []
    _gather(tree, found)
    return found


def results_in(result: object) -> list[Tensor]:
    """Return the tensors of what a network returns, but for what it returns for its own next call.

    Such is the encoder's output beside the logits of an encoder-decoder: it is no result, and its
    size may change.
    """
    if handed_on(result):
        result = {key: item for key, item in _held_items(result) if key != _HANDED_ON}
    return tensors_in(result)


def handed_on(result: object) -> str:
    """Return the name of what a network returns for its own next call, "" if there is nothing."""
    named = dict(_held_items(result))
    return _HANDED_ON if named.get(_HANDED_ON) is not None and "logits" in named else ""


def _held_items(result: object) -> Iterable[tuple[object, object]]:
    return result.items() if isinstance(result, Mapping) else ()


def _gather(tree: object, found: list[Tensor]) -> None:
    if type(tree) in _PLAIN:
        return
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            if type(item) not in _PLAIN:
                _gather(item, found)
    else:
        for item in _held(tree):
            _gather(item, found)


def _held(tree: object) -> Iterable[object]:
    """Return what a nest other than a tuple or a list holds."""
    if isinstance(tree, Mapping):
        return tree.values()
    if isinstance(tree, SimpleNamespace):
        return vars(tree).values()
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, part.name) for part in dataclasses.fields(tree)]
    return tree if isinstance(tree, (deque, Set)) else ()


def opaque_in(tree: object, depth: int = _DEPTH) -> set[str]:
    """Return the kinds of objects in a nest that hold tensors where :func:`tensors_in` sees none.

    A cache that a language model returns is one: it is no result, and its sizes may change.

    Args:
        tree: the nest.
        depth: how deep to look into objects, which may hold one another in a circle.
    """
    if not depth or type(tree) in _PLAIN or isinstance(tree, (Tensor, str, bytes, type)):
        return set()
    inner = tree if isinstance(tree, (tuple, list)) else [*_held(tree)]
    if inner:
        known = {name} if (name := handed_on(tree)) else set[str]()
        return known.union(*(opaque_in(item, depth - 1) for item in inner))
    attributes = [*getattr(tree, "__dict__", {}).values()]
    nested = any(tensors_in(item) or opaque_in(item, depth - 1) for item in attributes)
    return {type(tree).__name__} if nested else set()
