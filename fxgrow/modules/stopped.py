"""Where a user's code stopped, in words that are not torch's."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch

from fxgrow.modules.standin import first_line

_INSIDE = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, Path(__file__).parent))
_LONGEST = 80


def stopped_at(error: BaseException) -> str:
    """Return why code does not run: what it says itself, or its line that torch stopped in.

    What torch says of two tensors that do not fit tells of sizes that nobody wrote.

    Args:
        error: what it raised.

    Returns:
        The reason, without a full stop.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_INSIDE)]
    if not own or own[-1] is frames[-1] or not own[-1].line:
        return first_line(error)
    line = " ".join(own[-1].line.split())
    shown = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
    return f"tensors do not fit one another in {own[-1].name}: {shown}"
