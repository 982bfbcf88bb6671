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
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from fxgrow.errors import UsageError, shown

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LOCK = threading.RLock()


def exclusive(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function that waits until no other thread is in one, and runs in plain modes.

    What it is given for its parameters of type ``nn.Module`` is one, or refused with the way out.
    """
    known = inspect.signature(function).parameters.values()
    places = [(i, p.name) for i, p in enumerate(known) if p.annotation in ("nn.Module", nn.Module)]

    @functools.wraps(function)
    def wait(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for place, name in places:
            if place < len(args) or name in kwargs:
                check_network(args[place] if place < len(args) else kwargs[name], name)
        with _LOCK, _plainly():
            return function(*args, **kwargs)

    return wait


def check_network(given: object, name: str = "model") -> None:
    """Return if what is given for a network is one.

    Args:
        given: whatever it is.
        name: of the parameter that it is given for.

    Raises:
        UsageError: it is something else: a file's name, a state_dict, a class.

    Example:
        >>> check_network("net.pt")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        fxgrow.errors.UsageError: model is a str, no torch.nn.Module. Read the file first: ...
    """
    if isinstance(given, nn.Module):
        return
    what, way_out = f"a {type(given).__name__}", "Give the network itself."
    if isinstance(given, (str, os.PathLike)):
        way_out = f"Read the file first: fxgrow.load({shown(os.fspath(given))!r})."
    elif isinstance(given, Mapping):
        way_out = (
            "Put a state_dict into its network (load_state_dict), or have fxgrow.load(PATH) read "
            "the file that it is from."
        )
    elif isinstance(given, type):
        what, way_out = f"the class {given.__name__}", "Give an instance of it."
    elif isinstance(getattr(given, "model", None), nn.Module):
        way_out = "Give its network: its attribute model."
    raise UsageError(f"{name} is {what}, no torch.nn.Module.", name=name, way_out=way_out)


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
