"""Growth on a plateau in trainers: the metric by its name, once for each epoch that has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxgrow.errors import PlanError, SourceError, UsageError, shown
from fxgrow.training.schedule import GrowthSchedule
from fxgrow.training.stages import GrowthClock


class Monitored:
    """The clock of a schedule that waits for a plateau, and the metric that it waits on.

    Args:
        schedule: with a plateau.
        monitor: the metric's name.

    Raises:
        UsageError: there is no name.
    """

    def __init__(self, schedule: GrowthSchedule, monitor: str | None) -> None:
        if not isinstance(monitor, str) or not monitor:
            raise UsageError(
                "the schedule waits for a plateau, and no metric is named.",
                way_out='Give the callback monitor="val_loss", as the metric is logged.',
            )
        self.name, self.clock, self._counted = monitor, GrowthClock(schedule), 0
        self._noted: tuple[int, float] | None = None

    @property
    def stage(self) -> int:
        """The stage of the schedule that it is time for."""
        return self.clock.stage

    def is_counted(self, number: int) -> bool:
        """Return whether an epoch (or evaluation) of a number, from 1, has been counted."""
        return number <= self._counted

    def note(self, number: int, metrics: Mapping[str, Any]) -> None:
        """Note what an epoch has come to before it is over, for a checkpoint written in between.

        Args:
            number: of the epoch, from 1.
            metrics: what there is by then.
        """
        if self.name in metrics:
            self._noted = number, float(metrics[self.name])

    def noted(self, number: int) -> dict[str, float]:
        """Return the metric by its name as it was noted for an epoch, if it was."""
        of, value = self._noted or (0, 0.0)
        return {self.name: value} if self._noted and of == number else {}

    def count(self, number: int, metrics: Mapping[str, Any]) -> None:
        """Count an epoch that is over.

        Args:
            number: how many are over, each of which counts once.
            metrics: what it ended with, by name.

        Raises:
            PlanError: the metric is not among them.
        """
        if self.is_counted(number):
            return
        if self.name not in metrics:
            known = ", ".join(sorted(map(str, metrics))) or "none"
            raise PlanError(
                f"growth waits on the metric {shown(self.name)}, which is not there after an "
                f"epoch. There are: {shown(known)}.",
                name=shown(self.name),
                way_out="Log it under that name in each epoch, or give monitor= another one.",
            )
        self._counted = number
        self.clock.step(metrics[self.name])

    def state_dict(self) -> dict[str, Any]:
        """Return where the training is, in numbers."""
        return {**self.clock.state_dict(), "counted": self._counted, "noted": self._noted}

    def load_state_dict(self, state: object) -> None:
        """Go on from where :meth:`state_dict` was taken.

        Raises:
            SourceError: the state is of another schedule, or none.
        """
        counted = state.get("counted") if isinstance(state, Mapping) else None
        if not isinstance(state, Mapping) or type(counted) is not int or counted < 0:
            raise SourceError(
                "the checkpoint does not tell how long a plateau has lasted.",
                way_out="Resume with the schedule of that run.",
            )
        self.clock.load_state_dict(state)
        self._counted, self._noted = counted, None
        noted = state.get("noted")
        if isinstance(noted, (list, tuple)) and [*map(type, noted)] == [int, float]:
            self._noted = noted[0], noted[1]

    def begin_anew(self) -> None:
        """Forget what was counted."""
        self.clock, self._counted, self._noted = GrowthClock(self.clock.schedule), 0, None
