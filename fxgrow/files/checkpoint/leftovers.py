"""The temporary folder that an output is written in, and what is left of one if a run is killed.

While a run lives it holds a lock on a file in its folder, which the system takes from it when it
ends, however it ends. A folder whose lock is free is left over, and the next run that writes beside
it settles its moves and removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from fxgrow.errors import FxgrowWarning, SourceError
from fxgrow.files.checkpoint.moving import JOURNAL, NEW, OLD, settle

# A file in the folder, as NFS locks nothing that is not open for writing, and so no directory.
_LOCK = "lock"
_NAME = re.compile(r"\..*\.[0-9a-f]{8}\.fxgrow", re.DOTALL)
_KINDS = {NEW: stat.S_IFDIR, OLD: stat.S_IFDIR, JOURNAL: stat.S_IFREG, _LOCK: stat.S_IFREG}
_own: set[Path] = set()  # the folders of this process that it has not yet removed


@contextlib.contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """Make a folder beside ``out``, and settle and remove it in the end.

    Args:
        out: the file or directory that will be written.

    Yields:
        The folder, with two empty ones in it: ``new`` and ``old``.

    Raises:
        OSError: it cannot be made.
        SourceError: see :func:`.moving.settle`.
    """
    folder, lock = _make(out)
    try:
        try:
            (folder / NEW).mkdir()
            (folder / OLD).mkdir()
            yield folder
        finally:
            _finish(folder)
    finally:
        if lock is not None:
            os.close(lock)


def tidy(parent: Path) -> None:
    """Settle and remove what runs that were killed have left in a directory.

    Only folders of the name and the content that fxgrow gives them are looked at, and only this
    user's own. That of a run that is still alive is left alone. Without locks (on Windows, and on
    some network file systems) nobody knows, and all are.
    """
    try:
        names = sorted(name for name in os.listdir(parent) if _NAME.fullmatch(name))
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return  # what cannot be listed holds nothing to tidy that could be reached
    for name in names:
        _tidy_one(parent / name)


def end() -> None:
    """Settle and remove the folders of this process; what remains if removing was interrupted.

    Raises:
        SourceError: see :func:`.moving.settle`.
    """
    for folder in sorted(_own):
        _finish(folder)


def _make(out: Path) -> tuple[Path, int | None]:
    """Make a folder and return it with its lock."""
    start = os.fsencode(out.name)[:100].decode("utf-8", "ignore")  # a name has at most 255 bytes
    while True:
        folder = out.parent / f".{start}.{secrets.token_hex(4)}.fxgrow"
        _own.add(folder)
        try:
            folder.mkdir(0o700)
        except OSError:
            _own.discard(folder)
            raise
        try:
            lock = _locked(folder, os.O_CREAT | os.O_EXCL)
        except BaseException:
            _finish(folder)
            raise
        if lock is not None or sys.platform == "win32":
            return folder, lock
        _own.discard(folder)  # before it was locked, another run took it for a leftover


def _finish(folder: Path) -> None:
    """Settle and remove a folder of this process; one where that is interrupted stays known."""
    try:
        settle(folder)
        _remove(folder)
    except SourceError:
        _own.discard(folder)
        raise
    except OSError as error:
        text = f"{folder} is left and cannot be removed: {error.strerror}. Remove it."
        warnings.warn(text, FxgrowWarning, stacklevel=2)
    _own.discard(folder)


def _locked(folder: Path, flags: int, *, needed: bool = False) -> int | None:
    """Open and lock the lock of a folder; return None if another run has it or has removed it.

    Args:
        folder: the folder.
        flags: more flags for opening the file.
        needed: return None as well where the file system has no locks.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        mine = False
    except OSError:
        mine = not needed
    else:
        mine = True
    if mine and _is_open_at(lock, folder / _LOCK):
        return lock
    os.close(lock)
    return None


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _tidy_one(folder: Path) -> None:
    """Settle and remove one folder if it is left over."""
    try:
        found = _entries(folder)
        if found is None:
            return
        if not found:
            os.rmdir(folder)  # its run was killed before it could lock it
            return
        lock = _locked(folder, 0, needed=True)
    except OSError:
        return  # it takes room and does no other harm; the next run tries again
    if lock is None:
        return
    try:
        settle(folder)
        _remove(folder)
    except SourceError as error:
        warnings.warn(str(error), FxgrowWarning, stacklevel=2)
    except OSError:
        return  # as above; the journal goes first, so that nothing is moved twice
    finally:
        os.close(lock)


def _entries(folder: Path) -> set[str] | None:
    """Return the names in a folder if it is one that fxgrow made for this user, else None."""
    if sys.platform == "win32":
        return None
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return None
    names = set(os.listdir(folder))
    for name in names:
        if _KINDS.get(name) != stat.S_IFMT(os.lstat(folder / name).st_mode):
            return None
    return names if _LOCK in names or not names else None


def _remove(folder: Path) -> None:
    """Remove a folder: its journal first, its lock last, so that what is left is still known."""
    for path in (folder / JOURNAL, folder / NEW, folder / OLD, folder / _LOCK):
        if path.is_dir() and not path.is_symlink():
            _open_up(path)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()


def _open_up(path: Path) -> None:
    """Let directories be emptied that were copied from a source that is read-only."""
    for folder, names, _ in os.walk(path):
        for name in names:
            inner = os.path.join(folder, name)
            if not os.path.islink(inner):
                with contextlib.suppress(OSError):  # whether it matters, removing it will tell
                    os.chmod(inner, 0o700)
