"""Calls that say more as a whole than the operations that torch composes them of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fxgrow.labels.layers import cover, narrowed
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Value

_CELLS = frozenset(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"))
_LAYERS = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))


class _Labels(Protocol):
    """What knows the labels of a run."""

    space: LabelSpace

    def value(self, tensor: Tensor) -> Value:
        """Return the recorded value of a tensor."""


class WholeCalls(TorchFunctionMode):
    """A mode in which calls are seen as a whole.

    Weight norm is one operation, whichever dim has the lengths and whatever the dtype is; torch
    itself composes some of them of others, in which a norm of all columns is taken by itself. And
    the state that a recurrent layer reads is what it returns, though a run of one step from a state
    of zeros does not show it.

    Args:
        labels: of the run.
    """

    def __init__(self, labels: _Labels) -> None:
        super().__init__()
        self._labels = labels

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call."""
        kwargs = kwargs or {}
        if func is torch._weight_norm:
            return torch.ops.fxgrow._weight_norm_interface(*args, **kwargs)[0]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _CELLS:
            state = result if isinstance(result, Tensor) else result[0]
            self._is_read(state, None, args[3])
        elif name in _LAYERS:
            weights = next(list(arg) for arg in reversed(args) if isinstance(arg, (list, tuple)))
            places = result[1].shape[0]
            for place in range(places):
                own = weights[place * (len(weights) // places) :]
                self._is_read(result[1], place, own[1])
        return result

    def _is_read(self, state: Tensor, place: int | None, columns: Tensor) -> None:
        """Let the columns of a weight read the channels of a state, or of one of several.

        Args:
            state: (batch, width), or (places, batch, width); or without the batch.
            place: which of several it is.
            columns: (rows, width).
        """
        told = cover(self._labels.value(state).layers, state.ndim - 1)
        read = cover(self._labels.value(columns).layers, 1)
        if told is None or read is None:
            return
        with _disable_current_modes():  # labels are no data of the run
            own = told if place is None else told[place]
            self._labels.space.unify(
                narrowed(own, {own.ndim - 1}).contiguous(), narrowed(read, {1}).contiguous()
            )
