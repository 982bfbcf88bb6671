"""Load what ``torch.save`` wrote without running code that the file names.

A file is read by :class:`~fxgrow.files.checkpoint.pickles.Machine` with the words of
:mod:`fxgrow.files.checkpoint.harmless`; torch's own unpickler is used with ``--trust-pickle``
alone, because its list of harmless names has functions that set attributes of anything they are
given.
"""

from __future__ import annotations

import functools
import re
import struct
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fxgrow.errors import SourceError
from fxgrow.files.checkpoint import harmless
from fxgrow.files.checkpoint.archive import MAGIC, Archive, read_archive
from fxgrow.files.checkpoint.extent import MOST_LEVELS, check_shape
from fxgrow.files.checkpoint.foreign import STATE_DICT
from fxgrow.files.checkpoint.kept import Kept
from fxgrow.files.checkpoint.kept_checks import parent
from fxgrow.files.checkpoint.pickles import (
    MOST_STEPS,
    DamagedError,
    Machine,
    PickleError,
    UnknownNameError,
)
from fxgrow.files.checkpoint.reading import Readable, reading, refuse_damaged, refuse_source
from fxgrow.files.checkpoint.storages import Storage, read_storage

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TRUST = "If you trust the file, pass --trust-pickle, which executes whatever code it holds."
_MOST_PICKLED = 256 << 20  # bytes of a pickle without its tensors
_ALIASED = 4  # times the bytes that a file holds may be shown by its tensors, plus the next
_SMALL = 1 << 25  # bytes
_MOST_MODULES = 20_000  # under all their names; the largest published networks have 5,000


def load_untrusted(file: Readable, archive: Archive | None = None) -> object:
    """Load what ``torch.save`` wrote into a file or a part of one, running nothing of it.

    Args:
        file: in torch's zip or legacy format.
        archive: what lies where in it, if that is known.

    Returns:
        The object that was saved, on the CPU.

    Raises:
        SourceError: the file is damaged, or asks for a class or function that is not known to be
            harmless; that one is named.
    """
    is_zip = file.size >= 4 and file.read(0, 4) == MAGIC
    with reading(file.path):
        try:
            if is_zip:
                loaded = _load_zip(file, read_archive(file) if archive is None else archive)
            else:
                loaded = _load_legacy(file)
            _check(loaded, file.size)
        except PickleError as error:
            _refuse(file.path, error)
    return loaded


def load_trusted(path: Path, *, mapped: bool = False) -> object:
    """Load what ``torch.save`` wrote, on the CPU, executing whatever code the file holds.

    Python's own unpickler imports from where the user stands, too.

    Args:
        path: the file.
        mapped: leave tensors where they lie in it; it must not change as long as they are used.

    Raises:
        SourceError: the file is damaged, or needs code that is not there.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # a console script does not look there
    with warnings.catch_warnings(), reading(path):
        warnings.simplefilter("ignore")  # about protocols and moved classes; errors say the rest
        try:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
        except (ImportError, AttributeError) as error:
            if name := _of_script(str(error)):
                _refuse_script(path, name, error)
            raise SourceError(
                f"{path} needs code that cannot be imported here: {error}.",
                name=str(path),
                way_out="Run fxgrow where that code is importable, or save the state_dict.",
            ) from error


def _of_script(text: str) -> str:
    """Return the class that Python says it did not find in the script that runs, or ""."""
    found = re.search(r"attribute '(\w+)' on <module '(?:\w+\.)*__main__'", text)
    return found[1] if found else ""


def _refuse_script(path: Path, name: str, cause: Exception) -> NoReturn:
    """Refuse a pickle of a class that was defined in the script that wrote it.

    Raises:
        SourceError: always.
    """
    raise SourceError(
        f"{path} asks for {name} of __main__: a class that was defined in the script that wrote "
        "the file, and that no other program finds.",
        name=f"__main__.{name}",
        way_out="In that script itself, fxgrow.load(path, trust_pickle=True) reads it. Elsewhere, "
        "put the class into a module of its own before saving; or save the weights there: "
        f"{STATE_DICT}; and name the class by the script's file: --arch SCRIPT:{name} (for "
        "SCRIPT.py in this directory).",
    ) from cause


class _Words:
    """The vocabulary of one file; see :class:`~fxgrow.files.checkpoint.pickles.Vocabulary`.

    Args:
        load: returns the memory of a tensor by its key: (key, dtype, number of entries).
    """

    find = staticmethod(harmless.resolve)
    is_class = staticmethod(harmless.is_class)
    build = staticmethod(harmless.build)

    def __init__(self, load: Any = None) -> None:
        self._load = load

    def load_persistent(self, identity: object) -> object:
        plain = type(identity) is tuple and len(identity) >= 5 and identity[0] == "storage"
        if not plain or self._load is None:
            raise PickleError("something outside of the pickle that is no memory of a tensor")
        _, dtype, key, _, count = identity[:5]  # type: ignore[index]
        if not isinstance(dtype, torch.dtype) or type(key) is not str or type(count) is not int:
            raise PickleError("the memory of a tensor without type, name or size")
        return self._load(key, dtype, count)


def _load_zip(file: Readable, archive: Archive) -> object:
    """Load a file of torch's zip format."""
    if not archive.folder:
        refuse_source(
            file.path,
            "is a zip archive that torch.save did not write",
            "Save it again with torch.save.",
        )
    pickled = archive.part(file, "data.pkl")
    if pickled.size > _MOST_PICKLED:
        refuse_source(file.path, "has a pickle of more than 256 MB", "Save the state_dict alone.")
    swapped = _is_swapped(
        archive.read(file, "byteorder") if "byteorder" in archive.members else b""
    )

    @functools.cache
    def load(key: str) -> Tensor:
        memory = archive.part(file, f"data/{key}")
        return read_storage(memory, 0, memory.size)

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        data = load(key)
        if data.nbytes != count * dtype.itemsize:
            raise PickleError(f"data/{key} has another size than the pickle says")
        return _storage(data, dtype, swapped)

    return Machine(pickled.read(0, pickled.size), _Words(functools.cache(storage))).load()


def _load_legacy(file: Readable) -> object:
    """Load a file of the format before PyTorch 1.6: five pickles, then the memory of tensors.

    The pickles are a magic number, a version, the system, the object and the keys of its memory.
    """
    data = file.read(0, min(file.size, _MOST_PICKLED))
    if not data.startswith(LEGACY_MAGIC):
        refuse_damaged(file.path, "it does not begin as torch.save begins files")
    wanted: OrderedDict[str, tuple[torch.dtype, int, Tensor]] = OrderedDict()

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        if not 0 <= count * dtype.itemsize <= file.size:
            raise PickleError("the memory of a tensor that is larger than the file")
        known = wanted.setdefault(
            key, (dtype, count, torch.empty(max(0, count) * dtype.itemsize, dtype=torch.uint8))
        )
        if known[:2] != (dtype, count):
            raise PickleError("the memory of a tensor under two sizes")
        return Storage(known[2], dtype)

    position, found = 0, []
    for index in range(5):
        machine = Machine(data, _Words(storage if index == 3 else None), position)
        found.append(machine.load())
        position = machine.position
    system, loaded, keys = found[2:]
    swapped = isinstance(system, dict) and _is_swapped(
        b"little" if system.get("little_endian", True) else b"big"
    )
    if type(keys) is not list or sorted(map(str, keys)) != sorted(wanted):
        raise PickleError("the memory of other tensors than the pickle asks for")
    for key in keys:
        dtype, count, memory = wanted[key]
        if struct.unpack("<q", file.read(position, 8)) != (count,):
            refuse_damaged(file.path, f"the tensor {key} has another size than the pickle says")
        memory.copy_(_storage(read_storage(file, position + 8, memory.nbytes), dtype, swapped).data)
        position += 8 + memory.nbytes
    if position != file.size:
        refuse_damaged(file.path, "there is more behind its end")
    return loaded


def _is_swapped(order: bytes) -> bool:
    """Return whether numbers are in another order of bytes than this machine's."""
    if order not in (b"", b"little", b"big"):
        raise PickleError("a byteorder that is neither little nor big")
    return (order or b"little") != sys.byteorder.encode()


def _storage(data: Tensor, dtype: torch.dtype, swapped: bool) -> Storage:
    """Return memory with its bytes in this machine's order."""
    if swapped and dtype.itemsize > 1:
        memory: Any = data.untyped_storage()
        memory.byteswap(dtype)
    return Storage(data, dtype)


def _check(loaded: object, held: int) -> None:
    """Return if what a pickle built is data all through, and of a bounded size.

    Args:
        loaded: the object.
        held: the bytes of the file.

    Raises:
        PickleError: it is not.
    """
    above = _walk(loaded, held)
    if above and _walk([loaded, *above], held):
        raise PickleError("it holds a part of something that does not hold it")


def _walk(loaded: object, held: int) -> list[Kept]:
    """Check what a pickle built, and return the tops of trees that it holds only parts of.

    Raises:
        PickleError: something is no data.
    """
    left = _ALIASED * held + _SMALL
    met: dict[int, Kept] = {}

    def children(item: object) -> Iterator[object]:
        nonlocal left
        if isinstance(item, Tensor) and not item.is_meta and item.layout is torch.strided:
            left -= item.nbytes
            if left < 0:
                raise PickleError("its tensors are many times larger than what it holds of them")
        if isinstance(item, Kept):
            met[id(item)] = item
        return harmless.children(item)

    def weight(item: object) -> int:
        return MOST_STEPS // _MOST_MODULES if isinstance(item, nn.Module) else 1

    check_shape(loaded, children, weight)
    tops = {id(top): top for item in list(met.values()) for top in _missing(item, met)}
    return list(tops.values())


def _missing(item: Kept, met: Mapping[int, Kept]) -> list[Kept]:
    """Return the top of the tree that an object is part of, or none if what holds it was met.

    Raises:
        PickleError: there is no top.
    """
    above, levels = parent(item), 0
    if above is None or id(above) in met:
        return []
    while (higher := parent(above)) is not None:
        above, levels = higher, levels + 1
        if levels > MOST_LEVELS:
            raise PickleError(f"it is nested more than {MOST_LEVELS} levels deep")
    return [above]


def _refuse(path: Path, error: PickleError) -> NoReturn:
    """Refuse a pickle that asks for more than plain data, or is none.

    Raises:
        SourceError: always.
    """
    if isinstance(error, DamagedError):
        refuse_damaged(path, str(error), error)
    if isinstance(error, UnknownNameError) and error.name.startswith("__main__."):
        _refuse_script(path, error.name.removeprefix("__main__."), error)
    if isinstance(error, UnknownNameError):
        raise SourceError(
            f"{path} asks for {error.name}, which is not on the list of harmless classes, so it "
            "was not loaded.",
            name=error.name,
            way_out=_TRUST,
        ) from error
    raise SourceError(
        f"{path} was not loaded, because it holds more than plain data: {error}.",
        name=str(path),
        way_out=f"Save it again with a plain torch.save, or the state_dict alone. {_TRUST}",
    ) from error
