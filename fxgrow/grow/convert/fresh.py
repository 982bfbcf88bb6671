"""New modules of a larger architecture: what their tensors hold, so that nothing changes.

A new module may write channels of its own, which old layers then read by zeros (a dense layer,
whose output is concatenated). Or it writes channels that others write too (a residual block): then
it must give what it gets, as any block that is inserted. Or it is a layer in a chain, and passes on
what it gets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.channels import Channels, resolve
from fxgrow.errors import PlanError
from fxgrow.grow.identity.concrete_run import Recording, any_inside, is_inside, record
from fxgrow.grow.identity.filling import METHODS
from fxgrow.grow.identity.new_block import Filling, NewBlock, block_plan, of_norms, tensor_edits
from fxgrow.grow.identity.stages import child_of
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import AxisEdit, Run, TensorEdit
from fxgrow.plan.step import BlockPlan


@dataclass(frozen=True)
class Fresh:
    """The new modules of a network.

    Attributes:
        analysis: of the network, the new modules included.
        units: their names, those together that pass on what they get together: a layer of a chain
            with its norm and its activation, or a block by itself.
        old: the tensors of the smaller network by name.
    """

    analysis: Analysis
    units: tuple[tuple[str, ...], ...]
    old: Mapping[str, Tensor]

    @property
    def _network(self) -> nn.Module:
        return self.analysis.traced.standin

    @cached_property
    def _runs(self) -> tuple[Recording, ...]:
        """Runs in eval mode, and in train mode if the inputs are large enough for that."""
        watched = {name for unit in self.units for name in (*unit, self._before(unit))}
        found = [record(self.analysis.traced, watched)]
        try:
            found.append(record(self.analysis.traced, watched, training=True))
        except Exception:  # a user's forward may raise anything
            return tuple(found)
        return tuple(found)

    def _before(self, unit: tuple[str, ...]) -> str:
        """Return the module before a unit in the list that holds both."""
        parent, _, local = unit[0].rpartition(".")
        names = [name for name, _ in self._network.get_submodule(parent).named_children()]
        return child_of(parent, names[max(names.index(local) - 1, 0)])

    def _method(self, unit: tuple[str, ...], block: NewBlock) -> str:
        """Return how a unit is kept from changing anything."""
        single = not any(True for _ in self._network.get_submodule(unit[0]).children())
        if single and block.is_in_chain():
            return "net2deeper"
        channels = self.analysis.channels
        own = [
            self._own[channels.of_axis(index)]
            for index, axis in enumerate(channels.axes)
            if channels.roles[index] == "writer" and any_inside(axis.tensor, unit)
        ]
        return "read_by_zeros" if all(one.all() for one in own) else "r2deeper"

    @cached_property
    def _own(self) -> npt.NDArray[np.bool_]:
        """Whether each channel is of new modules alone: nothing old writes it, and weights read it.

        What no weight reads becomes something that cannot grow, as where an input is added to it.
        """
        fresh = [name for unit in self.units for name in unit]
        channels = self.analysis.channels
        own = np.zeros(channels.count, dtype=bool)
        for index, role in enumerate(channels.roles):
            if role == "reader":
                own[channels.of_axis(index)] = True
        for index, axis in enumerate(channels.axes):
            if channels.roles[index] == "writer" and not any_inside(axis.tensor, fresh):
                own[channels.of_axis(index)] = False
        return own

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return named_tensors(self._network)

    @cached_property
    def _channels(self) -> Channels:
        """The channels of the run in eval mode."""
        return resolve(self._runs[0].space)

    def edits(
        self, unit: tuple[str, ...], likes: Mapping[str, str]
    ) -> tuple[dict[str, TensorEdit], BlockPlan]:
        """Return the edits that make the tensors of a unit, and what is done there.

        Args:
            unit: one of ``units``.
            likes: for each module of it with weights, the old one that tells how large these are.

        Raises:
            PlanError: it cannot be kept from changing anything, or the old one has no such tensors.
        """
        own = {name: tensor for name, tensor in self._tensors.items() if any_inside(name, unit)}
        sources = {}
        for module, like in likes.items():
            for name in own:
                if is_inside(name, module):
                    source = like + name.removeprefix(module)
                    if source not in self.old:
                        raise PlanError(
                            f"nothing in the source's {like} is like {name}.", name=name
                        )
                    sources[name] = source, self.old[source]
        parameters = frozenset(name for name in own if isinstance(own[name], nn.Parameter))
        block = NewBlock(unit, self._before(unit), self._runs, own, parameters, self._channels)
        method = self._method(unit, block)
        filling = METHODS[method](block) if method in METHODS else Filling(of_norms(block))
        edits = {name: fitted(e) for name, e in tensor_edits(block, filling, sources).items()}
        return edits, block_plan(block, likes[unit[0]], method, filling)


def units_of(network: nn.Module, fresh: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Return new modules in units, those without weights left out where they stand alone.

    Args:
        network: that has them.
        fresh: their names, in order.
    """
    units: list[list[str]] = []
    for name in fresh:
        module = network.get_submodule(name)
        single = not any(True for _ in module.children())
        starts = any(parameter.ndim > 1 for parameter in module.parameters())
        follows = single and units and _parent(units[-1][0]) == _parent(name) and not starts
        if follows and not any(True for _ in network.get_submodule(units[-1][0]).children()):
            units[-1].append(name)
        elif any(True for _ in module.parameters()):
            units.append([name])
    return tuple(tuple(unit) for unit in units)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def fitted(edit: TensorEdit) -> TensorEdit:
    """Return the edit of a new tensor that is like an old one of another shape.

    Where nothing is said of a dim, the old one's entries are taken in turn.

    Raises:
        PlanError: the shapes have not as many dims.
    """
    if len(edit.shape) != len(edit.new_shape):
        counts = f"{len(edit.shape)} dims, and {len(edit.new_shape)} are needed"
        raise PlanError(f"{edit.source} has {counts}.", name=edit.source)
    told = {axis.dim for axis in edit.axes}
    others = tuple(
        AxisEdit(dim, "carrier", 1, _in_turn(before, after))
        for dim, (before, after) in enumerate(zip(edit.shape, edit.new_shape, strict=True))
        if dim not in told and before != after and not edit.fill
    )
    return replace(edit, axes=(*others, *edit.axes))


def _in_turn(before: int, after: int) -> tuple[Run, ...]:
    """Return runs that repeat old positions until there are enough."""
    return tuple(Run("old", 0, min(before, after - at)) for at in range(0, after, before))


def bridges(edits: Mapping[str, TensorEdit]) -> Collection[str]:
    """Return the weights that pass on each channel as it is."""
    return [name for name, edit in edits.items() if edit.fill == "identity"]
