"""Public functions by themselves: no other thread in one, and none of the caller's modes in force.

``torch.fx`` patches ``nn.Module`` while it traces, warnings are filtered and the random state is
set for all threads at once, so functions that do such things wait for one another. Under
``torch.inference_mode`` nothing could be labelled, and under a default device of meta no input
would have values; the caller has them back afterwards. So is torch's fast way through
``nn.TransformerEncoder``, which computes the same by nested tensors, and by operations that take no
float64. What is compiled runs as it is written: compiled code shows none of its operations.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LOCK = threading.RLock()


def exclusive(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function that waits until no other thread is in one, and runs in plain modes."""

    @functools.wraps(function)
    def wait(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _LOCK, _plainly():
            return function(*args, **kwargs)

    return wait


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Leave inference mode, a default device without values and fast paths, for a while."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as modes:
        torch.backends.mha.set_fastpath_enabled(False)
        modes.callback(torch.backends.mha.set_fastpath_enabled, fast)
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(mode=False))
        if torch.get_default_device().type == "meta":
            modes.enter_context(torch.device("cpu"))
        if "torch._dynamo" in sys.modules:  # which nothing is compiled without
            modes.enter_context(torch.compiler.set_stance("force_eager"))
            modes.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Using `torch.compile.* when there are global hooks")
        yield
