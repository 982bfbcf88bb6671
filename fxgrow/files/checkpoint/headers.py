"""Read a safetensors file: a header that says where each tensor lies, and the tensors.

The library maps the file into memory, which ends the process where the file shrinks meanwhile; so
tensors are read by ranges here. What the library checks of a header is checked here too, and that
no name stands in it twice.

Source: the format's description in the README of safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from typing import Any, NoReturn

import torch
from torch import Tensor

from fxgrow.files.checkpoint.reading import Readable, reading, refuse_damaged, too_deep
from fxgrow.files.checkpoint.storages import read_storage

_MOST_HEADER = 100_000_000  # bytes, as in the library
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def read_tensors(file: Readable) -> tuple[OrderedDict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and the texts in its header.

    Raises:
        SourceError: the file is damaged, or its header is not plain.
    """
    with reading(file.path):
        (length,) = struct.unpack("<Q", file.read(0, 8))
        if not 2 <= length <= min(_MOST_HEADER, file.size - 8):
            refuse_damaged(file.path, "its header is cut")
        header = json.loads(file.read(8, length), object_pairs_hook=_distinct)
    if not isinstance(header, dict) or too_deep(header):
        refuse_damaged(file.path, "its header is no list of tensors")
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        refuse_damaged(file.path, "its header has something else than texts under __metadata__")
    begin, end = 8 + length, 0
    tensors: dict[str, Tensor] = {}
    entries = [(name, _TensorEntry(file, name, entry)) for name, entry in header.items()]
    for name, entry in sorted(entries, key=lambda item: item[1].bounds):
        if entry.bounds[0] != end:
            refuse_damaged(file.path, f"{name!r} does not begin where the one before it ends")
        end = entry.bounds[1]
        data = read_storage(file, begin + entry.bounds[0], end - entry.bounds[0])
        tensors[name] = data.view(entry.dtype).view(entry.shape)
    if begin + end != file.size:
        refuse_damaged(file.path, "it holds more or less than its header says")
    return OrderedDict(sorted(tensors.items())), texts


class _TensorEntry:
    """What a header says of a tensor.

    Attributes:
        dtype: of its entries.
        shape: its sizes.
        bounds: where it begins and ends, from the end of the header.
    """

    def __init__(self, file: Readable, name: str, entry: Any) -> None:
        def refuse(what: str) -> NoReturn:
            refuse_damaged(file.path, f"{name!r} has {what}")

        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            refuse("another entry in the header than tensors have")
        dtype = vars(torch).get(_DTYPES.get(str(entry["dtype"]), ""))
        if not isinstance(dtype, torch.dtype):
            refuse(f"the dtype {entry['dtype']!r}, which torch does not know")
        for numbers in (entry["shape"], entry["data_offsets"]):
            if not isinstance(numbers, list) or len(numbers) > 64:
                refuse("a shape that is none")
            if not all(type(number) is int and 0 <= number < 2**60 for number in numbers):
                refuse("a shape that is none")
        self.dtype, self.shape = dtype, tuple(entry["shape"])
        nbytes = math.prod(self.shape) * dtype.itemsize
        if len(entry["data_offsets"]) != 2:
            refuse("no beginning and end")
        first, last = entry["data_offsets"]
        if last - first != nbytes:
            refuse("another size than its shape")
        self.bounds = (first, last)


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object as a dict.

    Raises:
        ValueError: a name stands in it twice, which readers understand in different ways.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found
