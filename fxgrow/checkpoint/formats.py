"""File formats of weights: told apart by content, read and written.

A format is an object registered under its name in :data:`FORMATS`; the order of registration is
the order in which :func:`sniff` asks. safetensors is imported only here.
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NoReturn, cast

import torch
from torch import Tensor

from fxgrow.checkpoint.unpickling import load_pickled
from fxgrow.errors import SourceError
from fxgrow.registry import Registry

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_HEAD = 64
_KINDS = "a torch.save file (.pt, .pth) or a safetensors file"


@dataclass
class Contents:
    """What a file holds.

    Attributes:
        data: the object that was saved; for safetensors an OrderedDict name -> tensor.
        header: the texts in a safetensors header (empty for other formats).
    """

    data: object
    header: dict[str, str] = field(default_factory=dict)


class FileFormat(ABC):
    """One file format.

    Attributes:
        name: under which it is registered.
        suffixes: file name endings that ask for this format when writing.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def sniff(self, path: Path, head: bytes) -> bool:
        """Tell whether the file is of this format, by its first bytes and, for zips, members."""

    @abstractmethod
    def read(self, path: Path, *, trust_pickle: bool) -> Contents:
        """Read the file, or raise :class:`SourceError`."""

    @abstractmethod
    def write(self, contents: Contents, path: Path) -> None:
        """Write ``contents`` to ``path``; :func:`.writing.write_file` is what makes it atomic."""


FORMATS: Registry[FileFormat] = Registry("file format")


def sniff(path: Path) -> FileFormat:
    """Find the format of a file by its content.

    Raises:
        SourceError: the file is missing, empty, truncated, or of no known format.
    """
    head = _read_head(path)
    for name in FORMATS:
        if FORMATS[name].sniff(path, head):
            return FORMATS[name]
    _refuse_unknown(path, head)


class _Pt2(FileFormat):
    name = "pt2"
    suffixes = (".pt2",)

    def sniff(self, path: Path, head: bytes) -> bool:
        members = _members(path, head)
        marks = ("/archive_format", "/models/model.json", "serialized_exported_program.json")
        return any(member.endswith(marks) for member in members)

    def read(self, path: Path, *, trust_pickle: bool) -> Contents:
        self._refuse(path, "a torch.export program (.pt2), which fxgrow does not read yet")

    def write(self, contents: Contents, path: Path) -> None:
        self._refuse(path, "to be a torch.export program (.pt2), which fxgrow does not write yet")

    def _refuse(self, path: Path, what: str) -> NoReturn:
        raise SourceError(
            f"{path} is {what}.",
            name=str(path),
            way_out="Use the model's state_dict: torch.save(model.state_dict(), 'model.pt').",
        )


class _TorchScript(FileFormat):
    name = "torchscript"

    def sniff(self, path: Path, head: bytes) -> bool:
        return any(member.endswith("/constants.pkl") for member in _members(path, head))

    def read(self, path: Path, *, trust_pickle: bool) -> Contents:
        raise SourceError(
            f"{path} is a TorchScript program, which is compiled code.",
            name=str(path),
            way_out="Use the state_dict: torch.save(model.state_dict(), 'model.pt').",
        )

    def write(self, contents: Contents, path: Path) -> None:
        raise NotImplementedError("TorchScript is never written")


class _Torch(FileFormat):
    name = "torch"
    suffixes: ClassVar[tuple[str, ...]] = (".pt", ".pth", ".bin", ".ckpt", ".tar")
    _zip: ClassVar[bool] = True

    def sniff(self, path: Path, head: bytes) -> bool:
        return any(m.count("/") == 1 and m.endswith("/data.pkl") for m in _members(path, head))

    def read(self, path: Path, *, trust_pickle: bool) -> Contents:
        return Contents(load_pickled(path, trust_pickle=trust_pickle))

    def write(self, contents: Contents, path: Path) -> None:
        # A file object, because torch would put a file's (temporary) name into the archive.
        with path.open("xb") as file:
            torch.save(contents.data, file, _use_new_zipfile_serialization=self._zip)


class _TorchLegacy(_Torch):
    name = "torch_legacy"
    suffixes = ()
    _zip = False

    def sniff(self, path: Path, head: bytes) -> bool:
        return head.startswith(_LEGACY_MAGIC)


class _Safetensors(FileFormat):
    name = "safetensors"
    suffixes = (".safetensors",)

    def sniff(self, path: Path, head: bytes) -> bool:
        return len(head) > 8 and head[7:9] == b"\x00{"  # a header's length in 8 bytes, then JSON

    def read(self, path: Path, *, trust_pickle: bool) -> Contents:
        import safetensors

        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                header = dict(file.metadata() or {})
                names = list(file.keys())
                tensors = OrderedDict((name, file.get_tensor(name)) for name in names)
        except (safetensors.SafetensorError, OSError, RuntimeError) as error:
            _refuse_damaged(path, str(error), error)
        return Contents(tensors, header)

    def write(self, contents: Contents, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = cast(Mapping[str, Tensor], contents.data)
        save_file(dict(tensors), path, metadata=contents.header or None)


for _format in (_Pt2(), _TorchScript(), _Torch(), _TorchLegacy(), _Safetensors()):
    FORMATS.register(_format.name)(_format)


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except FileNotFoundError as error:
        _refuse_source(path, "does not exist", "Check the path.", error)
    except IsADirectoryError as error:
        _refuse_source(path, "is a directory", f"Name a file in it: {_KINDS}.", error)
    except OSError as error:
        _refuse_source(path, f"cannot be read: {error.strerror}", "Check its permissions.", error)
    if not head:
        _refuse_source(path, "is empty", "Copy or download it again.")
    return head


def _members(path: Path, head: bytes) -> list[str]:
    """Return the names in a zip archive; none if the file is no zip."""
    if not head.startswith(b"PK\x03\x04"):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception as error:  # zipfile does not wrap what a damaged table makes it raise
        _refuse_damaged(path, "its table of contents cannot be read", error)


def _refuse_unknown(path: Path, head: bytes) -> NoReturn:
    save_again = "Save it with torch.save(model.state_dict(), 'model.pt')."
    if head.startswith(b"version https://git-lfs"):
        _refuse_source(path, "is a Git LFS pointer, not the file itself", "Run: git lfs pull.")
    if head.startswith(b"PK\x03\x04"):
        _refuse_source(path, "is a zip archive that torch.save did not write", save_again)
    if head[:1] == b"\x80":
        _refuse_source(path, "is a pickle that torch.save did not write", save_again)
    printable = all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head)
    what = "a text file" if printable else "of an unknown format"
    _refuse_source(path, f"is {what}, not {_KINDS}", save_again)


def _refuse_damaged(path: Path, reason: str, error: Exception) -> NoReturn:
    short = " ".join(reason.split()) or type(error).__name__
    way_out = "Copy or download it again."
    _refuse_source(path, f"is truncated or damaged: {short}", way_out, error)


def _refuse_source(path: Path, what: str, way_out: str, cause: Exception | None = None) -> NoReturn:
    raise SourceError(f"{path} {what}.", name=str(path), way_out=way_out) from cause
