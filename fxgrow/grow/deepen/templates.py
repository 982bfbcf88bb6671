"""Which block of a stage a new one is a copy of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from fxgrow.channels.blocks import residual_additions
from fxgrow.errors import PlanError
from fxgrow.grow.identity.concrete_run import ModuleCall, Recording, is_inside
from fxgrow.grow.identity.stages import Stage, pattern
from fxgrow.modules.tensors import layer_of, named_tensors


@dataclass(frozen=True)
class Templates:
    """The blocks of a stage in a run of the network.

    Attributes:
        model: the network.
        stage: the stage.
        before: a run in which its modules were watched.
    """

    model: nn.Module
    stage: Stage
    before: Recording

    def likes(self) -> tuple[int, ...]:
        """Return the places of the blocks that the new ones are copies of.

        Raises:
            PlanError: no block of the list can be copied; the reason is that of the block before.
        """
        stage = self.stage
        blocks = [self.model.get_submodule(stage.child(p)) for p in range(len(stage.names))]
        period = pattern(blocks[: stage.after + 1])
        first = stage.after - period + 1
        places = [first + index % period for index in range(stage.count)]
        if all(self._is_usable(place) for place in places):
            return tuple(places)
        nearest = sorted(range(len(blocks)), key=lambda place: (abs(place - stage.after), -place))
        for place in nearest:
            same = type(blocks[place]) is type(blocks[stage.after])
            if same and self._is_usable(place):
                return (place,) * stage.count
        problem = self.problem(stage.after) or "no other block takes what that one gives"
        raise PlanError(
            f"no block of {stage.container or 'the network'} can be inserted after "
            f"{stage.child(stage.after)}: {problem}.",
            name=stage.key,
            way_out="Name another stage, or a block after which another like it can come.",
        )

    def _is_usable(self, place: int) -> bool:
        """Return whether a block can be copied, and takes what the one before the new one gives."""
        if place < 0 or self.problem(place):
            return False
        arriving = self.calls(self.stage.after)
        taken = self.calls(place)[0].inputs[0]
        return len(arriving) == 1 and arriving[0].outputs[0].shape == taken.shape

    def calls(self, place: int) -> list[ModuleCall]:
        """Return the calls of a module of the stage."""
        return self.before.calls[self.stage.child(place)]

    def problem(self, place: int) -> str:
        """Return why a block cannot be copied, as far as its surroundings tell, or ""."""
        name = self.stage.child(place)
        calls = self.calls(place)
        if len(calls) != 1:
            times = f"{len(calls)} times in a pass" if calls else "never"
            return f"{name} runs {times}"
        if other := self._shared(name):
            return f"{name} shares {other} with the rest of the network"
        if not calls[0].inputs or not calls[0].outputs:
            return f"{name} takes or gives no numbers"
        taken, given = calls[0].inputs[0], calls[0].outputs[0]
        if taken.shape != given.shape:
            for op in self.before.outside([name]):
                if op.name == "cat" and given in op.inputs:
                    return (
                        f"what {name} gives is joined to other channels (aten.cat at {op.module}), "
                        "so that whatever reads them would have to widen"
                    )
            if layer := self._projections.get(name, ""):
                return f"the shortcut of {name} projects ({layer})"
            shapes = ["x".join(map(str, shape)) for shape in (taken.shape, given.shape)]
            return f"{name} takes {shapes[0]} and gives {shapes[1]}"
        return ""

    def _shared(self, name: str) -> str:
        """Return a tensor of a block that is one of the rest's too, by its name there, or ""."""
        tensors = named_tensors(self.model)
        mine = {id(tensor) for other, tensor in tensors.items() if is_inside(other, name)}
        shared = (
            other for other, t in tensors.items() if id(t) in mine and not is_inside(other, name)
        )
        return next(shared, "")

    @cached_property
    def _projections(self) -> dict[str, str]:
        """The first layer of the shortcut of each block whose shortcut has one."""
        operations = self.before.tape.operations
        found: dict[str, str] = {}
        for block in residual_additions(self.before.tape):
            if block.skip != "projection":
                continue
            path = [operations[index] for index in block.skip_path if index >= 0]
            layers = [layer_of(parameter) for op in path for parameter in op.parameters]
            for name in self.before.calls:
                inside = is_inside(operations[block.addition].module, name)
                if inside and layers and is_inside(layers[0], name):
                    found.setdefault(name, layers[0])
        return found
