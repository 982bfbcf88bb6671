"""What a network does in train mode alone, found without labels: noise, further outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload

from fxgrow.labels.noise import by_given_chance, drawn_by
from fxgrow.labels.tape import Tape
from fxgrow.modules.calling import Arguments, call, tensors_in
from fxgrow.modules.decisions import Decider
from fxgrow.modules.draws import same_chance
from fxgrow.modules.on_meta import OnMeta
from fxgrow.modules.standin import keeping_state, set_training


@dataclass(frozen=True)
class TrainRun:
    """What a run in train mode draws and returns.

    Attributes:
        draws: how often each operation drew noise.
        shapes: of the tensors that it returned, in order.
    """

    draws: Counter[OpOverload]
    shapes: tuple[tuple[int, ...], ...]

    def adds_to(self, tape: Tape) -> bool:
        """Return whether it draws more than a run in eval mode, or returns other shapes."""
        known = Counter(op.target for op in tape.operations if _is_noise(op.target))
        return bool(self.draws - known) or self.shapes != tuple(v.shape for v in tape.outputs)


def run_in_training(
    standin: nn.Module, target: nn.Module, inputs: Arguments, decider: Decider | None
) -> TrainRun | Exception:
    """Run a network in train mode, without labels; return what it raised where it fails.

    Args:
        standin: the network on the meta device.
        target: the part of it that is run; in train mode afterwards.
        inputs: what it takes.
        decider: answers where the network looks at values.
    """
    set_training(target, mode=True)
    recorder = _Draws(decider)
    try:
        with torch.no_grad(), same_chance(), keeping_state(standin), recorder:
            result = call(target, inputs)
    except Exception as error:  # a user's forward may raise anything, as on a batch of one
        return error
    return TrainRun(recorder.found, tuple(tuple(tensor.shape) for tensor in tensors_in(result)))


def _is_noise(target: OpOverload) -> bool:
    return drawn_by(target) in ("noise", "uniform") or by_given_chance(target)


class _Draws(OnMeta):  # type: ignore[no-untyped-call]
    """Counts the operations that draw noise."""

    def __init__(self, decider: Decider | None) -> None:
        super().__init__(decider, "spread")
        self.found: Counter[OpOverload] = Counter()

    def ran(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[torch.Tensor],
        result: object,
    ) -> None:
        """Count an operation."""
        if _is_noise(func):
            self.found[func] += 1
