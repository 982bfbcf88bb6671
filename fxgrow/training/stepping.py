"""What is done around the steps of optimizers, so that parts of parameters have their own rates.

The steps of all optimizers are watched, and those that hold such parameters are changed: before a
step, gradients are scaled and what is to be held back is noted; after it, each entry goes back by
the share of the step that it does not take. Groups, settings and averages stay the optimizer's own,
so schedulers, fused and foreach kernels, gradient scalers and state_dicts need nothing. Weight
decay is kept apart: it pulls as it would without the rate. Where it can, the step of a parameter is
made part by part instead, see :mod:`fxgrow.training.own_steps`, which costs less.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakTensorKeyDictionary

from fxgrow.errors import PlanError
from fxgrow.training.own_steps import is_by_parts, step_by_parts
from fxgrow.training.parts import Part
from fxgrow.training.ratios import PartsByGrowth, ratios_of

_Ratios: TypeAlias = Mapping[int, Sequence[Tensor]]  # by the id of a rate, for each later growth

# Their steps are a function of each entry's own gradients: scaled ones make the steps of others.
_BY_ENTRY = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adamax, torch.optim.Rprop,
    torch.optim.SparseAdam,
)  # fmt: skip
# Their decay shrinks weights by lr·wd, apart from the gradient.
_DECOUPLED = (torch.optim.Adafactor, torch.optim.Muon)


@dataclass
class WarmUp:
    """How many steps of a warm-up are left, and of how many."""

    left: int = 0
    steps: int = 1
    clock: weakref.ref[Optimizer] | None = None  # whose steps count

    @property
    def share(self) -> float:
        """The share of the next step that is taken."""
        return (self.steps - self.left + 1) / self.steps if self.left else 1.0

    def tick(self, optimizer: Optimizer) -> None:
        """Count a step, if it is one of the optimizer that was the first to make one."""
        if self.clock is None or self.clock() is None:
            self.clock = weakref.ref(optimizer)
        if self.clock() is optimizer and self.left:
            self.left -= 1

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over: it has a clock of its own."""
        return {"left": self.left, "steps": self.steps, "clock": None}


@dataclass
class Rate:
    """What is made of the steps of one parameter.

    Attributes:
        shape: of the parameter.
        gradient: what the optimizer's gradient is multiplied by: a number, or broadcastable.
        update: the share of a step that is taken, likewise.
        first: the entries whose norm later ones are measured by.
        later: entries of later growths, which take a share by the ratio of norms.
        warming: a warm-up of all steps.
    """

    shape: tuple[int, ...] = ()
    gradient: float | Tensor = 1.0
    update: float | Tensor = 1.0
    first: tuple[Part, ...] = ()
    later: tuple[tuple[Part, ...], ...] = ()
    warming: WarmUp = field(default_factory=WarmUp)

    @cached_property
    def grown(self) -> PartsByGrowth:
        """Its entries by growth, of which ratios of norms are taken."""
        return PartsByGrowth((self.first, *self.later), self.shape)

    def to(self, parameter: Tensor) -> None:
        """Bring factors to the device and the dtype of the parameter."""
        if isinstance(self.gradient, Tensor):
            self.gradient = self.gradient.to(parameter)
        if isinstance(self.update, Tensor):
            self.update = self.update.to(parameter)

    @property
    def is_whole(self) -> bool:
        """Whether steps are as they would be, but for a warm-up."""
        return _is_one(self.gradient) and _is_one(self.update) and not self.later


RATES: MutableMapping[Tensor, Rate] = WeakTensorKeyDictionary()


def hold(rates: Iterable[tuple[Tensor, Rate]]) -> None:
    """Keep to some rates from the next step on."""
    _watch()
    for parameter, rate in rates:
        RATES[parameter] = rate


@functools.cache
def _watch() -> None:
    """Look at every optimizer's steps, from the first growth on."""
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


@dataclass
class _Step:
    """One step of an optimizer.

    Attributes:
        gradients: to be given back to parameters.
        held: entries, where they were, and the share of the step that they take.
        along: parameters of SGD that move along their momentum: how far can be told without a
            copy of where they were.
        parted: parameters of SGD whose step is made part by part, in place of the optimizer's.
        warming: the warm-ups that this is a step of, by id.
        ratios: of norms of parts.
    """

    gradients: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    held: list[tuple[Tensor, Tensor, float | Tensor]] = field(default_factory=list)
    along: list[tuple[Tensor, Rate, Mapping[str, Any]]] = field(default_factory=list)
    parted: list[tuple[Tensor, Rate, Mapping[str, Any]]] = field(default_factory=list)
    warming: dict[int, WarmUp] = field(default_factory=dict)
    ratios: _Ratios = field(default_factory=dict)


_RUNNING: MutableMapping[Optimizer, _Step] = weakref.WeakKeyDictionary()


def check_optimizer(optimizer: Optimizer, *, scaled: bool, parted: bool) -> None:
    """Return if an optimizer can keep to rates.

    Args:
        optimizer: the optimizer.
        scaled: gradients are scaled.
        parted: entries take shares of steps.

    Raises:
        PlanError: it cannot; it is named.
    """
    kind = type(optimizer).__name__
    if scaled and not isinstance(optimizer, _BY_ENTRY):
        raise PlanError(
            f'lr="width" cannot be kept with {kind}: its steps are not known to be a function of '
            "each entry's own gradients.",
            name=kind,
            way_out="Train with SGD, Adam, AdamW, RMSprop or another of these in torch.optim, or "
            'give lr="none".',
        )
    known = isinstance(optimizer, (*_BY_ENTRY, *_DECOUPLED, torch.optim.ASGD))
    if parted and not known and any(group.get("weight_decay") for group in optimizer.param_groups):
        raise PlanError(
            f"rates of parts cannot be kept with {kind}: it is not known how it decays weights.",
            name=kind,
            way_out='Set weight_decay=0, take one of torch.optim, or give lr="none".',
        )


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Prepare a step; one with a closure, when that has computed the gradients."""
    _give_back(optimizer)
    if not len(RATES) or not any(
        parameter in RATES for group in optimizer.param_groups for parameter in group["params"]
    ):
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _prepare(optimizer)
        return None

    def evaluate() -> Any:
        _give_back(optimizer)
        loss = closure()
        _prepare(optimizer)
        return loss

    rest = {key: value for key, value in kwargs.items() if key != "closure"}
    return (args[0], evaluate, *args[2:]), rest


def _give_back(optimizer: Optimizer) -> None:
    """Give parameters the gradients that a step before took from them, if it came to no end."""
    step = _RUNNING.pop(optimizer, None)
    for parameter, gradient in step.gradients if step is not None else ():
        parameter.grad = gradient


@torch.no_grad()
def _prepare(optimizer: Optimizer) -> None:
    """Scale gradients, and note what is to be held back."""
    members = [
        (parameter, RATES[parameter], group)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and parameter in RATES
    ]
    check_optimizer(
        optimizer,
        scaled=any(not _is_one(rate.gradient) for _, rate, _ in members),
        parted=any(not rate.is_whole for _, rate, _ in members),
    )
    step = _RUNNING[optimizer] = _Step()
    later = [(parameter, rate) for parameter, rate, _ in members if rate.later]
    found = ratios_of([(parameter, rate.grown) for parameter, rate in later])
    ratios = {id(rate): own for (_, rate), own in zip(later, found, strict=True)}
    for parameter, rate, group in members:
        if rate.warming.left:
            step.warming[id(rate.warming)] = rate.warming
            step.held.append((parameter, parameter.clone(), rate.warming.share))
        if rate.is_whole:
            continue
        rate.to(parameter)
        if (
            _is_one(rate.gradient)
            and _is_one(rate.update)
            and is_by_parts(optimizer, group, parameter, rate.grown.growths)
        ):
            step.parted.append((parameter, rate, group))
            step.gradients.append((parameter, parameter.grad))
            parameter.grad = None  # so that the optimizer leaves it alone
            continue
        if _is_along(optimizer, group, rate):
            step.along.append((parameter, rate, group))
        else:
            _hold_back(step, parameter, rate, ratios, 1.0 - _shrunk(optimizer, group))
        if not _is_one(rate.gradient):
            step.gradients.append((parameter, parameter.grad))
            parameter.grad = parameter.grad * rate.gradient
        _add_decay(optimizer, group, parameter, rate, ratios)
    step.ratios = ratios


def _is_along(optimizer: Optimizer, group: Mapping[str, Any], rate: Rate) -> bool:
    """Return whether an optimizer subtracts its momentum of a parameter, and nothing else."""
    scaled = getattr(optimizer, "found_inf", None) is not None
    plain = bool(group.get("momentum")) and not group.get("nesterov") and _is_one(rate.update)
    return type(optimizer) is torch.optim.SGD and plain and not scaled


def _hold_back(
    step: _Step, parameter: Tensor, rate: Rate, ratios: _Ratios, keeps: float | Tensor
) -> None:
    """Note which entries take what shares of a step, and where they would be without it.

    Args:
        step: what notes it.
        parameter: the parameter.
        rate: its rate.
        ratios: of the norms of its parts.
        keeps: what decay alone would leave of an entry.
    """
    if not _is_one(rate.update):
        step.held.append((parameter, parameter * keeps, rate.update))
    for view, ratio in _parted(rate, ratios, parameter):
        step.held.append((view, view * keeps, ratio))


def _add_decay(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, rate: Rate, ratios: _Ratios
) -> None:
    """Add as much decay to the gradient as is held back of it afterwards, where it joins that."""
    decay, gradient = group.get("weight_decay") or 0.0, parameter.grad
    if not decay or gradient is None or not _is_one(1.0 - _shrunk(optimizer, group)):
        return
    alpha = -decay if group.get("maximize") else decay
    scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler, where the step undoes it
    alpha = alpha if scale is None else alpha * scale
    whole = parameter
    if not _is_one(rate.update):
        whole = parameter / rate.update
        gradient += (whole - parameter) * alpha
    wholes = _parted(rate, ratios, whole)
    for (view, ratio), (weight, _) in zip(_parted(rate, ratios, gradient), wholes, strict=True):
        view.addcmul_(weight, (1 / ratio - 1) * alpha)


def _parted(rate: Rate, ratios: _Ratios, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of the later parts in a tensor of the parameter's shape, each with its share."""
    for parts, ratio in zip(rate.later, ratios.get(id(rate), ()), strict=True):
        for part in parts:
            for view in part.views(tensor):
                yield view, ratio


def _shrunk(optimizer: Optimizer, group: Mapping[str, Any]) -> float | Tensor:
    """Return the share of weights that decay takes in a step, where it is apart from gradients."""
    decay = group.get("weight_decay") or 0.0
    if not decay:
        return 0.0
    if not (isinstance(optimizer, _DECOUPLED) or group.get("decoupled_weight_decay")):
        return 0.0
    lr = group["lr"]
    # Fused kernels read a rate as a number and multiply in float64, others in its own dtype.
    lr = lr.double() if group.get("fused") and isinstance(lr, Tensor) else lr
    share: float | Tensor = lr * decay
    overflow = getattr(optimizer, "found_inf", None)  # of a GradScaler: then there is no step
    return share if overflow is None else share * (overflow == 0).squeeze()


def _is_one(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 1.0


@torch.no_grad()
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Hold back what entries do not take of a step."""
    del args, kwargs
    step = _RUNNING.get(optimizer)
    if step is None:
        return
    _give_back(optimizer)
    for parameter, rate, group in step.parted:
        shares = zip(rate.later, map(float, step.ratios[id(rate)]), strict=True)
        step_by_parts(optimizer, group, parameter, ((rate.first, 1.0), *shares))
    for parameter, rate, group in step.along:
        moved = optimizer.state[parameter]["momentum_buffer"]
        steps = _parted(rate, step.ratios, moved)
        for (view, ratio), (part, _) in zip(
            _parted(rate, step.ratios, parameter), steps, strict=True
        ):
            view.addcmul_(part, (1 - ratio) * group["lr"])
    for entries, before, share in reversed(step.held):
        entries.lerp_(before, 1 - share)
    for warming in step.warming.values():
        warming.tick(optimizer)
