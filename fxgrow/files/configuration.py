"""Find the configuration of a grown model: the fields that govern its widths.

What a field governs is found by setting it and building the model on meta tensors. A field may be
any number in the configuration; the value proposed is the old one times the ratio by which some
size has to grow. Fields that bring sizes nearer to what they should be are set together until every
tensor is as it is in the grown model. Several sets of fields may do that (twice the heads, or heads
of twice the size): that one is taken under which most of the modules' other numbers stay as they
are. A network of the right sizes may still compute something else; two more fields that only
together leave all sizes (heads, and heads of keys) are then set. Nothing is known of names of
fields, but that some modules keep a number under the name of the field that it came from.
"""

from __future__ import annotations

import itertools
import json
import math
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
from fxgrow.files.ungoverned import in_the_way, refusal
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

    def attributes(self) -> Iterator[tuple[str, int]]:
        """Yield the names of modules' attributes that are the same whole number in all of them."""
        values: dict[str, set[tuple[Number, ...]]] = {}
        for path, numbers in self._other.items():
            values.setdefault(path.rpartition(".")[2], set()).add(numbers)
        for name, found in values.items():
            only = found.pop()
            if not found and len(only) == 1 and isinstance(only[0], int) and only[0] > 0:
                yield name, only[0]

    def changed(self, model: nn.Module) -> int:
        """Return how many other numbers of the modules are not as in the grown model.

        Not all of them need be: some that nothing reads are out of date there.
        """
        mine = dict(_numbers_of(model))
        names = [name for name in self._other if name not in self._edited]
        return sum(mine.get(name) != self._other[name] for name in names)


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
    config: Any = architecture.arguments["config"]  # in a record, it may say anything
    old = {**screened(config).written, **_flags(plan)}
    limit = Limit.of(grown.state_dict())
    search = _FieldSearch(architecture, _Wanted(grown, plan), limit, is_same)
    full = search.complete(old)
    changes = search.run(full)
    if changes is None and (unsaid := search.unsaid(full)):
        said = changed(full, unsaid)
        changes = search.run(said)
        full, old = (said, changed(old, unsaid)) if changes is not None else (full, old)
    if changes is None and any(step.makes_graphs for step in plan.steps):
        raise refusal("the grown model's code differs from that of its class", "", plan)
    if changes is None and search.unlike:
        fields = ", ".join(".".join(map(str, place)) for place, _ in search.unlike)
        reason = f"its sizes are those of another {fields}, with which it computes something else"
        raise refusal(reason, "", plan, search.forbidden())
    if changes is None and not search.first:
        raise refusal("a network of its sizes computes something else", "", plan)
    if changes is None:
        raise in_the_way(search.first, search.nearest, plan)
    full, found = changed(full, changes), changed(old, changes)
    # A field that was left out may have followed from others; then all fields are needed.
    same = search.complete(found) == search.complete(full)
    return found if same else {**old, **full}


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
        self._refused: dict[Place, tuple[object, str]] = {}
        self._config: Config = {}

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
        self._config, self._built = config, 0
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
        complete.sort(key=lambda found: (found.others, len(found.changes)))
        pairs = (self._pairs(config, found, left, every) for found in complete)
        for found in itertools.chain(complete, *pairs):
            if self._is_same(changed(config, found.changes)):
                return found.changes
            self.unlike = self.unlike or found.changes
        return None

    def _pairs(
        self, config: Config, found: _Attempt, left: list[Difference], every: bool
    ) -> Iterator[_Attempt]:
        """Yield attempts of one or two more fields that leave all sizes as they should be.

        Args:
            config: a complete configuration, of the old model.
            found: what gives all sizes, of a network that computes something else.
            left: what is different under ``config``.
            every: see :func:`~fxgrow.files.fields.proposals`.
        """
        now, growing = changed(config, found.changes), {each.name for each in left}
        fields: list[tuple[Place, object]] = []
        for place, value in proposals(config, left, every):
            if place in found.places or self._built >= _MOST_BUILT:
                continue
            result = self._try(changed(now, ((place, value),)))
            if result == ([], found.others):
                continue
            if result is not None and not result[0]:
                yield _Attempt((*found.changes, (place, value)), *result)
            # What touches others, such as the number of layers, is made good by no other field.
            elif result is None or {each.name for each in result[0]} <= growing:
                fields.append((place, value))
        for pair in itertools.combinations(fields, 2):
            if pair[0][0] != pair[1][0] and self._built < _MOST_BUILT:
                result = self._try(changed(now, pair))
                if result is not None and not result[0]:
                    yield _Attempt((*found.changes, *pair), *result)

    def unsaid(self, config: Config) -> Change:
        """Return fields that a configuration leaves out and its class reads, as they should be.

        A class may take the size of heads from a field or, without one, from two others.
        """
        names = dict(self._wanted.attributes())
        places = [()] + [(key,) for key, value in config.items() if isinstance(value, dict)]
        before, found, growing = self._try(config), [], {each.name for each in self.first}
        for place, (name, value) in itertools.product(places, names.items()):
            if name in (config[place[0]] if place else config):
                continue
            at: Place = (*place, name)
            result = self._try(changed(config, ((at, 2 * value),)))
            if result not in (before, None) and {each.name for each in result[0]} <= growing:
                found.append((at, value))
        return tuple(found)

    def forbidden(self) -> str:
        """Return what the class says against a field's value that sizes ask for, or ""."""
        growing = {each.name for each in self.first}
        for place, (value, told) in self._refused.items():
            old: Any = self._config
            for key in place:
                old = old[key]
            if not isinstance(old, int):
                continue
            for other in (2 * old, old // 2):
                result = self._try(changed(self._config, ((place, other),)))
                names = {each.name for each in result[0]} if result is not None else set()
                if result is not None and result[0] != self.first and names <= growing:
                    field, cause = ".".join(map(str, place)), told.rpartition("Error: ")[2]
                    return f"its class refuses {field} {value}: {cause}"
        return ""

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
        except SourceError as error:  # 30 channels in 4 heads, say
            self._note(config, error)
            return None
        return self._wanted.differences(built), self._wanted.changed(built)

    def _note(self, config: Config, error: SourceError) -> None:
        """Remember what a class says against one field that was set alone."""
        set_ = [(key,) for key in config if config[key] != self._config.get(key)]
        if len(set_) == 1:
            self._refused.setdefault(set_[0], (config[set_[0][0]], error.reason))


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
