"""Find the configuration of a grown model: the fields that govern its widths.

What a field governs is found by setting it and building the model on meta tensors. A field may be
any number in the configuration; the value proposed is the old one times the ratio by which some
size has to grow. Fields that bring sizes nearer to what they should be are set together until every
tensor is as it is in the grown model. Several sets of fields may do that (twice the heads, or heads
of twice the size): that one is taken under which most of the modules' other numbers stay as they
are. Nothing is known of names of fields.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fxgrow.errors import SourceError
from fxgrow.files.fields import (
    Change,
    Config,
    Difference,
    Number,
    Place,
    changed,
    is_number,
    proposals,
)
from fxgrow.modules.architectures import Architecture
from fxgrow.modules.huggingface import quiet, screened
from fxgrow.modules.uninitialised import Limit
from fxgrow.plan.schema import Plan

_MOST_BUILT = 200  # models, before the search is given up


@dataclass(frozen=True)
class _Attempt:
    """Fields with new values, and what comes of them.

    Attributes:
        changes: the fields.
        left: what is still different.
        others: how many other numbers are not as in the grown model.
    """

    changes: Change
    left: list[Difference]
    others: int

    @property
    def places(self) -> frozenset[Place]:
        """The fields without their values."""
        return frozenset(place for place, _ in self.changes)


class _Wanted:
    """What a configuration must give, and what it should.

    Args:
        grown: the grown model. Its tensors' shapes must come out.
        plan: how it grew. The attributes that it edits must come out.
    """

    def __init__(self, grown: nn.Module, plan: Plan) -> None:
        self._shapes = _shapes_of(grown)
        self._edited = {
            f"{e.module}.{e.attribute}": _numbers(e.after) for s in plan.steps for e in s.modules
        }
        self._other = dict(_numbers_of(grown))

    def differences(self, model: nn.Module) -> list[Difference]:
        """Return what is different in a model and must not be, tensors first, in their order."""
        shapes = _shapes_of(model)
        found = [
            Difference(name, shapes.get(name, ()), want)
            for name, want in self._shapes.items()
            if shapes.get(name) != want
        ]
        found += [Difference(n, shape, ()) for n, shape in shapes.items() if n not in self._shapes]
        for name, want in self._edited.items():
            have = _attribute(model, name)
            if len(have) != len(want) or not all(map(math.isclose, have, want)):
                found.append(Difference(name, have, want, is_tensor=False))
        return found

    def changed(self, model: nn.Module) -> int:
        """Return how many other numbers of the modules are not as in the grown model.

        Not all of them need be: some that nothing reads are out of date there.
        """
        mine = dict(_numbers_of(model))
        names = [name for name in self._other if name not in self._edited]
        return sum(mine.get(name) != self._other[name] for name in names)


class UngovernedError(SourceError):
    """What has grown in a way that no configuration describes.

    Attributes:
        groups: a glob of the names of the groups in the way; "" if these are not known.
    """

    groups = ""


def grown_config(
    architecture: Architecture,
    plan: Plan,
    grown: nn.Module,
    is_same: Callable[[Config], bool] = lambda config: True,
) -> Config:
    """Return the configuration of a grown model.

    Args:
        architecture: a class of transformers with the old configuration.
        plan: how the model grew.
        grown: what became of it.
        is_same: returns whether the network of a configuration computes what the grown one does,
            with its weights. Twice the heads and heads of twice the size have the same shapes.

    Returns:
        The old configuration with some fields changed.

    Raises:
        UngovernedError: no fields give these widths; the first tensor in the way is named.
    """
    if any(step.makes_graphs for step in plan.steps):
        raise _refusal("the grown model's code differs from that of its class", "", plan)
    config: Any = architecture.arguments["config"]  # in a record, it may say anything
    old = {**screened(config).written, **_flags(plan)}
    limit = Limit.of(grown.state_dict())
    search = _FieldSearch(architecture, _Wanted(grown, plan), limit, is_same)
    full = search.complete(old)
    changes = search.run(full)
    if changes is None and search.unlike:
        fields = ", ".join(".".join(map(str, place)) for place, _ in search.unlike)
        reason = f"its sizes are those of another {fields}, with which it computes something else"
        raise _refusal(reason, "", plan)
    if changes is None and not search.first:
        raise _refusal("a network of its sizes computes something else", "", plan)
    if changes is None:
        raise _in_the_way(search.first, search.nearest, plan)
    full, found = changed(full, changes), changed(old, changes)
    # A field that was left out may have followed from others; then all fields are needed.
    return found if search.complete(found) == full else {**old, **full}


def _flags(plan: Plan) -> Config:
    """Return the fields that a plan clears, so that the class ties nothing that was untied."""
    edits = (edit for step in plan.steps for edit in step.modules if isinstance(edit.after, bool))
    return {edit.attribute.rpartition(".")[2]: edit.after for edit in edits}


class _FieldSearch:
    """Builds a class with configurations and compares what comes out.

    Args:
        architecture: whose class is built.
        wanted: what should come out.
        limit: what one model may take; some fields are no widths.
        is_same: see :func:`grown_config`.

    Attributes:
        first: what is different under the old configuration.
        nearest: what was still different where least was.
        unlike: fields that give all sizes, but of a network that computes something else.
    """

    def __init__(
        self,
        architecture: Architecture,
        wanted: _Wanted,
        limit: Limit,
        is_same: Callable[[Config], bool],
    ) -> None:
        self.unlike: Change = ()
        self._is_same = is_same
        self.first: list[Difference] = []
        self.nearest: list[Difference] = []
        self._architecture = architecture
        self._wanted = wanted
        self._limit = limit
        self._built = 0

    def complete(self, config: Config) -> Config:
        """Return a configuration with all fields that it leaves at their defaults."""
        built: Any = self._build(config)
        full: Config = json.loads(built.config.to_json_string(use_diff=False))
        return full

    def _build(self, config: Config) -> nn.Module:
        """Return a model on meta tensors."""
        return replace(self._architecture, arguments={"config": config}).build(limit=self._limit)

    def run(self, config: Config) -> Change | None:
        """Return the fields to change, with their new values, or None if there are none.

        Args:
            config: a complete configuration, of the old model.
        """
        first = self._try(config)
        if first is None:
            return None
        self.first = self.nearest = first[0]
        if not self.nearest:
            return () if self._is_same(config) else None
        for every in (False, True):  # whole numbers first, which most widths are
            found = self._run(config, first[0], every)
            if found is not None:
                return found
        return None

    def _run(self, config: Config, left: list[Difference], every: bool) -> Change | None:
        """Return the best of all sets of fields that leave no difference, or None.

        What helps by itself is combined; where no such field helps any more, others are asked.
        """
        useful, inert = self._helpful(config, (), left, proposals(config, left, every), set())
        waiting = list(useful)
        complete: list[_Attempt] = []
        seen = {attempt.places for attempt in waiting}
        while waiting:
            present = waiting.pop(0)
            if not present.left:
                complete.append(present)
                continue
            fields = [attempt.changes[-1] for attempt in useful]
            now = changed(config, present.changes)
            more, _ = self._helpful(now, present.changes, present.left, fields, inert)
            if not more:
                others = proposals(now, present.left, every)
                more, _ = self._helpful(now, present.changes, present.left, others, inert)
            waiting += [attempt for attempt in more if attempt.places not in seen]
            seen.update(attempt.places for attempt in more)
        for found in sorted(complete, key=lambda found: (found.others, len(found.changes))):
            if self._is_same(changed(config, found.changes)):
                return found.changes
            self.unlike = self.unlike or found.changes
        return None

    def _helpful(
        self,
        config: Config,
        changes: Change,
        left: list[Difference],
        fields: Iterable[tuple[Place, object]],
        inert: set[Place],
    ) -> tuple[list[_Attempt], set[Place]]:
        """Return the attempts of one more field that leave less different, and fields to no effect.

        Args:
            config: with the changes so far.
            changes: those.
            left: what these leave different.
            fields: the fields to set, with their new values.
            inert: fields that need not be tried.
        """
        found: list[_Attempt] = []
        idle = set(inert)
        done = {place for place, _ in changes}
        for place, value in fields:
            if place in done or place in inert or self._built >= _MOST_BUILT:
                continue
            result = self._try(changed(config, ((place, value),)))
            if result is None:
                continue
            if result[0] == left:
                idle.add(place)
            if len(result[0]) < len(left):
                found.append(_Attempt((*changes, (place, value)), *result))
                self.nearest = min(self.nearest, result[0], key=len)
        return found, idle

    def _try(self, config: Config) -> tuple[list[Difference], int] | None:
        """Return what a configuration leaves different, or None if there is no such model."""
        self._built += 1
        try:
            with quiet():
                built = self._build(config)
        except SourceError:  # 30 channels in 4 heads, say
            return None
        return self._wanted.differences(built), self._wanted.changed(built)


def _shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _numbers_of(model: nn.Module) -> Iterator[tuple[str, tuple[Number, ...]]]:
    """Yield the attributes of modules that are numbers, and the sizes of all buffers."""
    for module, part in model.named_modules():
        for name, value in vars(part).items():
            if not name.startswith("_") and (numbers := _numbers(value)):
                yield f"{module}.{name}", numbers
    yield from ((name, tuple(buffer.shape)) for name, buffer in model.named_buffers())


def _attribute(model: object, path: str) -> tuple[Number, ...]:
    """Return an attribute by its path as numbers; () if there is none."""
    try:
        for name in path.strip(".").split("."):
            model = getattr(model, name)
    except AttributeError:
        return ()
    return _numbers(model)


def _numbers(value: object) -> tuple[Number, ...]:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(item for item in items if is_number(item))


def _in_the_way(first: list[Difference], nearest: list[Difference], plan: Plan) -> UngovernedError:
    """Return the refusal that names a tensor whose size no field governs.

    Args:
        first: what is different under the old configuration.
        nearest: what is under the one that comes nearest.
        plan: how the model grew.
    """
    still = [difference for difference in first if difference in nearest]
    shown = (still or first or nearest)[0]
    have, want = ("x".join(map(str, sizes)) or "none" for sizes in (shown.have, shown.want))
    what = "" if shown.is_tensor else " (an attribute)"
    rest = f"it stays {have}" if still else "and all else what it should be"
    reason = f"no field of config.json makes {shown.name}{what} {want}, {rest}"
    return _refusal(reason, shown.name, plan)


def glob_of(name: str) -> str:
    """Return a glob of the groups that are the same in other layers.

    Example:
        >>> glob_of("bert.encoder.layer.0.output.dense")
        'bert.encoder.layer.*.output.dense'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _refusal(reason: str, name: str, plan: Plan) -> UngovernedError:
    layers = {name.rpartition(".")[0], name}
    guilty = next((g.name for g in plan.groups if layers & {*g.writers, *g.readers, g.name}), "")
    glob = glob_of(guilty)
    leave = f"Leave it out (--exclude '{glob}'), or write" if guilty else "Write"
    error = UngovernedError(
        f"a directory cannot hold this model: {reason}.",
        name=name,
        way_out=f"{leave} the weights alone, which fxgrow.load reads: -o model.safetensors.",
    )
    error.groups = glob
    return error
