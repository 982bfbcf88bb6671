"""Operations whose results nobody reads: what they say of values binds no channel.

An ``nn.MultiheadAttention`` computes the mean of its heads' weights unless it is told not to, and
most callers throw it away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from fxgrow.labels.operators import traits_of
from fxgrow.labels.pins import PinKind
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Operation, Tape, Value
from fxgrow.modules.calling import tensors_in
from fxgrow.modules.decisions import looks_at_values
from fxgrow.modules.tensors import modules_of

# What an operation does to values alone. Whatever is laid out must still fit at new sizes.
_OF_VALUES = frozenset((PinKind.MIXED, PinKind.NO_RULE, PinKind.ACTIVATIONS, PinKind.CURVED))


def unread(tape: Tape, kept: Iterable[Value]) -> frozenset[int]:
    """Return the operations (by index) that lead to no output of the network.

    What is written in place, and what Python looks at, counts as read.

    Args:
        tape: of a finished run.
        kept: other values that outlast the run.
    """
    read = {value.index for value in (*tape.outputs, *kept)}
    found = set()
    for op in reversed(tape.operations):
        if _acts(op) or any(value.index in read for value in op.outputs):
            read |= {value.index for value in op.inputs}
        else:
            found.add(op.index)
    return frozenset(found)


def _acts(op: Operation) -> bool:
    """Return whether an operation does more than return tensors."""
    return not op.outputs or traits_of(op.target).is_mutable or looks_at_values(op.target)


def kept_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that modules hold after a run, but for their parameters."""
    for module in modules_of(model):
        yield from (buffer for buffer in module._buffers.values() if buffer is not None)
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, (Tensor, list, tuple, dict)):
                yield from tensors_in(value)


def forget(space: LabelSpace, operations: Iterable[int], said: Sequence[tuple[int, int]]) -> None:
    """Take back what operations that nobody reads said of the values of channels.

    Args:
        space: where it was recorded.
        operations: by index.
        said: how many mixers and pins were known before each operation of the run.
    """
    said = (*said, (len(space.mixers), len(space.pins)))
    for index in sorted(operations, reverse=True):  # from the end, so that places before it stay
        (mixer, pin), (last_mixer, last_pin) = said[index : index + 2]
        del space.mixers[mixer:last_mixer]
        told = space.pins[pin:last_pin]
        space.pins[pin:last_pin] = [item for item in told if item[1].kind not in _OF_VALUES]
