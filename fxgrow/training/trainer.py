"""A callback of Hugging Face's ``Trainer`` that grows the network while it trains.

The Trainer loads weights before its first event in ``train``, tells no callback from where, and
keeps the network in a local variable. So the network grows in place; and when weights of other
shapes are about to be loaded, it first grows as the checkpoint says that has such weights.
"""

from __future__ import annotations

import copy
import importlib
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxgrow.errors import FxgrowError, PlanError, SourceError, UsageError, shown, warn
from fxgrow.files.pretrained import example_inputs
from fxgrow.training.due import Schedule
from fxgrow.training.history import named_module
from fxgrow.training.in_place import Grown
from fxgrow.training.replicas import check_replicas, wrap_anew
from fxgrow.training.resume import regrow_
from fxgrow.training.schedule import GrowthSchedule
from fxgrow.training.scheduled import Averages, Growing
from fxgrow.training.trainer_files import (
    OWN_NAMES,
    STATE,
    Renaming,
    differs,
    foreign,
    has_other_shape,
    is_json,
    number,
    progress_in,
    progress_of,
    progresses,
    renamed,
    step_of,
)
from fxgrow.training.trainer_files import Regrow as _Regrow

CHECKPOINT = "checkpoint"  # where the Trainer puts them, in its output directory
_NO_RECORD = (
    "Name a checkpoint that the Trainer wrote with a GrowthCallback. save_pretrained keeps no "
    "record of growth: keep fxgrow.training.state_dict(model) beside it, for regrow_."
)


def _bases() -> tuple[Any, ...]:
    """Return what callbacks of the Trainer extend; nothing where transformers is not installed."""
    try:
        library = importlib.import_module("transformers.trainer_callback")
    except ImportError:
        return ()
    return library.TrainerCallback, library.ExportableState


_BASES = _bases()
_Callback: Any = _BASES[0] if _BASES else object
_Exportable: Any = _BASES[1] if _BASES else type("_Exportable", (), {})


class GrowthCallback(_Callback, _Exportable):  # type: ignore[misc]
    """Grows the network before scheduled epochs or steps; a run that is killed resumes.

    The optimizer and the scheduler go on. Checkpoints hold how the network has grown:
    ``trainer.train(resume_from_checkpoint=…)`` gives a new network that shape before its weights
    are loaded, from a checkpoint in ``args.output_dir``, or from the one that ``resume_from`` or
    ``args.resume_from_checkpoint`` names. ``load_best_model_at_end`` means the best one since the
    last growth: weights of an earlier stage do not fit.

    Args:
        schedule: for each epoch (or number of optimizer steps) before which the network grows,
            from 0: a width, ``"1.5x"``; options of :func:`fxgrow.widen`,
            ``{"width": "1.5x", …}``; those of :func:`fxgrow.deepen`,
            ``{"deepen": {"layer3": "+1"}, …}``; or a list of such. Or a
            :class:`fxgrow.training.GrowthSchedule`.
        monitor: the name of the metric that a schedule with a plateau waits on, as evaluations tell
            it (``"eval_loss"``); each evaluation counts as an epoch.
        unit: ``"epochs"`` (default), or ``"steps"`` for ``state.global_step``.
        part: the name of the module that grows; "" (default) for all of the network.
        inputs: as ``example_inputs`` of :func:`fxgrow.widen`; None takes what the configuration of
            a model of transformers tells, or infers them.
        averages: returns what averages the part's weights: ``lambda model: [ema]``.
        resume_from: the directory of the checkpoint to resume from, if it is in another one than
            the Trainer's.
        **options: of :func:`fxgrow.training.grow_`, for all growths: ``lr``, ``pairing``, ….

    Attributes:
        grown: the results of the growths in this process, with plans and reports.

    Raises:
        UsageError: the schedule is none.
        SourceError: transformers is not installed.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        unit: str = "epochs",
        part: str = "",
        inputs: object = None,
        averages: Averages | None = None,
        resume_from: str | Path | None = None,
        monitor: str | None = None,
        **options: Any,
    ) -> None:
        if not _BASES:
            raise SourceError(
                "this callback needs transformers.",
                way_out="pip install 'fxgrow[transformers]' brings it.",
            )
        if isinstance(schedule, Mapping) and "stages" in set(map(str, schedule)):
            schedule = GrowthSchedule.from_dict(schedule)
        elif isinstance(schedule, Mapping):  # what JSON holds has strings as keys
            schedule = {number(at): growths for at, growths in schedule.items()}
        told = schedule.to_dict() if isinstance(schedule, GrowthSchedule) else schedule
        self._given = {"schedule": told, "unit": unit, "part": part, **options}
        if monitor is not None:
            self._given["monitor"] = monitor
        self._is_data = inputs is None and averages is None  # so that JSON holds all
        self._growing = Growing(
            schedule, unit=unit, part=part, inputs=inputs, averages=averages, options=options,
            monitor=monitor,
        )  # fmt: skip
        self._resume_from = resume_from
        self._root: Callable[[], nn.Module | None] = lambda: None
        self._foreign = ""  # a name among the weights loaded last that the network has not
        self._warned = False

    @property
    def grown(self) -> list[Grown]:
        """The results of the growths in this process."""
        return self._growing.grown

    @property
    def progress(self) -> dict[str, Any]:
        """How many growths are done, and how the network has grown: what a checkpoint holds."""
        root = self._root()
        record = self._growing.record(root) if root is not None else None
        growing = self._growing
        return {
            "done": growing.done, "growths": growing.told(), "part": growing.part, "growth": record,
            "waited": growing.waited(),
        }  # fmt: skip

    @progress.setter
    def progress(self, progress: Mapping[str, Any]) -> None:
        self._growing.take_up(progress["done"], progress.get("growths"), progress.get("waited"))

    def state(self) -> dict[str, Any]:
        """Return what the Trainer keeps of this callback in a checkpoint, as JSON."""
        given = self._given if is_json(self._given) else {}
        return {"args": given, "attributes": {"progress": self.progress}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare to grow the network again when weights of a later stage are loaded.

        Raises:
            PlanError: the network is spread over processes.
            UsageError: callbacks are to be made anew from JSON that does not hold all of this one.
        """
        del state, control
        check_replicas(args)
        again = getattr(args, "restore_callback_states_from_checkpoint", False)
        if again and not (self._is_data and is_json(self._given)):
            raise UsageError(
                "restore_callback_states_from_checkpoint makes callbacks anew from JSON, which "
                "does not hold inputs, averages and options that are no text or numbers.",
                way_out="Leave it out: this callback resumes without it.",
            )
        self._watch(kwargs["model"], args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the schedule where the checkpoint left it.

        Raises:
            PlanError: the network has not grown as the checkpoint's, or that has grown in another
                way than the schedule says, or a name in the schedule is not of the network.
        """
        del control
        model = kwargs["model"]
        if self._root() is not model:
            self._growing.begin_anew()
            self._watch(model, args)
        held = state.stateful_callbacks or {} if state.global_step else {}  # none is of step 0
        saved = progress_in(held, type(self).__name__, self._growing.part)
        if saved is not None:
            self._take_up(model, saved, kwargs["optimizer"])
        if self._growing.monitored is not None and not args.do_eval:
            raise PlanError(
                "growth waits on a metric of evaluations, and there are none.",
                name="eval_strategy",
                way_out='Give TrainingArguments(…, eval_strategy="epoch").',
            )
        self._tell_inputs(model)
        self._growing.begin(model)
        is_steps = self._growing.unit == "steps"
        self._growing.warn_of_never(state.max_steps if is_steps else state.num_train_epochs)

    def _take_up(self, model: nn.Module, saved: Mapping[str, Any], optimizer: Any) -> None:
        """Go on after what a checkpoint has seen."""
        record, now = saved["growth"] or {}, self._growing.record(model)
        if record.get("stages", []) != now["stages"]:
            if self._foreign:
                raise PlanError(
                    f"the checkpoint's weights have names that {type(model).__name__} has not "
                    f"({shown(self._foreign)}): transformers renamed them as it wrote them, and a "
                    "Trainer does not undo that.",
                    name=shown(self._foreign),
                    way_out=OWN_NAMES,
                )
            raise PlanError(
                "the network has not grown as the checkpoint's had.",
                way_out="Give the Trainer a new network by model=…, of the configuration that the "
                "training began with, and the callback resume_from= with the checkpoint's path.",
            )
        if record:  # another checkpoint of the same stage may have told the shapes
            self._growing.regrow(model, record, [optimizer])
        self._growing.take_up(saved["done"], saved.get("growths"), saved.get("waited"))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Grow before an epoch."""
        del control
        if self._growing.unit == "epochs":
            self._grow_due(int((state.epoch or 0) + 1e-6), args, state, kwargs)  # sums of fractions

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Grow before a step."""
        del control
        if self._growing.unit == "steps" or self._growing.monitored is not None:
            self._grow_due(state.global_step, args, state, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have an epoch's evaluation before the checkpoint of its last step is saved.

        The Trainer has it after that, and a resumed run leaves it out.
        """
        del kwargs
        each = str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "epoch"
        over = abs(state.epoch - round(state.epoch)) < 1e-9 and state.epoch >= args.eval_delay
        if self._growing.monitored is not None and control.should_save and each and over:
            control.should_evaluate = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out an evaluation that has been made."""
        del args, kwargs
        monitored = self._growing.monitored
        if monitored is not None and monitored.is_counted(state.global_step):
            control.should_evaluate = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the metric that a schedule with a plateau waits on.

        Raises:
            PlanError: the evaluation does not tell it.
        """
        del args, control
        monitored = self._growing.monitored
        if monitored is not None and state.global_step:
            monitored.count(state.global_step, kwargs["metrics"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn where transformers writes weights under names under which no Trainer loads them."""
        del control
        folder = Path(args.output_dir) / f"{CHECKPOINT}-{state.global_step}"
        told = "" if self._warned else renamed(folder, kwargs["model"])
        if told:
            self._warned = True
            warn(told)

    def _tell_inputs(self, model: nn.Module) -> None:
        """Take what a configuration tells for inputs, where none were given."""
        if self._growing.inputs is None and not self._growing.part:
            self._growing.inputs = example_inputs(model)

    def _grow_due(self, count: int, args: Any, state: Any, given: Mapping[str, Any]) -> None:
        """Carry out what is due."""
        if not self._growing.is_due(count):
            return
        model = given["model"]
        self._tell_inputs(model)
        optimizer, scheduler = given["optimizer"], given["lr_scheduler"]
        self._growing.grow_due(count, model, [optimizer], [scheduler])
        wrap_anew(model, getattr(args, "world_size", 1))
        if getattr(args, "load_best_model_at_end", False):
            # Weights of an earlier stage would not fit at the end.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _watch(self, model: nn.Module, args: Any) -> None:
        """Look at what is loaded into a network from now on."""
        if self._root() is model:
            return
        self._root = weakref.ref(model)
        hook = _Regrow(self, getattr(args, "output_dir", None), args.resume_from_checkpoint)
        # The public way keeps a reference to the module, with which copies of copies fail.
        model._register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]

    def regrow(self, weights: Mapping[str, Tensor], output: Any, resume: Any) -> None:
        """Give the network the shapes of weights that are about to be loaded, if it has others.

        Args:
            weights: a state_dict.
            output: the directory with checkpoints.
            resume: a checkpoint's directory, if it is known.

        Raises:
            PlanError: no checkpoint says how.
        """
        model = self._root()
        self._foreign = "" if model is None else foreign(model, weights)
        if model is None or not differs(model, weights):
            return
        named = [Path(one) for one in (self._resume_from, resume) if isinstance(one, (str, Path))]
        found = [] if output is None else list(Path(output).glob(f"{CHECKPOINT}-*"))
        newest = sorted(found, key=step_of, reverse=True)
        tried: list[object] = []
        reason: FxgrowError | None = None
        for folder in (*named, *newest):
            for progress in progress_of(folder, type(self).__name__, self._growing.part):
                record = progress["growth"]
                if not isinstance(record, dict) or record.get("stages") in tried:
                    continue
                tried.append(record.get("stages"))
                trial = copy.deepcopy(model)
                try:
                    self._growing.regrow(trial, record, trial=True)
                except FxgrowError as error:
                    reason = error
                    continue
                if not differs(trial, weights):
                    self._foreign = ""
                    self._growing.regrow(model, record)
                    return
        if any(has_other_shape(model, name, tensor) for name, tensor in weights.items()):
            why = f" The last one that was tried: {reason.message}" if reason is not None else ""
            raise PlanError(
                f"{type(model).__name__} gets weights of other shapes, and no checkpoint in "
                f"{output} says how to grow to these.{why}",
                way_out="Build the network as it was before its first growth, and name the "
                "checkpoint: GrowthCallback(…, resume_from=directory).",
            ) from reason


def regrow_from(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    """Give a network the shape that the one in a Trainer's checkpoint had grown to.

    Args:
        model: the network as its code builds it from ``config.json``, or grown so already. What is
            new in it holds nothing yet: load the weights next.
        checkpoint: the directory, with the ``trainer_state.json`` of a training in which
            :class:`GrowthCallback` took part; anybody's, so it is checked.

    Returns:
        The network.

    Raises:
        SourceError: the directory tells nothing of growth, or what it tells is no record of it.
        PlanError: it is of another network.

    Example:
        >>> regrow_from(model, "out/checkpoint-20")  # doctest: +SKIP
        >>> safetensors.torch.load_model(
        ...     model, "out/checkpoint-20/model.safetensors"
        ... )  # doctest: +SKIP
    """
    file = Path(checkpoint) / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        told = shown(f"{type(error).__name__}: {error}")
        raise SourceError(
            f"{file} cannot be read: {told}.", name=str(file), way_out=_NO_RECORD
        ) from error
    held = state.get("stateful_callbacks") if isinstance(state, dict) else None
    several = held.values() if isinstance(held, dict) else ()
    found = [one for entry in several for one in progresses(entry)]
    if not found:
        raise SourceError(
            f"{file} does not tell how a network has grown.", name=str(file), way_out=_NO_RECORD
        )
    for progress in sorted(found, key=lambda one: len(one["part"])):  # the whole tells of parts
        regrow_(named_module(model, progress["part"]), progress["growth"])
    model._register_load_state_dict_pre_hook(Renaming(model))  # type: ignore[no-untyped-call]
    return model
