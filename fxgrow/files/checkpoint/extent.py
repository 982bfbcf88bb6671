"""How far nested objects reach: whether whoever walks through them comes to an end, and soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fxgrow.files.checkpoint.pickles import MOST_STEPS, SCALARS, PickleError

MOST_LEVELS = 200  # of containers and objects in one another; torchvision's modules have 30


def check_shape(
    root: object,
    children: Callable[[Any], Iterator[object]],
    weight: Callable[[object], int] = lambda item: 1,
) -> None:
    """Return if nested objects come to an end for whoever walks through them.

    They have no cycles, no more than ``MOST_LEVELS`` levels, and no more than ``MOST_STEPS`` parts
    if one that is held twice counts twice, as for a walk that does not remember where it was.

    Args:
        root: the outermost object.
        children: yields what an object holds; nothing for what holds nothing.
        weight: for how many parts an object counts.

    Raises:
        PickleError: they do not.

    Complexity: linear in the number of objects and of references.
    """
    known: dict[int, _Visit] = {}  # to the end
    path = [_Visit(root, children(root), weight(root))]
    on_path = {id(root)}
    while path:
        visit = path[-1]
        for child in visit.rest:
            if type(child) in SCALARS:
                continue
            if id(child) in on_path:
                raise PickleError("it holds itself")
            if id(child) not in known:
                path.append(_Visit(child, children(child), weight(child)))
                on_path.add(id(child))
                break
            visit.add(known[id(child)])
        else:
            path.pop()
            on_path.discard(id(visit.item))
            known[id(visit.item)] = visit
            if path:
                path[-1].add(visit)
        if len(path) > MOST_LEVELS or visit.height > MOST_LEVELS:
            raise PickleError(f"it is nested more than {MOST_LEVELS} levels deep")
        if visit.parts > MOST_STEPS:
            raise PickleError(
                f"it has more than {MOST_STEPS:,} parts, as one is held again and again"
            )


@dataclass
class _Visit:
    """An object whose children are being looked at.

    Attributes:
        item: the object.
        rest: its children that were not looked at.
        parts: for how many it and what is in it count, as far as is known.
        height: the number of levels below it, likewise.
    """

    item: object
    rest: Iterator[object]
    parts: int
    height: int = 0

    def add(self, child: _Visit) -> None:
        """Count a child that is known."""
        self.height = max(self.height, 1 + child.height)
        self.parts += child.parts
