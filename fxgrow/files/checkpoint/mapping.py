"""Files in memory without being copied there: for what fxgrow has just written itself.

What comes from elsewhere is never mapped; see :mod:`.reading`. What was just written lies in a
folder of fxgrow's own, and nothing else changes it before it has its name. Of a file that is looked
at for its names and shapes alone, the tensors are not read at all.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from fxgrow.files.checkpoint.reading import FileReader

_ALIGNED = 8  # bytes; torch reads numbers only from multiples of their own size
_LARGE = 1 << 16  # bytes; for less, reading costs no more than not reading
_DROP = getattr(mmap, "MADV_DONTNEED", None)  # Windows has none


class MappedFile(FileReader):
    """A regular file whose bytes are read where the system keeps them.

    Args:
        path: the file.

    Raises:
        SourceError: as for :class:`~fxgrow.files.checkpoint.reading.FileReader`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._map: mmap.mmap | None = None
        if self.size:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def mapped(self, start: int, length: int) -> memoryview | None:
        """Return a range of bytes where it lies, if numbers may lie there."""
        if self._map is None or start % _ALIGNED or start + length > self.size:
            return None
        return memoryview(self._map)[start : start + length]

    def release(self) -> None:
        """Give back the memory of what was looked at; it is read anew where it is needed."""
        if self._map is not None and _DROP is not None:
            self._map.madvise(_DROP)


class Mappings:
    """The files that are mapped for one purpose."""

    def __init__(self) -> None:
        self._files: list[MappedFile] = []

    def open(self, path: Path) -> MappedFile:
        """Map a file; see :class:`MappedFile`."""
        self._files.append(MappedFile(path))
        return self._files[-1]

    def release(self) -> None:
        """Give back the memory of what was looked at in all of them."""
        for file in self._files:
            file.release()


class HollowFile(FileReader):
    """A regular file of which tensors' shapes are read and their numbers are not.

    What is asked for as a tensor's memory is zeros, which take none as long as nobody writes there.
    """

    def mapped(self, start: int, length: int) -> memoryview | None:
        """Return zeros in place of a range of many bytes."""
        if length < _LARGE or start + length > self.size:
            return None
        return memoryview(mmap.mmap(-1, length))
