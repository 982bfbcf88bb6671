"""What a network does in train mode alone, found without labels: noise, further outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
from fxgrow.modules.standin import keeping_state


def differs_in_training(
    standin: nn.Module, target: nn.Module, inputs: Arguments, tape: Tape, decider: Decider | None
) -> bool:
    """Return whether train mode draws further noise, or returns something of other shapes.

    Args:
        standin: the network on the meta device.
        target: the part of it that is run, in train mode.
        inputs: what it takes.
        tape: of the run in eval mode.
        decider: answers where the network looks at values.

    Raises:
        Exception: whatever the forward raises.
    """
    known = Counter(op.target for op in tape.operations if _is_noise(op.target))
    recorder = _Draws(decider)
    with torch.no_grad(), same_chance(), keeping_state(standin), recorder:
        result = call(target, inputs)
    shapes = [tuple(tensor.shape) for tensor in tensors_in(result)]
    return bool(recorder.found - known) or shapes != [value.shape for value in tape.outputs]


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
