"""Read what is on disk as if it were hostile: regular files, by ranges, unchanged meanwhile.

Nothing is mapped into memory, but for what fxgrow has just written itself (see :mod:`.mapping`). A
file that shrinks while it is read then gives an error, where a mapping would end the process with a
bus error; and what has been read stays what was checked.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from fxgrow.errors import FxgrowError, SourceError, one_line
from fxgrow.files.checkpoint.addresses import way_to

AGAIN = "Copy or download it again."
_MOST = 1 << 30  # bytes; one read of the system's returns at most 2 GB
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # never wait for a pipe
_TEXT_LIMIT = 256 << 20  # bytes; the index of the largest published model has 10 MB
_DEPTH = 100  # of nested JSON; a configuration has about 5, a torch.export graph 20


class Readable(Protocol):
    """Bytes that are read by ranges: of a file or of a part of one.

    Attributes:
        path: the file, for messages.
        size: how many there are.
    """

    path: Path
    size: int

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes from ``start`` on.

        Raises:
            SourceError: there are not as many.
        """

    def read(self, start: int, length: int) -> bytes:
        """Return a range of bytes.

        Raises:
            SourceError: there are not as many.
        """
        if not 0 <= start <= start + length <= self.size:
            refuse_damaged(self.path, "it ends too early")
        found = bytearray(length)
        self.read_into(start, memoryview(found))
        return bytes(found)

    def mapped(self, start: int, length: int) -> memoryview | None:
        """Return a range of bytes where it lies, or None where it is to be read."""
        return None


class FilePart(Readable):
    """A part of what is read.

    Args:
        whole: what it is a part of.
        start: where it begins.
        length: its bytes.
    """

    def __init__(self, whole: Readable, start: int, length: int) -> None:
        self.path, self.size = whole.path, length
        self._whole, self._start = whole, start

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer; see :class:`Readable`."""
        if start + len(buffer) > self.size:
            refuse_damaged(self.path, "a part of it ends too early")
        self._whole.read_into(self._start + start, buffer)

    def mapped(self, start: int, length: int) -> memoryview | None:
        """Return a range of bytes where it lies; see :class:`Readable`."""
        return self._whole.mapped(self._start + start, length)


class NoBytes(Readable):
    """What there is to read of a directory.

    Args:
        path: the directory.
    """

    size = 0

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill an empty buffer; see :class:`Readable`."""
        if buffer:
            refuse_damaged(self.path, "it is a directory")


class FileReader(Readable):
    """A regular file that is open for reading.

    Args:
        path: the file; a link is followed.

    Attributes:
        path: the file.
        size: its bytes when it was opened.

    Raises:
        SourceError: it is missing, may not be read, or is no regular file. A device or a FIFO is
            not waited for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY | _AT_ONCE)
        except FileNotFoundError as error:
            refuse_source(path, "does not exist", way_to(path), error)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            refuse_unreadable(path, error)
        self._first = os.fstat(descriptor)
        self.size = self._first.st_size
        if not stat.S_ISREG(self._first.st_mode):
            os.close(descriptor)
            what = "a directory" if stat.S_ISDIR(self._first.st_mode) else "a device or a pipe"
            refuse_source(path, f"is {what}, not a file", "Give a regular file.")
        self._file = os.fdopen(descriptor, "rb", buffering=0)

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        last = os.fstat(self._file.fileno())
        self._file.close()
        if kind is None or not issubclass(kind, FxgrowError):
            self._check_unchanged(last)

    def _check_unchanged(self, last: os.stat_result) -> None:
        before, after = ((s.st_size, s.st_mtime_ns) for s in (self._first, last))
        if before != after:
            refuse_source(self.path, "changed while it was read", "Wait until it is complete.")

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes with what the file holds from ``start`` on.

        Raises:
            SourceError: the file ends before that.
        """
        done = 0
        while done < len(buffer):
            try:
                self._file.seek(start + done)
                count = self._file.readinto(buffer[done : done + _MOST])
            except OSError as error:
                refuse_unreadable(self.path, error)
            if not count:
                self._check_unchanged(os.fstat(self._file.fileno()))
                refuse_damaged(self.path, "it ends too early")
            done += count


def read_bytes(path: Path, limit: int = _TEXT_LIMIT) -> bytes:
    """Return all that a small file holds.

    Raises:
        SourceError: it cannot be read, or is larger than ``limit`` bytes.
    """
    with FileReader(path) as file:
        if file.size > limit:
            refuse_source(path, f"has {file.size} bytes, more than fxgrow reads of its kind", AGAIN)
        return file.read(0, file.size)


def read_json(path: Path) -> Any:
    """Return what a JSON file says.

    Raises:
        SourceError: it cannot be read, is no JSON, or is nested too deeply.
    """
    return parse_json(read_bytes(path), path)


def parse_json(data: bytes | str, path: Path) -> Any:
    """Return what JSON says that a file holds.

    Args:
        data: the text.
        path: the file, for messages.

    Raises:
        SourceError: it is no JSON, or is nested too deeply.
    """
    try:
        found = json.loads(data)
    except RecursionError as error:
        refuse_damaged(path, "its JSON is nested too deeply", error)
    except ValueError as error:
        refuse_damaged(path, f"it is no JSON ({error})", error)
    if too_deep(found):
        refuse_damaged(path, "its JSON is nested too deeply")
    return found


def too_deep(data: object, limit: int = _DEPTH) -> bool:
    """Return whether nested dicts, lists and tuples have more than ``limit`` levels."""
    level = [data]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list, tuple))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or crafted file makes other code raise into one message.

    Raises:
        SourceError: the code inside raised anything but an :class:`FxgrowError`.
    """
    try:
        yield
    except FxgrowError:
        raise
    except RecursionError as error:
        refuse_damaged(path, "it is nested too deeply", error)
    except MemoryError as error:
        refuse_source(path, "needs more memory than there is", "Use a larger machine.", error)
    except Exception as error:
        refuse_damaged(path, f"{type(error).__name__}: {error}", error)


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Let every error raised on purpose name the file that it is about.

    Raises:
        FxgrowError: what the code inside raised.
    """
    try:
        yield
    except FxgrowError as error:
        # A directory may be called as a module or a word of the message is.
        if re.search(rf"(?<![\w./-]){re.escape(str(path))}(?![\w-]|\.\w)", error.message):
            raise
        told = f"{path}: {error.message}"
        raise type(error)(told, name=error.name, way_out=error.way_out) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let every error name the file that was read, whatever it is: :func:`about` what it reads.

    Raises:
        FxgrowError: what the code inside raised; other errors become a :class:`SourceError`, as
            under :func:`reading`.
    """
    with about(path), reading(path):
        yield


def refuse_unreadable(path: Path, error: OSError | ValueError) -> NoReturn:
    """Refuse a file that the system does not let us read.

    Raises:
        SourceError: always.
    """
    reason = getattr(error, "strerror", None) or str(error)
    refuse_source(path, f"cannot be read: {reason}", "Check its name and its permissions.", error)


def refuse_damaged(path: Path, reason: str, error: Exception | None = None) -> NoReturn:
    """Refuse a file that cannot be read to its end.

    Raises:
        SourceError: always.
    """
    short = one_line(reason) or type(error).__name__
    refuse_source(path, f"is truncated or damaged: {short.rstrip('.')}", AGAIN, error)


def refuse_source(path: Path, what: str, way_out: str, cause: Exception | None = None) -> NoReturn:
    """Refuse a file, saying what it is and what to do.

    Raises:
        SourceError: always.
    """
    raise SourceError(f"{path} {what}.", name=str(path), way_out=way_out) from cause
