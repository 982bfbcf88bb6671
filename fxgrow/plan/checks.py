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
- ``aliases``, ``names``: say which tensors are one, and which of another architecture they become.

``inputs``, ``prediction`` and ``norms`` say on what and against what the result is measured, and
``request`` with which seed, init and noise numbers are drawn, and what an output without a name is
called after. All other fields are for the reader.

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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fxgrow.plan.bounds import (
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
from fxgrow.plan.edits import Multiplier, Rearrangement

MOST_STEPS = 64
_MOST_INPUTS = 1 << 27  # entries of all inputs together
_MOST_CHILDREN = 1 << 14  # of a module
_TRACERS = frozenset({"torch.fx", "dispatch"})


def check_plan(plan: Any) -> None:
    """Return if a plan says nothing that no planner would say.

    Args:
        plan: of the right types.

    Raises:
        PlanError: it does; the message names the field.
    """
    steps = (*plan.after, plan)
    if len(steps) > MOST_STEPS:
        refuse("after", f"it makes {len(steps)} steps, and there can be {MOST_STEPS}")
    for index, step in enumerate(steps):
        place = f"after.{index}." if step is not plan else ""
        if place and step.after:
            refuse(f"{place}after", "what is carried out first has nothing before it")
        _Step(step, place).check()


@dataclass(frozen=True)
class _Step:
    """One step of a plan.

    Attributes:
        plan: the step.
        place: what its fields are called before their names.
    """

    plan: Any
    place: str

    def check(self) -> None:
        """Check all fields.

        Raises:
            PlanError: one of them is wrong.
        """
        plan, at = self.plan, self.place
        _check_request(plan.request, f"{at}request.")
        self._check_source()
        self._check_scopes()
        self._check_rearrangements()
        self._check_tensors()
        self._check_aliases()
        for index, edit in enumerate(plan.modules):
            check_attribute(edit, f"{at}modules.{index}.")
        for index, size in enumerate(plan.sizes):
            self._check_module(size.module, f"{at}sizes.{index}.module")
            check_sizes(size, f"{at}sizes.{index}.")
        for name in ("multipliers", "prediction"):
            found: tuple[Multiplier, ...] = getattr(plan, name)
            for index, multiplier in enumerate(found):
                self._check_module(multiplier.module, f"{at}{name}.{index}.module")
                check_multiplier(multiplier, f"{at}{name}.{index}.")
        for index, norm in enumerate(plan.norms):
            check_factor(norm.gain, f"{at}norms.{index}.gain")
            if _in(norm.module, "running_var") not in plan.source:
                refuse(f"{at}norms.{index}.module", f"{norm.module!r} has no running_var")
        for index, block in enumerate(plan.blocks):
            check_word(block.method, f"{at}blocks.{index}.method")
        if not plan.names and not plan.changes:
            refuse(f"{at}groups", "nothing is said to grow")

    def _check_source(self) -> None:
        """Check the fingerprint."""
        for name, (shape, dtype) in self.plan.source.items():
            place = f"{self.place}source.{name}"
            if not is_name(name):
                refuse(place, "that is no name of a tensor")
            check_shape(shape, place)
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                refuse(place, f"there is no dtype {dtype!r}")

    def _check_scopes(self) -> None:
        """Check what the network was followed on."""
        plan, total = self.plan, 0
        inputs = [(self.place, plan.inputs, plan.tracer)]
        for index, scope in enumerate(plan.submodules):
            place = f"{self.place}submodules.{index}."
            self._check_module(scope.module, f"{place}module")
            inputs.append((place, scope.inputs, scope.tracer))
        for place, shapes, tracer in inputs:
            if not _TRACERS.issuperset(tracer.split(", ")):
                refuse(f"{place}tracer", f"{tracer!r} is none")
            for shape in shapes:
                check_shape(shape, f"{place}inputs")
                total += math.prod(shape)
            if total > _MOST_INPUTS:
                refuse(f"{place}inputs", "they are too large")

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The modules that hold tensors, and the network itself."""
        return frozenset(("", *(owner for name in self.plan.source for owner in _owners(name))))

    def _check_module(self, name: str, place: str) -> None:
        """Check the name of a module that holds tensors."""
        if name not in self._modules:
            refuse(place, f"the plan's source has no module {name!r}")

    @cached_property
    def _moved(self) -> dict[str, list[tuple[str, bool]]]:
        """What each module that is renamed or copied becomes: names, and whether they are new."""
        found: dict[str, list[tuple[str, bool]]] = {}
        for edit in self.plan.rearrangements:
            for child in edit.children:
                source, name = (_in(edit.container, n) for n in (child.source, child.name))
                found.setdefault(source, []).append((name, child.new))
        return {name: made for name, made in found.items() if made != [(name, False)]}

    @cached_property
    def _after(self) -> dict[str, tuple[str, bool]]:
        """For each tensor after the step, the one before that it is or is like; whether new."""
        plan = self.plan
        if plan.names:
            made = {name: plan.tensors.get(plan.aliases.get(name, name)) for name in plan.names}
            likes = {name: edit.source if edit else "" for name, edit in made.items()}
            return {name: (old or likes[name], not old) for name, old in plan.names.items()}
        found = {}
        for name in plan.source:
            owner = next((owner for owner in _owners(name) if owner in self._moved), "")
            for moved, is_new in self._moved.get(owner, [("", False)]):
                found[moved + name.removeprefix(owner)] = (name, is_new)
        return found

    def _check_rearrangements(self) -> None:
        """Check which modules are put where, under which names."""
        edits = self.plan.rearrangements
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
        plan, total, limit = self.plan, 0, _memory()
        for name, edit in plan.tensors.items():
            place = f"{self.place}tensors.{name}."
            source = edit.source or name
            if name not in self._after or source not in plan.source:
                refuse(f"{place}source", "it makes no tensor of the network, or of none")
            shape, dtype = plan.source[source][0], getattr(torch, plan.source[source][1])
            if edit.shape != shape:
                refuse(f"{place}shape", f"{source} is {list(shape)} in the plan's source")
            check_tensor(edit, dtype, place)
            variance = edit.absorption.variance if edit.absorption is not None else source
            if variance not in plan.source or plan.source[variance][0] != shape:
                refuse(f"{place}absorption.variance", f"it is no tensor of {list(shape)}")
            total += math.prod(edit.new_shape) * int(dtype.itemsize)
            if total > limit:
                refuse(f"{place}new_shape", "the new tensors do not fit into memory")
        for name, (_, is_new) in self._after.items():
            if is_new and plan.aliases.get(name, name) not in plan.tensors:
                refuse(f"{self.place}tensors", f"nothing makes the new {name}")

    def _check_aliases(self) -> None:
        """Check which tensors are one, and that each continues one that there is."""
        plan, after = self.plan, self._after
        for name, first in plan.aliases.items():
            known = name in after and first in after
            if not known or first in plan.aliases or name in plan.tensors:
                refuse(f"{self.place}aliases.{name}", "these are no two names of a tensor")
        for name, (old, _) in after.items():
            if not is_name(name) or old not in plan.source:
                refuse(f"{self.place}names.{name}", f"{old!r} is no tensor to make it of")
            first = plan.aliases.get(name, name)
            if plan.source[old] != plan.source.get(after[first][0]):
                refuse(f"{self.place}aliases.{name}", f"it is not like {first}")


def _check_request(request: Any, place: str) -> None:
    """Check what was asked for, as far as it is used again."""
    check_init(request.init, f"{place}init")
    for name in ("rescaling", "pairing", "method"):
        check_word(getattr(request, name), f"{place}{name}")
    check_factor(request.gain, f"{place}gain")
    check_amount(request.noise, f"{place}noise")
    check_amount(request.split_noise, f"{place}split_noise")
    if request.multiple_of < 1:
        refuse(f"{place}multiple_of", "it is not positive")


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
        at = f"{place}children.{index}."
        if child.source not in olds:
            refuse(f"{at}source", f"no module that stays was called {child.source!r}")
        changed = child.new or child.name != child.source
        if not child.name or "." in child.name or (changed and _stem(child.name) not in stems):
            refuse(f"{at}name", f"{child.name!r} is no module's name with another number")


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
