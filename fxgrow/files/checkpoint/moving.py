"""Give finished files their names, all of them or none, and undo what was cut short.

A *temporary folder* lies beside the output, on the same file system. What is to be moved is in
``new``, what it replaces is kept in ``old`` (or, where two names were swapped, in ``new``), and
``journal.json`` says what is moved. It is on the disk before the first move, so whoever finds the
folder can put everything back. The last file is the one that refers to the others (an index): when
it is in place, all is done, and the journal only asks for the folder to be removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fxgrow.errors import SourceError
from fxgrow.files.checkpoint.exchange import exchange, rename_new
from fxgrow.files.checkpoint.reading import parse_json, read_bytes

NEW, OLD, JOURNAL = "new", "old", "journal.json"
_LIMIT = 16 << 20  # bytes of a journal; 100 name a file

# What tells one file from another: inode, kind, and of all but directories size and time.
Identity: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class _Move:
    """One file or directory that takes its name, and what had that name before.

    Attributes:
        name: the name.
        new: what takes it; None if what had it is only taken away.
        old: what had it; None if nothing did.
    """

    name: str
    new: Identity | None
    old: Identity | None


def move_all(
    folder: Path, names: Sequence[str], *, force: bool, superseded: Sequence[str] = ()
) -> None:
    """Let what is in ``folder/new`` take its names beside the folder: all of it, or nothing.

    Args:
        folder: the temporary folder.
        names: what to move, in this order.
        force: replace files and directories of these names, which are kept in the folder.
        superseded: files beside the folder that are taken away, as what refers to them is replaced.

    Raises:
        SourceError: a name was taken meanwhile, and nothing has changed; or putting back what was
            moved by then failed too.
        OSError: it failed, and nothing has changed.
    """
    taken = ((name, _identity(folder.parent / name)) for name in superseded)
    moves = [_Move(name, None, old) for name, old in taken if old and stat.S_ISREG(old[1])]
    for name in names:
        new = _identity(folder / NEW / name)
        if new is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        old = _identity(folder.parent / name) if force else None
        if old is not None and old[1] not in (stat.S_IFREG, stat.S_IFDIR):
            old = None  # it came after the check, and will be found in the way
        moves.append(_Move(name, new, old))
    _write_journal(folder, moves)
    try:
        for move in moves:
            _place(move, folder, alone=len(moves) == 1)
        _sync(folder.parent)
    except BaseException:
        _undo(moves, folder)
        raise
    with contextlib.suppress(OSError):  # as all is in place, it asks for nothing
        (folder / JOURNAL).unlink()


def settle(folder: Path) -> None:
    """Undo what a journal says of moves that were cut short; leave them if all were done.

    Args:
        folder: a temporary folder that no run is using any more.

    Raises:
        SourceError: something cannot be put back, and lies in the folder. Or it was copied here
            with its journal, so nothing is known of the files beside it.
    """
    moves = _read_journal(folder)
    if moves and any(_identity(folder / place / moves[-1].name) == moves[-1].new
                     for place in (NEW, OLD)):  # fmt: skip
        _undo(moves, folder)


def sync_tree(path: Path) -> None:
    """Have the system write a directory and all that is in it to the disk.

    Raises:
        OSError: it cannot.
    """
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(folder, name)):
                _sync(Path(folder, name))
        _sync(Path(folder))


def _place(move: _Move, folder: Path, *, alone: bool) -> None:
    """Let a file or a directory take its name; what had it comes to lie in the folder."""
    new, kept, out = folder / NEW / move.name, folder / OLD / move.name, folder.parent / move.name
    if move.new is None:
        with contextlib.suppress(FileNotFoundError):  # someone has taken it away since
            os.rename(out, kept)
        return
    if move.old is None:
        try:
            rename_new(new, out)
        except FileExistsError as error:
            raise SourceError(
                f"{out} exists, and did not when that was checked.",
                name=str(out),
                way_out="Pass --force to overwrite it, or name another (-o).",
            ) from error
        return
    files = stat.S_ISREG(move.new[1]) and stat.S_ISREG(move.old[1])
    if files:
        with contextlib.suppress(OSError):  # some file systems have no links
            os.link(out, kept)
    if os.path.lexists(kept):
        os.replace(new, out)
    elif not exchange(new, out):
        if files and alone:
            os.replace(new, out)  # in one step, after which there is no old one to put back
            return
        os.rename(out, kept)  # for a moment nobody has the name, and the journal alone tells of it
        rename_new(new, out)


def _undo(moves: Sequence[_Move], folder: Path) -> None:
    """Put back whatever had the names before.

    Raises:
        SourceError: something cannot be put back, and lies in the folder.
    """
    for move in reversed(moves):
        new, out = folder / NEW / move.name, folder.parent / move.name
        kept = folder / OLD / move.name
        if not os.path.lexists(kept):
            kept = new  # where the two names were swapped
        try:
            _put_back(move, new, kept, out)
        except OSError as error:
            raise SourceError(
                f"{out} cannot be put back: {error.strerror}. It lies in {kept}.",
                name=str(out),
                way_out="Move it back.",
            ) from error


def _put_back(move: _Move, new: Path, kept: Path, out: Path) -> None:
    """Put back what had one name before."""
    found = _identity(out)
    if found == move.old or found not in (None, move.new):
        return  # it was never moved, or someone has put something else there since
    if move.old is None:
        os.rename(out, new)
    elif _identity(kept) in (None, move.new):
        return  # it was never moved either, and someone has taken it away since
    elif found is None:
        rename_new(kept, out)
    elif not exchange(kept, out):
        os.rename(out, new)
        rename_new(kept, out)


def _identity(path: Path) -> Identity | None:
    """Return what tells a file from others that may get its name, or None if there is none."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    kind = stat.S_IFMT(found.st_mode)
    if stat.S_ISDIR(kind):
        return found.st_ino, kind
    # Whole seconds: a network file system may round what a local cache still knows exactly.
    return found.st_ino, kind, found.st_size, int(found.st_mtime)


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a directory, to the disk."""
    windows = sys.platform == "win32"
    if path.is_dir() and (windows or not os.access(path, os.R_OK)):
        return  # it cannot be opened, though one may write to it
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(descriptor)


def _write_journal(folder: Path, moves: Sequence[_Move]) -> None:
    """Write down what will be moved, and see that it is on the disk."""
    told = {
        "folder": os.lstat(folder).st_ino,
        "moves": [[each.name, each.new, each.old] for each in moves],
    }
    (folder / JOURNAL).write_text(json.dumps(told), encoding="utf-8")
    _sync(folder / JOURNAL)
    _sync(folder)
    _sync(folder.parent)


def _read_journal(folder: Path) -> list[_Move]:
    """Return what a journal says, or nothing if there is none that fxgrow would write.

    Raises:
        SourceError: it cannot be read, or is that of another folder.
    """
    path = folder / JOURNAL
    found = _identity(path)
    if found is None or not stat.S_ISREG(found[1]):
        return []
    data = read_bytes(path, _LIMIT)
    try:
        told = parse_json(data, path)
    except SourceError:
        return []  # it was cut short, so nothing had been moved
    items = told.get("moves") if isinstance(told, dict) else None
    moves = [_move_of(item) for item in items] if isinstance(items, list) else []
    known = [each for each in moves if each is not None]
    if len(known) < len(moves) or not known or known[-1].new is None:
        return []
    if told.get("folder") != os.lstat(folder).st_ino:
        raise SourceError(
            f"{folder} was copied from elsewhere and may hold files that another run replaced.",
            name=str(folder),
            way_out="Take what you need from it and remove it.",
        )
    return known


def _move_of(item: object) -> _Move | None:
    """Return one move of a journal, or None if it is not one of files beside the folder."""
    if not isinstance(item, list) or len(item) != 3:
        return None
    name, new, old = item
    plain = isinstance(name, str) and name == Path(name).name and name not in ("", "..")
    if not plain or "\0" in name or not all(each is None or _tells(each) for each in (new, old)):
        return None
    return _Move(name, *(None if each is None else tuple(each) for each in (new, old)))


def _tells(item: object) -> bool:
    """Return whether a value from a journal tells of a regular file or a directory."""
    if not isinstance(item, list) or not all(type(number) is int for number in item):
        return False
    return (len(item), *item[1:2]) in ((2, stat.S_IFDIR), (4, stat.S_IFREG))
