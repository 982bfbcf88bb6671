"""Load pickled checkpoints and modules without running the code they name.

A pickle is a program: its GLOBAL opcode names any importable object, REDUCE calls it. PyTorch's
weights-only unpickler refuses every name that is not on its list, and fxgrow extends that list for
the time of one load by those names of *this* file that are harmless:

- ``nn.Module`` subclasses defined in ``torch.nn.modules``, ``torch.nn.parallel.data_parallel``,
  ``torchvision.models`` and ``torchvision.ops``. Only modules below these packages are ever
  imported, and what is found must be a class that was defined there. ``GraphModule`` and
  ``ScriptModule`` subclasses are left out: they compile code that they are given.
- A few plain classes and pure functions that torch's and torchvision's own modules hold as
  attributes (``functools.partial`` in ViT, box coders in detection, activations in transformers).
- ``argparse.Namespace``, which the usual training scripts save as ``args``: it is a bag of
  attributes. Numpy *scalars* (``best_acc``): not by numpy's own constructors, whose handling of
  crafted dtypes is memory-unsafe, but by two stand-ins below that know plain numbers only.

Because REDUCE calls an allowed object with arguments of the attacker's choice, and BUILD sets any
attribute of an allowed class, each entry must be harmless for *all* arguments and attributes. For
the constructors of layers that holds: they allocate tensors, and the callables they may be given
(``norm_layer``) can only come from the same list; ``getattr`` is not on it. The same is true of
hooks and of a replaced ``forward``. What remains is memory use, and names: ``torch.fx`` writes the
names of submodules and parameters into Python source, so names that could end a string literal
there are refused after loading.
"""

from __future__ import annotations

import _compat_pickle
import importlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from fxgrow.errors import SourceError

_MODULE_PACKAGES = (
    "torch.nn.modules.",
    "torch.nn.parallel.data_parallel.",
    "torchvision.models.",
    "torchvision.ops.",
)
_HARMLESS = frozenset(
    {
        "argparse.Namespace",
        "functools.partial",
        "torch._C._nn.gelu",
        "torch.nn.functional.gelu",
        "torch.nn.functional.relu",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
    }
)
_TRUST = "If you trust the file, pass --trust-pickle, which executes whatever code it holds."
_SAFE_NAME = re.compile(r"[^'\"\\\x00-\x1f\x7f-\x9f\u2028\u2029]*")
# The pickles of a legacy file before its storages: magic number, protocol, system, object, keys.
_LEGACY_PICKLES = 5


class _NumpyDtype:
    """Stands in for ``numpy.dtype`` while unpickling: a plain number's type, and nothing else."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufc][0-9]{1,2}|\?", code):
            raise pickle.UnpicklingError(f"{code!r} is not the dtype of a plain number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])

    def __reduce__(self) -> Any:
        return self.dtype.__reduce__()  # saved again, it is numpy's own


def _numpy_scalar(dtype: object, data: object) -> Any:
    """Stand in for ``numpy._core.multiarray.scalar``: one plain number from its bytes."""
    if not isinstance(dtype, _NumpyDtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar that is not a plain number")
    return np.frombuffer(data, dtype.dtype, count=1)[0]


_STAND_INS: dict[str, Any] = {
    "numpy.dtype": _NumpyDtype,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray.scalar": _numpy_scalar,
}


def load_pickled(path: Path, *, trust_pickle: bool = False) -> object:
    """Load what ``torch.save`` wrote, on the CPU.

    Args:
        path: a file in torch's zip or legacy format.
        trust_pickle: use Python's own unpickler, which executes whatever code the file holds.

    Returns:
        The object that was saved.

    Raises:
        SourceError: the file is damaged, or asks for a class or function that is not known to be
            harmless; that one is named, and nothing of it is run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols and moved classes; errors say the rest
        try:
            if trust_pickle:
                return torch.load(path, map_location="cpu", weights_only=False)
            with torch.serialization.safe_globals(_allowed(path)):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except SourceError:
            raise
        except Exception as error:  # a crafted or damaged pickle may raise anything
            _refuse(path, error, trust_pickle)
    _check_names(path, loaded)
    return loaded


def _allowed(path: Path) -> list[Any]:
    """Return (object, name) for each harmless global that the file asks for."""
    found = ((name, _resolve(name)) for name in sorted(_requested(path)))
    return [(entry, name) for name, entry in found if entry is not None]


def _requested(path: Path) -> set[str]:
    """Return the ``module.name`` of every GLOBAL in the file, without executing anything."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [n for n in archive.namelist() if n.count("/") == 1]
            pickles = [archive.read(n) for n in members if n.endswith("/data.pkl")]
        return {name for data in pickles for name in _globals(data)}
    with path.open("rb") as file:
        return {name for _ in range(_LEGACY_PICKLES) for name in _globals(file)}


def _globals(pickled: Any) -> list[str]:
    names = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # Python 2's names, as protocol 2 writes them and the unpickler translates them.
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
            names.append(f"{module}.{name}")
    return names


def _resolve(full: str) -> Any:
    """Return the harmless object called ``full``, or None if it is not known to be harmless."""
    if full in _STAND_INS:
        return _STAND_INS[full]
    module_name, _, name = full.rpartition(".")
    listed = full in _HARMLESS
    if not listed and not full.startswith(_MODULE_PACKAGES):
        return None
    try:
        entry: Any = getattr(importlib.import_module(module_name), name, None)
    except ImportError:
        return None  # another version's layout; the load names it
    if listed:
        return entry
    if not isinstance(entry, type) or not issubclass(entry, nn.Module):
        return None
    if issubclass(entry, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        return None
    return entry if (entry.__module__, entry.__qualname__) == (module_name, name) else None


def _refuse(path: Path, error: Exception, trusted: bool) -> NoReturn:
    reason = re.sub(r"^\[.*?\] \. ", "", " ".join(str(error).split()))  # C++'s file and line
    unknown = re.search(r"GLOBAL (\S+)", reason)
    if isinstance(error, pickle.UnpicklingError) and unknown:
        raise SourceError(
            f"{path} asks for {unknown[1]}, which is not on the list of harmless classes, so it "
            "was not loaded.",
            name=unknown[1],
            way_out=_TRUST,
        ) from error
    if trusted and isinstance(error, (ImportError, AttributeError)):
        raise SourceError(
            f"{path} needs code that cannot be imported here: {reason}.",
            name=str(path),
            way_out="Run fxgrow where that code is importable, or save the state_dict instead.",
        ) from error
    if isinstance(error, pickle.UnpicklingError) and re.search("operand|persistent", reason):
        raise SourceError(
            f"{path} is written in a way that cannot be loaded safely (another pickle protocol, or "
            "a module in the format of before PyTorch 1.6).",
            name=str(path),
            way_out=f"Save it again with a plain torch.save. {_TRUST}",
        ) from error
    raise SourceError(
        f"{path} is truncated or damaged: {reason.split('. ')[0] or type(error).__name__}.",
        name=str(path),
        way_out="Copy or download it again.",
    ) from error


def _check_names(path: Path, loaded: object) -> None:
    """Refuse modules with names that would leave a string literal in generated source."""
    for module in _modules_in(loaded):
        try:
            tables = [
                table
                for child in module.modules()
                for table in (child._modules, child._parameters, child._buffers)
            ]
        except (AttributeError, TypeError) as error:
            _refuse(path, error, trusted=False)
        for name in (name for table in tables for name in table):
            if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
                raise SourceError(
                    f"{path} holds a module with a part called {name!r}, which is no name.",
                    name=str(path),
                    way_out=_TRUST,
                )


def _modules_in(loaded: object) -> Iterator[nn.Module]:
    """Yield the modules in nested dicts, lists and tuples; a pickle may make these circular."""
    pending, seen = [loaded], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield item
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
