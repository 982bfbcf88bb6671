"""Follow a schedule in a training loop: when a stage begins, and what the network becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxgrow.errors import SourceError, UsageError, shown
from fxgrow.training.in_place import Grown, deepen_, grow_
from fxgrow.training.rates import Rates
from fxgrow.training.schedule import GrowthSchedule

_OF_BOTH = ("seed", "strict", "verify", "progress")


def enter_stage_(
    model: nn.Module,
    schedule: GrowthSchedule,
    stage: int,
    example_inputs: object = None,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: object = None,
    averages: Iterable[nn.Module] | nn.Module = (),
    lr: Rates = "none",
    method: str = "r2deeper",
    **options: Any,
) -> tuple[Grown, ...]:
    """Make a network what a stage of a schedule says, in place: first deeper, then wider.

    Args:
        model: the network as it was in the stage before.
        schedule: the stages.
        stage: the number of the one that begins, from 0.
        example_inputs: as for :func:`fxgrow.training.grow_`, as all up to ``lr``.
        optimizer: what trains the network, or several.
        scheduler: of the learning rate, or several.
        averages: copies of the network that average its weights.
        lr: what happens to learning rates.
        method: of new blocks, as for :func:`fxgrow.deepen`.
        **options: those of :func:`fxgrow.widen`; ``where`` is the schedule's.

    Returns:
        What has grown: nothing, or one entry each for depth and width.

    Raises:
        TraceError, PlanError, NotPreservedError, VerificationError: as for
            :func:`fxgrow.training.grow_`. Where new blocks came first, they stay.

    Example:
        >>> import torch
        >>> from fxgrow.training import GrowthSchedule, enter_stage_
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> schedule = GrowthSchedule.of([{"epochs": 5}, {"epochs": 10, "width": "2x"}])
        >>> for epoch in range(15):
        ...     stage = schedule.stage_at(epoch)
        ...     if epoch and stage != schedule.stage_at(epoch - 1):
        ...         grown = enter_stage_(net, schedule, stage)
        >>> net[0].out_features
        16
    """
    if not 0 <= stage < len(schedule.stages):
        raise UsageError(f"there is no stage {stage} of {len(schedule.stages)}.")
    told, found = schedule.stages[stage], list[Grown]()
    follow: dict[str, Any] = {
        "optimizer": optimizer, "scheduler": scheduler, "averages": averages, "lr": lr,
    }  # fmt: skip
    if stage and told.blocks:
        shared = {name: options[name] for name in _OF_BOTH if name in options}
        found.append(deepen_(model, told.blocks, example_inputs, method=method, **follow, **shared))
    if stage and told.width:
        options = {"where": schedule.where, **options}
        found.append(grow_(model, told.width, example_inputs, **follow, **options))
    return tuple(found)


class GrowthClock:
    """Counts the epochs of a training, and tells when the next stage of a schedule begins.

    Args:
        schedule: the stages.

    Attributes:
        stage: the present one, from 0.
        epochs: how many of it are over.
        best: the best value of the metric in it; None before there is any.
        stale: how many epochs ago that was.

    Example:
        >>> from fxgrow.training import GrowthClock, GrowthSchedule, Plateau
        >>> schedule = GrowthSchedule.of(
        ...     [{"epochs": None}, {"epochs": None, "width": "2x"}], plateau=Plateau(patience=2)
        ... )
        >>> clock = GrowthClock(schedule)
        >>> [clock.step(loss) for loss in (2.0, 1.0, 1.0, 1.0, 1.0)]
        [None, None, None, 1, None]
    """

    def __init__(self, schedule: GrowthSchedule) -> None:
        self.schedule = schedule
        self.stage = 0
        self._begin(0)

    def _begin(self, stage: int) -> None:
        self.stage, self.epochs, self.stale = stage, 0, 0
        self.best: float | None = None

    def step(self, metric: float | None = None) -> int | None:
        """Count an epoch that is over.

        Args:
            metric: what it ended with, where a plateau is waited for.

        Returns:
            The stage that begins now (see :func:`enter_stage_`), or None.

        Raises:
            UsageError: a plateau is waited for, and there is no metric; or it is no number.
        """
        told, plateau = self.schedule.stages[self.stage], self.schedule.plateau
        value = _number(metric)
        if plateau is not None and value is None:
            raise UsageError(
                "the schedule waits for a plateau.", way_out="Give the metric: step(loss)."
            )
        self.epochs += 1
        over = told.epochs is not None and self.epochs >= told.epochs
        if plateau is not None and value is not None:
            if plateau.improves(value, self.best):
                self.best, self.stale = value, 0
            else:
                self.stale += 1
            over = over or self.stale >= plateau.patience
        if not over or self.stage == len(self.schedule.stages) - 1:
            return None
        self._begin(self.stage + 1)
        return self.stage

    def state_dict(self) -> dict[str, Any]:
        """Return where the training is, in numbers."""
        return {
            "stage": self.stage, "epochs": self.epochs, "best": self.best, "stale": self.stale,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken.

        Raises:
            SourceError: the state is of another schedule, or none.
        """
        counts = [state.get(name) for name in ("stage", "epochs", "stale")]
        best = state.get("best")
        valid = all(type(n) is int and n >= 0 for n in counts)
        if not valid or not (best is None or isinstance(best, float)):
            raise SourceError("this is not the state of a GrowthClock.")
        stage, epochs, stale = (int(str(n)) for n in counts)
        if stage >= len(self.schedule.stages):
            raise SourceError(
                f"the state is of stage {stage}, and the schedule has {len(self.schedule.stages)}.",
                way_out="Load it with the schedule of that training.",
            )
        self.stage, self.epochs, self.best, self.stale = stage, epochs, best, stale


def _number(metric: object) -> float | None:
    """Return a metric as a number, that of a tensor too.

    Raises:
        UsageError: it is none.
    """
    try:
        return None if metric is None else float(metric)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"the metric {shown(repr(metric))} is no number.", way_out="Give one: step(loss)."
        ) from error
