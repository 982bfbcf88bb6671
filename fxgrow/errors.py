"""The errors fxgrow raises, from bad input to a result that failed its check.

Every error is a :class:`FxgrowError`. Its text is one sentence or two: what is wrong, where (the
file, the layer, the node), why, and the way out. The same facts are fields, so that a caller can
act on them without parsing the text. ``exit_code`` is what the command line ends with. A text that
is given with options of the command line names arguments in Python: see :mod:`fxgrow.wording`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from fxgrow.wording import worded

_PACKAGE = str(Path(__file__).parent)


def shown(text: str, most: int = 300) -> str:
    r"""Return text that anybody may have written, such as a name, as a part of one line.

    Whatever does not print (line breaks, control characters, marks that turn the direction of
    writing) is escaped, and a longer text is cut to ``most`` characters.

    Example:
        >>> print(shown("fc.weight"), shown("fc" + chr(10) + "weight"), shown("fc.weight", 2))
        fc.weight fc\nweight fc…
    """
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text[: most + 1])
    return line if len(line) <= most else f"{line[:most]}…"


def listed(names: Sequence[str], most: int = 1) -> str:
    """Return the first of some names, and how many more there are, as a part of a sentence.

    Example:
        >>> listed(["a"]), listed(["a", "b", "c"]), listed(["a", "b", "c"], 2)
        ('a', 'a and 2 more', 'a, b and 1 more')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_line(text: str, most: int = 300) -> str:
    """Return sentences that anybody may have written as one line, as :func:`shown` does."""
    return shown(" ".join(text[: 10 * most].split()), most)


class FxgrowError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        message: what is wrong and where, in one or two sentences.
        name: fully qualified name of the layer, tensor, node or file concerned ("" if none).
        way_out: what the user can do about it ("" if nothing is known).
        exit_code: the command line's exit status for this error.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, name: str = "", way_out: str = "") -> None:
        self.message = worded(message)
        self.name = name
        self.way_out = worded(way_out)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} {self.way_out}".rstrip()

    @property
    def reason(self) -> str:
        """The message without its full stop, to be told within another sentence."""
        return self.message.rstrip(".")


class SourceError(FxgrowError):
    """A file or an architecture that cannot be read, recognised or written."""


class TraceError(FxgrowError):
    """A model whose computation could not be followed."""


class UnknownInputsError(TraceError):
    """Inputs that were not given and could not be inferred."""


class TooLargeError(TraceError):
    """A run that would need more memory than any comparison should."""


class UnsupportedOperationError(FxgrowError):
    """An operation that cannot be reasoned about where the request needs it to be."""


class PlanError(FxgrowError):
    """A request that cannot be planned, or a plan that does not fit its source."""


class UnpredictedError(PlanError):
    """A change of the output that cannot be predicted, so that nothing could judge the result."""


class UsageError(PlanError):
    """A request that none could mean: of a form, or by a name, that there is not."""

    exit_code: ClassVar[int] = 2


class NotPreservedError(FxgrowError):
    """``strict`` was asked for and the plan predicts a change of the output."""

    exit_code: ClassVar[int] = 4


class VerificationError(FxgrowError):
    """The widened network does not compute what the plan predicts."""

    exit_code: ClassVar[int] = 3


class FxgrowWarning(UserWarning):
    """Something was done that the user may not expect; the text says what."""

    def __init__(self, text: str = "") -> None:
        super().__init__(worded(text))


def warn(text: str) -> None:
    """Warn at the line that called fxgrow, however deep in it this is."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, FxgrowWarning, stacklevel=level)
