"""File formats of weights: told apart by content, read and written.

A format is an object registered under its name in :data:`FORMATS`; the order of registration is
the order in which :func:`sniff` asks. Those of ``torch.save`` stand here, the others in modules of
their own: :mod:`.safetensors_files` (safetensors, in one file or in shards), :mod:`.directory` and
:mod:`.exported`.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeAlias

import torch

from fxgrow.errors import SourceError
from fxgrow.files.checkpoint.archive import MAGIC, Archive, read_archive
from fxgrow.files.checkpoint.foreign import STATE_DICT, refuse_foreign
from fxgrow.files.checkpoint.kept import KeptError, save_keeping
from fxgrow.files.checkpoint.reading import AGAIN, FileReader, NoBytes, Readable, refuse_source
from fxgrow.files.checkpoint.unpickling import LEGACY_MAGIC, load_trusted, load_untrusted
from fxgrow.modules.calling import Arguments
from fxgrow.registry import Registry

_HEAD = 64
_KINDS = "a torch.save file (.pt, .pth), a safetensors file or a torch.export program (.pt2)"


@dataclass(frozen=True)
class Shards:
    """How weights are spread over several files.

    Attributes:
        limit: bytes of tensors that one file holds at most, unless a single tensor is larger.
        metadata: what the index says of the whole, without the sizes.
    """

    limit: int
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Contents:
    """What a file or a directory holds.

    Attributes:
        data: the object that was saved; for safetensors an OrderedDict name -> tensor; for an
            exported program its module.
        header: the texts in a safetensors header (empty for other formats).
        shards: how the weights are spread over several files; None for one file.
        folder: the directory whose other files belong to the weights, where there is one.
        config: its ``config.json``, where it has one.
        inputs: the arguments that a program is exported with.
        dynamic: for each tensor among them, the dims whose size may vary; None if nobody said.
    """

    data: object
    header: dict[str, str] = field(default_factory=dict)
    shards: Shards | None = None
    folder: Path | None = None
    config: dict[str, Any] | None = None
    inputs: Arguments | None = None
    dynamic: tuple[frozenset[int], ...] | None = None


Opener: TypeAlias = Callable[[Path], FileReader]


@dataclass(frozen=True)
class Candidate:
    """A file or a directory whose format is asked for: what it is told by, and read from.

    Attributes:
        path: the file or directory.
        file: its bytes.
        head: the first of them.
        archive: what lies where in it, if it is an archive.
        opener: opens other files that belong to it.
    """

    path: Path
    file: Readable
    head: bytes
    archive: Archive | None
    opener: Opener = FileReader

    @property
    def members(self) -> Collection[str]:
        """The names in an archive, without its folder's; none if the file is no archive."""
        return () if self.archive is None else self.archive.members.keys()


class FileFormat(ABC):
    """One file format.

    Attributes:
        name: under which it is registered.
        suffixes: file name endings that ask for this format when writing.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def sniff(self, found: Candidate) -> bool:
        """Tell whether a file is of this format, by its first bytes and, for zips, members."""

    @abstractmethod
    def read(self, found: Candidate, *, trust_pickle: bool) -> Contents:
        """Read a file of this format, or raise :class:`SourceError`."""

    @abstractmethod
    def write(self, contents: Contents, path: Path) -> None:
        """Write ``contents`` to ``path``, and what belongs to it beside it.

        The directory that holds ``path`` is empty; :func:`.writing.write_file` moves all of it to
        where it belongs once it is complete.
        """


FORMATS: Registry[FileFormat] = Registry("file format")


@contextmanager
def opened(path: Path, opener: Opener = FileReader) -> Iterator[Candidate]:
    """Open a file or a directory; what of it must not change meanwhile is read once.

    Raises:
        SourceError: it is missing, empty, or an archive that readers may read in different ways.
    """
    is_directory = os.path.isdir(path)
    with nullcontext(NoBytes(path)) if is_directory else opener(path) as file:
        head = file.read(0, min(_HEAD, file.size))
        if not head and not is_directory:
            refuse_source(path, "is empty", AGAIN)
        try:
            archive = read_archive(file) if head.startswith(MAGIC) else None
        except SourceError:
            refuse_foreign(path, file)
            raise
        yield Candidate(path, file, head, archive, opener)


def read_file(
    path: Path, *, trust_pickle: bool = False, opener: Opener = FileReader
) -> tuple[FileFormat, Contents]:
    """Return the format of a file or a directory, told by its content, and what it holds.

    Args:
        path: the file or directory.
        trust_pickle: let a pickle execute code.
        opener: opens each of its files.

    Raises:
        SourceError: it cannot be read, or is of no known format.
    """
    with opened(path, opener) as found:
        file_format = _format_of(found)
        return file_format, file_format.read(found, trust_pickle=trust_pickle)


def sniff(path: Path) -> FileFormat:
    """Find the format of a file by its content.

    Raises:
        SourceError: the file is missing, empty, truncated, or of no known format.
    """
    with opened(path) as found:
        return _format_of(found)


def _format_of(found: Candidate) -> FileFormat:
    for name in FORMATS:
        if FORMATS[name].sniff(found):
            return FORMATS[name]
    refuse_foreign(found.path, found.file)
    _refuse_unknown(found.path, found.head)


def format_of_name(path: Path) -> str | None:
    """Return the format that a file's name asks for, or None if it asks for none."""
    name = path.name.lower()
    return next((f for f in FORMATS if name.endswith(FORMATS[f].suffixes)), None)


class _TorchScript(FileFormat):
    name = "torchscript"

    def sniff(self, found: Candidate) -> bool:
        return "constants.pkl" in found.members

    def read(self, found: Candidate, *, trust_pickle: bool) -> Contents:
        raise SourceError(
            f"{found.path} is a TorchScript program, which is compiled code.",
            name=str(found.path),
            way_out="Use the state_dict: torch.save(model.state_dict(), 'model.pt').",
        )

    def write(self, contents: Contents, path: Path) -> None:
        raise NotImplementedError("TorchScript is never written")


class _Torch(FileFormat):
    name = "torch"
    suffixes: ClassVar[tuple[str, ...]] = (".pt", ".pth", ".bin", ".ckpt", ".tar")
    _zip: ClassVar[bool] = True

    def sniff(self, found: Candidate) -> bool:
        return "data.pkl" in found.members

    def read(self, found: Candidate, *, trust_pickle: bool) -> Contents:
        if trust_pickle:
            mapped = found.archive is not None and found.opener is not FileReader
            return Contents(load_trusted(found.path, mapped=mapped))
        return Contents(load_untrusted(found.file, found.archive))

    def write(self, contents: Contents, path: Path) -> None:
        try:
            self._save(contents.data, path)
        except KeptError:  # raised before anything large is written
            path.unlink()
            save_keeping(functools.partial(self._save, contents.data, path))

    def _save(self, data: object, path: Path, **options: Any) -> None:
        # A file object, because torch would put a file's (temporary) name into the archive.
        with path.open("xb") as file:
            torch.save(data, file, _use_new_zipfile_serialization=self._zip, **options)


class _TorchLegacy(_Torch):
    name = "torch_legacy"
    suffixes = ()
    _zip = False

    def sniff(self, found: Candidate) -> bool:
        return found.head.startswith(LEGACY_MAGIC)


for _format in (_TorchScript(), _Torch(), _TorchLegacy()):
    FORMATS.register(_format.name)(_format)


def _refuse_unknown(path: Path, head: bytes) -> NoReturn:
    if os.path.isdir(path):
        refuse_source(path, "is a directory without weights", f"Name a file: {_KINDS}.")
    save_again = f"Save it with {STATE_DICT}."
    if head.startswith(MAGIC):
        refuse_source(path, "is a zip archive that torch.save did not write", save_again)
    if head[:1] == b"\x80":
        refuse_source(path, "is a pickle that torch.save did not write", save_again)
    printable = all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head)
    if head.lstrip().startswith(b"{") and printable:
        way_out = (
            "Name the file with the weights, or for a config.json the directory that it is in."
        )
        refuse_source(path, "is JSON text, not weights", way_out)
    what = "a text file" if printable else "of an unknown format"
    refuse_source(path, f"is {what}, not {_KINDS}", save_again)
