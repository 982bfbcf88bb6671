"""Which growth wrote which entries of a network's parameters, and how often each is copied."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, prod
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fxgrow.plan.edits import AxisEdit, TensorEdit
from fxgrow.plan.names import names_after
from fxgrow.plan.schema import Plan
from fxgrow.training.history import stages_within

Ranges: TypeAlias = tuple[tuple[int, int], ...]  # (first, one past the last), in order


@dataclass(frozen=True)
class Part:
    """Entries of a parameter that one growth wrote and that have equally many copies.

    Attributes:
        name: fully qualified name of the parameter.
        stage: the growth that wrote them, counted from 1; 0 where they continue what the network
            was first given with.
        rows: how many copies of each row the parameter holds (m): an entry's gradient is 1/m of
            that of the narrow network's entry.
        columns: into how many copies each entry's column is split (k): the entry is 1/k of the
            narrow network's.
        blocks: which entries: in each block, for each dim, ranges of positions; an entry of a
            block lies in one of the ranges of every dim. Blocks have no entry in common.
    """

    name: str
    stage: int
    rows: int
    columns: int
    blocks: tuple[tuple[Ranges, ...], ...]

    def views(self, tensor: Tensor, runs: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """Yield the entries of a tensor of the parameter's shape, as views of it.

        Args:
            tensor: the tensor.
            runs: (dim, length) where it has one entry for each run of so many positions of a dim,
                all later dims whole; see :func:`runs_of`.
        """
        shape = tensor.shape
        for box in self._boxes:
            view = tensor
            for dim, first, length in box:
                if runs is not None and dim > runs[0]:
                    break
                each = runs[1] if runs is not None and dim == runs[0] else 1
                if length // each != shape[dim]:
                    view = view.narrow(dim, first // each, length // each)
            yield view

    @cached_property
    def count(self) -> int:
        """The number of entries."""
        return sum(prod(length for _, _, length in box) for box in self._boxes)

    @cached_property
    def _boxes(self) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """The dims of each view, with the first position and the number of them; made once."""
        boxes = itertools.chain.from_iterable(itertools.product(*block) for block in self.blocks)
        return tuple(
            tuple((dim, first, end - first) for dim, (first, end) in enumerate(box))
            for box in boxes
        )

    def mask(self, tensor: Tensor) -> Tensor:
        """Return where the entries lie, bool in the shape of a tensor, on its device."""
        mask = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
        for view in self.views(mask):
            view.fill_(True)
        return mask


def runs_of(parts: Iterable[Part], shape: Sequence[int]) -> tuple[int, int]:
    """Return the longest runs of entries, one after the other in memory, that no part cuts.

    Args:
        parts: of a parameter; all of them.
        shape: of the parameter.

    Returns:
        The last dim that is cut, and into how long runs of its positions.
    """
    ends: dict[int, set[int]] = {}
    for part in parts:
        for box in part._boxes:
            for dim, first, length in box:
                if length != shape[dim]:
                    ends.setdefault(dim, set()).update((first, length))
    if not ends:
        return 0, max(shape[0], 1)
    last = max(ends)
    return last, gcd(shape[last], *ends[last])


@dataclass(frozen=True)
class WrittenAxis:
    """What is known of each position of a dim: the growth that wrote it, m and k; shape (size,)."""

    stage: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    @classmethod
    def of(cls, size: int, stage: int) -> WrittenAxis:
        """Return an axis that one growth has written."""
        ones = np.ones(size, dtype=np.int64)
        return cls(ones * stage, ones, ones)


@dataclass(frozen=True)
class Provenance:
    """Where the entries of a parameter come from.

    Attributes:
        axes: for each dim; an entry is of the latest stage of its positions, and has the product
            of their copies.
        unknown: why neither stages nor copies can be told, "" where they can.
        computed: it is a part of a weight that is computed of it (weight_norm), and split.
        drawn: the last growth left entries that are no copies.
    """

    axes: tuple[WrittenAxis, ...]
    unknown: str = ""
    computed: bool = False
    drawn: bool = False


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """Return the parts of all parameters that growths in training have changed or brought.

    Args:
        model: the network.

    Returns:
        The parts by parameter, in the network's order, each parameter's by stage.
    """
    found = provenances(model)
    return tuple(
        part
        for name, _ in model.named_parameters()
        if name in found
        for part in split(name, found[name])
    )


def provenances(
    model: nn.Module, *, rule: str | None = None, more: Plan | None = None
) -> dict[str, Provenance]:
    """Return where the entries of all tensors that have changed come from, by name.

    Args:
        model: the network.
        rule: count the copies that growths with this rule of learning rates made; None: all.
        more: a plan that is yet to be carried out, after all growths; its copies count.
    """
    found: dict[str, Provenance] = {}
    number = 0
    for module, stage in stages_within(model):
        number += 1
        counts = rule is None or stage.lr == rule
        found = _after(found, stage.plan, number, f"{module}." if module else "", counts)
    if more is not None:
        found = _after(found, more, number + 1, "", True)
    return found


def copies_in(plan: Plan) -> dict[str, Provenance]:
    """Return what a plan alone makes of the tensors that it changes or brings, by name."""
    return _after({}, plan, 1, "", True)


def _after(
    found: Mapping[str, Provenance], plan: Plan, number: int, prefix: str, counts: bool
) -> dict[str, Provenance]:
    """Return provenances after a growth of the module whose names have a prefix."""
    local = {n.removeprefix(prefix): p for n, p in found.items() if n.startswith(prefix)}
    current = {name: replace(prov, drawn=False) for name, prov in local.items()}
    names: Sequence[str] = list(plan.steps[0].source)
    for step in plan.steps:
        moved = names_after(names, step)
        after: dict[str, Provenance] = {}
        for name, before, is_new in moved:
            listed = step.aliases.get(name, name)
            edit, untied = step.tensors.get(listed), listed in step.untied
            if is_new and not untied:
                if edit is not None:
                    axes = tuple(WrittenAxis.of(size, number) for size in edit.new_shape)
                    after[name] = Provenance(axes)
            elif edit is not None:
                after[name] = _changed(current.get(before), edit, number, counts)
            elif before in current:
                after[name] = current[before]
        current, names = after, [name for name, _, _ in moved]
    rest = {name: prov for name, prov in found.items() if not name.startswith(prefix)}
    return rest | {prefix + name: prov for name, prov in current.items()}


def _changed(before: Provenance | None, edit: TensorEdit, number: int, counts: bool) -> Provenance:
    """Return the provenance of a tensor after an edit, whose copies count or not."""
    old = before or Provenance(tuple(WrittenAxis.of(size, 0) for size in edit.shape))
    if edit.fill:
        return Provenance(
            tuple(WrittenAxis.of(size, number) for size in edit.new_shape), drawn=True
        )
    unknown, computed, drawn = old.unknown, old.computed, old.drawn
    axes = list(old.axes)
    if edit.groups[0] != edit.groups[1]:
        axes = [WrittenAxis.of(size, 0) for size in edit.new_shape]
        reason = "its convolution has another number of groups"
        return Provenance(tuple(axes), reason, drawn=True)
    kinds = {run.kind for axis in edit.axes for run in axis.runs}
    computed |= edit.normed is not None and "share" in kinds
    drawn |= not kinds <= {"old", "share"}
    for axis in edit.axes:
        old_axis = axes[axis.dim]
        grown = [_grown(axis, one, old_axis, number, counts) for one in range(axis.groups)]
        if any(not _same(one, grown[0]) for one in grown[1:]):
            unknown = unknown or "the groups of its convolution have grown in different ways"
        axes[axis.dim] = grown[0]
    return Provenance(tuple(axes), unknown, computed, drawn)


def _same(one: WrittenAxis, other: WrittenAxis) -> bool:
    return all(
        np.array_equal(mine, theirs)
        for mine, theirs in (
            (one.stage, other.stage),
            (one.rows, other.rows),
            (one.columns, other.columns),
        )
    )


def _grown(edit: AxisEdit, group: int, old: WrittenAxis, number: int, counts: bool) -> WrittenAxis:
    """Return what an axis becomes; of a grouped one, in one group.

    Args:
        edit: of the axis.
        group: which group of its runs.
        old: the axis before; of a grouped one, in each group.
        number: of the growth.
        counts: whether its copies count.
    """
    sources = [(run.kind, run.start + at) for run in edit.runs for at in range(run.length)]
    size = len(sources) // edit.groups
    sources = sources[group * size : (group + 1) * size]
    copies = Counter(source for kind, source in sources if kind in ("old", "share"))
    stage, rows, columns = (np.empty(size, dtype=np.int64) for _ in range(3))
    seen: set[int] = set()
    for at, (kind, source) in enumerate(sources):
        stage[at], rows[at], columns[at] = number, 1, 1
        if kind not in ("old", "share"):
            continue
        here = source % len(old.stage)
        rows[at], columns[at] = old.rows[here], old.columns[here]
        if source not in seen:
            seen.add(source)
            stage[at] = old.stage[here]
        if kind == "share" and counts:
            columns[at] *= copies[source]
        elif edit.role != "reader" and counts:
            rows[at] *= copies[source]
    return WrittenAxis(stage, rows, columns)


def split(name: str, provenance: Provenance) -> list[Part]:
    """Return the parts of a parameter, by stage, then by copies."""
    classes = [_classes(axis) for axis in provenance.axes]
    found: dict[tuple[int, int, int], list[tuple[Ranges, ...]]] = {}
    for chosen in itertools.product(*classes):
        stage = max((key[0] for key, _ in chosen), default=0)
        rows = int(np.prod([key[1] for key, _ in chosen], dtype=np.int64))
        columns = int(np.prod([key[2] for key, _ in chosen], dtype=np.int64))
        block = tuple(ranges for _, ranges in chosen)
        found.setdefault((stage, rows, columns), []).append(block)
    return [Part(name, *key, _merged(blocks)) for key, blocks in sorted(found.items())]


def _merged(blocks: Sequence[tuple[Ranges, ...]]) -> tuple[tuple[Ranges, ...], ...]:
    """Return blocks with those made one that differ in one dim alone."""
    merged = list(blocks)
    for dim in reversed(range(len(blocks[0]))):
        along: dict[tuple[Ranges, ...], list[tuple[int, int]]] = {}
        for block in merged:
            along.setdefault(block[:dim] + block[dim + 1 :], []).extend(block[dim])
        merged = [(*rest[:dim], _joined(ranges), *rest[dim:]) for rest, ranges in along.items()]
    return tuple(merged)


def _joined(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Return ranges in order, those that touch as one."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], end)
        else:
            found.append((first, end))
    return tuple(found)


def _classes(axis: WrittenAxis) -> list[tuple[tuple[int, int, int], Ranges]]:
    """Return the ranges of equal positions of an axis, by (stage, rows, columns)."""
    table = np.stack([axis.stage, axis.rows, axis.columns], 1)
    bounds = [0, *(np.flatnonzero((np.diff(table, axis=0) != 0).any(1)) + 1).tolist(), len(table)]
    found: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for first, end in itertools.pairwise(bounds):
        if end > first:
            stage, rows, columns = (int(number) for number in table[first])
            found.setdefault((stage, rows, columns), []).append((first, end))
    return [(key, tuple(ranges)) for key, ranges in sorted(found.items())]
