"""When a network grows in training, and to what: frozen data, JSON both ways.

>>> from fxgrow.training import GrowthSchedule
>>> schedule = GrowthSchedule.geometric({"conv": 64}, epochs=160, first=8)
>>> [(stage.epochs, *stage.width.values()) for stage in schedule.stages][:4]
[(8, '16'), (10, '20'), (11, '24'), (14, '28')]
>>> schedule.stage_at(9), schedule.stages[-1].width
(1, {'conv': '64'})
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from glob import escape
from typing import Any, TypeVar, get_args

from torch import nn

from fxgrow.errors import PlanError, UsageError, shown
from fxgrow.grow.identity.stages import new_blocks
from fxgrow.grow.sizes.widths import new_width
from fxgrow.plan.requests import Where
from fxgrow.plan.schema import MOST_STEPS
from fxgrow.training.definition import definition_of, units_of
from fxgrow.training.geometric import (
    check_parts,
    checked_blocks,
    depths_by_stage,
    lengths,
    widths_by_stage,
)
from fxgrow.training.plateau import MOST_EPOCHS, Plateau, refuse, whole

SCHEMA = 1
_MOST_ENTRIES = 1 << 16
_MOST_NAME = 1000  # characters
_ESCAPED = re.compile(r"\[([*?[])\]")  # by glob.escape: "wte.weight[1]" is a group's name
_T = TypeVar("_T")


@dataclass(frozen=True)
class GrowthStage:
    """What a network becomes as a stage begins, and how long that lasts.

    Attributes:
        epochs: how many; None for until the metric is on its plateau, and in the last stage for
            as long as the training lasts. With a plateau, a number is the most.
        width: what grows as it begins, for :func:`fxgrow.training.grow_`: globs over channel
            groups to widths. In the first stage, what :func:`fxgrow.training.seed_network` begins
            with.
        blocks: likewise, before, for :func:`fxgrow.training.deepen_`.
    """

    epochs: int | None
    width: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what is said.

        Raises:
            UsageError: it cannot be read.
        """
        if self.epochs is not None:
            whole(self.epochs, "epochs", 1, MOST_EPOCHS)
        for name, found, read in (
            ("width", self.width, lambda text: new_width(text, 1)),
            ("blocks", self.blocks, lambda text: new_blocks(text, 0)),
        ):
            if type(found) is not dict or len(found) > _MOST_ENTRIES:
                refuse(name, f"it is no mapping of at most {_MOST_ENTRIES} names")
            for key, value in found.items():
                if type(key) is not str or type(value) is not str or len(key) > _MOST_NAME:
                    refuse(name, f"{str(key)[:80]!r} is not a name, or has no text for its size")
                _readable(read, value)


def _readable(read: Callable[[str], object], text: str) -> None:
    """Return if a size can be read, be it more or less than there is.

    Raises:
        UsageError: it cannot.
    """
    try:
        read(text[:40])
    except UsageError:
        raise
    except PlanError:
        return  # of a form that can be read


@dataclass(frozen=True)
class GrowthSchedule:
    """The stages of a training.

    Attributes:
        stages: in order; nothing grows as the first one begins.
        where: what grows, as for :func:`fxgrow.widen`.
        plateau: when a stage without a number of epochs ends.
    """

    stages: tuple[GrowthStage, ...]
    where: Where = "all"
    plateau: Plateau | None = None

    def __post_init__(self) -> None:
        """Check that the stages follow one another.

        Raises:
            UsageError: there are none, or too many, or one would never end.
        """
        if type(self.stages) is not tuple or not 0 < len(self.stages) <= MOST_STEPS:
            refuse("stages", f"there must be from 1 to {MOST_STEPS}")
        if self.plateau is not None and not isinstance(self.plateau, Plateau):
            refuse("plateau", f"{str(self.plateau)[:40]!r} is no fxgrow.training.Plateau(…)")
        if self.where not in get_args(Where):
            refuse("where", f"{str(self.where)[:40]!r} is none of {', '.join(get_args(Where))}")
        for index, stage in enumerate(self.stages[:-1]):
            if stage.epochs is None and self.plateau is None:
                refuse(f"stages.{index}.epochs", "without a number and a plateau it never ends")

    @classmethod
    def geometric(
        cls,
        final: nn.Module | Callable[[], nn.Module] | Mapping[str, int],
        *,
        initial: float = 0.25,
        rate: float = 0.2,
        epochs: int,
        first: int | None = None,
        stages: int | None = None,
        blocks: Mapping[str, tuple[int, int]] | None = None,
        example_inputs: object = None,
        where: Where = "all",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        multiple_of: int = 2,
    ) -> GrowthSchedule:
        """Return the schedule of the variance-transfer paper (Yuan et al. 2023).

        Widths grow by C_t = C_{t−1} + p·C_{t−1}, the increment rounded to an even number and at
        least two; stages become longer by the same rate, T_t = T_0·(1 + p)^t, in whole epochs.

        Args:
            final: the network of full size, or what makes it (it is only followed); or the final
                width of each channel group.
            initial: the first width, of the final one.
            rate: p, above 0.
            epochs: in all.
            first: T_0; the last stage has the rest of the epochs. None is the one for which it
                follows the rule too, a whole number where that comes near (8 of 160, in the paper).
            stages: how many; None for as many as it takes. With fewer, the last one goes from
                where the widths are to the final ones.
            blocks: lists of blocks that grow in depth, with their first and last number of blocks,
                which is spread evenly over the stages: ``{"layer1": (1, 3)}``.
            example_inputs: of the network, as for :func:`fxgrow.widen`.
            where: what grows, as for :func:`fxgrow.widen`.
            include: globs over channel groups; only these grow.
            exclude: globs likewise; these are of full size from the first.
            multiple_of: of what widths are, but the final ones; a head of attention and a group of
                a convolution stay whole besides.

        Raises:
            UsageError: numbers that cannot be meant, or fewer epochs than stages.
            TraceError: the network cannot be followed.
            PlanError: nothing in it can grow.
        """
        check_parts(initial, rate)
        whole(multiple_of, "multiple_of", 1, 1 << 31)
        if isinstance(final, Mapping):
            units = units_of(final)
        else:
            units = definition_of(final, example_inputs).units(where, include, exclude)
        most = MOST_STEPS if stages is None else stages
        whole(most, "stages", 1, MOST_STEPS)
        deep = checked_blocks(blocks)
        widths = widths_by_stage(units, initial, rate, multiple_of, most)
        count = max(len(widths), *(b - a + 1 for a, b in deep.values()), 1)
        count = count if stages is None else stages
        widths += widths[-1:] * (count - len(widths))
        depths = depths_by_stage(deep, count)
        long = lengths(epochs, count, rate, first)
        return cls(
            tuple(
                GrowthStage(n, width, deeper)
                for n, width, deeper in zip(long, _changes(widths, depths), depths, strict=True)
            ),
            where,
        )

    @classmethod
    def of(
        cls,
        stages: Iterable[Mapping[str, Any] | GrowthStage],
        *,
        where: Where = "all",
        plateau: Plateau | None = None,
    ) -> GrowthSchedule:
        """Return the schedule of an explicit list of stages.

        Args:
            stages: each with ``epochs``, ``width`` (a text for all that ``where`` selects, or a
                mapping of globs) and ``blocks``, all optional but ``epochs``.
            where: what grows, as for :func:`fxgrow.widen`.
            plateau: when a stage of ``epochs=None`` ends.

        Raises:
            UsageError: something cannot be read.

        Example:
            >>> schedule = GrowthSchedule.of([{"epochs": 5}, {"epochs": 10, "width": "2x"}])
            >>> schedule.stages[1].width
            {'*': '2x'}
        """
        if not isinstance(stages, Iterable):
            refuse("stages", f"a {type(stages).__name__} is no list of stages")
        return cls(tuple(itertools.starmap(_stage, enumerate(stages))), where, plateau)

    @property
    def epochs(self) -> int | None:
        """The number of epochs in all, None if a stage has none."""
        known = [stage.epochs for stage in self.stages if stage.epochs is not None]
        return sum(known) if len(known) == len(self.stages) else None

    def stage_at(self, epoch: int) -> int:
        """Return the number of the stage that an epoch belongs to, both from 0.

        Raises:
            UsageError: it depends on a metric.
        """
        if self.plateau is not None:
            raise UsageError(
                "when a stage ends depends on a metric.",
                way_out="Ask a fxgrow.training.GrowthClock after each epoch.",
            )
        whole(epoch, "epoch", 0, MOST_EPOCHS)
        end = 0
        for index, stage in enumerate(self.stages):
            end += stage.epochs or 0
            if stage.epochs is None or epoch < end:
                return index
        return len(self.stages) - 1

    def growths(self) -> dict[int, list[dict[str, Any]]]:
        """Return what grows by the epoch before which it does, as callbacks of trainers take it.

        Raises:
            UsageError: it depends on a metric.

        Example:
            >>> GrowthSchedule.of([{"epochs": 5}, {"epochs": 10, "width": "2x"}]).growths()
            {5: [{'width': {'*': '2x'}, 'where': 'all'}]}
        """
        found: dict[int, list[dict[str, Any]]] = {}
        begins = 0
        for index, before in enumerate(self.stages[:-1]):
            begins += before.epochs or 0
            told = self.growths_of(index + 1)
            if told:
                found[begins] = told
        self.stage_at(0)  # which is refused where a metric decides
        return found

    def growths_of(self, stage: int) -> list[dict[str, Any]]:
        """Return what grows as a stage begins, likewise."""
        told, found = self.stages[stage], list[dict[str, Any]]()
        if told.blocks:
            found.append({"deepen": dict(told.blocks)})
        if told.width:
            found.append({"width": dict(told.width), "where": self.where})
        return found

    def widths_at(self, stage: int) -> dict[str, int]:
        """Return the width of each channel group in a stage, of a schedule in absolute widths.

        Raises:
            UsageError: a width is told relative to another, or there is no such stage.
        """
        told = self._at(stage, "width")
        return {_ESCAPED.sub(r"\1", name): int(text) for name, text in told.items()}

    def blocks_at(self, stage: int) -> dict[str, int]:
        """Return the number of blocks of each list in a stage, likewise.

        Raises:
            UsageError: as for :meth:`widths_at`.
        """
        return {name: int(text) for name, text in self._at(stage, "blocks").items()}

    def _at(self, stage: int, what: str) -> dict[str, str]:
        whole(stage, "stage", 0, len(self.stages) - 1)
        found: dict[str, str] = {}
        for each in self.stages[: stage + 1]:
            found |= getattr(each, what)
        for name, text in found.items():
            if not text.isdecimal():
                raise UsageError(
                    f"the {what} {text!r} of {shown(name)} depends on what there is.",
                    name=name,
                    way_out="Give numbers, or make the schedule from the network of full size "
                    "(GrowthSchedule.geometric).",
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as JSON-able data."""
        return {"schema": SCHEMA, **asdict(self), "stages": [asdict(x) for x in self.stages]}

    def to_json(self) -> str:
        """Return the schedule as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: object) -> GrowthSchedule:
        """Return the schedule that :meth:`to_dict` described.

        Raises:
            UsageError: the data is none; the field is named.
        """
        held = _fields(data, "schedule", {"schema", *(x.name for x in fields(cls))})
        if type(held.get("schema")) is not int or held["schema"] != SCHEMA:
            refuse("schema", f"it is not {SCHEMA}")
        stages, plateau = held.get("stages"), held.get("plateau")
        if not isinstance(stages, (list, tuple)) or len(stages) > MOST_STEPS:
            refuse("stages", f"they are not a list of at most {MOST_STEPS}")
        known = {x.name for x in fields(Plateau)}
        return cls(
            tuple(itertools.starmap(_stage, enumerate(stages))),
            held.get("where", "all"),
            None if plateau is None else Plateau(**_fields(plateau, "plateau", known)),
        )

    @classmethod
    def from_json(cls, text: str) -> GrowthSchedule:
        """Return the schedule that :meth:`to_json` wrote.

        Raises:
            UsageError: the text is none.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the schedule is not JSON: {shown(str(error))}.") from error
        return cls.from_dict(data)


def _changes(
    widths: Sequence[Mapping[str, int]], depths: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    """Return which groups have another width than in the stage before, or are new in it."""
    known: dict[str, int] = {}
    counts: dict[str, int] = {}
    found: list[dict[str, str]] = []
    for width, depth in zip(widths, depths, strict=True):
        counts |= {name: int(text) for name, text in depth.items()}
        there = {name: n for name, n in width.items() if not _is_to_come(name, counts)}
        changed = {name: str(n) for name, n in there.items() if known.get(name) != n}
        found.append({escape(name): text for name, text in changed.items()})
        known |= there
    return found


def _is_to_come(name: str, counts: Mapping[str, int]) -> bool:
    """Return whether a layer is in a block that is not there yet."""
    for container, count in counts.items():
        inside = name.removeprefix(f"{container}.")
        number = inside.partition(".")[0]
        if inside != name and number.isdecimal() and int(number) >= count:
            return True
    return False


def _stage(index: int, data: object) -> GrowthStage:
    """Return a stage that is told by a mapping, or is one."""
    if isinstance(data, GrowthStage):
        return data
    held = dict(_fields(data, "stages", {x.name for x in fields(GrowthStage)}))
    if isinstance(held.get("width"), str):
        held["width"] = {"*": held["width"]}
    if "epochs" not in held:
        refuse("stages", f"stage {index} has no epochs: give a number, or None for no end")
    return GrowthStage(**held)


def _fields(data: object, place: str, known: set[str]) -> Mapping[str, Any]:
    """Return data that is a mapping of known names.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(data, Mapping):
        refuse(place, f"it is a {type(data).__name__}, and no mapping")
    foreign = [str(key) for key in data if not isinstance(key, str) or key not in known]
    if foreign:
        refuse(place, f"it has no {foreign[0][:40]!r}")
    return data
