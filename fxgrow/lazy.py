"""The names of a package that are imported when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping


def imported_late(
    package: str, homes: Mapping[str, str], rooms: Collection[str] = ()
) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a package (PEP 562).

    Args:
        package: its name.
        homes: by each name that it offers, the module that this is imported from.
        rooms: packages in it that are imported likewise.

    Example:
        >>> import fxgrow
        >>> find = imported_late("fxgrow", {"Registry": "fxgrow.registry"})
        >>> find("Registry") is fxgrow.registry.Registry
        True
        >>> find("registrar")
        Traceback (most recent call last):
        AttributeError: module 'fxgrow' has no attribute 'registrar'
    """

    def find(name: str) -> object:
        if name in rooms:
            return importlib.import_module(f"{package}.{name}")
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(home), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
