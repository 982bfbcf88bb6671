"""Write a file or a directory whole or not at all, and never over the source."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias

from fxgrow.errors import FxgrowError, SourceError, one_line
from fxgrow.files.checkpoint.directory import WEIGHTS
from fxgrow.files.checkpoint.formats import FORMATS, Contents
from fxgrow.files.checkpoint.leftovers import temporary_folder, tidy
from fxgrow.files.checkpoint.moving import NEW, move_all, sync_tree
from fxgrow.files.checkpoint.safetensors_files import INDEX_SUFFIX, superseded

Check: TypeAlias = Callable[[Path], object]

_ANOTHER = "Name another file with -o."


def check_output(
    out: Path, source: Path | None = None, *, force: bool = False, option: str = "-o"
) -> None:
    """Check that ``out`` may be written, without touching anything.

    Args:
        out: the file or directory to be written.
        source: the file the data came from, which is never written to.
        force: allow ``out`` to exist, as a regular file or as a directory with a model's weights.
        option: that of the command line by which another is named.

    Raises:
        SourceError: ``out`` is or holds the source, exists without ``force``, is of a kind that is
            never replaced, has a name that cannot be, or lies in a directory that is missing or
            cannot be written to.
    """
    found = _found(out)
    if source is not None:
        _check_source(out, source)
    if found is None:
        return
    if stat.S_ISLNK(found.st_mode):
        _refuse_output(out, "is a link", "Name what it leads to, or another file with -o.")
    if stat.S_ISDIR(found.st_mode):
        _check_directory(out)
    elif not stat.S_ISREG(found.st_mode):
        _refuse_output(out, "is a device, a pipe or a socket", _ANOTHER)
    if not force:
        _refuse_output(
            out,
            "exists",
            f"Pass --force to overwrite it, or name another ({option}).",
        )


def write_file(
    contents: Contents,
    out: Path,
    file_format: str,
    *,
    source: Path | None,
    force: bool = False,
    check: Check | None = None,
) -> None:
    """Write a file or directory whole or not at all: it takes its name when it is complete.

    Args:
        contents: what to write.
        out: the file's name.
        file_format: name of a registered format.
        source: the file the data came from, which is never written to.
        force: overwrite an existing file.
        check: looks at what was written before it takes its name, and raises if it is wrong.

    Raises:
        SourceError: see :func:`check_output`; or writing failed, and nothing is left behind.
    """
    check_output(out, source, force=force)

    def write(temporary: Path) -> None:
        FORMATS[file_format].write(contents, temporary)
        if check is not None:
            check(temporary)

    write_whole(out, write, source=source, force=force)


def write_whole(
    out: Path, write: Callable[[Path], object], *, source: Path | None = None, force: bool = True
) -> None:
    """Let ``write`` fill an empty directory; what is in it then takes its place, all or nothing.

    A run that is killed leaves a temporary folder beside ``out``, and perhaps some of several files
    moved. The next one that writes there undoes that.

    Args:
        out: the file or directory to write. Files of other names that ``write`` leaves (shards)
            come to lie beside it, before it does; those of an index that it replaces are removed.
        write: gets the path to write to, whose name is that of ``out``.
        source: the file the data came from, which is never written to.
        force: overwrite what is there.

    Raises:
        SourceError: see :func:`check_output`; or writing failed, and nothing is left behind.
    """
    handled = sys.exc_info()[1]  # by the caller: it may write because something went wrong
    try:
        tidy(out.parent)
        with temporary_folder(out) as folder:
            write(folder / NEW / out.name)
            sync_tree(folder / NEW)
            names = sorted(os.listdir(folder / NEW), key=lambda name: (name == out.name, name))
            for name in names:  # writing takes a while; others may have come
                check_output(out.with_name(name), source, force=force)
            gone = superseded(out, names) if force and out.name.endswith(INDEX_SUFFIX) else ()
            kept = "" if source is None else source.name  # it may be a shard itself
            move_all(folder, names, force=force, superseded=sorted({*gone} - {kept}))
    except FxgrowError:
        raise
    except Exception as error:
        cause = _cause(error, handled)
        if not isinstance(cause, Exception):
            raise cause from None
        _refuse_failed(out, cause)


def _cause(error: Exception, handled: BaseException | None) -> BaseException:
    """Return the system's error or the signal that torch has wrapped in an error of its own."""
    found: BaseException | None = error
    while found is not None and found is not handled:
        if isinstance(found, OSError) or not isinstance(found, Exception):
            return found
        found = found.__cause__ or found.__context__
    return error


def _refuse_failed(out: Path, error: Exception) -> NoReturn:
    """Say why writing failed."""
    reason = one_line(str(error)) or type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    if told := re.search(r"\((?:os error |Os \{ code: )(\d+)", reason):  # as Rust tells
        number = int(told[1])
    if number is not None:
        reason = os.strerror(number)
    full = number in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    way_out = "Make room there, or name a file elsewhere with -o." if full else _ANOTHER
    if number is None:  # no other file could hold it either
        way_out = "Write its weights alone: its state_dict, and the plan."
    raise SourceError(
        f"{out} cannot be written: {reason.rstrip('.')}.", name=str(out), way_out=way_out
    ) from error


def _found(out: Path) -> os.stat_result | None:
    """Return what has the name, or None; refuse one that nothing can have.

    Raises:
        SourceError: there can be no such file, or not there.
    """
    # The directory first: the other questions cannot be asked in one that may not be entered.
    parent = out.parent
    try:
        mode = os.stat(parent).st_mode
    except (FileNotFoundError, NotADirectoryError):
        _refuse_output(out, f"cannot be written: there is no directory {parent}", "Make it.")
    except (OSError, ValueError) as error:
        _refuse_name(out, error)
    if not stat.S_ISDIR(mode):
        what = f"there is no directory {parent}, but a file of that name"
        _refuse_output(out, f"cannot be written: {what}", _ANOTHER)
    if not os.access(parent, os.W_OK | os.X_OK):
        _refuse_output(out, f"cannot be written: {parent} is not writable", _ANOTHER)
    if out.name in ("", ".."):
        _refuse_output(out, "is a directory", "Name a file in it with -o.")
    try:
        return os.lstat(out)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _refuse_name(out, error)


def _refuse_name(out: Path, error: OSError | ValueError) -> NoReturn:
    """Refuse a name that the system does not take.

    Raises:
        SourceError: always.
    """
    reason = getattr(error, "strerror", None) or str(error)
    if "\0" in str(out):
        reason = "its name has a null byte"
    elif getattr(error, "errno", 0) == errno.ENAMETOOLONG:
        reason = "its name is longer than the file system allows"
    _refuse_output(out, f"cannot be written: {reason}", _ANOTHER)


def _check_source(out: Path, source: Path) -> None:
    """Refuse an output that is the source, lies in it or holds it.

    Raises:
        SourceError: it does.
    """
    here, there = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    for holds, how in (
        (here == there or _is_same_file(out, source), "is"),
        (there in here.parents and there.is_dir(), "lies in"),
        (here in there.parents and _holds_weights(out), "holds"),
    ):
        if holds:
            _refuse_output(out, f"{how} the source, which is never written to", _ANOTHER)


def _check_directory(out: Path) -> None:
    """Refuse to replace a directory that holds more than a model.

    Raises:
        SourceError: it has no weights, or is the checkout of a repository.
    """
    if not _holds_weights(out):
        _refuse_output(out, "is a directory", "Name a file in it with -o.")
    if os.path.lexists(out / ".git"):
        _refuse_output(out, "is the checkout of a repository, which is never replaced", _ANOTHER)


def _holds_weights(path: Path) -> bool:
    """Return whether there are weights in a directory under a name that is known for them."""
    names = (os.path.join(path, name) for name in WEIGHTS)
    return any(os.path.isfile(name) and not os.path.islink(name) for name in names)


def _refuse_output(out: Path, what: str, way_out: str) -> NoReturn:
    """Refuse a file that may not be written.

    Raises:
        SourceError: always.
    """
    name = str(out).replace("\0", "\\0")
    raise SourceError(f"{name} {what}.", name=name, way_out=way_out)


def _is_same_file(one: Path, other: Path) -> bool:
    """Return whether two names are those of one file."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
