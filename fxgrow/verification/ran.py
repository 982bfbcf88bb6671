"""What networks computed, and what is as it was before and after they did."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fxgrow.modules.draws import OTHERS, Chance
from fxgrow.modules.expectation import Expectation
from fxgrow.plan.edits import NormGain
from fxgrow.verification.choices import Choice, Choosing
from fxgrow.verification.forward import Mode

Outputs: TypeAlias = list[Tensor]


class Job(NamedTuple):
    """What a network is to run on.

    Attributes:
        batch: which one of some.
        mode: in which mode.
        chance: what masks are made of.
    """

    batch: int
    mode: Mode
    chance: Chance = "mean"


class Ran(dict[Job, Outputs]):
    """The outputs of a network, by job.

    Attributes:
        choices: what it chose, by job.
        parted: how many choices it did not make by itself, by operation.
        masks: how many masks it drew, by job and kind; none for jobs in which it drew none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.choices: dict[Job, Sequence[Choice]] = {}
        self.parted: Counter[str] = Counter()
        self.masks: dict[Job, Counter[str]] = {}

    def enter(self, job: Job, outputs: Outputs, choosing: Choosing, run: Expectation) -> None:
        """Add what one job gave."""
        self[job], self.choices[job] = outputs, choosing.made
        self.parted.update(choosing.parted)
        if run.draws.masks or run.common:
            self.masks[job] = run.draws.masks

    def updated(self, other: Ran) -> Ran:
        """Return the same with some jobs as in another one."""
        found = Ran()
        for ran in (self, other):
            found.update(ran)
            found.choices.update(ran.choices)
            found.masks.update(ran.masks)
        return found


def further(jobs: Sequence[Job], ran: Ran) -> list[Job]:
    """Return jobs that show the other sides of random branches, one batch for each mode.

    Args:
        jobs: what was run.
        ran: what the old network did there.
    """
    drew = [job for job in jobs if job in ran.masks]
    first = {job.mode: job for job in reversed(drew)}
    return [job._replace(chance=chance) for job in first.values() for chance in OTHERS]


def tells(outputs: Outputs) -> bool:
    """Return whether outputs are numbers; logits that are masked may be infinite."""
    floating = [t for t in outputs if t.is_floating_point() and t.numel()]
    some = not floating or any(bool(t.isfinite().any()) for t in floating)
    return some and not any(bool(t.isnan().any()) for t in outputs)


@contextlib.contextmanager
def keeping_values(model: nn.Module) -> Iterator[None]:
    """Give buffers back, at the end, the values that they have."""
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in values:
            buffer.copy_(value)


@contextlib.contextmanager
def absorbing(reference: nn.Module, norms: Sequence[NormGain]) -> Iterator[None]:
    """Make norms behave, for a while, as they do in train mode after absorbing a gain s.

    Batch statistics meet eps / s² instead of eps; and channels whose running variance is too
    small to absorb s alone had their weight changed.
    """
    changed: list[tuple[Any, float, Tensor]] = []
    try:
        for norm in norms:
            module: Any = reference.get_submodule(norm.module)
            changed.append((module, module.eps, module.weight.detach().clone()))
            shifted = module.running_var + module.eps
            ratio = module.eps / (norm.gain**2 * shifted)
            with torch.no_grad():
                module.weight *= ratio.sqrt().clamp(min=1.0)
            module.eps = module.eps / norm.gain**2
        yield
    finally:
        for module, eps, weight in changed:
            module.eps = eps
            with torch.no_grad():
                module.weight.copy_(weight)
