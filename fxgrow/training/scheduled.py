"""What callbacks of trainers share: what grows when, what goes along, and what resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxgrow.errors import PlanError, UnknownInputsError, UsageError, shown, warn
from fxgrow.modules.tensors import module_names
from fxgrow.training.ahead import check_names
from fxgrow.training.due import Schedule, growths_of
from fxgrow.training.followers import averaged, optimizers_of
from fxgrow.training.history import named_module, stages_within
from fxgrow.training.in_place import Grown, deepen_, grow_
from fxgrow.training.monitored import Monitored
from fxgrow.training.resume import regrow_, state_dict
from fxgrow.training.schedule import GrowthSchedule

Averages: TypeAlias = Callable[[nn.Module], Iterable[nn.Module]]

UNITS = ("epochs", "steps")
_BUILD_ANEW = (
    "Weights fit the stage that they were saved at: load them into the network as its code builds "
    "it, in a new object."
)


class Growing:
    """The growths of one network (or one module in it) through a training.

    Args:
        schedule: as for :func:`growths_of`.
        unit: ``"epochs"`` or ``"steps"``.
        part: the name of the module that grows, in the network; "" for all of it.
        inputs: as ``example_inputs`` of :func:`fxgrow.widen`; None infers them.
        averages: returns averages of the module's weights, of the network.
        options: for all growths.
        monitor: the name of the metric that the schedule waits on, where it does.
        takes_inputs: where else the whole network's inputs may be told, as the end of a sentence.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        unit: str,
        part: str,
        inputs: object,
        averages: Averages | None,
        options: Mapping[str, Any],
        monitor: str | None = None,
        takes_inputs: str = "",
    ) -> None:
        if unit not in UNITS:
            raise UsageError(f"a schedule counts {' or '.join(UNITS)}, not {unit!r}.")
        waits = isinstance(schedule, GrowthSchedule) and schedule.plateau is not None
        if monitor is not None and not waits:
            raise UsageError(
                f"growth does not wait on {shown(repr(monitor))}: the schedule has no plateau.",
                way_out="Give GrowthSchedule.of(…, plateau=Plateau(…)), or leave monitor= out.",
            )
        self.monitored: Monitored | None = None
        if isinstance(schedule, GrowthSchedule) and waits:
            self.monitored = Monitored(schedule, monitor)
        self.growths = growths_of(schedule, options)
        self.unit, self.part, self.inputs, self._averages = unit, part, inputs, averages
        self.takes_inputs = takes_inputs
        self.done = 0
        self.grown: list[Grown] = []

    def is_due(self, count: int) -> bool:
        """Return whether a growth is due before an epoch or step, or was before.

        Where a metric decides, that is told by the stage that it is time for.
        """
        count = count if self.monitored is None else self.monitored.stage
        return self.done < len(self.growths) and self.growths[self.done].at <= count

    def grow_due(
        self,
        count: int,
        root: nn.Module,
        optimizers: Sequence[Optimizer],
        schedulers: Iterable[object],
        others: Iterable[nn.Module] = (),
    ) -> None:
        """Carry out all growths that are due.

        Args:
            count: of epochs or steps that have ended.
            root: the network.
            optimizers: what trains it, and possibly other things.
            schedulers: of the learning rates.
            others: copies of the whole network that average its weights.

        Raises:
            TraceError, PlanError, NotPreservedError, VerificationError: as for
                :func:`fxgrow.training.grow_`.
        """
        while self.is_due(count):
            due, part = self.growths[self.done], self._part_of(root)
            training = _training(optimizers, part)
            inputs = due.options.get("example_inputs", self.inputs)
            options = {key: value for key, value in due.options.items() if key != "example_inputs"}
            followers: dict[str, Any] = {
                "optimizer": training,
                "scheduler": [one for one in schedulers if _drives(one, training)],
                "averages": self.averages(root, others),
            }
            grow: Callable[..., Grown] = deepen_ if due.deepens else grow_
            try:
                self.grown.append(grow(part, example_inputs=inputs, **followers, **options))
            except (PlanError, UnknownInputsError) as error:
                raise self._located(error, part) from error
            self.done += 1

    def _located(
        self, error: PlanError | UnknownInputsError, part: nn.Module
    ) -> PlanError | UnknownInputsError:
        """Return an error as a callback's.

        It tells which part was meant, if a glob matches modules of one only, and how a callback
        takes inputs.
        """
        glob = error.name
        if isinstance(error, UnknownInputsError):
            way_out = (
                "Give the callback inputs=… of the sizes that the network takes, as example_inputs "
                f"of fxgrow.widen{self.takes_inputs if not self.part else ''}."
            )
            return UnknownInputsError(error.message, name=glob, way_out=way_out)
        if not error.message.startswith(f"the glob {glob!r} matches no"):
            return error
        for child, inner in part.named_children():
            if any(fnmatchcase(name, glob) for name in module_names(inner).values() if name):
                whole = f"{self.part}.{child}" if self.part else child
                return PlanError(
                    error.message,
                    name=glob,
                    way_out=f"In {whole} it does: give the callback part={whole!r}, or begin the "
                    f"glob with {child + '.'!r}.",
                )
        return error

    def begin(self, root: nn.Module) -> None:
        """Check the names in what is to come before the training begins.

        Raises:
            TraceError, PlanError: as for :func:`check_names`.
        """
        part = self._part_of(root)
        try:
            check_names(self.growths[self.done :], part, self.inputs)
        except (PlanError, UnknownInputsError) as error:
            raise self._located(error, part) from error

    def begin_anew(self) -> None:
        """Begin with the first growth, of another network."""
        self.done = 0
        if self.monitored is not None:
            self.monitored.begin_anew()

    def told(self) -> list[str]:
        """Return the growths that are done, as text, for a checkpoint."""
        return [str(due) for due in self.growths[: self.done]]

    def waited(self) -> dict[str, Any] | None:
        """Return how long a plateau has lasted, for a checkpoint; None if none is waited for."""
        return None if self.monitored is None else self.monitored.state_dict()

    def take_up(self, done: object, told: object, waited: object = None) -> None:
        """Go on after the growths that a checkpoint has seen.

        Args:
            done: how many.
            told: what :meth:`told` returned then; None if the checkpoint does not hold it.
            waited: what :meth:`waited` returned then, likewise.

        Raises:
            PlanError: they are not the first ones of the schedule.
        """
        now = [str(due) for due in self.growths]
        before = list(told) if isinstance(told, (list, tuple)) else now[: int(str(done))]
        count = max(len(before), int(str(done)))
        if now[:count] != before or len(before) < count:
            at = next(
                (n for n, (a, b) in enumerate(zip(now, before, strict=False)) if a != b),
                min(len(now), len(before)),
            )
            was = shown(str(before[at])) if at < len(before) else "more often"
            here = shown(now[at]) if at < len(now) else "nothing more"
            raise PlanError(
                f"the network grew {was}, where the schedule says {here}.",
                way_out="Resume with the schedule of that run: growths that are done stay as they "
                "were, and those that are to come may change.",
            )
        self.done = count
        if self.monitored is not None and waited is not None:
            self.monitored.load_state_dict(waited)

    def warn_of_never(self, ends: float) -> None:
        """Warn of growths that a training ends before.

        Args:
            ends: how many epochs or steps it has.
        """
        for due in self.growths[self.done :] if self.monitored is None else ():
            if due.at >= ends:
                text = f"the network never grows {due}: the training has {ends:g} {self.unit}."
                warn(text)

    def record(self, root: nn.Module) -> dict[str, Any]:
        """Return how the module has grown, as :func:`fxgrow.training.state_dict` does."""
        return state_dict(self._part_of(root))

    def regrow(
        self,
        root: nn.Module,
        record: Mapping[str, Any] | None,
        optimizers: Sequence[Optimizer] = (),
        others: Iterable[nn.Module] = (),
        *,
        trial: bool = False,
    ) -> None:
        """Give the module the shape that a checkpoint's has.

        Args:
            root: the network.
            record: what :meth:`record` returned; None if the module had never grown.
            optimizers: what trains the network, if there are any yet.
            others: copies of the whole network that average its weights.
            trial: whether the root is a copy, so that only averages in it may change.

        Raises:
            PlanError: the network has grown already, past what the checkpoint holds.
        """
        part = self._part_of(root)
        if record is None and not stages_within(part):
            return
        averages = self.averages(root, others)
        if trial:
            inside = set(root.modules())
            averages = [one for one in averages if one in inside]
        try:
            regrow_(
                part,
                record if record is not None else {"schema": 1, "stages": []},
                optimizer=_training(optimizers, part),
                averages=averages,
            )
        except PlanError as error:
            raise PlanError(
                f"a checkpoint does not fit {type(root).__name__}: {error.message}",
                name=error.name,
                way_out=_BUILD_ANEW,
            ) from error

    def averages(self, root: nn.Module, others: Iterable[nn.Module] = ()) -> list[nn.Module]:
        """Return all averages of the module's weights: those named, and in copies of the root.

        Each comes once: what is named may not depend on the copy, or may be in a callback too.
        """
        copies = averaged(others)
        found = [named_module(copy, self.part) for copy in copies]
        if self._averages is not None:
            for one in (root, *copies):
                found += averaged(self._averages(one))
        return list({id(one): one for one in found}.values())

    def _part_of(self, root: nn.Module) -> nn.Module:
        """Return the module that grows."""
        try:
            return root.get_submodule(self.part)
        except AttributeError as error:
            kind = type(root).__name__
            raise PlanError(f"{kind} has no module {self.part!r} to grow.") from error


def _training(optimizers: Sequence[Optimizer], part: nn.Module) -> list[Optimizer]:
    """Return the optimizers that hold parameters of a module."""
    own = set(part.parameters())
    return [
        one
        for one in optimizers_of(list(optimizers))
        if any(p in own for group in one.param_groups for p in group["params"])
    ]


def _drives(scheduler: object, optimizers: Sequence[Optimizer]) -> bool:
    """Return whether a scheduler is torch's, and of one of some optimizers."""
    if not isinstance(scheduler, LRScheduler):
        return False
    driven = optimizers_of(scheduler.optimizer)[0]
    return any(driven is one for one in optimizers)


def copies_held(holders: Iterable[object], model: nn.Module) -> list[nn.Module]:
    """Return the copies of a network that other objects hold: averages of its weights.

    Args:
        holders: the objects, such as callbacks; their attributes are looked at.
        model: the network.

    Raises:
        PlanError: one holds the network's tensors by their names, in a dict; it is named.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found: dict[int, nn.Module] = {}
    for holder in holders:
        for name, value in vars(holder).items():
            values = value if isinstance(value, (list, tuple)) else [value]
            for one in values:
                if isinstance(one, nn.Module) and one is not model and _is_copy(one, shapes):
                    found[id(one)] = one
            if isinstance(value, Mapping) and shapes and shapes.items() <= _shapes(value).items():
                kind = type(holder).__name__
                raise PlanError(
                    f"{kind} holds the network's tensors by name, in {name}, which cannot follow.",
                    name=kind,
                    way_out="Average with torch.optim.swa_utils.AveragedModel, or another copy of "
                    "the network.",
                )
    return list(found.values())


def _is_copy(module: nn.Module, shapes: Mapping[str, object]) -> bool:
    """Return whether a module has the parameters of a network, itself or in its wrapper."""
    (inner,) = averaged(module)
    return {name: parameter.shape for name, parameter in inner.named_parameters()} == shapes


def _shapes(tensors: Mapping[object, object]) -> dict[object, object]:
    """Return the shapes of what tensors a dict holds."""
    return {name: value.shape for name, value in tensors.items() if isinstance(value, Tensor)}
