"""Certify that a network that has grown follows the narrow one through training."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fxgrow.api.widen as api
from fxgrow.errors import PlanError, UsageError, shown
from fxgrow.grow.data.batches import Batch, LossFunction, check_runs, checked_batches
from fxgrow.modules.calling import arguments_of, call, map_tensors, results_in
from fxgrow.modules.exclusive import exclusive
from fxgrow.plan.schema import Plan
from fxgrow.training.clipping import clip_grad_norm_
from fxgrow.training.followers import unwrapped
from fxgrow.training.history import stages_of
from fxgrow.training.in_place import Grown, all_or_nothing, put_in_place
from fxgrow.training.parts import copies_in
from fxgrow.training.rates import check_growth, check_rule

Factory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
BOUND = 1e-11  # relative, or _TIMES the deviation of a network that is off by one unit
_TIMES = 100.0


class Deviation(NamedTuple):
    """How far outputs are from the narrow network's after a step.

    Attributes:
        wide: the largest deviation of the grown network's, relative to the largest output.
        one_ulp: likewise of the narrow network, each of whose weights was one unit in the last
            place off when the other one grew.
    """

    wide: float
    one_ulp: float


@dataclass(frozen=True)
class Certificate:
    """What two trainings from the same batches have shown.

    Attributes:
        deviations: after each step, the larger one of both modes.
        in_eval, in_train: likewise in each mode.
        lr: the rule of learning rates.
        optimizer: the optimizer's class.
        grown_at: how many steps came before the growth.
    """

    deviations: tuple[Deviation, ...]
    in_eval: tuple[Deviation, ...]
    in_train: tuple[Deviation, ...]
    lr: str
    optimizer: str
    grown_at: int = 0

    @property
    def worst(self) -> float:
        """The largest deviation of the grown network over all steps."""
        return max(deviation.wide for deviation in self.deviations)

    @property
    def departs_at(self) -> int | None:
        """The first step after which the grown network is too far off; None if it never is."""
        for step, (wide, one_ulp) in enumerate(self.deviations, 1):
            if not wide <= max(BOUND, _TIMES * one_ulp):
                return step
        return None

    @property
    def follows(self) -> bool:
        """Whether all deviations are within 1e-11, or 100 times that of one unit off."""
        return self.departs_at is None

    def __str__(self) -> str:
        """Return a table of some of the steps, and the verdict."""
        count = len(self.deviations)
        shown = sorted({1, *(count * tenth // 10 for tenth in range(1, 11)), count} - {0})
        both = "one unit off, larger of both"
        lines = [f"{'step':>6}  {'wide, eval':>10}  {'train':>8}  {both}"]
        lines += [
            f"{step:>6}  {self.in_eval[step - 1].wide:>10.1e}  {self.in_train[step - 1].wide:>8.1e}"
            f"  {self.deviations[step - 1].one_ulp:>28.1e}"
            for step in shown
        ]
        told = f"{self.optimizer}, lr={self.lr!r}, grown at step {self.grown_at}"
        if self.follows:
            lines.append(
                f"follows the narrow network ({told}). Its copies are tied, so the width brings no "
                "capacity until something parts them (split_noise)."
            )
        else:
            lines.append(f"departs from the narrow network at step {self.departs_at} ({told}).")
        return "\n".join(lines)


@exclusive
def certify(
    model: nn.Module,
    grown: api.Grown,
    loss_fn: LossFunction,
    batches: Iterable[Batch],
    *,
    optimizer: Factory | Optimizer,
    steps: int = 200,
    lr: str | None = None,
    grown_at: int = 0,
    max_norm: float | None = None,
) -> Certificate:
    """Train a network and what it has grown to side by side, and measure how far they are apart.

    Both train in float64, in copies, from the same batches, in train mode. The growth is carried
    out anew in float64, so that rounding of single precision plays no part.

    Args:
        model: the narrow network, as it was before it grew (``copy.deepcopy`` keeps one where
            :func:`fxgrow.training.grow_` grows in place). It must not use chance: no dropout.
        grown: what it became, of :func:`fxgrow.widen` or :func:`fxgrow.training.grow_`.
        loss_fn: of outputs and targets, a scalar.
        batches: pairs of inputs and targets, used in turn. Several inputs are a tuple or a dict.
        optimizer: what makes one of parameters, such as ``functools.partial(torch.optim.Adam,
            lr=1e-3)``; or one that has trained the narrow network, whose averages are taken along.
        steps: how many.
        lr: the rule of learning rates; None takes that of ``grown``, ``width`` where it has none.
        grown_at: let the narrow network make that many steps before the other one grows.
        max_norm: clip gradients by norm before each step, as :func:`clip_grad_norm_` does.

    Raises:
        UsageError: an argument is of another kind.
        PlanError: the growth, the network or the optimizer cannot be followed; it is named. Or the
            training diverges.

    Example:
        >>> import torch, fxgrow.training
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> grown = fxgrow.widen(net, "2x", pairing="replicate", split_noise=0.0)
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(4)]
        >>> certificate = fxgrow.training.certify(
        ...     net, grown, torch.nn.functional.mse_loss, batches,
        ...     optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01), steps=20,
        ... )
        >>> certificate.follows, certificate.worst < 1e-11
        (True, True)
    """
    _check_arguments(grown, optimizer, steps, grown_at)
    rule = _rule_of(grown) if lr is None else lr
    check_rule(rule)
    data = [map_tensors(_double, batch) for batch in checked_batches(batches)]
    narrow = _Training.of(unwrapped(model), grown, optimizer, loss_fn, max_norm)
    _check_growth(grown.plan)
    check_runs(narrow.model, data[0])
    _check_chance(narrow.model, data[0])
    turns = itertools.cycle(data)
    for _ in range(grown_at):
        narrow.step(next(turns))
    wide, off = copy.deepcopy(narrow), copy.deepcopy(narrow)
    wide.grow(grown, rule)
    off.move_by_one_unit()
    found: dict[str, list[Deviation]] = {"eval": [], "train": []}
    for number in range(1, steps + 1):
        batch = next(turns)
        for one in (narrow, wide, off):
            one.step(batch)
        for mode, deviations in found.items():
            outputs, *others = (_outputs(one.model, batch, mode) for one in (narrow, wide, off))
            deviations.append(Deviation(*(_deviation(outputs, o, number) for o in others)))
    both = zip(found["eval"], found["train"], strict=True)
    worse = tuple(Deviation(max(e.wide, t.wide), max(e.one_ulp, t.one_ulp)) for e, t in both)
    kind = type(narrow.optimizer).__name__
    return Certificate(worse, tuple(found["eval"]), tuple(found["train"]), rule, kind, grown_at)


def _check_arguments(grown: object, optimizer: object, steps: object, grown_at: object) -> None:
    """Return if the arguments of :func:`certify` are of the kinds that it takes.

    Raises:
        UsageError: one is not.
    """
    if not isinstance(grown, api.Grown):
        raise UsageError(
            f"grown is what a growth returned, not a {type(grown).__name__}.",
            way_out="Give all that fxgrow.widen(…) or fxgrow.training.grow_(…) returned: its plan "
            "is needed too.",
        )
    if not callable(optimizer) and not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"an optimizer is a torch.optim.Optimizer or makes one, not {shown(repr(optimizer))}.",
            way_out="optimizer=functools.partial(torch.optim.Adam, lr=1e-3)",
        )
    for name, value, least in (("steps", steps, 1), ("grown_at", grown_at, 0)):
        if type(value) is not int or value < least:
            raise UsageError(
                f"{name}={shown(repr(value))} is no whole number from {least} on.",
                way_out="Give numbers of steps: steps=200, grown_at=0.",
            )


def _rule_of(grown: api.Grown) -> str:
    """Return the rule of learning rates that a growth was carried out with."""
    if isinstance(grown, Grown):
        for stage in reversed(stages_of(unwrapped(grown.model))):
            if stage.plan is grown.plan:
                return stage.lr
    return "width"


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@dataclass
class _Training:
    """A network with its optimizer, loss and norm of gradients."""

    model: nn.Module
    optimizer: Optimizer
    loss_fn: LossFunction
    max_norm: float | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        grown: api.Grown,
        optimizer: Factory | Optimizer,
        loss_fn: LossFunction,
        max_norm: float | None,
    ) -> _Training:
        """Return a network in float64 with its own copy of an optimizer.

        Raises:
            PlanError: the network is the one that has grown.
        """
        if grown.model is model:
            raise PlanError(
                "the network is the one that has grown, so the narrow one is lost.",
                way_out="Keep a copy before it grows: narrow = copy.deepcopy(model).",
            )
        if isinstance(optimizer, Optimizer):
            model, own = copy.deepcopy((model, optimizer))
            model.double()
            for state in own.state.values():
                state.update({k: _double(v) for k, v in state.items() if _has_entries(v)})
        else:
            model = copy.deepcopy(model).double()
            own = optimizer(model.parameters())
        return cls(model.train(), own, loss_fn, max_norm)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Training:
        """Return a copy of the network and the optimizer with the same loss."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer), memo)
        return _Training(model, optimizer, self.loss_fn, self.max_norm)

    def grow(self, grown: api.Grown, rule: str) -> None:
        """Grow in place as a plan says.

        Raises:
            PlanError: the optimizer cannot follow.
        """
        plan = _in_double(grown.plan)
        result = api.Grown(plan.apply(self.model), plan, grown.report, grown.init)
        check_growth(self.model, result, rule, [self.optimizer])
        with all_or_nothing(self.model, [self.optimizer], []):
            put_in_place(self.model, result, rule, [self.optimizer])

    @torch.no_grad()
    def move_by_one_unit(self) -> None:
        """Move each weight to a neighbour of it in float64, up or down as a seed says."""
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            up = torch.rand(parameter.shape, generator=generator).to(parameter.device) < 0.5
            ends = torch.where(up, torch.inf, -torch.inf).to(parameter)
            parameter.copy_(torch.nextafter(parameter, ends))

    def step(self, batch: Batch) -> None:
        """Train on a batch."""
        inputs, targets = batch
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = self.loss_fn(call(self.model, arguments_of(inputs)), targets)
            torch.autograd.backward(loss)
        if self.max_norm is not None:
            clip_grad_norm_(self.model, self.max_norm)
        self.optimizer.step()


@torch.no_grad()
def _outputs(model: nn.Module, batch: Batch, mode: str) -> list[Tensor]:
    """Return a network's outputs for a batch in a mode; it is left as it was, in train mode."""
    held = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train(mode == "train")
    found = results_in(call(model, arguments_of(batch[0])))
    model.train()
    for buffer, before in held:
        buffer.copy_(before)
    return [tensor for tensor in found if tensor.is_floating_point()]


def _in_double(plan: Plan) -> Plan:
    """Return a plan for the same network in float64."""
    after = tuple(_in_double(step) for step in plan.after)
    source = {
        name: (shape, "float64" if "float" in dtype else dtype)
        for name, (shape, dtype) in plan.source.items()
    }
    return replace(plan, source=source, after=after)


def _has_entries(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _deviation(outputs: Sequence[Tensor], others: Sequence[Tensor], step: int) -> float:
    """Return the largest deviation of outputs, relative to the largest of them.

    Raises:
        PlanError: an output of the narrow network is not finite.
    """
    largest = max((float(one.abs().max()) for one in outputs if one.numel()), default=0.0)
    if not largest < float("inf"):
        raise PlanError(
            f"the training of the narrow network diverges: after step {step} its output is not "
            "finite.",
            way_out="Give a smaller learning rate, or fewer steps.",
        )
    gaps = [
        float((one - other).abs().max())
        for one, other in zip(outputs, others, strict=True)
        if one.numel()
    ]
    gap = max((gap if gap == gap else float("inf") for gap in gaps), default=0.0)
    return gap / largest if largest else gap


def _check_growth(plan: Plan) -> None:
    """Return if a growth draws no groups of convolutions.

    Raises:
        PlanError: it does; the first one is named.
    """
    if not any(getattr(step.request, "grouped", "") == "count" for step in plan.steps):
        return
    for name, one in copies_in(plan).items():
        if one.drawn or one.unknown:
            raise PlanError(
                f'the new groups of {name} are drawn (grouped="count"), so the network cannot '
                "follow the narrow one.",
                name=name,
                way_out='Grow groups in width: grouped="width".',
            )


def _check_chance(model: nn.Module, batch: Batch) -> None:
    """Return if a network in train mode does the same twice.

    Raises:
        PlanError: it does not; the first dropout is named.
    """
    dropout = nn.modules.dropout._DropoutNd
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, dropout) else getattr(module, "dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            raise PlanError(
                f"{name or type(module).__name__} drops at random (p={rate:g}), in which no other "
                "network can follow.",
                name=name,
                way_out="Set its rate to 0 for the comparison.",
            )
    first, second = (_outputs(model, batch, "train") for _ in range(2))
    if any(not torch.equal(one, other) for one, other in zip(first, second, strict=True)):
        raise PlanError(
            "the network in train mode depends on chance, in which no other one can follow.",
            way_out="Turn off what draws numbers (dropout, stochastic depth) for the comparison.",
        )
