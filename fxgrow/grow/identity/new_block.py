"""A new block in a network that runs with it, and the edits that make its tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fxgrow.channels.channels import Channels
from fxgrow.errors import PlanError
from fxgrow.grow.identity.concrete_run import Recording, run_concretely
from fxgrow.labels.gains import Verdict
from fxgrow.labels.tape import Value
from fxgrow.modules.tensors import layer_of
from fxgrow.plan.edits import AxisEdit, Run, TensorEdit
from fxgrow.plan.step import BlockPlan

_NORM_VALUES = {"one": 1.0, "zero": 0.0}


@dataclass
class Filling:
    """How a new block becomes the identity.

    Attributes:
        constants: parameters and buffers of which every entry is one number.
        edits: axes that are laid out so that channels cancel by pairs, by tensor.
        identities: weights that pass on what they get.
        zeroed: what makes the branches zero (layers that read pairs, or parameters that are
            zero), or what passes on what it gets.
        notes: what a reader should know.
        in_training: what becomes of the function in train mode.
    """

    constants: dict[str, float]
    edits: dict[str, list[AxisEdit]] = field(default_factory=dict)
    identities: frozenset[str] = frozenset()
    zeroed: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    in_training: Verdict = "exact"


@dataclass(frozen=True)
class NewBlock:
    """A new block in the runs of a network that has it.

    Attributes:
        modules: the fully qualified names there of the modules that it consists of, in order.
        after: the module whose outputs it gets.
        runs: in eval mode, and in train mode if the network runs in it.
        tensors: its tensors by fully qualified name, tied ones under their first.
        parameters: the names of those that are parameters.
        channels: of the run in eval mode.
    """

    modules: tuple[str, ...]
    after: str
    runs: tuple[Recording, ...]
    tensors: Mapping[str, Tensor]
    parameters: frozenset[str]
    channels: Channels

    def fills(self, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield each tensor of the block with an axis that is filled in one of these ways."""
        for axis, fill in zip(self.channels.axes, self.channels.fills, strict=True):
            if axis.tensor in self.tensors and fill in wanted:
                yield axis.tensor, fill

    def is_in_chain(self) -> bool:
        """Return whether the block gets what the one before it gives, and is none beside it."""
        recording = self.runs[0]
        given = recording.calls[self.after][0].outputs
        return not set(given).isdisjoint(recording.ends(self.modules)[0])

    def exits(self, recording: Recording) -> list[tuple[Value, Value]]:
        """Return each output that the network uses, with the input that it must equal.

        Raises:
            PlanError: the block does not get what the one before it gives.
        """
        inputs, outputs = recording.ends(self.modules)
        given = recording.calls[self.after][0].outputs
        used = recording.used_outside(self.modules)
        pairs = []
        for place, value in enumerate(outputs):
            if value not in used:
                continue
            if place >= len(given) or given[place] not in inputs:
                raise PlanError(
                    f"what {self.after} gives does not go into the next block as it is",
                    name=self.after,
                )
            pairs.append((value, given[place]))
        return pairs


def passes(
    block: NewBlock,
    recording: Recording,
    constants: Mapping[str, float | Tensor],
    zeroed: Collection[int] = (),
) -> bool:
    """Return whether a block gives what it gets, if some operations give zero."""
    found = run_concretely(recording, block.modules, constants, zeroed)
    return all(found.same_as(*pair) for pair in block.exits(recording))


def of_norms(block: NewBlock) -> dict[str, float]:
    """Return the tensors of norms, which begin as those of a norm that is made anew."""
    return {name: _NORM_VALUES[fill] for name, fill in block.fills(_NORM_VALUES)}


def tensor_edits(
    block: NewBlock, filling: Filling, sources: Mapping[str, tuple[str, Tensor]]
) -> dict[str, TensorEdit]:
    """Return the edit that makes each tensor of a new block.

    Args:
        block: the block.
        filling: how it becomes the identity.
        sources: for each tensor of the block, the old one, with its name, that it is like.
    """
    drawn = {name for name, _ in block.fills(("draw",))}
    anew = {layer_of(name) for name in filling.constants if name not in block.parameters}
    found = {}
    for name, fan_in in _fans_in(block):
        tensor = block.tensors[name]
        like, old = sources[name]
        made = TensorEdit(tuple(old.shape), tuple(tensor.shape), fan_in=fan_in, source=like)
        if name in filling.identities:
            made = replace(made, fill="identity")
        elif name in filling.constants:
            made = replace(made, scale=filling.constants[name], fill="constant")
        elif name in filling.edits:
            made = replace(made, axes=tuple(filling.edits[name]))
        elif name in drawn:
            run = Run("new", 0, tensor.shape[0])
            made = replace(made, axes=(AxisEdit(0, "writer", 1, (run,)),))
        elif not tensor.ndim and not tensor.is_floating_point() and layer_of(name) in anew:
            # The number of batches that a norm has seen.
            made = replace(made, scale=0.0, fill="constant")
        found[name] = made
    return found


def _fans_in(block: NewBlock) -> Iterator[tuple[str, int]]:
    """Yield each tensor of a block with the fan_in of its layer."""
    roles = zip(block.channels.axes, block.channels.roles, strict=True)
    writers = {axis.tensor: axis.dim for axis, role in roles if role == "writer"}
    for name, tensor in block.tensors.items():
        weight = f"{layer_of(name)}.weight"
        owner = weight if tensor.ndim < 2 and weight in block.tensors else name
        sizes = tuple(block.tensors[owner].shape)
        rows = max(sizes[writers.get(owner, 0)], 1) if sizes else 1
        yield name, math.prod(sizes) // rows


def block_plan(block: NewBlock, like: str, method: str, filling: Filling) -> BlockPlan:
    """Return what a report tells of a new block.

    Args:
        block: the block.
        like: what it is a copy of.
        method: how it is kept from changing anything.
        filling: what that makes of its tensors.
    """
    return BlockPlan(
        name=block.modules[0],
        like=like,
        method=method,
        zeroed=filling.zeroed,
        preserves="exact",
        reason="; ".join(filling.notes),
        parameters=sum(block.tensors[name].numel() for name in block.parameters),
        in_training=filling.in_training,
    )
