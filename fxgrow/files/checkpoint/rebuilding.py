"""Functions that a pickle may call, each with its own check of what it is given.

None of them calls anything that a file gives it, takes memory beyond what the file holds, or
returns one of its arguments (such a function could be had to change what it returns).
"""

from __future__ import annotations

import functools
import math
import re
import types
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxgrow.files.checkpoint.instances import PLAIN, set_attributes
from fxgrow.files.checkpoint.kept import Kept, Name
from fxgrow.files.checkpoint.pickles import Call, PickleError, plain_key
from fxgrow.files.checkpoint.storages import Storage, make_tensor

_FACTORIES: tuple[type, ...] = (bool, dict, float, int, list, set, str, tuple)


class NumpyDtype:
    """Stands in for ``numpy.dtype`` while unpickling: a plain number's type, and nothing else.

    numpy's own constructors are memory-unsafe with crafted dtypes.
    """

    def __init__(self, code: object, *_: object) -> None:
        if isinstance(code, str) and code.startswith("O"):
            raise PickleError("an array of Python objects")
        if not isinstance(code, str) or not re.fullmatch(
            r"[biufc][0-9]{1,2}|[SU][0-9]{1,4}|\?", code
        ):
            raise PickleError(f"{code!r} is not the dtype of a plain number")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        """Take the byte order."""
        if type(state) is tuple and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])

    def __reduce__(self) -> Any:
        return self.dtype.__reduce__()  # saved again, it is numpy's own


def _numpy_scalar(dtype: object, data: object) -> Any:
    """Return one plain number from its bytes."""
    if not isinstance(dtype, NumpyDtype) or not isinstance(data, bytes):
        raise PickleError("a numpy scalar that is not a plain number")
    return np.frombuffer(data, dtype.dtype, count=1)[0]


def _array(kind: object, shape: object, code: object) -> Any:
    """``numpy._core.multiarray._reconstruct``: an empty array, which is filled by its state."""
    if kind != Name("numpy", "ndarray") or shape != (0,) or code not in (b"b", "b"):
        raise PickleError("an array of another class than numpy's own")
    return np.empty(0, dtype=np.int8)


def build_array(array: Any, state: object) -> None:
    """Give an array its shape and its numbers, which must be as many as it says.

    Raises:
        PickleError: they are not, or it has them already.
    """
    parts: Any = state if type(state) is tuple and len(state) == 5 else (None,) * 5
    _, shape, dtype, by_columns, data = parts
    plain = isinstance(dtype, NumpyDtype) and type(shape) is tuple and type(data) is bytes
    if not plain or array.size or type(by_columns) is not bool:
        raise PickleError("an array that is none of plain numbers")
    sizes = all(type(size) is int and 0 <= size < 2**40 for size in shape) and len(shape) <= 32
    if not sizes or math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise PickleError("an array of another size than its shape")
    array.__setstate__((1, shape, dtype.dtype, by_columns, data))


def _defaultdict(factory: object = None) -> defaultdict[Any, object]:
    """Of an own list of factories, by the names of which a pickle's are known."""
    known = {f"builtins.{kind.__name__}": kind for kind in _FACTORIES}
    name = str(factory) if isinstance(factory, Name) else getattr(factory, "name", None)
    if factory is not None and (not isinstance(factory, (Name, Call)) or name not in known):
        raise PickleError("a defaultdict of something else than plain data")
    return defaultdict(known[str(name)] if factory is not None else None)


def _ordered_dict(items: object = ()) -> OrderedDict[Any, object]:
    if type(items) not in (list, tuple):
        raise PickleError("an OrderedDict of something else than pairs")
    return OrderedDict((plain_key(key), value) for key, value in items)  # type: ignore[attr-defined]


def _counter(items: object = None) -> Counter[Any]:
    counts = {} if items is None else items
    if type(counts) is not dict or not all(type(value) in PLAIN for value in counts.values()):
        raise PickleError("a Counter of something else than numbers")
    return Counter(counts)


def _set(items: object = ()) -> set[object]:
    if type(items) not in (list, tuple):
        raise PickleError("a set of something else than a list")
    return set(map(plain_key, items))  # type: ignore[call-overload]


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise PickleError("bytes in another encoding than pickles use")
    return text.encode("latin1")


def _bytes(data: object = b"", encoding: object = "latin1") -> bytes:
    return bytes(data) if type(data) is bytes else _encode(data, encoding)


def _complex(real: object, imaginary: object) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise PickleError("a complex number of something else than numbers")
    return complex(real, imaginary)


def _size(items: object) -> torch.Size:
    if type(items) not in (list, tuple, torch.Size) or not all(type(item) is int for item in items):  # type: ignore[attr-defined]
        raise PickleError("a size of something else than numbers")
    return torch.Size(items)  # type: ignore[arg-type]


def _device(kind: object, index: object = None) -> torch.device:
    if type(kind) is not str or not (index is None or type(index) is int):
        raise PickleError("a device of something else than a name")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _layout(name: object) -> torch.layout:
    layout: object = vars(torch).get(str(name).removeprefix("torch."))
    if not isinstance(layout, torch.layout):
        raise PickleError(f"no layout {name!r}")
    return layout


def _tensor(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
) -> Tensor:
    """``torch._utils._rebuild_tensor_v2``."""
    _check_flags(requires_grad, hooks)
    tensor = make_tensor(storage, offset, size, stride)
    return _finished(tensor, requires_grad, metadata)


def _tensor_v3(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> Tensor:
    """``torch._utils._rebuild_tensor_v3``: of a dtype that has no storage of its own."""
    _check_flags(requires_grad, hooks)
    tensor = make_tensor(storage, offset, size, stride, dtype)
    return _finished(tensor, requires_grad, metadata)


def _finished(tensor: Tensor, requires_grad: object, metadata: object) -> Tensor:
    """Return a tensor with its flags."""
    if metadata is not None and metadata != {}:
        flags = metadata if isinstance(metadata, dict) else {None: None}
        if not flags.items() <= {("conj", True), ("conj", False), ("neg", True), ("neg", False)}:
            raise PickleError("a tensor with unknown metadata")
        tensor = tensor.conj() if flags.get("conj") else tensor
        tensor = torch._neg_view(tensor) if flags.get("neg") else tensor
        tensor = tensor.detach()
    return tensor.requires_grad_(bool(requires_grad))


def _check_flags(requires_grad: object, hooks: object) -> None:
    if type(requires_grad) is not bool or hooks:
        raise PickleError("a tensor with hooks")


def _parameter(
    data: object, requires_grad: object, hooks: object = None, state: object = None
) -> nn.Parameter:
    """``torch._utils._rebuild_parameter`` and ``_rebuild_parameter_with_state``."""
    _check_flags(requires_grad, hooks)
    if type(data) is not Tensor:
        raise PickleError("a parameter of something else than a tensor")
    parameter = nn.Parameter(data, requires_grad=bool(requires_grad))
    _set_state(parameter, state)
    return parameter


def _from_type(make: object, kind: object, arguments: object, state: object) -> Tensor:
    """``torch._tensor._rebuild_from_type_v2``: a tensor with attributes."""
    if not isinstance(make, Call) or make.function not in (_tensor, _tensor_v3, _parameter):
        raise PickleError("a tensor that is made by something else than torch")
    if kind not in (Tensor, nn.Parameter) or type(arguments) is not tuple:
        raise PickleError("a tensor of another class than torch's own")
    tensor = make.function(*arguments)
    if not isinstance(tensor, kind):
        raise PickleError("a tensor of another class than it says")
    _set_state(tensor, state)
    return tensor


def _set_state(tensor: Tensor, state: object) -> None:
    """Give a tensor its attributes, which stand in a dict or before what its slots hold."""
    values = state[0] if type(state) is tuple and len(state) == 2 and not state[1] else state
    if values:
        set_attributes(tensor, values)


def _meta(dtype: object, size: object, stride: object, requires_grad: object) -> Tensor:
    """``torch._utils._rebuild_meta_tensor_no_storage``."""
    _check_flags(requires_grad, None)
    if not isinstance(dtype, torch.dtype):
        raise PickleError("a dtype that is none")
    shape, strides = _size(size), _size(stride)
    tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return tensor.requires_grad_(bool(requires_grad))


def _sparse(layout: object, data: object) -> Tensor:
    """``torch._utils._rebuild_sparse_tensor``, of coordinates."""
    if layout is not torch.sparse_coo or type(data) is not tuple or len(data) < 3:
        raise PickleError("a compressed sparse tensor")
    indices, values, size = data[:3]
    return torch.sparse_coo_tensor(indices, values, _size(size), check_invariants=True)


def _quantized(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    parameters: object,
    requires_grad: object,
    hooks: object = None,
) -> Tensor:
    """``torch._utils._rebuild_qtensor``, which does not check all that it is given."""
    _check_flags(requires_grad, hooks)
    shape = make_tensor(storage, offset, size, stride).shape
    scheme, *values = parameters if type(parameters) is tuple else (None,)
    if scheme is torch.per_tensor_affine:
        known = list(map(type, values)) == [float, int]
    else:
        vectors = [item for item in values[:2] if type(item) is Tensor and item.ndim == 1]
        axes = [item for item in values[2:] if type(item) is int and 0 <= item < len(shape)]
        known = (len(vectors), len(axes), len(values)) == (2, 1, 3)
        known = known and all(len(vector) == shape[axes[0]] for vector in vectors)
    if not known or not isinstance(storage, Storage):
        raise PickleError("a quantized tensor of an unknown kind")
    wrap: Any = torch.TypedStorage
    make: Any = torch._utils._rebuild_qtensor
    memory = wrap(wrap_storage=storage.data.untyped_storage(), dtype=storage.dtype, _internal=True)
    tensor: Tensor = make(memory, offset, shape, stride, parameters, requires_grad, OrderedDict())
    return tensor


def _partial(function: object) -> functools.partial[object] | Kept:
    """``functools.partial``, of a class or function that is a value here, or is kept."""
    if isinstance(function, Name):
        return Kept(Name("functools", "partial"), called=True, arguments=(function,))
    if not (isinstance(function, (type, types.FunctionType, types.BuiltinFunctionType))):
        raise PickleError("a partial of something else than a class or a function")
    return functools.partial(function)


def build_partial(instance: functools.partial[object], state: object) -> None:
    """Give a partial its keyword arguments: numbers and texts."""
    if type(state) is not tuple or len(state) != 4 or state[0] is not instance.func:
        raise PickleError("a partial of something else than it says")
    _, arguments, keywords, attributes = state
    plain = isinstance(keywords, dict) and all(
        type(value) in PLAIN and not (isinstance(value, int) and abs(value) > 2**16)
        for value in keywords.values()
    )
    if arguments != () or attributes or not (keywords is None or plain):
        raise PickleError("a partial with arguments that are no plain numbers")
    instance.__setstate__((instance.func, (), keywords, None))  # type: ignore[attr-defined]


def _calls(**functions: Callable[..., object]) -> dict[str, Callable[..., object]]:
    return {f"torch._utils.{name}": function for name, function in functions.items()}


_FUNCTIONS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "collections.defaultdict": _defaultdict,
    "builtins.set": _set,
    "builtins.frozenset": lambda items=(): frozenset(_set(items)),
    "builtins.bytes": _bytes,
    "builtins.bytearray": lambda *arguments: bytearray(_bytes(*arguments)),
    "builtins.complex": _complex,
    "_codecs.encode": _encode,
    "functools.partial": _partial,
    "numpy.dtype": NumpyDtype,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    **_calls(
        _rebuild_tensor=_tensor,
        _rebuild_tensor_v2=_tensor,
        _rebuild_tensor_v3=_tensor_v3,
        _rebuild_parameter=_parameter,
        _rebuild_parameter_with_state=_parameter,
        _rebuild_meta_tensor_no_storage=_meta,
        _rebuild_sparse_tensor=_sparse,
        _rebuild_qtensor=_quantized,
    ),
}

CALLS: dict[str, Call] = {name: Call(name, function) for name, function in _FUNCTIONS.items()}
