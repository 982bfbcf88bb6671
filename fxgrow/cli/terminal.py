"""What goes to stderr: warnings, errors in one line, and the step that is being taken."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

import typer

from fxgrow.errors import FxgrowError, FxgrowWarning, one_line

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_LONGEST = 2000  # characters of a message
PATIENCE = 1.0  # seconds before a step is worth showing


def print_error(text: str) -> None:
    """Print an error as one line."""
    typer.echo(f"error: {one_line(text, _LONGEST)}", err=True)


def print_warning(text: str) -> None:
    """Print a warning as one line."""
    typer.echo(f"warning: {one_line(text, _LONGEST)}", err=True)


def discard_output() -> None:
    """Let what is still to be printed go nowhere: Python would complain about it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_table(renderable: RenderableType) -> None:
    """Print tables to stdout: in colour on a terminal, else as plain text."""
    from rich.console import Console

    from fxgrow.api.report.tables import as_text, terminal_width

    if sys.stdout.isatty():
        Console(width=terminal_width()).print(renderable)
    else:
        typer.echo(as_text(renderable, terminal_width()))


class Notices:
    """Warnings, each printed once as one line."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def warn(self, text: str) -> None:
        """Print a warning unless it was printed before."""
        line = one_line(text, _LONGEST)
        if line not in self._seen:
            self._seen.add(line)
            print_warning(text)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Print fxgrow's Python warnings in this way; leave others to Python."""
        with warnings.catch_warnings():
            others = warnings.showwarning

            def show(
                message: Warning | str,
                category: type[Warning],
                filename: str,
                lineno: int,
                file: TextIO | None = None,
                line: str | None = None,
            ) -> None:
                if issubclass(category, FxgrowWarning):
                    self.warn(str(message))
                else:
                    others(message, category, filename, lineno, file, line)

            warnings.simplefilter("always", FxgrowWarning)
            warnings.showwarning = show
            yield


class Steps:
    """Shows the step that is being taken, once it takes longer than a second, on a terminal.

    The display runs from the start and is empty until then, which needs no timer.
    """

    def __init__(self) -> None:
        self._step = ""
        self._since = time.monotonic()
        self._live: Live | None = _live_display(self._render) if sys.stderr.isatty() else None

    def __call__(self, step: str) -> None:
        """Say which step begins."""
        self._step = step
        self._since = time.monotonic()

    def __enter__(self) -> Steps:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _render(self) -> RenderableType:
        from rich.text import Text

        elapsed = time.monotonic() - self._since
        text = f"{self._step} … {elapsed:.0f} s" if self._step and elapsed >= PATIENCE else ""
        return Text(text, style="dim")


def _live_display(render: Callable[[], RenderableType]) -> Live:
    """Return a display on stderr that clears itself when it ends."""
    from rich.console import Console
    from rich.live import Live

    return Live(
        console=Console(stderr=True),
        get_renderable=render,
        refresh_per_second=8,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


@contextlib.contextmanager
def errors_in_one_line(*, debug: bool) -> Iterator[None]:
    """End with the exit code of an error, and say it in one line.

    Args:
        debug: let every error through, with its traceback.

    Raises:
        Exit: the work ended early; the code says why.
    """
    try:
        yield
    except FxgrowError as error:
        if debug:
            traceback.print_exc()
        print_error(str(error))
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    except BrokenPipeError as error:
        discard_output()
        raise typer.Exit(1) from error
    except OSError as error:
        if debug:
            raise
        discard_output()
        print_error(f"{error.filename or 'the output'} cannot be used: {error.strerror or error}.")
        raise typer.Exit(1) from error
    except Exception as error:
        if debug or isinstance(error, (typer.Exit, typer.Abort)) or _is_usage(error):
            raise
        print_error(f"{_described(error)} Run `fxgrow --debug …` for the traceback.")
        raise typer.Exit(1) from error


def _is_usage(error: Exception) -> bool:
    """Return whether the error is typer's own, which it shows itself."""
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _described(error: Exception) -> str:
    """Return an unexpected error with the place it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"
    text = one_line(str(error), _LONGEST).rstrip(".")
    return f"unexpected {type(error).__name__}{f': {text}' if text else ''}{place}."
