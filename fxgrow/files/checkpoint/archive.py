"""Zip archives that every reader reads alike: where their members lie in the file.

``torch.save`` and ``torch.export.save`` write plain archives: members that are stored as they are,
one after the other from the first byte on, then one directory, then the end. Readers of zips differ
in all else (which of two directories counts, or which of two members of one name; what they make of
bytes before, between and behind the members), so that one file could be checked as one archive and
loaded as another. Here, whatever is not plain is refused. What is plain can be read, or mapped, by
the ranges that are returned; a compressed member has a range, and is not read.

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fxgrow.files.checkpoint.reading import FilePart, Readable, refuse_damaged, refuse_source

MAGIC = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_STORED, _DEFLATED = 0, 8
# Flags: how well it was compressed; sizes follow the data; the name is UTF-8.
_LEVEL, _STREAMED, _UTF8 = 0x0006, 0x0008, 0x0800
_ZIP64, _PADDING = 0x0001, 0x4246  # kinds of extra fields; the second is torch's
_DESCRIPTORS = frozenset((12, 16, 20, 24))  # sizes of what may follow streamed data
_FULL = 0xFFFFFFFF  # in 32 bits: the value stands in 64 bits elsewhere
_MOST_MEMBERS = 200_000
_SAVE_AGAIN = "Save it again with torch.save."


@dataclass(frozen=True)
class Member:
    """Where a member lies in the file.

    Attributes:
        start: its first byte.
        length: its bytes in the file.
        stored: whether these are its contents, and not compressed.
    """

    start: int
    length: int
    stored: bool = True


@dataclass(frozen=True)
class Archive:
    """The members of an archive.

    Attributes:
        folder: the one folder that all of them are in; "" where none is in a folder, as
            ``torch.export`` wrote before torch 2.8.
        members: by their names in it.
    """

    folder: str
    members: dict[str, Member]

    def part(self, file: Readable, name: str) -> FilePart:
        """Return a member to read.

        Raises:
            SourceError: there is none of that name, or it is compressed.
        """
        member = self.members.get(name)
        if member is None:
            refuse_damaged(file.path, f"it lacks its member {name}")
        if not member.stored:  # torch never compresses, and what is small may become huge
            refuse_source(file.path, f"has a compressed member {name!r}", _SAVE_AGAIN)
        return FilePart(file, member.start, member.length)

    def read(self, file: Readable, name: str) -> bytes:
        """Return the bytes of a member; see :meth:`part`."""
        part = self.part(file, name)
        return part.read(0, part.size)


@dataclass(frozen=True)
class _DirectoryEntry:
    """What the directory says of a member."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    length: int
    header: int  # where its own header begins


def read_archive(file: Readable) -> Archive:
    """Return what lies where in an archive.

    Raises:
        SourceError: it is truncated, compressed, or not plain in another way.
    """
    begin, size, count = _directory(file)
    entries = sorted(_entries(file, file.read(begin, size), count), key=lambda entry: entry.header)
    members: dict[str, Member] = {}
    position, streamed = 0, False
    for entry in entries:
        gap = entry.header - position
        if gap and not (streamed and gap in _DESCRIPTORS):
            _refuse(file, f"bytes before {entry.name!r} that belong to no member")
        members[entry.name] = Member(_data_start(file, entry), entry.length, not entry.method)
        position = members[entry.name].start + entry.length
        streamed = bool(entry.flags & _STREAMED)
    gap = begin - position
    if gap and not (streamed and gap in _DESCRIPTORS):
        _refuse(file, "bytes before its directory that belong to no member")
    if len(members) != len(entries):
        _refuse(file, "two members of one name")
    if not any("/" in name for name in members):
        return Archive("", members)
    folders = {name.partition("/")[0] for name in members}
    if len(folders) != 1 or not all("/" in name for name in members):
        _refuse(file, "members that are not in a subdirectory, the same for all")
    (folder,) = folders
    return Archive(folder, {name.partition("/")[2]: place for name, place in members.items()})


def _directory(file: Readable) -> tuple[int, int, int]:
    """Return where the directory begins, its size and its number of entries."""
    end = file.size - _END.size
    if end < 0:
        refuse_damaged(file.path, "its table of contents is missing")
    mark, disk, first, here, count, size, begin, comment = _END.unpack(file.read(end, _END.size))
    if mark != b"PK\x05\x06" or comment:
        refuse_damaged(file.path, "it does not end with its table of contents")
    values, end = _wide_end(file, end, (disk, first, here, count, size, begin))
    disk, first, here, count, size, begin = values
    if disk or first or here != count or begin + size != end:
        _refuse(file, "another directory than the one that it ends with")
    if count > _MOST_MEMBERS:
        _refuse(file, f"{count} members")
    return begin, size, count


def _wide_end(file: Readable, end: int, values: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return what the end says, and where it begins, by the 64-bit end before it if there is one.

    Args:
        file: the archive.
        end: where its end begins.
        values: what that says.
    """
    place = end - _LOCATOR64.size - _END64.size
    if place < 0:
        return values, end
    tail = file.read(place, end - place)
    found = _LOCATOR64.unpack(tail[_END64.size :])
    if found[0] != b"PK\x06\x07":
        return values, end
    mark, length, _, _, *wide = _END64.unpack(tail[: _END64.size])
    if mark != b"PK\x06\x06" or length != _END64.size - 12 or found[1:] != (0, place, 1):
        _refuse(file, "two ends")
    full = (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, _FULL, _FULL)
    if not all(a in (b, all_ones) for a, b, all_ones in zip(values, wide, full, strict=True)):
        _refuse(file, "two ends that differ")
    return tuple(wide), place


def _entries(file: Readable, directory: bytes, count: int) -> Iterator[_DirectoryEntry]:
    """Yield what the directory says of each member."""
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory):
            refuse_damaged(file.path, "its table of contents is cut")
        (mark, _, _, flags, method, _, _, _, packed, length, name_length, extra_length, comment,
         disk, _, _, header) = _CENTRAL.unpack_from(directory, at)  # fmt: skip
        at += _CENTRAL.size
        raw_name = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length
        if mark != b"PK\x01\x02" or at > len(directory):
            refuse_damaged(file.path, "its table of contents is cut")
        name = _name(file, raw_name)
        if method not in (_STORED, _DEFLATED) or flags & ~(_LEVEL | _STREAMED | _UTF8):
            _refuse(file, f"a member {name!r} that is encrypted or compressed in another way")
        wide = _wide_values(file, extra)
        length, packed, header = (
            next(wide, value) if value == _FULL else value for value in (length, packed, header)
        )
        if comment or disk or (not method and packed != length) or next(wide, None) is not None:
            _refuse(file, f"a member {name!r} that is not plain")
        yield _DirectoryEntry(name, raw_name, flags, method, packed, header)
    if at != len(directory):
        _refuse(file, "more in its directory than it says")


def _wide_values(file: Readable, extra: bytes) -> Iterator[int]:
    """Return the 64-bit values in a directory's extra fields."""
    values: list[int] = []
    at = 0
    while at < len(extra):
        if at + 4 > len(extra):
            refuse_damaged(file.path, "its table of contents is cut")
        kind, length = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind not in (_ZIP64, _PADDING) or at > len(extra) or (kind == _ZIP64 and length % 8):
            _refuse(file, "extra fields of another kind than torch writes")
        if kind == _ZIP64:
            values += struct.unpack(f"<{length // 8}Q", field)
    return iter(values)


def _name(file: Readable, raw: bytes) -> str:
    """Return the name of a member, a relative path without detours."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse_damaged(file.path, "a member's name is no text", error)
    if "\\" in name or not name.isprintable() or {"", ".", ".."} & set(name.split("/")):
        _refuse(file, f"a member called {name[:80]!r}")
    return name


def _data_start(file: Readable, entry: _DirectoryEntry) -> int:
    """Return where the data of a member begins, if its own header says what the directory does."""
    head = _LOCAL.unpack(file.read(entry.header, _LOCAL.size))
    mark, _, flags, method, _, _, _, packed, length, name_length, extra_length = head
    name = file.read(entry.header + _LOCAL.size, name_length)
    streamed = flags & _STREAMED and not packed and not length
    known = streamed or packed in (entry.length, _FULL)
    expected = (MAGIC, entry.flags, entry.method, entry.raw_name)
    if (mark, flags, method, name) != expected or not known:
        _refuse(file, f"a member {entry.name!r} of which its directory says something else")
    start: int = entry.header + _LOCAL.size + name_length + extra_length
    if start + entry.length > file.size:
        refuse_damaged(file.path, f"{entry.name!r} is cut")
    return start


def _refuse(file: Readable, what: str) -> None:
    refuse_source(file.path, f"is an archive that torch does not write: it has {what}", _SAVE_AGAIN)
