"""A new block in a network that runs with it, and the edits that make its tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fxgrow.channels.channels import Channels
from fxgrow.channels.groups import layer_of
from fxgrow.errors import PlanError
from fxgrow.grow.identity.concrete_run import Recording, rehearse
from fxgrow.labels.gains import Verdict
from fxgrow.labels.tape import Value
from fxgrow.plan.edits import AxisEdit, Run, TensorEdit

_NORM_VALUES = {"one": 1.0, "zero": 0.0}


@dataclass
class Filling:
    """How a new block becomes the identity.

    Attributes:
        constants: parameters and buffers of which every entry is one number.
        edits: axes that are laid out so that twins cancel, by tensor.
        identities: weights that pass on what they get.
        zeroed: what silences the branches (layers that read twins, or parameters that are zero),
            or what passes on what it gets.
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

    @property
    def name(self) -> str:
        """The name of its first module."""
        return self.modules[0]

    def fills(self, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield each tensor of the block with an axis that is filled in one of these ways."""
        for axis, fill in zip(self.channels.axes, self.channels.fills, strict=True):
            if axis.tensor in self.tensors and fill in wanted:
                yield axis.tensor, fill

    def exits(self, recording: Recording) -> list[tuple[Value, Value]]:
        """Return each output that the network uses, with the input that it must equal.

        Raises:
            PlanError: the block does not get what the one before it gives.
        """
        inputs, outputs = recording.ends(self.modules)
        given = recording.passages[self.after][0].outputs
        used = {value.index for op in recording.outside(self.modules) for value in op.inputs}
        used |= {value.index for value in recording.tape.outputs}
        arrived = {value.index for value in inputs}
        pairs = []
        for place, value in enumerate(outputs):
            if value.index not in used:
                continue
            if place >= len(given) or given[place].index not in arrived:
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
    silent: Collection[int] = (),
) -> bool:
    """Return whether a block gives what it gets, with these constants and silent operations."""
    found = rehearse(recording, block.modules, constants, silent)
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
    writers = {
        axis.tensor: axis.dim
        for axis, role in zip(block.channels.axes, block.channels.roles, strict=True)
        if role == "writer"
    }
    anew = {layer_of(name) for name in filling.constants if name not in block.parameters}
    found = {}
    for name, tensor in block.tensors.items():
        shape = tuple(tensor.shape)
        weight = f"{layer_of(name)}.weight"
        owner = weight if tensor.ndim < 2 and weight in block.tensors else name
        sizes = tuple(block.tensors[owner].shape)
        fan_in = math.prod(sizes) // max(sizes[writers.get(owner, 0)], 1) if sizes else 1
        like, old = sources[name]
        made = TensorEdit(tuple(old.shape), shape, fan_in=fan_in, source=like)
        if name in filling.identities:
            made = replace(made, fill="identity")
        elif name in filling.constants:
            made = replace(made, scale=filling.constants[name], fill="constant")
        elif name in filling.edits:
            made = replace(made, axes=tuple(filling.edits[name]))
        elif name in drawn:
            run = Run("new", 0, shape[0])
            made = replace(made, axes=(AxisEdit(0, "writer", 1, (run,)),))
        elif not tensor.ndim and not tensor.is_floating_point() and layer_of(name) in anew:
            made = replace(
                made, scale=0.0, fill="constant"
            )  # the number of batches that a norm has seen
        found[name] = made
    return found
