"""What a plan can make fxgrow do, and the checks that it says nothing else.

A plan may come from anybody: as a file, or in a file of weights. So it is hostile until checked. It
is data: nothing in it is run, imported or opened, and none of its text gets into code but names
that modules have already. All that it can do is this, to a copy of a network:

- ``tensors``: lay a tensor out anew, as parts of one old tensor (its positions, shares of them,
  their mean), zeros, ones, and numbers that an init registered here draws; multiply it by a
  factor, or let a norm's tensors take up a gain. All of a plan's new tensors fit into memory.
- ``rearrangements``: put copies of modules beside them, under names that differ from theirs in a
  number at the end, and have the module around them call them as it calls those.
- ``modules``: give numbers, or tuples of them, that a module or its configuration holds as plain
  attributes other values; repeat texts that are in a tuple there; pad otherwise.
- ``sizes``, ``multipliers``: put other sizes and factors into the graph of the network's own code.
- ``untied``: give one name of a parameter with several names a copy of it, and clear the flag of
  the configuration that would have the class tie it again.
- ``aliases``, ``names``: say which tensors are one, and which of another architecture they become.

``scopes`` and ``prediction`` say on what and against what the result is measured, and ``request``
with which seed, init and noise numbers are drawn, and what an output without a name is called
after. All other fields are for the reader.

What a plan says by itself is checked here when it is read, its single entries in
:mod:`fxgrow.plan.bounds`. That the network at hand has what it names is checked where it is carried
out (:mod:`fxgrow.apply`), and once more what gets into code is where that is made
(:func:`fxgrow.apply.graph.graph_module`).
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch

from fxgrow.errors import UsageError
from fxgrow.labels.space import Normed
from fxgrow.plan.bounds import (
    MOST_GLOBS,
    check_amount,
    check_attribute,
    check_factor,
    check_init,
    check_multiplier,
    check_shape,
    check_sizes,
    check_tensor,
    check_word,
    is_name,
    refuse,
)
from fxgrow.plan.budget import budgeted
from fxgrow.plan.edits import Child, Multiplier, Rearrangement, TensorEdit
from fxgrow.plan.requests import Convert, Deepen, Request, Untie, Widen
from fxgrow.plan.step import PlanStep

_MOST_INPUTS = 1 << 27  # entries of all inputs together
_MOST_CHILDREN = 1 << 14  # of a module
_LONGEST_GLOB = 1 << 10
T = TypeVar("T")


def check_step(step: PlanStep, place: str = "") -> None:
    """Return if a step of a plan says nothing that no planner would say.

    Args:
        step: of the right types.
        place: what its fields are called before their names.

    Raises:
        PlanError: it does; the message names the field.
    """
    _Checked(step, place).check()


@dataclass(frozen=True)
class _Checked:
    """A step that is being checked.

    Attributes:
        step: the step.
        place: what its fields are called before their names.
    """

    step: PlanStep
    place: str

    def check(self) -> None:
        """Check all fields.

        Raises:
            PlanError: one of them is wrong.
        """
        step, at = self.step, self.place
        _check_request(step.request, f"{at}request.")
        if isinstance(step.request, Convert) != bool(step.names):
            refuse(f"{at}names", "a conversion names what it makes, and nothing else does")
        self._check_source()
        self._check_scopes()
        self._check_rearrangements()
        self._check_tensors()
        self._check_aliases()
        self._check_untied()
        for index, edit in enumerate(step.modules):
            check_attribute(edit, f"{at}modules.{index}.", unties=bool(step.untied))
        for index, size in enumerate(step.sizes):
            self._check_module(size.module, f"{at}sizes.{index}.module")
            check_sizes(size, f"{at}sizes.{index}.")
        for name in ("multipliers", "prediction"):
            found: tuple[Multiplier, ...] = getattr(step, name)
            for index, multiplier in enumerate(found):
                self._check_module(multiplier.module, f"{at}{name}.{index}.module")
                check_multiplier(multiplier, f"{at}{name}.{index}.")
        for index, group in enumerate(step.groups):
            check_word(group.pairing, f"{at}groups.{index}.pairing")
        for index, block in enumerate(step.blocks):
            check_word(block.method, f"{at}blocks.{index}.method")
        if not (step.names or step.changes or step.untied):
            refuse(f"{at}groups", "nothing is said to grow")

    def _check_source(self) -> None:
        """Check the fingerprint."""
        for name, (shape, dtype) in self.step.source.items():
            place = f"{self.place}source.{name}"
            if not is_name(name):
                refuse(place, "that is no name of a tensor")
            check_shape(shape, place)
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                refuse(place, f"there is no dtype {dtype!r}")

    def _check_scopes(self) -> None:
        """Check what the network was followed on."""
        if not self.step.scopes:
            refuse(f"{self.place}scopes", "nothing was followed")
        total = 0
        for index, scope in enumerate(self.step.scopes):
            place = f"{self.place}scopes.{index}."
            self._check_module(scope.module, f"{place}module")
            for shape in scope.inputs:
                check_shape(shape, f"{place}inputs")
                total += math.prod(shape)
            if total > _MOST_INPUTS:
                refuse(f"{place}inputs", "they are too large")

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The modules that hold tensors, and the network itself."""
        return frozenset(("", *(owner for name in self.step.source for owner in _owners(name))))

    def _check_module(self, name: str, place: str) -> None:
        """Check the name of a module that holds tensors."""
        if name not in self._modules:
            refuse(place, f"the plan's source has no module {name!r}")

    @cached_property
    def _moved(self) -> dict[str, list[tuple[str, bool]]]:
        """What each module that is renamed or copied becomes: names, and whether they are new."""
        found: dict[str, list[tuple[str, bool]]] = {}
        for edit in self.step.rearrangements:
            for child in edit.children:
                source, name = (_in(edit.container, n) for n in (child.source, child.name))
                found.setdefault(source, []).append((name, child.new))
        return {name: made for name, made in found.items() if made != [(name, False)]}

    @cached_property
    def _after(self) -> dict[str, tuple[str, bool]]:
        """For each tensor after the step, the one before that it is or is like; whether new."""
        step = self.step
        if step.names:
            made = {name: step.tensors.get(step.aliases.get(name, name)) for name in step.names}
            likes = {name: edit.source if edit else "" for name, edit in made.items()}
            return {name: (old or likes[name], not old) for name, old in step.names.items()}
        found = {}
        for name in step.source:
            owner = next((owner for owner in _owners(name) if owner in self._moved), "")
            for moved, is_new in self._moved.get(owner, [("", False)]):
                found[moved + name.removeprefix(owner)] = (name, is_new)
        return found

    def _check_rearrangements(self) -> None:
        """Check which modules are put where, under which names."""
        edits = self.step.rearrangements
        times = Counter(edit.container for edit in edits)
        held: dict[str, set[str]] = {edit.container: set() for edit in edits}
        for module in self._modules - {""}:
            container, _, local = module.rpartition(".")
            held.get(container, set()).add(local)
        for index, edit in enumerate(edits):
            place = f"{self.place}rearrangements.{index}."
            self._check_module(edit.container, f"{place}container")
            around = {"", edit.container, *_owners(edit.container)}
            if times[edit.container] > 1 or not around.isdisjoint(self._moved):
                refuse(f"{place}container", "it is rearranged twice, or in what is moved")
            if edit.caller is not None and edit.caller not in around:
                refuse(f"{place}caller", f"it does not hold {edit.container!r}")
            _check_children(edit, held[edit.container], place)

    def _check_tensors(self) -> None:
        """Check the tensors that change, and that what is new is made."""
        step, total, limit = self.step, 0, _memory()
        for name, edit in step.tensors.items():
            place = f"{self.place}tensors.{name}."
            source = edit.source or name
            if name not in self._after or source not in step.source:
                refuse(f"{place}source", "it makes no tensor of the network, or of none")
            shape, dtype = step.source[source][0], getattr(torch, step.source[source][1])
            if edit.shape != shape:
                refuse(f"{place}shape", f"{source} is {list(shape)} in the plan's source")
            check_tensor(edit, dtype, place)
            if edit.absorption is not None:
                variance = edit.absorption.variance
                known = variance in step.source and step.source[variance][0] == shape
                if not known or variance.rpartition(".")[2] != "running_var":
                    refuse(f"{place}absorption.variance", f"it is no running_var of {list(shape)}")
            if edit.normed is not None:
                self._check_normed(edit.normed, place)
            total += math.prod(edit.new_shape) * int(dtype.itemsize)
            if total > limit:
                refuse(f"{place}new_shape", "the new tensors do not fit into memory")
        for name, (_, is_new) in self._after.items():
            if is_new and step.aliases.get(name, name) not in step.tensors:
                refuse(f"{self.place}tensors", f"nothing makes the new {name}")

    def _check_normed(self, parts: Normed, place: str) -> None:
        """Check what a weight is made of, whose parts change together."""
        edits = [self.step.tensors.get(part) for part in (parts.direction, parts.length)]
        if any(edit is None or edit.normed != parts or edit.fill for edit in edits):
            refuse(f"{place}normed", "its parts are no two tensors that change together")
        direction, length = (edit for edit in edits if edit is not None)
        if parts.dim is not None and not 0 <= parts.dim < len(direction.shape):
            refuse(f"{place}normed.dim", f"{list(direction.shape)} has no such dim")
        shapes = (length.shape, length.new_shape)
        if shapes != (parts.of(direction.shape), parts.of(direction.new_shape)):
            refuse(f"{place}normed.length", f"it is no length of {list(direction.shape)}")

    def _check_aliases(self) -> None:
        """Check which tensors are one, and that each continues one that there is."""
        step, after = self.step, self._after
        for name, first in step.aliases.items():
            known = name in after and first in after
            if not known or first in step.aliases or name in step.tensors:
                refuse(f"{self.place}aliases.{name}", "these are no two names of a tensor")
        for name, (old, _) in after.items():
            if not is_name(name) or old not in step.source:
                refuse(f"{self.place}names.{name}", f"{old!r} is no tensor to make it of")
            first = step.aliases.get(name, name)
            if step.source[old] != step.source.get(after[first][0]):
                refuse(f"{self.place}aliases.{name}", f"it is not like {first}")

    def _check_untied(self) -> None:
        """Check which tensors get a copy: each is made whole of the one that it was."""
        step = self.step
        if bool(step.untied) != isinstance(step.request, Untie):
            refuse(f"{self.place}untied", "a step of its own unties, and does nothing else")
        for name, first in step.untied.items():
            place, edit = f"{self.place}untied.{name}", step.tensors.get(name)
            same = step.source.get(name, step.source.get(first)) == step.source.get(first)
            if first not in step.source or first in step.untied or first in step.aliases:
                refuse(place, f"{first!r} is no tensor that keeps its name")
            if edit is None or edit != TensorEdit(edit.shape, edit.shape, source=first) or not same:
                refuse(place, f"it is no copy of {first!r}")


def _check_request(request: Request, place: str) -> None:
    """Check what was asked for, as far as it is used again."""
    drawing = request.drawing
    _check_each(drawing.init, f"{place}init", check_init)
    for name, init in (("output_init", drawing.output_init), ("input_init", drawing.input_init)):
        if init is not None:
            check_init(init, f"{place}{name}")
    check_amount(drawing.noise, f"{place}noise")
    check_amount(drawing.split_noise, f"{place}split_noise")
    if isinstance(request, (Widen, Convert)):
        _check_each(request.pairing, f"{place}pairing", check_word)
    if isinstance(request, Deepen):
        check_word(request.method, f"{place}method")
    if isinstance(request, Widen):
        _check_each(request.rescaling, f"{place}rescaling", check_word)
        _check_each(request.gain, f"{place}gain", check_factor)
        if request.multiple_of < 1:
            refuse(f"{place}multiple_of", "it is not positive")
        if request.keep is not None and request.keep < 1:
            refuse(f"{place}keep", "it is not positive")
        if not 0.0 <= request.threshold <= 1.0:
            refuse(f"{place}threshold", "it is not from 0 to 1")
        if request.budget:
            _check_budget(request.budget, f"{place}budget")


def _check_budget(budget: str, place: str) -> None:
    """Check a budget of parameters."""
    try:
        budgeted(budget, 1)
    except UsageError as error:
        refuse(place, error.reason)


def _check_each(setting: T | dict[str, T], place: str, check: Callable[[T, str], None]) -> None:
    """Check a setting for all layers, or for those that globs match."""
    if not isinstance(setting, dict):
        check(setting, place)
        return
    if not 0 < len(setting) <= MOST_GLOBS:
        refuse(place, f"there are {len(setting)} globs, not 1 to {MOST_GLOBS}")
    for glob, value in setting.items():
        if not 0 < len(glob) <= _LONGEST_GLOB:
            refuse(place, f"a glob has {len(glob)} characters, not 1 to {_LONGEST_GLOB}")
        check(value, f"{place}.{glob}")


def _check_children(edit: Rearrangement, held: set[str], place: str) -> None:
    """Check the modules of a container; ``held`` are those before that hold tensors."""
    if len(edit.children) > _MOST_CHILDREN:
        refuse(f"{place}children", f"there are more than {_MOST_CHILDREN}")
    names = [child.name for child in edit.children]
    olds = [child.source for child in edit.children if not child.new]
    if len({*names}) < len(names) or len({*olds}) < len(olds) or not held.issubset(olds):
        refuse(f"{place}children", "a module is named twice, or is missing")
    stems = {_stem(name) for name in olds}
    for index, child in enumerate(edit.children):
        if child.source not in olds:
            why = f"no module that stays was called {child.source!r}"
            refuse(f"{place}children.{index}.source", why)
        if not _is_numbered(child, stems):
            why = f"{child.name!r} is no module's name with another number"
            refuse(f"{place}children.{index}.name", why)


def _is_numbered(child: Child, stems: Set[str]) -> bool:
    """Return whether a module keeps its name, or has that of one beside it but for the number."""
    kept = not child.new and child.name == child.source
    return bool(child.name) and "." not in child.name and (kept or _stem(child.name) in stems)


def _in(module: str, name: str) -> str:
    """Return the fully qualified name of what a module holds."""
    return f"{module}.{name}" if module else name


def _owners(name: str) -> Iterator[str]:
    """Yield the names of all modules around something, outermost first, but for the network."""
    parts = name.split(".")
    yield from (".".join(parts[:length]) for length in range(1, len(parts)))


def _stem(name: str) -> str:
    """Return a name without the number at its end."""
    return re.sub(r"\d+$", "", name)


def _memory() -> int:
    """Return how many bytes of memory the machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return 1 << 40
