"""Settings that may differ from layer to layer: one for all, or a mapping of globs to settings.

A glob is over fully qualified names, as :mod:`fnmatch` has it; the first that matches counts, and
what none matches keeps the default. A rescaling, a gain and an init are those of a layer
(``layer1.0.conv1``), and a pairing is that of a channel group, which goes by its own name and by
those of its writers.

This module needs no torch, so the command line can use it without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from fxgrow.errors import UsageError

T = TypeVar("T")


def setting_for(setting: T | Mapping[str, T], names: Sequence[str], default: T) -> T:
    """Return the setting of one layer or group.

    Args:
        setting: one for all, or by glob.
        names: what the layer or the group goes by.
        default: what it is where no glob matches.

    Example:
        >>> by_layer = {"layer4.*": "default_vt", "*": "none"}
        >>> setting_for(by_layer, ["layer4.0.conv1"], "none"), setting_for("none", ["fc"], "")
        ('default_vt', 'none')
    """
    if not isinstance(setting, Mapping):
        return setting
    for glob, value in setting.items():
        if any(fnmatchcase(name, glob) for name in names):
            return value
    return default


def globs_in(setting: object) -> tuple[str, ...]:
    """Return the globs of a setting, in order; none of one that is for all."""
    return tuple(setting) if isinstance(setting, Mapping) else ()


def values_in(setting: T | Mapping[str, T]) -> tuple[T, ...]:
    """Return all that a setting may be, where a glob matches."""
    return tuple(setting.values()) if isinstance(setting, Mapping) else (setting,)


def checked(
    kind: str, setting: object, read: Callable[[object], T], *, over: str, form: str
) -> T | dict[str, T]:
    """Return a setting as a plan records it.

    Args:
        kind: what it is called.
        setting: one for all, or a mapping of globs to such.
        read: returns a single one as it is recorded, or raises.
        over: what the globs are over.
        form: what a single one may be, for the error message.

    Raises:
        UsageError: it is neither, or ``read`` refuses one.

    Example:
        >>> checked("gain", {"fc": 2}, float, over="layers", form="a number")
        {'fc': 2.0}
    """
    if not isinstance(setting, Mapping):
        return read(setting)
    if setting and all(isinstance(glob, str) and glob for glob in setting):
        return {str(glob): read(value) for glob, value in setting.items()}
    raise UsageError(
        f"the {kind} {dict(setting)!r} cannot be read.",
        way_out=f"Give {form}, or a mapping of globs over {over} to such.",
    )


def completed(setting: T | Mapping[str, T], default: T) -> T | dict[str, T]:
    """Return a setting that says by itself what it is where no glob of it matches.

    Example:
        >>> completed({"fc": "none"}, "default_vt"), completed("none", "default_vt")
        ({'fc': 'none', '*': 'default_vt'}, 'none')
    """
    if not isinstance(setting, Mapping):
        return setting
    return {**setting} if "*" in setting else {**setting, "*": default}


def by_layer_text(setting: object) -> str:
    """Return a setting as one line.

    Example:
        >>> by_layer_text("none"), by_layer_text({"layer1.*": "2x", "*": 1.0})
        ('none', 'layer1.*=2x, *=1')
    """
    if isinstance(setting, Mapping):
        return ", ".join(f"{glob}={by_layer_text(value)}" for glob, value in setting.items())
    return f"{setting:.4g}" if isinstance(setting, float) else str(setting)
