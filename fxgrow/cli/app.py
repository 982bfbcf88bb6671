"""The command line: all its commands."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from fxgrow.cli import convert, deepen, grow, kernels, look
from fxgrow.cli.base import app
from fxgrow.cli.terminal import print_error
from fxgrow.errors import FxgrowError

COMMANDS = (grow, deepen, kernels, convert, look)  # importing them adds their commands
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last


def main() -> None:
    """Run the command line.

    A signal that asks it to end does so as an exception, so that nothing is left behind; the exit
    code is 128 and its number.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we came
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 to the end
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack α
    codes: list[int] = []  # of the signals that came

    def stop(number: int, frame: FrameType | None) -> None:
        codes.append(128 + number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for each in _signals():
        signal.signal(each, stop)
    try:
        app(prog_name="fxgrow")
    except (SystemExit, KeyboardInterrupt) as error:
        done = isinstance(error, SystemExit) and not error.code
        if codes and not done:  # libraries turn what is raised amid their work into other errors
            print_error(f"stopped by {signal.Signals(codes[0] - 128).name}.")
            raise SystemExit(codes[0]) from error
        raise
    finally:
        for each in _signals():
            signal.signal(each, signal.SIG_IGN)
        _end()


def _signals() -> list[signal.Signals]:
    """Return the signals that ask a run to end, unless it was started to ignore them."""
    known = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    return [each for each in known if signal.getsignal(each) is not signal.SIG_IGN]


def _end() -> None:
    """Remove what is left if removing it was interrupted."""
    leftovers = sys.modules.get("fxgrow.files.checkpoint.leftovers")
    if leftovers is None:
        return  # nothing was ever written, and loading torch takes a second
    try:
        leftovers.end()
    except FxgrowError as error:
        print_error(str(error))
