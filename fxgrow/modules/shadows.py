"""One run on real numbers beside the shapes, to find out what a forward decides by values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.weak import WeakTensorKeyDictionary

from fxgrow.errors import TraceError
from fxgrow.modules.calling import Arguments, call, map_tensors, tensors_in
from fxgrow.modules.decisions import Decision, extents
from fxgrow.modules.draws import Chance, same_chance
from fxgrow.modules.on_meta import OnMeta
from fxgrow.modules.standin import keeping_state
from fxgrow.modules.tensors import named_tensors

_MOST = 1 << 20  # decisions of one run: a loop that never ends asks for ever
_MOST_DRAWN = 1 << 31  # entries of a network without values
_FINDING = ("nonzero", "nms")  # what returns positions, of which there may be none
_MOST_FOUND = 1 << 10  # of those that find something where nothing is


class Shadows(OnMeta):  # type: ignore[no-untyped-call]
    """A run on the meta device in which each tensor has values beside it, and decides by them.

    Args:
        real: the values of tensors on the meta device, by their ids.
        device: where tensors say that they are.
        finds: where an operation finds no positions at all, it says that it found the first one,
            so that what would be computed of them is.
        yes: what truth values that leave the tensors are taken for, if not for what they are.
        number: the same for other numbers, which may be positions in a list of modules.
        chance: what masks are made of.

    Attributes:
        decisions: what was decided, in order.
        met: ids of the tensors of the network that took part.
    """

    def __init__(
        self,
        real: Mapping[int, Tensor],
        device: torch.device,
        *,
        finds: bool = True,
        yes: bool | None = None,
        number: int | None = None,
        chance: Chance = "spread",
    ) -> None:
        self.device = device
        self.decisions: list[Decision] = []
        self.met: set[int] = set()
        super().__init__(self, chance)
        self._lasting = real
        self._real = WeakTensorKeyDictionary()
        lent = (tensor for tensor in real.values() if isinstance(tensor, nn.Parameter))
        self._lent = {tensor.untyped_storage().data_ptr() for tensor in lent}
        self._finds, self._yes, self._number = finds, yes, number
        self._found = 0

    def decide(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation gives on the values; see :class:`Decider`."""
        real = self._run(func, args, kwargs)
        if self._finds and func._opname in _FINDING and isinstance(real, Tensor):
            real = self._at_least_one(real, args[0])
        if self._yes is not None and isinstance(real, bool):
            real = self._yes
        return self._decided(func._name, self._forced(real))

    def read(self, tensor: Tensor, name: str, reading: Callable[[Tensor], Any]) -> Any:
        """Return all values of a tensor."""
        with torch._C.DisableTorchFunction():
            return self._decided(name, self._forced(reading(self._values(tensor))))

    def _forced(self, real: Any) -> Any:
        """Return what left the tensors, with other numbers if it is to be others."""
        if isinstance(real, list):
            return [self._forced(item) for item in real]
        plain = isinstance(real, (int, float)) and not isinstance(real, bool)
        return type(real)(self._number) if plain and self._number is not None else real

    def ran(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
        result: object,
    ) -> None:
        """Do the same to the values."""
        self.met.update(id(tensor) for tensor in operands if id(tensor) in self._lasting)
        made = tensors_in(result)
        known = not func._schema.is_mutable and all(tensor in self._real for tensor in made)
        if any(tensor.is_meta for tensor in made) and not known:
            real = tensors_in(self._run(func, args, kwargs))
            if not (func.is_view or func._schema.is_mutable):
                real = [_laid_out(own, tensor) for own, tensor in zip(real, made, strict=True)]
            self._keep(made, real)

    def joined(self, tensor: Tensor, twin: Tensor) -> None:
        """Let the twin of a constant have its values."""
        self._real[twin] = tensor

    def _values(self, tensor: Tensor) -> Tensor:
        """Return the values of a tensor."""
        if not tensor.is_meta:
            return tensor
        found: Tensor | None = self._real.get(tensor)  # type: ignore[no-untyped-call]
        found = self._lasting.get(id(tensor)) if found is None else found
        if found is None and isinstance(tensor, nn.Parameter):
            raise TraceError(
                "it makes a parameter of a tensor (nn.Parameter) on its way",
                way_out="Run the network once before, if only its first run does that.",
            )
        if found is None:
            raise TraceError("it uses a tensor that no operation of this run has made")
        return found

    def _run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation gives on the values, all of them where the first ones are."""
        if func._schema.is_mutable:
            self._spare(tensors_in((args, kwargs))[0])
        args, kwargs = map_tensors(self._values, (args, kwargs))
        given = tensors_in((args, kwargs))
        there = next((tensor.device for tensor in given if tensor.device.type != "cpu"), None)
        if there is not None:
            args, kwargs = map_tensors(lambda x: x.to(there) if x.ndim else x, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": given[0].device if given else torch.device("cpu")}
        return self.draws.run(func, args, kwargs)

    def _spare(self, tensor: Tensor) -> None:
        """Give what is written over values of its own, if it has those of the user's parameter."""
        values = self._values(tensor)
        if values.untyped_storage().data_ptr() in self._lent:
            self._real[tensor] = values.clone()

    def _decided(self, name: str, real: Any) -> Any:
        """Write a decision down, and return it on the meta device."""
        if len(self.decisions) >= _MOST:
            raise TraceError("the forward looks at values without an end")
        self.decisions.append(Decision(name, extents(real)))
        result = map_tensors(_like, real)
        self._keep(tensors_in(result), real)
        return result

    def _keep(self, made: Sequence[Tensor], real: Any) -> None:
        for tensor, values in zip(made, tensors_in(real), strict=True):
            self._real[tensor] = values

    def _at_least_one(self, found: Tensor, searched: Tensor) -> Tensor:
        """Return positions: the first one where none was found and there are any."""
        if len(found) or not searched.numel() or not searched.ndim:
            return found
        self._found += 1
        if self._found > _MOST_FOUND:
            raise TraceError("the forward goes on as long as it finds anything")
        return found.new_zeros((1, *found.shape[1:]))


def _laid_out(values: Tensor, like: Tensor) -> Tensor:
    """Return values that lie in memory as a tensor does: kernels of two devices may differ in that.

    What may be viewed on the meta device may then be viewed here.
    """
    if values.stride() == like.stride() or values.shape != like.shape:
        return values
    laid_out = torch.empty_strided(
        like.shape, like.stride(), dtype=values.dtype, device=values.device
    )
    return laid_out.copy_(values)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def values_of(standin: nn.Module, model: nn.Module) -> dict[int, Tensor]:
    """Return the values of a network's tensors by the ids of those that stand in for them.

    Those that it does not have are drawn: it may be known by its shapes alone. Buffers are copied.

    Raises:
        TraceError: it has no values, and is too large to draw them.
    """
    generator = torch.Generator().manual_seed(0)
    own, found, drawn = named_tensors(model), {}, 0
    for name, tensor in named_tensors(standin).items():
        real = own[name]
        if real.is_meta:
            drawn += real.numel()
            if drawn > _MOST_DRAWN:
                raise TraceError("it has no values, and is too large to draw them")
            real = _drawn(real, generator)
        found[id(tensor)] = real if isinstance(real, nn.Parameter) else real.clone()
    return found


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return values for a tensor without: those of a layer keep the size of what it gets."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if tensor.ndim < 2:
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    drawn = torch.randn(tensor.shape, generator=generator)
    return (drawn / math.sqrt(math.prod(tensor.shape[1:]))).to(tensor.dtype)


def record(
    target: nn.Module,
    values: Mapping[int, Tensor],
    inputs: Arguments,
    real_inputs: Arguments,
    device: torch.device,
    **how: Any,
) -> Shadows:
    """Return a run of a network on inputs, in which it has decided by values.

    Args:
        target: the network on the meta device, in the mode in which it is to run.
        values: of its tensors, by their ids; see :func:`values_of`.
        inputs: on the meta device, others with values.
        real_inputs: the same with values.
        device: where its tensors say that they are.
        how: as for :class:`Shadows`.

    Raises:
        Exception: whatever the forward raises.
    """
    pairs = zip(tensors_in(inputs), tensors_in(real_inputs), strict=True)
    real = {id(meta): x.detach().clone() for meta, x in pairs if meta.is_meta}
    shadows = Shadows({**values, **real}, device, **how)
    chance = same_chance(how.get("chance", "spread"))
    with torch.no_grad(), chance, keeping_state(target), shadows:
        call(target, inputs)
    return shadows
