"""A callback of Lightning that grows the network while it trains.

It works with ``lightning`` and with ``pytorch_lightning``, and extends the callback of the one that
is loaded already (of the former, if neither is).

Lightning restores modules before the states of callbacks, and all other callbacks make their copies
of the network before that. So the network grows again at the moment when a checkpoint has been
read, before anything is loaded from it.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn

from fxgrow.errors import PlanError, SourceError, warn
from fxgrow.training.due import Schedule
from fxgrow.training.in_place import Grown
from fxgrow.training.resume import regrow_
from fxgrow.training.scheduled import Averages, Growing, copies_held

KEY = "fxgrow_growth"  # in a checkpoint, what each part of the network has grown through


def _library() -> str:
    """Return the name of the package of Lightning that is used, or "" if there is none."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        return name
    return ""


_NAME = _library()
_Callback: Any = importlib.import_module(_NAME).Callback if _NAME else object
_CheckpointIO: Any = importlib.import_module(f"{_NAME}.plugins").CheckpointIO if _NAME else object


class GrowthCallback(_Callback):  # type: ignore[misc]
    """Grows the network before scheduled epochs or steps; a run that is killed resumes.

    Optimizers, schedulers and the averages that other callbacks hold
    (``StochasticWeightAveraging``, ``WeightAveraging``) go on, in any order of the callbacks, and
    so do loggers. Checkpoints hold how the network has grown: ``trainer.fit(net, …, ckpt_path=…)``
    gives a new network that shape before its weights are loaded.

    Args:
        schedule: for each epoch (or number of optimizer steps) before which the network grows,
            from 0: a width, ``"1.5x"``; options of :func:`fxgrow.widen`,
            ``{"width": "1.5x", …}``; those of :func:`fxgrow.deepen`,
            ``{"deepen": {"layer3": "+1"}, …}``; or a list of such. Or a
            :class:`fxgrow.training.GrowthSchedule`.
        monitor: the name of the metric that a schedule with a plateau waits on, as it is logged
            (``"val_loss"``); it is looked at as each epoch ends, of those with a validation if
            ``check_val_every_n_epoch`` leaves some out. The first process's value counts.
        unit: ``"epochs"`` (default), or ``"steps"`` for ``trainer.global_step``.
        part: the name of the module that grows, for ``self.net`` of the LightningModule
            ``"net"``; "" (default) for all of it.
        inputs: as ``example_inputs`` of :func:`fxgrow.widen`; None takes ``example_input_array``
            if all of the LightningModule grows, or infers them.
        averages: returns what averages the part's weights in the LightningModule itself, such as
            ``lambda module: [module.ema]``; those of callbacks are found.
        **options: of :func:`fxgrow.training.grow_`, for all growths: ``lr``, ``pairing``, ….

    Attributes:
        grown: the results of the growths in this process, with plans and reports.

    Raises:
        UsageError: the schedule is none.
        SourceError: Lightning is not installed.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        unit: str = "epochs",
        part: str = "",
        inputs: object = None,
        averages: Averages | None = None,
        monitor: str | None = None,
        **options: Any,
    ) -> None:
        if not _NAME:
            raise SourceError(
                "this callback needs Lightning.",
                way_out="pip install 'fxgrow[lightning]' brings it.",
            )
        super().__init__()
        self._growing = Growing(
            schedule, unit=unit, part=part, inputs=inputs, averages=averages, options=options,
            monitor=monitor,
            takes_inputs="; or the LightningModule an example_input_array",
        )  # fmt: skip
        self._fitted: Callable[[], object] = lambda: None
        self._before: object = None  # the metric as a validation began
        self._ran = False  # whether a step of the present epoch was made in this process

    @property
    def grown(self) -> list[Grown]:
        """The results of the growths in this process."""
        return self._growing.grown

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint."""
        return f"{type(self).__qualname__}{{'part': {self._growing.part!r}}}"

    def state_dict(self) -> dict[str, Any]:
        """Return which growths of the schedule are done, and how long a plateau has lasted."""
        growing = self._growing
        return {"done": growing.done, "growths": growing.told(), "waited": growing.waited()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the growths that a checkpoint has seen.

        Raises:
            PlanError: they are not the first ones of the schedule.
        """
        self._growing.take_up(
            state_dict["done"], state_dict.get("growths"), state_dict.get("waited")
        )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Prepare to grow the network again as soon as a checkpoint has been read."""
        del stage
        if getattr(trainer.strategy.launcher, "_start_method", None) is not None:
            raise PlanError(
                "this strategy hands weights back to a process in which the network never grew.",
                name=type(trainer.strategy).__name__,
                way_out="Train with strategy='ddp' or on one device.",
            )
        if self._fitted() is not pl_module:
            self._growing.begin_anew()
            self._fitted = weakref.ref(pl_module)

        def regrow(checkpoint: Mapping[str, Any]) -> None:
            parts = checkpoint.get(KEY)
            record = parts.get(self._growing.part) if isinstance(parts, Mapping) else None
            self._growing.regrow(
                pl_module, record, trainer.optimizers, self._copies(trainer, pl_module)
            )

        def recorded(checkpoint: dict[str, Any]) -> dict[str, Any]:
            parts = {**checkpoint.get(KEY, {}), self._growing.part: self._growing.record(pl_module)}
            return {**checkpoint, KEY: parts}

        strategy = trainer.strategy
        strategy.checkpoint_io = _GrowthIO(strategy.checkpoint_io, regrow, recorded, owner=self)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the names in the schedule, and warn of growths that the training ends before.

        Raises:
            PlanError: the network has none of that name.
        """
        self._tell_inputs(pl_module)
        self._growing.begin(pl_module)
        ends = trainer.max_steps if self._growing.unit == "steps" else trainer.max_epochs
        if ends is not None and ends >= 0:  # -1 is no end
            self._growing.warn_of_never(ends)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Grow before an epoch."""
        if self._growing.unit == "epochs":
            self._grow_due(trainer.current_epoch, trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the metric that a schedule with a plateau waits on.

        Raises:
            PlanError: it is not logged.
        """
        del pl_module
        number, monitored = trainer.current_epoch + 1, self._growing.monitored
        every, ran, self._ran = trainer.check_val_every_n_epoch or 1, self._ran, False
        if monitored is not None and number % every == 0 and not monitored.is_counted(number):
            # Each process has its own, and all grow or none.
            metrics = trainer.strategy.broadcast({**monitored.noted(number), **_metrics(trainer)})
            if not ran and monitored.name not in metrics:  # the epoch was over in the checkpoint
                warn(
                    f"the plateau does not count epoch {number}: the checkpoint was written before "
                    f"its end, and does not hold {monitored.name}. To count it, save at the end: "
                    "ModelCheckpoint(…, save_on_train_epoch_end=True)."
                )
                return
            monitored.count(number, metrics)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at what the metric was before."""
        del pl_module
        monitored = self._growing.monitored
        self._before = monitored and trainer.callback_metrics.get(monitored.name)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the metric, for a checkpoint that is written before the epoch has ended."""
        del pl_module
        monitored = self._growing.monitored
        if monitored is None or trainer.sanity_checking:
            return
        if trainer.callback_metrics.get(monitored.name) is not self._before:  # of an epoch before
            monitored.note(trainer.current_epoch + 1, _metrics(trainer))

    def _tell_inputs(self, pl_module: Any) -> None:
        """Take the module's own example for inputs, where none were given."""
        if self._growing.inputs is None and not self._growing.part:
            self._growing.inputs = getattr(pl_module, "example_input_array", None)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: object, batch_idx: int
    ) -> None:
        """Grow before a step."""
        del batch, batch_idx
        self._ran = True
        if self._growing.unit == "steps":
            self._grow_due(trainer.global_step, trainer, pl_module)

    def _grow_due(self, count: int, trainer: Any, pl_module: Any) -> None:
        """Carry out what is due."""
        if not self._growing.is_due(count):
            return
        strategy = trainer.strategy
        wrapped = strategy.model is not pl_module
        if wrapped and not isinstance(strategy.model, nn.parallel.DistributedDataParallel):
            kind = type(strategy).__name__
            raise PlanError(
                f"{kind} keeps the network in a wrapper that cannot follow.",
                name=kind,
                way_out="Train with strategy='ddp' or on one device.",
            )
        _drop_own_forward(pl_module)
        self._tell_inputs(pl_module)
        self._growing.grow_due(
            count,
            pl_module,
            trainer.optimizers,
            [config.scheduler for config in trainer.lr_scheduler_configs],
            self._copies(trainer, pl_module),
        )
        if wrapped:  # the wrapper's hooks are on the parameters that it was made with
            strategy.model = pl_module
            strategy.configure_ddp()

    def _copies(self, trainer: Any, pl_module: Any) -> list[nn.Module]:
        """Return the averages of the network's weights that other callbacks hold."""
        return copies_held((one for one in trainer.callbacks if one is not self), pl_module)


def _metrics(trainer: Any) -> dict[str, float]:
    """Return what has been logged, by name."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _drop_own_forward(module: nn.Module) -> None:
    """Remove the attribute that Lightning leaves after a step in a wrapper: its class's forward.

    It would go on to run where the class changes, and copies may run it on the original.
    """
    if vars(module).get("forward") == MethodType(type(module).forward, module):
        del module.forward


def regrow_from(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a LightningModule the shape that the one in a checkpoint had grown to.

    Called in ``on_load_checkpoint``, it makes ``load_from_checkpoint`` work, which knows no
    callbacks.

    Args:
        module: the module as its code builds it, or grown so already.
        checkpoint: what Lightning has read.

    Raises:
        SourceError: what it says of growth is not a record of it.
        PlanError: it is of another network.
    """
    parts = checkpoint.get(KEY, {})
    if not isinstance(parts, Mapping):
        raise SourceError("the checkpoint's record of growth is not a mapping.", name=KEY)
    for part, record in parts.items():
        regrow_(module.get_submodule(part), record)


class _GrowthIO(_CheckpointIO):  # type: ignore[misc]
    """Reads and writes checkpoints as another one does, with how the network has grown.

    Args:
        inner: what reads and writes.
        regrow: called with each checkpoint that was read.
        recorded: returns a checkpoint with what it is to hold.
        owner: the callback; what it put around an IO before is replaced.
    """

    def __init__(
        self,
        inner: Any,
        regrow: Callable[[Mapping[str, Any]], None],
        recorded: Callable[[dict[str, Any]], dict[str, Any]],
        owner: object,
    ) -> None:
        while isinstance(inner, _GrowthIO) and inner.owner() is owner:
            inner = inner.inner
        self.inner: Any = inner
        self.owner: Callable[[], object] = weakref.ref(owner)
        self._regrow, self._recorded = regrow, recorded

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kw: Any) -> None:
        """Write a checkpoint."""
        self.inner.save_checkpoint(self._recorded(checkpoint), path, *args, **kw)

    def load_checkpoint(self, path: Any, *args: Any, **kw: Any) -> Any:
        """Read a checkpoint, and grow the network as it says."""
        checkpoint = self.inner.load_checkpoint(path, *args, **kw)
        self._regrow(checkpoint)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """End what is under way."""
        self.inner.teardown()
