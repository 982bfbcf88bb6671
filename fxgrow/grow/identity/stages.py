"""Stages: blocks of one structure, one after the other, and how they are numbered."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fxgrow.errors import PlanError
from fxgrow.plan.amounts import amount
from fxgrow.plan.edits import Child, Rearrangement

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FORMS = 'Give an increment ("+2"), a ratio ("2x") or a number of blocks in all ("6").'
_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>\d+)")


@dataclass(frozen=True)
class Stage:
    """Modules one after the other, and the one after which new ones are put.

    Attributes:
        key: what the user called it.
        container: fully qualified name of the module that holds them.
        names: of all modules in a list; of the blocks of a run, as they follow one another.
        after: place of the block after which new ones come.
        count: how many come.
    """

    key: str
    container: str
    names: tuple[str, ...]
    after: int
    count: int

    def child(self, place: int) -> str:
        """Return the fully qualified name of one of the modules."""
        return child_of(self.container, self.names[place])


def child_of(container: str, name: str) -> str:
    """Return the fully qualified name of a module in another.

    Example:
        >>> child_of("layer1", "0"), child_of("", "0")
        ('layer1.0', '0')
    """
    return f"{container}.{name}" if container else name


def new_blocks(blocks: str, old: int, name: str = "") -> int:
    """Return how many blocks a specification adds.

    Args:
        blocks: ``"+2"``, ``"2x"`` or ``"6"``.
        old: how many there are.
        name: the stage, for the error message.

    Raises:
        PlanError: the specification is malformed, or asks for no more than there are.

    Example:
        >>> new_blocks("+2", 3), new_blocks("2x", 3), new_blocks("5", 3)
        (2, 3, 2)
    """
    asked = amount(blocks, old, what="number of blocks", way_out=_FORMS)
    if asked <= old:
        raise PlanError(
            f"{blocks!r} asks for {asked} blocks where {name or 'the stage'} has {old} already; "
            "fxgrow only deepens.",
            name=name,
            way_out=_FORMS,
        )
    return asked - old


def structure(module: nn.Module) -> tuple[object, ...]:
    """Return what two modules have in common if one can be a copy of the other.

    Classes, names and shapes of tensors, and whatever else decides what is computed; numbers with
    a fraction (a probability of dropout, an eps) may differ, and so may what ``index_like`` names.
    """
    return tuple(
        (
            name,
            type(inner),
            tuple((n, tuple(t.shape)) for n, t in _own_tensors(inner)),
            tuple(
                (key, _told(value))
                for key, value in sorted(vars(inner).items())
                if not key.startswith("_") and key != "training" and not is_index(key)
            ),
        )
        for name, inner in module.named_modules()
    )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _told(value: object) -> object:
    """Return a value of an attribute as something that equals that of a copy."""
    if isinstance(value, (bool, int, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_told(item) for item in value)
    return getattr(value, "__qualname__", type(value))


def is_index(attribute: str) -> bool:
    """Return whether an attribute's name says that it is the place of a block among its like.

    Example:
        >>> is_index("layer_idx"), is_index("index"), is_index("padding_idx")
        (True, True, False)
    """
    return (
        re.fullmatch(r"_?((layer|block|depth)_?)?(idx|index|id|number|num)", attribute) is not None
    )


def pattern(blocks: Sequence[nn.Module]) -> int:
    """Return after how many blocks the structure of the last repeats.

    A stage of equal blocks has a period of one; blocks that take turns (windows that are shifted
    and not) have one of two. Where nothing repeats yet, blocks with the same tensors are taken to
    take turns, and others are not.

    Example:
        >>> from torch.nn import Linear, ReLU, Sequential
        >>> a, b = (lambda: Sequential(Linear(2, 2))), (lambda: Sequential(Linear(2, 2), ReLU()))
        >>> pattern([a(), b(), b()]), pattern([a(), b(), a(), b()]), pattern([a(), b()])
        (1, 2, 2)
    """
    keys = [structure(block) for block in blocks]
    last = len(keys) - 1
    for period in range(1, len(keys)):
        window = range(max(0, last - period + 1), last + 1)
        if all(place - period >= 0 and keys[place] == keys[place - period] for place in window):
            return period
    shapes = [[tuple(p.shape) for p in block.parameters()] for block in blocks[-2:]]
    return 2 if len(blocks) > 1 and shapes[0] == shapes[1] else 1


def inserted(stage: Stage, likes: Sequence[int]) -> list[Child]:
    """Return the modules of a list with new ones in it.

    Args:
        stage: where the new ones come.
        likes: for each new one, the place of the module it is a copy of.

    Raises:
        PlanError: the modules are not numbered, so that no name is plain for a new one.
    """
    sources = [(place, False) for place in range(len(stage.names))]
    sources[stage.after + 1 : stage.after + 1] = [(place, True) for place in likes]
    stem, number = _numbered(stage.names[stage.after], stage)
    found = []
    for source, new in sources:
        local = stage.names[source]
        if new:
            number += 1
            local = f"{stem}{number}"
        elif source > stage.after:
            match = _NUMBERED.fullmatch(local)
            if match is not None and match["stem"] == stem:
                local = f"{stem}{int(match['number']) + len(likes)}"
        found.append(Child(local, stage.names[source], new))
    if len({child.name for child in found}) != len(found):
        raise PlanError(f"the modules of {stage.container} are not numbered one after the other.")
    return found


def _numbered(name: str, stage: Stage) -> tuple[str, int]:
    """Return a name without its number, and the number.

    Raises:
        PlanError: it has none.
    """
    match = _NUMBERED.fullmatch(name)
    if match is None:
        raise PlanError(
            f"the modules of {stage.container or 'the network'} are not numbered: a block after "
            f"{name!r} has no plain name.",
            name=stage.key,
            way_out="Put the blocks into an nn.Sequential or nn.ModuleList without names.",
        )
    return match["stem"], int(match["number"])


def rearrangement(stage: Stage, likes: Sequence[int], children: Iterable[str]) -> Rearrangement:
    """Return the module that holds a stage with new modules in it; see :func:`inserted`.

    Args:
        stage: where the new ones come.
        likes: for each new one, the place of the module it is a copy of.
        children: the names of all modules that the container holds.

    Raises:
        PlanError: there is no plain name for a new module.
    """
    made = inserted(stage, likes)
    kept = {child.source: child for child in made if not child.new}
    found = []
    for name in children:
        found.append(kept.get(name, Child(name, name)))
        if name == stage.names[stage.after]:
            found += [child for child in made if child.new]
    names = [child.name for child in found]
    taken = next((name for name in names if names.count(name) > 1), "")
    if taken:
        raise PlanError(
            f"a block after {stage.child(stage.after)} would be called {taken}, as another module "
            f"of {stage.container or 'the network'} is.",
            name=stage.key,
            way_out="Give that module another name.",
        )
    return Rearrangement(stage.container, tuple(found))
