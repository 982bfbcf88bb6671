"""What a forward decides by values: recorded in one run, and given again in others.

Python may look at a value (``if x.max() > 1``, ``for row in mask.nonzero()``), and a tensor on the
meta device has none. What left the tensors in a run on real numbers is the same in every run that
computes the same, whatever the widths: the numbers themselves, and how many positions were found.
torch says which operations do that (:attr:`torch.Tag.data_dependent_output` and
:attr:`torch.Tag.dynamic_output_shape`); others of any library that cannot run on shapes alone are
taken for such.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import GetSetDescriptorType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from fxgrow.errors import TraceError
from fxgrow.modules.calling import map_kind, map_tensors

_META = torch.device("meta")
_TELLING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_MASKS = (torch.bool, torch.uint8)
_LOOKING_UP = torch.ops.aten.index.Tensor


class Extent(NamedTuple):
    """What is kept of a tensor that an operation returned: all that a run on shapes needs."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Decision(NamedTuple):
    """What an operation returned that looked at values.

    Attributes:
        operation: its name.
        result: a number or a list of them, or a nest of the :class:`Extent` of each tensor.
    """

    operation: str
    result: Any


class Decider(Protocol):
    """What answers for the values that a run on shapes does not have.

    Attributes:
        device: where tensors say that they are.
    """

    device: torch.device

    def decide(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation gives, its tensors on the meta device."""

    def read(self, tensor: Tensor, name: str, reading: Callable[[Tensor], Any]) -> Any:
        """Return what Python gets that reads all values of a tensor."""


@functools.cache
def looks_at_values(func: OpOverload) -> bool:
    """Return whether what an operation returns, or how much of it, is data."""
    return func is not _LOOKING_UP and any(tag in func.tags for tag in _TELLING)


def masks_in(indices: Sequence[Tensor | None]) -> bool:
    """Return whether there are masks among indices."""
    return any(index is not None and index.dtype in _MASKS for index in indices)


def positions_of(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return indices with the positions that each mask tells in place of it, a tensor a dim."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in _MASKS:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


class Replay:
    """Gives what was decided again, in order.

    Args:
        decisions: of a run of the same network.
        device: where its tensors were.
    """

    def __init__(self, decisions: Sequence[Decision], device: torch.device) -> None:
        self.device = device
        self._decisions = iter(decisions)

    def decide(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the operation gave; see :class:`Decider`.

        Raises:
            TraceError: that run did something else at this point.
        """
        return self._next(func._name)

    def read(self, tensor: Tensor, name: str, reading: Callable[[Tensor], Any]) -> Any:
        """Return the values that were read."""
        del tensor, reading
        return self._next(name)

    def _next(self, name: str) -> Any:
        found = next(self._decisions, None)
        if found is None or found.operation != name:
            said = "nothing" if found is None else found.operation
            raise TraceError(
                f"at these sizes the network asks for what {name} tells, and at its own sizes it "
                f"asked for {said} there"
            )
        return map_kind(Extent, _empty, found.result)


def _empty(extent: Extent) -> Tensor:
    return torch.empty(extent.shape, dtype=extent.dtype, device=_META)


def extents(result: Any) -> Any:
    """Return a result with the :class:`Extent` in place of each tensor."""
    return map_tensors(lambda tensor: Extent(tuple(tensor.shape), tensor.dtype), result)


_READING: dict[object, tuple[str, Callable[[Tensor], Any]]] = {
    Tensor.tolist: ("tolist", Tensor.tolist),
    Tensor.numpy: ("numpy", lambda tensor: tensor.numpy().copy()),
    Tensor.__array__: ("numpy", lambda tensor: tensor.numpy().copy()),
}


class AsIfReal(TorchFunctionMode):
    """Lets tensors say that they are on a device, and Python read what was read in another run.

    Libraries ask tensors where they are before they choose how to go on.

    Args:
        decider: answers for values.
        left: told of the tensors of which all values were read.
    """

    def __init__(self, decider: Decider, left: Callable[[Tensor, str], None]) -> None:
        super().__init__()
        self._decider, self._left = decider, left
        kind = decider.device.type
        self._said = {
            id(Tensor.device): decider.device,
            id(Tensor.is_meta): kind == "meta",
            id(Tensor.is_cpu): kind == "cpu",
            id(Tensor.is_cuda): kind == "cuda",
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer for a tensor, or run the call."""
        asked = getattr(func, "__self__", None)
        if type(asked) is GetSetDescriptorType and id(asked) in self._said:
            return self._said[id(asked)]
        name, reading = _READING.get(func, ("", None))
        if reading is not None and args[0].is_meta:
            self._left(args[0], name)
            return self._decider.read(args[0], name, reading)
        return func(*args, **(kwargs or {}))
