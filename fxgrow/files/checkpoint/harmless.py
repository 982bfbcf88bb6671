"""What a pickle may name without ``--trust-pickle``, and what may be done with it.

- Classes of ``nn.Module`` defined in ``torch.nn.modules``, ``torch.nn.parallel.data_parallel``,
  ``torchvision.models`` and ``torchvision.ops``, and a few plain classes that such modules hold.
  Only modules below these packages are ever imported, and what is found must be a class that was
  defined there. ``GraphModule`` and ``ScriptModule`` subclasses are left out: they compile code.
  Constructors are never called: a pickle makes an empty instance and gives it attributes. These
  are data; none of them takes the place of anything that the class defines, and hooks are refused.
- A few pure functions that torch's own modules hold as attributes (activations). They are values:
  a pickle cannot call them.
- Functions that a pickle may call: those of :mod:`fxgrow.files.checkpoint.rebuilding`.
- Names of data of other libraries, which are neither imported nor called but passed on: those of
  :mod:`fxgrow.files.checkpoint.kept`.
"""

from __future__ import annotations

import _compat_pickle
import functools
import importlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxgrow.files.checkpoint.instances import check_parts, set_attributes
from fxgrow.files.checkpoint.kept import Kept, Name, kept_name
from fxgrow.files.checkpoint.kept_checks import check_kept, parts
from fxgrow.files.checkpoint.pickles import Call, PickleError, UnknownNameError
from fxgrow.files.checkpoint.rebuilding import CALLS, NumpyDtype, build_array, build_partial
from fxgrow.files.checkpoint.storages import Storage

_MODULE_PACKAGES = (
    "torch.nn.modules.",
    "torch.nn.parallel.data_parallel.",
    "torchvision.models.",
    "torchvision.ops.",
)
_CLASSES = frozenset(
    {
        "argparse.Namespace",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
    }
)
_FUNCTIONS = frozenset(
    {
        "torch._C._nn.gelu",
        "torch.nn.functional.gelu",
        "torch.nn.functional.relu",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
    }
)
# Storages whose dtypes have another name; ``FloatStorage`` is of ``torch.float``.
_STORAGES = {
    "Byte": "uint8",
    "Char": "int8",
    "ComplexFloat": "cfloat",
    "ComplexDouble": "cdouble",
    "Untyped": "uint8",
}
_SETTINGS = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)


def resolve(module: str, name: str) -> object:
    """Return what a pickle's name stands for: a :class:`Call`, a value or a class.

    Raises:
        PickleError: it is not known to be harmless.
    """
    # Python 2's names, as protocol 2 writes them and every unpickler translates them.
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    full = f"{module}.{name}"
    if full in CALLS:
        return CALLS[full]
    found = _setting(module, name)
    if found is None:
        found = _listed(module, name)
    if found is None:
        found = kept_name(module, name)
    if found is None:
        raise UnknownNameError(full)
    return found


def _setting(module: str, name: str) -> object:
    """Return a dtype or another constant of torch, or the dtype behind the name of a storage."""
    if module not in ("torch", "torch.storage", "torch.cuda"):
        return None
    if name == "Tensor":
        return Tensor
    value: object = vars(torch).get(name)
    if isinstance(value, _SETTINGS):
        return value
    stem = name.removesuffix("Storage")
    dtype = vars(torch).get(_STORAGES.get(stem, stem.lower())) if stem != name else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _listed(module: str, name: str) -> Any:
    """Return a harmless class or function, or None if it is not known to be harmless."""
    full = f"{module}.{name}"
    if full == "torch.nn.parameter.Parameter":
        return nn.Parameter
    listed = full in _CLASSES or full in _FUNCTIONS
    if not listed and not full.startswith(_MODULE_PACKAGES):
        return None
    try:
        entry: Any = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None  # another version's layout; the error names it
    if listed:
        return entry
    if not isinstance(entry, type) or not issubclass(entry, nn.Module):
        return None
    if issubclass(entry, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        return None
    return entry if (entry.__module__, entry.__qualname__) == (module, name) else None


def is_class(value: object) -> bool:
    """Return whether a pickle may make empty instances of a class."""
    if not isinstance(value, type) or vars(value).get("__new__", None) is not None:
        return False
    return issubclass(value, nn.Module) or f"{value.__module__}.{value.__name__}" in _CLASSES


def build(instance: Any, state: object) -> None:
    """Give an instance that a pickle made its attributes, as BUILD does.

    Raises:
        PickleError: the instance takes none, or one of them is no data or hides a part of its
            class.
    """
    if isinstance(instance, functools.partial):
        build_partial(instance, state)
    elif isinstance(instance, NumpyDtype):
        instance.set_state(state)
    elif type(instance) is np.ndarray:
        build_array(instance, state)
    elif isinstance(instance, Kept) and not instance.has_state:
        instance.state = state
    elif type(instance) is OrderedDict or is_class(type(instance)):
        set_attributes(instance, state)
    else:
        raise PickleError(f"it gives attributes to a {type(instance).__name__}")


def children(item: Any) -> Iterator[object]:
    """Yield what an object that a pickle built holds, and refuse what is no data.

    Raises:
        PickleError: a module's parts are no modules or tensors by name, or what it holds is a
            function that a pickle calls; or an object that is passed on is made of other things
            than those are.
    """
    kind = type(item)
    if kind in (dict, OrderedDict, defaultdict, Counter):
        yield from item.values()
        if kind is OrderedDict and vars(item):
            yield vars(item)
    elif kind in (list, tuple):
        yield from item
    elif isinstance(item, Kept):
        check_kept(item)
        yield from parts(item)
    elif isinstance(item, Name) and not item.is_value:
        raise PickleError(f"it holds {item}")
    elif isinstance(item, (Call, Storage)):
        raise PickleError(f"it holds {getattr(item, 'name', 'the memory of a tensor')}")
    elif is_class(kind):  # nothing else was made that has attributes
        if isinstance(item, nn.Module):
            check_parts(item)
        yield vars(item)
    elif isinstance(item, Tensor) and vars(item):
        yield vars(item)


def holds_kept(data: object) -> bool:
    """Return whether anything in what a pickle built is passed on and was not made."""
    waiting, seen = [data], set[int]()
    while waiting:
        item = waiting.pop()
        if isinstance(item, (Kept, Name)):
            return True
        if id(item) not in seen:
            seen.add(id(item))
            waiting += children(item)
    return False
