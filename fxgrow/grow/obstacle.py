"""Why something cannot grow as wanted: a value, for a search that goes on without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxgrow.errors import FxgrowError, PlanError


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way of some widths.

    Attributes:
        reason: why they are impossible, a sentence without its full stop.
        name: the layer or module concerned; "" if there is none.
        groups: the channel groups that it comes from, and why each cannot grow; none if they are
            not known.
        certain: these groups cannot grow, whatever becomes of others.
        way_out: what the user can do about it.
    """

    reason: str
    name: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)
    certain: bool = False
    way_out: str = ""

    @classmethod
    def of(cls, error: FxgrowError) -> Obstacle:
        """Return what an error tells."""
        return cls(error.message.rstrip("."), error.name, way_out=error.way_out)

    def reason_for(self, group: str) -> str:
        """Return why a group cannot grow."""
        return self.groups.get(group, self.reason)

    @property
    def error(self) -> PlanError:
        """The error for the user."""
        return PlanError(f"{self.reason}.", name=self.name, way_out=self.way_out)
