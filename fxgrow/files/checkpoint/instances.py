"""Attributes of objects that a pickle made: data that hides nothing of what a class defines.

torch and fxgrow call methods of modules by their names. An attribute of an instance that had the
name of one of them would be called instead, so none may; the same is true of hooks.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxgrow.files.checkpoint.pickles import DamagedError, PickleError

PLAIN = (bool, int, float, str, type(None))
_HELD = {"_modules": nn.Module, "_parameters": nn.Parameter, "_buffers": Tensor}
_NAME = re.compile(r"[^\"\\.\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_OF_SCRIPTS = "__overloads__"  # torch.jit.script leaves this, empty, in all that it compiles
_MOST_LAYERS = 10_000  # of a recurrent module, which loops over their number


def set_attributes(instance: Any, state: object) -> None:
    """Give an object attributes.

    Raises:
        PickleError: one of them is no data, or hides a part of its class.
    """
    kind: Any = type(instance)
    if not isinstance(state, dict):
        raise PickleError(f"the attributes of a {kind.__name__} are no dict")
    if state.get(_OF_SCRIPTS) == {}:
        state = {name: value for name, value in state.items() if name != _OF_SCRIPTS}
    _check_attributes(kind, state)
    if isinstance(instance, nn.Module):
        layers = state.get("num_layers")
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise PickleError(f"a {kind.__name__} of {layers} layers")
        kind.__setstate__(instance, {**state, **_own_tables(kind, state)})
    else:
        vars(instance).update(state)


def _check_attributes(kind: type, state: Mapping[Any, object]) -> None:
    """Return if attributes have names, and hide nothing that a class defines but plain values.

    Raises:
        PickleError: one of them has none, or does.
    """
    for name, value in state.items():
        if type(name) is not str or (name.startswith("__") and name.endswith("__")):
            raise PickleError(f"an attribute {name!r} of a {kind.__name__}")
        hidden = _hidden(kind, name)
        if hidden is not None and not (isinstance(hidden, PLAIN) and isinstance(value, PLAIN)):
            raise PickleError(f"an attribute {name!r} that hides a part of {kind.__name__}")


@functools.lru_cache(maxsize=4096)
def _hidden(kind: type, name: str) -> object:
    """Return what an attribute of this name would hide of a class, or None."""
    return inspect.getattr_static(kind, name, None)


def _own_tables(kind: type, state: Mapping[str, Any]) -> dict[str, object]:
    """Return what every module has, as torch makes it: tables of parts, and those of hooks empty.

    Raises:
        PickleError: something is of another type, or there are hooks.
    """
    found: dict[str, object] = {}
    for name, usual in vars(nn.Module()).items():
        value = state.get(name, usual)
        if isinstance(usual, dict):
            if type(value) not in (dict, OrderedDict) or (name in _HELD and name not in state):
                raise DamagedError(f"a {kind.__name__} lacks its tables of parts")
            if name not in _HELD and value:
                raise PickleError(f"a {kind.__name__} with hooks")
            found[name] = value if name in _HELD else usual
        elif isinstance(value, (type(usual), bool)):
            found[name] = value
        else:
            raise PickleError(f"a {kind.__name__} whose {name} is of another type")
    return found


def check_parts(module: nn.Module) -> None:
    """Return if a module holds modules, parameters and buffers under names.

    Raises:
        PickleError: it does not, or a name could leave a string in generated code.
    """
    if not _HELD.keys() <= vars(module).keys():
        raise DamagedError(f"a {type(module).__name__} lacks its tables of parts")
    for table, held in _HELD.items():
        for name, part in vars(module)[table].items():
            if type(name) is not str or not _NAME.fullmatch(name):
                raise PickleError(f"a module with a part called {name!r}, which is no name")
            if part is not None and not isinstance(part, held):
                raise PickleError(f"a {type(module).__name__} whose {name!r} is no {held.__name__}")
