"""What must not happen, whatever a file or a plan says: code that runs, classes that change."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir

from fxgrow.errors import FxgrowError

FLAG = Path(gettempdir()) / f"fxgrow_hostile_{os.getpid()}"  # made by any code below that runs
CODE = f"__import__('os')\\x2esystem('touch {FLAG}')"  # without a dot, which would part a name
TEXTS = [
    f'relu" if exec("{CODE}") else "relu',
    f"relu' if exec('{CODE}') else 'relu",
    f'a"); exec("{CODE}"); ("',
    f'a\nexec("{CODE}")\n',
    CODE,
    *("", ".", "a..b", ".a", "a.", "__class__", "__class__.forward", "__dict__", "__init__"),
    *("forward", "back\\slash", 'a"b', "null\0", "\x1b[2J", "\u2028", "os:system"),
    "\ud800",
    "n" * 70_000,
]
_HOMES = ("torch.nn", "torchvision.models", "torchvision.ops", "fxgrow", "honest", "test_hostile")

Classes = dict[type, dict[str, object]]


def classes() -> Classes:
    """Return all that the classes of torch, torchvision, fxgrow and the tests hold."""
    homes = [m for name, m in list(sys.modules.items()) if m and name.startswith(_HOMES)]
    found = {value for home in homes for value in vars(home).values() if isinstance(value, type)}
    return {cls: dict(vars(cls)) for cls in found if str(cls.__module__).startswith(_HOMES)}


def assert_unchanged(before: Classes) -> None:
    """Assert that no class has changed, and that no code ran."""
    for cls, held in classes().items():
        known = before.get(cls, held)
        assert held.keys() == known.keys(), cls
        assert all(held[name] is known[name] for name in held), cls
    assert not FLAG.exists()


def refusal(act: Callable[[], object]) -> str:
    """Return the one line in which something is refused; "" if it is not."""
    reason = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act()
    except FxgrowError as error:
        reason = str(error)
    assert reason.isprintable(), reason
    return reason
