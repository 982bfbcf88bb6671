"""Named things that extensions may add to: rules, rescalings, pairings, inits, file formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from fxgrow.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from name to object in which a missing and a duplicate name both raise.

    Args:
        kind: what is registered, as the error messages call it (``"pairing"``).

    Example:
        >>> colours = Registry[int]("colour")
        >>> _ = colours.register("red")(0xFF0000)
        >>> colours["red"] == 0xFF0000, list(colours)
        (True, ['red'])
        >>> colours["blue"]
        Traceback (most recent call last):
        fxgrow.errors.UsageError: there is no colour 'blue'. Known: red.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under each of ``names``.

        Raises:
            ValueError: a name is taken.
        """

        def decorate(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"the {self.kind} {name!r} is registered already")
                self._entries[name] = entry
            return entry

        return decorate

    def __getitem__(self, name: str) -> T:
        known = f"Known: {', '.join(self._entries)}."
        if not isinstance(name, str):  # a mapping, where one for all is asked for
            raise UsageError(
                f"{name!r} is no name of {_with_article(self.kind)}.", way_out=f"Give one. {known}"
            )
        try:
            return self._entries[name]
        except KeyError:
            raise UsageError(
                f"there is no {self.kind} {name!r}.", name=name, way_out=known
            ) from None

    @property
    def entries(self) -> Mapping[str, T]:
        """A view of all that is registered, which cannot be written to."""
        return MappingProxyType(self._entries)

    def get(self, name: str) -> T | None:
        """Return the entry called ``name``, or None."""
        return self._entries.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
