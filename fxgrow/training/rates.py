"""Learning rates after growth: which rules there are, and what they are for each parameter.

An optimizer keeps its groups and their settings, so that schedulers and loggers stay right: what a
rule changes is done around each of its steps, see :mod:`fxgrow.training.stepping`.

``width``: of m copies of each row and k of each column, the narrow network's gradient is m times an
entry's own, and its weight k times. So the optimizer is given m times the gradient, and the entry
takes 1/k of the step. That makes SGD's rate lr·m/k with a decay of wd·k/m, Adam's lr/k with eps/m,
and the decay wd·k/m where it joins the gradient, wd·k where it does not. The optimizer's averages
are then those of the narrow network. Factors differ from row to row where copies do (1.5x).

``variance_transfer`` (Yuan et al. 2023, section 3.3): the entries that a growth wrote in a weight
take ‖W_part‖/‖W_0‖ of the step, W_0 being the entries before the first growth under this rule, with
norms as they are at the step. Vectors (biases, norms) take whole steps.

``warm_up``: all steps grow from 1/100 to the whole over the 100 that follow the growth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fxgrow.api.widen as api
from fxgrow.errors import PlanError, UsageError
from fxgrow.files.optimizer.buffers import BUFFERS, is_counter
from fxgrow.plan.schema import Plan
from fxgrow.training import stepping
from fxgrow.training.history import stages_within
from fxgrow.training.lost import OWN, watch
from fxgrow.training.parts import Part, Provenance, WrittenAxis, copies_in, provenances, split
from fxgrow.training.stepping import Rate, WarmUp

Rates: TypeAlias = Literal["none", "width", "variance_transfer", "warm_up"]
RATES: tuple[Rates, ...] = ("none", "width", "variance_transfer", "warm_up")
WARM_UP = 100  # steps
_TABLE = "_fxgrow_rates"  # the attribute of the grown module that holds its table


@dataclass
class Entry:
    """A parameter and its rate."""

    parameter: nn.Parameter
    rate: Rate

    @property
    def fits(self) -> bool:
        """Whether the rate is for the parameter's shape."""
        return tuple(self.parameter.shape) == self.rate.shape


class Table:
    """The rates of a network's parameters, held by the module so that copies of it have their own.

    No nest of tensors: what looks for tensors in attributes of modules does not look in here.

    Attributes:
        rates: of each parameter that has one.
        warming: what the steps of all are multiplied by after a growth.
    """

    def __init__(self, rates: list[Entry], warming: WarmUp) -> None:
        self.rates = rates
        self.warming = warming

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take a state over, of a copy or of what was pickled, and have the copy's rates held.

        What has grown since, in a copy that no rule was asked for, has none.
        """
        vars(self).update(state)
        self.rates = [entry for entry in self.rates if entry.fits]
        stepping.hold((entry.parameter, entry.rate) for entry in self.rates)


def check_rule(rule: str) -> None:
    """Return if there is a rule of that name.

    Raises:
        UsageError: there is not.
    """
    if rule not in RATES:
        known = ", ".join(RATES)
        raise UsageError(f"there is no rule {rule!r} for learning rates.", way_out=f"Give {known}.")


def check_growth(
    network: nn.Module, grown: api.Grown, rule: str, optimizers: Sequence[Optimizer]
) -> None:
    """Return if a rule can be kept after a growth, which is yet to be carried out.

    Raises:
        PlanError: it cannot; the parameter or the optimizer is named.
    """
    rules = {stage.lr for _, stage in stages_within(network)} | {rule}
    _check_whole(network)
    if rule == "width":
        trained = {n for n, p in grown.model.named_parameters() if p.requires_grad}
        copies = copies_in(grown.plan)
        _check_copies(grown.plan, {n: p for n, p in copies.items() if n in trained})
    if rule == "variance_transfer":
        _check_alive(network, grown)
    for optimizer in optimizers:
        stepping.check_optimizer(
            optimizer, scaled="width" in rules, parted=bool(rules & {"width", "variance_transfer"})
        )


def _check_whole(network: nn.Module) -> None:
    """Return if no network around this one has grown under a rule that goes for its parameters.

    Raises:
        PlanError: one has.
    """
    tables = (vars(module).get(_TABLE) for module in network.modules())
    own = {id(one.parameter) for table in tables if table is not None for one in table.rates}
    for name, parameter in network.named_parameters():
        rate = stepping.RATES.get(parameter)
        if (
            rate is not None
            and id(parameter) not in own
            and (not rate.is_whole or rate.warming.left)
        ):
            raise PlanError(
                f"{name} has a rate of its own since a network that this one is a part of has grown"
                " (lr=).",
                name=name,
                way_out="Grow that network, with include= and exclude= for what is to grow.",
            )


def _check_copies(plan: Plan, found: Mapping[str, Provenance]) -> None:
    """Return if a plan makes copies whose number is known.

    Raises:
        PlanError: it makes none, or a parameter's cannot be told.
    """
    for name, one in found.items():
        if one.unknown or one.computed:
            reason = one.unknown or "it is a part of a weight that is computed (weight_norm)"
            raise PlanError(
                f'lr="width" has no rate for {name}: {reason}.',
                name=name,
                way_out='Give lr="none", or leave the layer out (exclude=).',
            )
    widens = any(step.request.verb == "widen" for step in plan.steps)
    if widens and not any(
        part.rows * part.columns > 1 for n in found for part in split(n, found[n])
    ):
        raise PlanError(
            'lr="width" makes up for copies of channels, and this growth makes none.',
            way_out='Give pairing="replicate" too, or lr="variance_transfer".',
        )


def _check_alive(network: nn.Module, grown: api.Grown) -> None:
    """Return if no part of a weight that a growth writes is zero, for its rate would stay so.

    Raises:
        PlanError: one is; the parameter is named.
    """
    found = provenances(network, more=grown.plan)
    for name, parameter in grown.model.named_parameters():
        if name not in found or parameter.ndim < 2 or not parameter.requires_grad:
            continue
        if found[name].unknown:
            raise PlanError(
                f'lr="variance_transfer" has no rate for {name}: {found[name].unknown}.',
                name=name,
                way_out='Give lr="none", or leave the layer out (exclude=).',
            )
        parts = split(name, found[name])
        latest = max(part.stage for part in parts)
        if parts[0].stage == latest:
            continue  # a new layer
        new = [view for part in parts if part.stage == latest for view in part.views(parameter)]
        if not any(bool(view.detach().any()) for view in new):
            raise PlanError(
                f'the new entries of {name} are zero, and lr="variance_transfer" gives each part '
                "a rate by its norm, so they would stay zero.",
                name=name,
                way_out='Give another pairing ("vv_z_negz", "replicate"), or lr="none".',
            )


def follow(network: nn.Module, rule: str, *, left: int | None = None) -> None:
    """Have optimizers keep to the rules of all growths of a network, the last one noted already.

    Args:
        network: the module that has grown.
        rule: of the last growth.
        left: how many steps of a warm-up are left; None to begin one where the rule asks for it,
            or to go on with one.
    """
    stages = [stage.lr for _, stage in stages_within(network)]
    old: Table | None = vars(network).get(_TABLE)
    if left is None:
        left = WARM_UP if rule == "warm_up" else old.warming.left if old is not None else 0
    warming = WarmUp(left, WARM_UP)
    copies = provenances(network, rule="width") if "width" in stages else {}
    wrote = provenances(network) if "variance_transfer" in stages else {}
    rates: dict[nn.Parameter, Entry] = {}
    for name, parameter in network.named_parameters():
        rate = Rate(shape=tuple(parameter.shape), warming=warming)
        if name in copies:
            rate.gradient = _product(copies[name].axes, "rows")
            rate.update = _product(copies[name].axes, "columns", inverse=True)
        if name in wrote and parameter.ndim >= 2 and not wrote[name].unknown:
            rate.first, rate.later = _transferred(split(name, wrote[name]), stages)
        if left or not rate.is_whole:
            rates[parameter] = Entry(parameter, rate)
    forget(network)
    if rates:
        vars(network)[_TABLE] = Table(list(rates.values()), warming)
        stepping.hold((parameter, entry.rate) for parameter, entry in rates.items())
    for module in network.modules():
        own = {n: rates[p] for n, p in module._parameters.items() if p is not None and p in rates}
        if own:
            vars(module)[OWN] = own
            watch(module)
            if _after_load not in module._load_state_dict_post_hooks.values():
                module.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]


def _after_load(module: nn.Module, keys: object) -> None:
    """Give rates to parameters that ``load_state_dict(…, assign=True)`` has put into a module."""
    del keys
    for local, entry in vars(module).get(OWN, {}).items():
        parameter = module._parameters.get(local)
        if parameter is not None and parameter is not entry.parameter:
            is_kept = stepping.RATES.get(entry.parameter) is entry.rate  # not in a layer's own copy
            entry.parameter = parameter
            if is_kept and entry.fits:
                stepping.hold([(parameter, entry.rate)])


@contextlib.contextmanager
def rates_restored_on_error(network: nn.Module) -> Iterator[None]:
    """Restore the rates of a network's parameters if an error is raised within."""
    held = [(parameter, stepping.RATES.get(parameter)) for parameter in network.parameters()]
    try:
        yield
    except BaseException:
        for parameter, rate in held:
            stepping.RATES.pop(parameter, None)
            if rate is not None:
                stepping.RATES[parameter] = rate
        raise


def steps_left(network: nn.Module) -> int:
    """Return how many steps of a warm-up are left to a network, or to a module in it."""
    tables = (vars(module).get(_TABLE) for module in network.modules())
    return max((table.warming.left for table in tables if table is not None), default=0)


def forget(network: nn.Module) -> None:
    """Drop the rates of a copy of a network, which no optimizer trains."""
    for module in network.modules():
        vars(module).pop(_TABLE, None)
        vars(module).pop(OWN, None)


def rate_of(parameter: Tensor) -> Rate:
    """Return what growths have made of the steps of a parameter."""
    return stepping.RATES.get(parameter) or Rate()


def _product(axes: Sequence[WrittenAxis], which: str, *, inverse: bool = False) -> float | Tensor:
    """Return the product of copies over all dims: a number, or broadcastable where they differ."""
    whole = torch.ones((), dtype=torch.float64)
    for dim, axis in enumerate(axes):
        counts: np.ndarray[Any, Any] = getattr(axis, which)
        shape = [1] * len(axes)
        if len(counts) and (counts == counts[0]).all():
            whole = whole * float(counts[0])
        elif len(counts):
            shape[dim] = -1
            whole = whole * torch.from_numpy(counts.astype(np.float64)).view(shape)
    whole = 1 / whole if inverse else whole
    return float(whole) if whole.numel() == 1 else whole


def _transferred(
    parts: Sequence[Part], stages: Sequence[str]
) -> tuple[tuple[Part, ...], tuple[tuple[Part, ...], ...]]:
    """Return the parts that make up W_0, and those of each growth under variance transfer."""
    own = {part.stage for part in parts}
    under = [n for n, rule in enumerate(stages, 1) if rule == "variance_transfer" and n in own]
    first = tuple(part for part in parts if part.stage < min(under, default=0))
    later = [tuple(part for part in parts if part.stage == number) for number in under]
    return (first, tuple(filter(None, later))) if first else ((), ())


def scale_states(network: nn.Module, plan: Plan, optimizers: Sequence[Optimizer]) -> None:
    """Make averages of the wide network's gradients those of the narrow one's: under ``width``.

    Args:
        network: the module that has grown.
        plan: how.
        optimizers: what trains it; their averages have grown.
    """
    copies = copies_in(plan)
    for name, parameter in network.named_parameters():
        factor = _product(copies[name].axes, "rows") if name in copies else 1.0
        if isinstance(factor, float) and factor == 1.0:
            continue
        for optimizer in optimizers:
            state = optimizer.state.get(parameter, {})
            for key, value in list(state.items()):
                if is_counter(value) or key not in BUFFERS:
                    continue
                power = factor ** BUFFERS[key](state, key).degree
                state[key] = value * (power.to(value) if isinstance(power, Tensor) else power)


def advice(plan: Plan, rule: str) -> str:
    """Return what to do about learning rates after a growth, with its reason.

    Args:
        plan: what was done.
        rule: the one that was chosen.
    """
    parts = [part for name, one in copies_in(plan).items() for part in split(name, one)]
    rows, columns = (max((getattr(p, of) for p in parts), default=1) for of in ("rows", "columns"))
    if rule == "width":
        return (
            "Keep the learning rate: with the rates that it has, the network goes on as the narrow "
            "one would, so its copies stay tied and bring no capacity until something parts them "
            "(split_noise)."
        )
    if rule == "variance_transfer":
        return (
            "Keep the learning rate and its schedule: new weights take steps by the ratio of their "
            "norm to that of the first ones, so that they catch up with these."
        )
    if rule == "warm_up":
        return (
            f"Keep the learning rate: steps grow to the whole within {WARM_UP}, while the "
            "optimizer's averages take in the new weights."
        )
    if rows * columns > 1:
        return (
            f"Channels were copied up to {max(rows, columns)} times, so each copy has a smaller "
            "gradient and a smaller share of a weight to change: at the same rate, SGD moves the "
            'network more slowly there and Adam faster. lr="width" makes up for both.'
        )
    return (
        "The function is the old one, so the rate that was right before is right for the old "
        "weights; new ones begin untrained, and late in a schedule the rate may be too small for "
        'them. lr="variance_transfer" gives each part a rate by its norm; a schedule that starts '
        'anew (lr="warm_up") helps where the loss jumps after the first steps.'
    )
