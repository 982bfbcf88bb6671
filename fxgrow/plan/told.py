"""Whether what a plan tells is what it does.

Groups, blocks and kernels are for the reader: nothing is made of them. So a plan that was edited,
or damaged, could do one thing and tell another. What a plan tells is held against its edits here,
when a plan is read to be carried out and reported on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from fxgrow.errors import UsageError
from fxgrow.labels.space import Role
from fxgrow.modules.tensors import layer_of
from fxgrow.plan.amounts import amount
from fxgrow.plan.bounds import refuse
from fxgrow.plan.by_layer import values_in
from fxgrow.plan.edits import AxisEdit, TensorEdit
from fxgrow.plan.pairing import PAIRINGS, cancels
from fxgrow.plan.requests import Convert, Widen
from fxgrow.plan.rescaling import RESCALINGS, check_gain, gain_by_layer
from fxgrow.plan.step import BlockPlan, GroupPlan, KernelPlan, PlanStep

_LARGE = 1 << 40  # a width that only ratios below one make smaller


def check_told(step: PlanStep, place: str = "") -> None:
    """Return if what a step tells is what its edits do.

    Args:
        step: of a plan that :func:`fxgrow.plan.checks.check_step` has let pass.
        place: what its fields are called before their names.

    Raises:
        PlanError: it is not; the message names the field.
    """
    _Told(step, place).check()


@dataclass(frozen=True)
class _Told:
    """A step whose words are held against its edits."""

    step: PlanStep
    place: str

    def check(self) -> None:
        """Check all that is told, then that all that grows is told of.

        Raises:
            PlanError: one of the two is not so.
        """
        self._check_asked(f"{self.place}request.")
        self._check_counts()
        for index, group in enumerate(self.step.groups):
            self._check_group(group, f"{self.place}groups.{index}.")
        for index, block in enumerate(self.step.blocks):
            self._check_block(block, f"{self.place}blocks.{index}.")
        for index, kernel in enumerate(self.step.kernels):
            self._check_kernel(kernel, f"{self.place}kernels.{index}.")
        self._check_all_told()

    def _check_asked(self, place: str) -> None:
        """Check that what was asked for is what could have been."""
        request = self.step.request
        if isinstance(request, (Widen, Convert)):
            with _naming(f"{place}pairing"):
                for pairing in values_in(request.pairing):
                    PAIRINGS[pairing]
        if isinstance(request, Widen):
            with _naming(f"{place}rescaling"):
                for rescaling in values_in(request.rescaling):
                    RESCALINGS[rescaling]
            with _naming(f"{place}gain"):
                check_gain(gain_by_layer(request.gain), request.rescaling)
            with _naming(f"{place}width"):
                known = {_is_width(width) for width in values_in(request.width)}
            if not any(known):
                refuse(f"{place}width", f"nothing grows to {request.width!r}")
        for index, group in enumerate(self.step.groups):
            with _naming(f"{self.place}groups.{index}.pairing"):
                PAIRINGS[group.pairing]

    def _check_counts(self) -> None:
        """Check the numbers of operations and of parameters, as far as a plan alone tells them.

        Those of parameters are counted anew where the plan is carried out.
        """
        for name in ("parameters", "flops"):
            before, after = getattr(self.step, name)
            if before < 0 or after < 0:
                refuse(f"{self.place}{name}", "a number is negative")
        if isinstance(self.step.request, Widen) and self.step.flops[0] > self.step.flops[1]:
            refuse(f"{self.place}flops", "a wider network computes no less")

    @cached_property
    def _edits(self) -> dict[str, list[TensorEdit]]:
        """The edits of each layer, and of each tensor by its own name."""
        found: dict[str, list[TensorEdit]] = {}
        for name, edit in self.step.tensors.items():
            for owner in self._owners(name):
                found.setdefault(owner, []).append(edit)
        return found

    @cached_property
    def _other_names(self) -> dict[str, list[str]]:
        """The other names of tied tensors, by the name that their edit has."""
        found: dict[str, list[str]] = {}
        for name, first in self.step.aliases.items():
            found.setdefault(first, []).append(name)
        return found

    def _owners(self, name: str) -> set[str]:
        """Return what a tensor is told of under: its names, and those of its layers."""
        names = (name, *self._other_names.get(name, ()))
        return {*names, *map(layer_of, names)}

    @cached_property
    def _growth(self) -> Counter[str]:
        """By how many channels each writer grows in all of its groups together."""
        found: Counter[str] = Counter()
        for group in self.step.groups:
            old, new = group.width
            found.update(dict.fromkeys(group.writers, new - old))
        return found

    def _check_group(self, group: GroupPlan, place: str) -> None:
        """Check what is told of a channel group."""
        old, new = group.width
        if not 0 <= old < new:
            refuse(f"{place}width", f"{old} to {new} is no growth")
        self._check_name(group, f"{place}name")
        self._check_kind(group, place)
        told: tuple[tuple[Role, tuple[str, ...]], ...]
        told = ("writer", group.writers), ("reader", group.readers)
        for role, layers in told:
            for layer in layers:
                if layer not in self._edits:
                    why = f"it tells of {layer!r}, to which nothing is done"
                    refuse(f"{place}{role}s", why)
                tied = role == "reader" and layer in group.writers  # of one axis that is both
                if not (tied or self._takes_part(layer, role)):
                    refuse(f"{place}{role}s", f"{layer!r} is no {role} that grows")
        if not any(self._grows(writer, old, new) for writer in group.writers):
            refuse(f"{place}width", f"{old} to {new} is not what becomes of its writers")
        self._check_factors(group, place)
        self._check_verdict(group, place)

    def _takes_part(self, layer: str, role: Role) -> bool:
        """Return whether a layer has an axis of a role that grows.

        More groups of a convolution are read by more filters, of as many columns each; what reads
        copies that a norm before it silences is laid out as what they pass.
        """
        edits = self._edits[layer]
        if any(any(_grown(edit, role)) for edit in edits):
            return True
        filters = any(
            edit.module == layer and edit.attribute == "groups" for edit in self.step.modules
        )
        passed = any(len(edit.shape) > 1 and any(_grown(edit, "carrier")) for edit in edits)
        return role == "reader" and (filters or passed)

    def _check_name(self, group: GroupPlan, place: str) -> None:
        """Check that a group is called after its first writer, as no other group is.

        After the layer, or where that writes other groups as well, after its tensor, and where one
        tensor writes several, after that and the dim.
        """
        first = group.writers[0] if group.writers else ""
        tensor = group.name.rpartition("[")[0] or group.name
        if first not in (group.name, tensor, layer_of(tensor)):
            refuse(place, f"{group.name!r} is not its first writer")
        if self._names[group.name] > 1:
            refuse(place, f"two groups are called {group.name!r}")
        others = (name for name in self.step.source if name != tensor and layer_of(name) == first)
        edits = (self.step.tensors.get(name) for name in others)
        # An edit that writes nothing is of a bias; of what has no edit nothing is known.
        alone = all(edit is not None and not any(_grown(edit, "writer")) for edit in edits)
        if group.name != first and group.name == tensor and alone:
            refuse(place, f"{first!r} writes no other group")

    @cached_property
    def _names(self) -> Counter[str]:
        """How many groups have each name."""
        return Counter(group.name for group in self.step.groups)

    def _check_kind(self, group: GroupPlan, place: str) -> None:
        """Check where in the network a group is told to be.

        A block is called after the module that holds it, or where none does, after the addition.
        """
        if group.kind == "pinned":
            refuse(f"{place}kind", "what is pinned does not grow")
        if not group.block:
            return
        if group.kind == "stream":
            refuse(f"{place}block", "a stream is in no block")
        within = any(writer.startswith(f"{group.block}.") for writer in group.writers[:1])
        if not within and ("." in group.block or "add" not in group.block):
            refuse(f"{place}block", f"{group.writers[:1]} is not in {group.block!r}")

    def _grows(self, writer: str, old: int, new: int) -> bool:
        """Return whether a layer's outputs grow as a group of one width to another does."""
        told = self._growth[writer]
        sizes = [_sizes(edit, axis) for edit in self._edits[writer] for axis in edit.axes]
        return any(
            after > before and (after - before == told or after * old == before * new)
            for before, after in sizes
        )

    def _check_factors(self, group: GroupPlan, place: str) -> None:
        """Check the factors of old weights, and what takes them up."""
        # A weight may take more than its layer's factor: what makes up for others, or for a norm.
        for layer, factor in group.factors.items():
            if not factor > 0 or (layer not in self._edits and factor != 1.0):
                refuse(f"{place}factors.{layer}", f"it is not multiplied by {factor}")
        for name, told, layers in (
            ("alpha", group.alpha, group.writers),
            ("beta", group.beta, group.readers),
        ):
            known = {group.factors[layer] for layer in layers if layer in group.factors}
            if told is not None and told not in known:
                refuse(f"{place}{name}", f"{told} is no factor of its layers")
            single = all(self._parts(layer) == 1 for layer in layers)
            if told is None and len(known) == 1 and single:
                refuse(f"{place}{name}", f"it is {known.pop()}, the factor of its layers")
        set_ = {edit.module for edit in self.step.modules}
        for norm in group.absorbed_by:
            taken = any(edit.absorption is not None for edit in self._edits.get(norm, ()))
            if not taken and norm not in set_:
                refuse(f"{place}absorbed_by", f"{norm!r} takes nothing up")

    def _parts(self, layer: str) -> int:
        """Return how many tensors of a layer have axes of outputs or inputs that change."""
        return sum(
            any(axis.role in ("writer", "reader") for axis in edit.axes)
            for edit in self._edits.get(layer, ())
        )

    def _check_verdict(self, group: GroupPlan, place: str) -> None:
        """Check what is told to become of the function."""
        noise = isinstance(self.step.request, Widen) and self.step.request.noise
        kept = not noise and cancels(group.pairing)
        if group.preserves != "no" and not kept:
            refuse(f"{place}preserves", "its new channels do not cancel")
        if group.preserves == "exact" and group.gain != 1.0 and not self.step.multipliers:
            refuse(f"{place}gain", f"nothing makes up for {group.gain}")
        if group.preserves == "no" and not group.reason:
            refuse(f"{place}preserves", "no reason is given, and its new channels cancel")

    def _check_block(self, block: BlockPlan, place: str) -> None:
        """Check what is told of a block that is inserted."""
        within = f"{block.name}."
        made = [edit for name, edit in self.step.tensors.items() if name.startswith(within)]
        if not made:
            refuse(f"{place}name", f"nothing makes {block.name!r}")
        if not 0 <= block.parameters <= sum(math.prod(edit.new_shape) for edit in made):
            refuse(f"{place}parameters", f"{block.parameters} is more than it is made of")

    def _check_kernel(self, kernel: KernelPlan, place: str) -> None:
        """Check what is told of a layer whose kernel grows."""
        dims = len(kernel.before)
        sizes = [
            (edit.shape[-dims:], edit.new_shape[-dims:])
            for edit in self._edits.get(kernel.name, ())
            if any(axis.role == "kernel" for axis in edit.axes)
        ]
        if not dims or (kernel.before, kernel.after) not in sizes:
            refuse(f"{place}after", f"it is not what becomes of {kernel.name!r}")

    def _check_all_told(self) -> None:
        """Check that every layer whose outputs or inputs grow is told of in a group."""
        if not isinstance(self.step.request, Widen):
            return
        groups = self.step.groups
        roles: dict[Role, set[str]] = {
            "writer": {layer for group in groups for layer in group.writers},
            "reader": {layer for group in groups for layer in group.readers},
        }
        for role, told in roles.items():
            for name, edit in self.step.tensors.items():
                # What silences new channels beside tied ones, a norm's weight, is laid out as a
                # reader, and is none.
                linear = role == "writer" or len(edit.shape) > 1
                if told.isdisjoint(self._owners(name)) and linear and any(_grown(edit, role)):
                    refuse(
                        f"{self.place}groups", f"none of them tells of {name}, a {role} that grows"
                    )


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Let what a field asks for, and there is not, be refused as the field's.

    Raises:
        PlanError: the code inside raised a :class:`UsageError`.
    """
    try:
        yield
    except UsageError as error:
        refuse(place, error.reason)


def _is_width(width: str) -> bool:
    """Return whether a width that was asked for is one of more channels than none.

    Raises:
        UsageError: it is none.
    """
    is_relative = width.strip().startswith("+") or width.strip().endswith("x")
    asked = amount(width, _LARGE, what="width", way_out="")
    return asked >= (_LARGE if is_relative else 1)


def _grown(edit: TensorEdit, role: Role) -> Iterator[bool]:
    """Yield, for each axis of a role, whether it grows."""
    for axis in edit.axes:
        if axis.role == role:
            old, new = _sizes(edit, axis)
            yield new > old


def _sizes(edit: TensorEdit, axis: AxisEdit) -> tuple[int, int]:
    """Return how many positions an axis has before and after, over all groups."""
    return edit.shape[axis.dim] * axis.groups, sum(run.length for run in axis.runs)
