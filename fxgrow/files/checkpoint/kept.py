"""Objects of a pickle that are passed on without being made: what they are called, and their parts.

Training checkpoints hold settings and states of other libraries: paths, dates, configurations. None
of it is needed to grow weights, so its classes are neither imported nor called. A :class:`Kept`
remembers how a pickle makes an object, and :func:`save_keeping` writes the same again. Only names
that :mod:`fxgrow.files.checkpoint.kept_names` lists are kept, and only what
:mod:`fxgrow.files.checkpoint.kept_checks` lets pass: what a file asks for beyond that is not handed
on under fxgrow's name.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fxgrow.files.checkpoint.kept_names import ARGUMENTS, CALLED, MADE, VALUES

_NOTHING = object()
_LISTED = CALLED | MADE | VALUES | ARGUMENTS


class KeptError(pickle.PicklingError):
    """An object that only :func:`save_keeping` writes."""


def _refuse(self: object, protocol: object = None) -> NoReturn:
    del self, protocol
    raise KeptError("written by save_keeping alone")


@dataclass(frozen=True)
class Name:
    """What a pickle names, and is not looked up.

    Attributes:
        module: where it would be found.
        name: what it is called there.
    """

    module: str
    name: str

    __reduce_ex__ = _refuse

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def is_called(self) -> bool:
        """Whether a pickle may make an object by calling it."""
        return str(self) in CALLED

    @property
    def is_made(self) -> bool:
        """Whether a pickle may make empty instances of it."""
        return str(self) in MADE

    @property
    def is_value(self) -> bool:
        """Whether it may stand for itself."""
        return str(self) in VALUES

    def __deepcopy__(self, memo: object) -> Name:
        return self


@dataclass(eq=False)
class Kept:
    """An object that a pickle makes, by what the pickle does for it.

    Attributes:
        name: of its class, or of what is called.
        called: whether that is called, or an empty instance is made.
        arguments: what it is given.
        items: what is appended to it.
        entries: what is set in it, by keys.
        state: what its attributes are set from.
    """

    name: Name
    called: bool
    arguments: tuple[object, ...]
    items: list[object] = field(default_factory=list)
    entries: dict[object, object] = field(default_factory=dict)
    state: Any = _NOTHING

    __reduce_ex__ = _refuse

    def extend(self, items: list[object]) -> None:
        """Append to it."""
        self.items.extend(items)

    def __setitem__(self, key: object, value: object) -> None:
        self.entries[key] = value

    def __deepcopy__(self, memo: object) -> Kept:
        return self  # nobody changes it

    @property
    def has_state(self) -> bool:
        """Whether attributes are set."""
        return self.state is not _NOTHING


def kept_name(module: str, name: str) -> Name | None:
    """Return a name that is kept, or None if it is not on the list."""
    found = Name(module, name)
    return found if str(found) in _LISTED and "." not in name else None  # no attribute


_PythonPickler: Any = vars(pickle)["_Pickler"]  # the one in C cannot be extended in this way


class _Pickler(_PythonPickler):  # type: ignore[misc]
    """Writes what any pickler does, and kept objects as they were."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Write an object."""
        if type(obj) not in (Name, Kept):
            super().save(obj, save_persistent_id)
        elif id(obj) in self.memo:
            self.write(self.get(self.memo[id(obj)][0]))
        elif type(obj) is Name:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            self.memoize(obj)
        else:
            self._save_kept(obj)

    def _save_kept(self, kept: Kept) -> None:
        self.save(kept.name)
        self.save(kept.arguments)
        self.write(pickle.REDUCE if kept.called else pickle.NEWOBJ)
        self.memoize(kept)
        for parts, code in (
            (kept.items, pickle.APPENDS),
            ([part for pair in kept.entries.items() for part in pair], pickle.SETITEMS),
        ):
            if parts:
                self.write(pickle.MARK)
                for part in parts:
                    self.save(part)
                self.write(code)
        if kept.has_state:
            self.save(kept.state)
            self.write(pickle.BUILD)


def _dump(obj: object, file: Any, protocol: int | None = None) -> None:
    _Pickler(file, protocol).dump(obj)


def save_keeping(save: Callable[..., object]) -> None:
    """Call a function that pickles, with a module to pickle by that writes kept objects.

    Args:
        save: given ``pickle_module``, as ``torch.save`` is.
    """
    save(pickle_module=types.SimpleNamespace(__name__="pickle", Pickler=_Pickler, dump=_dump))
