"""Write a file whole or not at all, and never over the source."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fxgrow.checkpoint.formats import FORMATS, Contents
from fxgrow.errors import SourceError


def check_output(out: Path, source: Path | None = None, *, force: bool = False) -> None:
    """Check that ``out`` may be written, without touching anything.

    Args:
        out: the file to be written.
        source: the file the data came from, which is never written to.
        force: allow ``out`` to exist.

    Raises:
        SourceError: ``out`` is the source, a directory, exists without ``force``, or lies in a
            directory that is missing or cannot be written to.
    """
    # The directory first: the other questions cannot be asked in one that may not be entered.
    if not os.path.isdir(out.parent):
        _refuse_output(out, f"cannot be written: there is no directory {out.parent}", "Make it.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        _refuse_output(
            out, f"cannot be written: {out.parent} is not writable", "Name another file with -o."
        )
    if source is not None and _is_same_file(out, source):
        _refuse_output(out, "is the source, which is never written to", "Name another with -o.")
    if out.is_dir():
        _refuse_output(out, "is a directory", "Name a file in it with -o.")
    if os.path.lexists(out) and not force:
        _refuse_output(out, "exists", "Pass --force to overwrite it, or another name with -o.")


def write_file(
    contents: Contents, out: Path, file_format: str, *, source: Path | None, force: bool = False
) -> None:
    """Write a file whole or not at all: a temporary one beside it takes its name when complete.

    Args:
        contents: what to write.
        out: the file's name.
        file_format: name of a registered format.
        source: the file the data came from, which is never written to.
        force: overwrite an existing file.

    Raises:
        SourceError: see :func:`check_output`; or writing failed, and nothing is left behind.
    """
    check_output(out, source, force=force)

    def write(temporary: Path) -> None:
        FORMATS[file_format].write(contents, temporary)
        check_output(out, source, force=force)  # writing takes a while; others may have come

    write_whole(out, write)


def write_whole(out: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``out``, which takes its name when complete.

    Raises:
        SourceError: writing failed, and nothing is left behind.
    """
    temporary = out.parent / f".{out.name[:100]}.{secrets.token_hex(4)}.tmp"
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except SourceError:
        raise
    except Exception as error:  # torch and safetensors wrap the system's errors in their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(
            f"{out} cannot be written: {reason}.",
            name=str(out),
            way_out="Name another file with -o.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_output(out: Path, what: str, way_out: str) -> NoReturn:
    raise SourceError(f"{out} {what}.", name=str(out), way_out=way_out)


def _is_same_file(one: Path, other: Path) -> bool:
    if one.resolve() == other.resolve():
        return True
    return one.exists() and other.exists() and os.path.samefile(one, other)
