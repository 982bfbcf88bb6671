"""Where each channel of a grown network comes from: which growth wrote it, and what it is like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fxgrow.modules.tensors import layer_of
from fxgrow.plan.edits import AxisEdit, TensorEdit
from fxgrow.plan.names import names_after
from fxgrow.plan.schema import Plan
from fxgrow.training.history import stages_within

_COPIED = ("old", "share", "borrowed")
_DRAWN = ("new", "minus")
_WRITING = ("writer", "carrier")  # the bias of a layer carries what its weight writes


@dataclass(frozen=True)
class Positions:
    """Where the positions of a dim come from. Both have an entry for each.

    Attributes:
        growth: the growth that wrote it, counted from 1; 0 for what was there before any.
        like: equal numbers for positions that began with one value: copies from 0 on, twins below.
    """

    growth: NDArray[np.int64]
    like: NDArray[np.int64]

    @classmethod
    def of(cls, size: int) -> Positions:
        """Return the positions of a dim that has not grown."""
        return cls(np.zeros(size, dtype=np.int64), np.arange(size, dtype=np.int64))

    def alike(self, *, drawn: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return pairs of positions that began with one value, the first of their kind and another.

        Args:
            drawn: whether twins, or copies of old positions.
        """
        _, first, back = np.unique(self.like, return_index=True, return_inverse=True)
        leading = first[back]
        chosen = (leading != np.arange(len(leading))) & ((self.like < 0) == drawn)
        return leading[chosen], np.flatnonzero(chosen)


@dataclass(frozen=True)
class GrownGroup:
    """A channel group, or a block, that growths have changed or brought.

    Attributes:
        name: of the group as it was last grown, or of the block.
        growth: the last growth of it, counted from 1.
        writers: where its channels are written: the dim by parameter and what is known of it.
        readers: where they are read, likewise.
        fresh: parameters that are new as a whole: those of a block.
    """

    name: str
    growth: int
    writers: dict[str, tuple[int, Positions]] = field(default_factory=dict)
    readers: dict[str, tuple[int, Positions]] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()


@dataclass
class _History:
    """What is known while growths are gone through.

    Attributes:
        axes: by tensor and dim, the role and the positions.
        groups: by the tensors that write them, the groups: name, growth, tensors that read.
        blocks: by the tensors that are in them, the names of blocks and their growths.
    """

    axes: dict[tuple[str, int], tuple[str, Positions]] = field(default_factory=dict)
    groups: dict[frozenset[str], tuple[str, int, frozenset[str]]] = field(default_factory=dict)
    blocks: dict[frozenset[str], tuple[str, int]] = field(default_factory=dict)
    drawn: int = 0

    def renamed(self, after: Mapping[str, str]) -> None:
        """Take the names that tensors have after a step, by those that they had before."""

        def moved(names: frozenset[str]) -> frozenset[str]:
            return frozenset(after.get(name, name) for name in names)

        def called(name: str, names: frozenset[str]) -> str:
            held = next((x for x in sorted(names) if x.startswith(f"{name}.")), name)
            return after.get(held, held).removesuffix(held.removeprefix(name))

        self.axes = {(after.get(name, name), dim): x for (name, dim), x in self.axes.items()}
        self.groups = {
            moved(names): (called(name, names), growth, moved(read))
            for names, (name, growth, read) in self.groups.items()
        }
        self.blocks = {
            moved(names): (called(name, names), growth)
            for names, (name, growth) in self.blocks.items()
        }

    def changed(self, name: str, edit: TensorEdit, growth: int) -> None:
        """Take what an edit makes of a tensor."""
        for axis in edit.axes:
            held = self.axes.get((name, axis.dim))
            size = edit.shape[axis.dim]
            before = held[1] if held is not None and len(held[1].like) == size else None
            grown = self._grown(axis, before or Positions.of(size), growth)
            if len(grown.like) == edit.new_shape[axis.dim]:
                self.axes[name, axis.dim] = (axis.role, grown)

    def _grown(self, axis: AxisEdit, old: Positions, growth: int) -> Positions:
        """Return what an axis becomes; of one that is read as groups, in the first of them."""
        size = sum(run.length for run in axis.runs) // axis.groups
        sources = [(run.kind, run.start + i) for run in axis.runs for i in range(run.length)][:size]
        written = np.full(size, growth, dtype=np.int64)
        like = np.empty(size, dtype=np.int64)
        seen: set[int] = set()
        fresh = 0
        for place, (kind, source) in enumerate(sources):
            if kind in _COPIED and source < len(old.like):
                like[place] = old.like[source]
                if kind != "borrowed" and source not in seen:
                    written[place] = old.growth[source]
                    seen.add(source)
                continue
            number = source if kind in _DRAWN else size + place
            like[place] = -1 - self.drawn - number
            fresh = max(fresh, number + 1)
        self.drawn += fresh
        return Positions(written, like)


def grown_groups(model: nn.Module) -> list[GrownGroup]:
    """Return what has grown in a network, and where its channels come from.

    Args:
        model: the network, grown by :func:`fxgrow.training.grow_` and the like.
    """
    history = _History()
    for growth, (module, stage) in enumerate(stages_within(model), 1):
        _follow(history, stage.plan, growth, f"{module}." if module else "")
    held = dict(model.named_parameters(remove_duplicate=False))
    return [*_groups(history, held), *_blocks(history, held)]


def _follow(history: _History, plan: Plan, growth: int, prefix: str) -> None:
    """Go through one growth, of the module whose names have a prefix."""
    names: Sequence[str] = list(plan.steps[0].source)
    for step in plan.steps:
        moved = names_after(names, step)
        kept = {prefix + old: prefix + name for name, old, is_new in moved if not is_new}
        history.renamed(kept)
        for name, edit in step.tensors.items():
            if not edit.source and not edit.fill:
                history.changed(prefix + name, edit, growth)
        for group in step.groups:
            written = _told(step, prefix, group.writers, _WRITING)
            read = _told(step, prefix, group.readers, ("reader",))
            for names_of in [x for x in history.groups if x & written]:
                del history.groups[names_of]
            history.groups[written] = (prefix + group.name, growth, read)
        for block in step.blocks:
            inside = frozenset(
                prefix + n for n, _, is_new in moved if is_new and n.startswith(f"{block.name}.")
            )
            history.blocks[inside] = (prefix + block.name, growth)
        names = [name for name, _, _ in moved]


def _told(step: Plan, prefix: str, layers: Sequence[str], roles: Sequence[str]) -> frozenset[str]:
    """Return the tensors of some layers that a step changes in one of some roles."""
    return frozenset(
        prefix + name
        for name, edit in step.tensors.items()
        if layer_of(name) in layers and any(axis.role in roles for axis in edit.axes)
    )


def _groups(history: _History, held: Mapping[str, object]) -> Iterator[GrownGroup]:
    def side(roles: Sequence[str], tensors: frozenset[str]) -> dict[str, tuple[int, Positions]]:
        return {
            tensor: (dim, positions)
            for (tensor, dim), (own, positions) in history.axes.items()
            if tensor in tensors and own in roles and tensor in held
        }

    for written, (name, growth, read) in history.groups.items():
        yield GrownGroup(name, growth, side(_WRITING, written), side(("reader",), read))


def _blocks(history: _History, held: Mapping[str, object]) -> Iterator[GrownGroup]:
    for inside, (name, growth) in history.blocks.items():
        tensors = tuple(sorted(tensor for tensor in inside if tensor in held))
        if tensors:
            yield GrownGroup(name, growth, fresh=tensors)
