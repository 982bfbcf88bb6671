"""All runs of a network at its new sizes, each in step with one at the old sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxgrow.grow.sizes.literals import CallSite, NewShapes, Repair, Repairer
from fxgrow.labels.sizes import SizedCall
from fxgrow.labels.trace import Traced


class Watching:
    """Repairs the sizes of each run of a network in step with an old one.

    Args:
        traced: the network.
        calls: of the old runs.
        shapes: what the values of these become.
        stops: whether a run is to end with some repair.

    Attributes:
        stopped: the repair with which a run ended, if it did.
    """

    def __init__(
        self,
        traced: Traced,
        calls: Sequence[Sequence[SizedCall]],
        shapes: NewShapes,
        stops: Callable[[Repair], bool] = lambda _: False,
    ) -> None:
        self._traced, self._calls, self._shapes = traced, calls, shapes
        self._runs: list[Repairer] = []
        self._stops = stops

    def __call__(self, value: object) -> Repairer:
        """Return what watches the next run."""
        del value
        run = min(len(self._runs), len(self._calls) - 1)
        before = sum(len(calls) for calls in self._calls[:run])
        self._runs.append(
            Repairer(self._calls[run], before, self._shapes, self._traced.at, self._stops)
        )
        return self._runs[-1]

    @property
    def repairs(self) -> list[Repair]:
        """The repairs of all runs."""
        return [repair for run in self._runs for repair in run.repairs]

    @property
    def repairs_in_eval(self) -> list[Repair]:
        """The repairs of the first run, which is in eval mode."""
        return self._runs[0].repairs if self._runs else []

    @property
    def reached(self) -> int:
        """How many calls were made."""
        return sum(len(run.sites) for run in self._runs)

    @property
    def sites(self) -> list[CallSite]:
        """Where each call of all runs was made."""
        return [site for run in self._runs for site in run.sites]

    @property
    def stopped(self) -> Repair | None:
        """The repair with which a run ended, if it did."""
        return next((run.repairs[-1] for run in self._runs if run.is_stopped), None)
