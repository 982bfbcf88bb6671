"""Grow a network in place, with all that follows it in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

import fxgrow.api.widen as api
from fxgrow.api.deepen import deepen
from fxgrow.files.optimizer.growth import grow_optimizer_
from fxgrow.grow.sizes.widths import Width
from fxgrow.modules.exclusive import exclusive
from fxgrow.training import stale
from fxgrow.training.adoption import adopt, keep_unchanged, undone_on_error
from fxgrow.training.followers import (
    averaged,
    check_schedulers,
    grown_averages,
    optimizers_of,
    restored_on_error,
    unwrapped,
)
from fxgrow.training.history import add_stage
from fxgrow.training.parts import Part, parts_of
from fxgrow.training.rates import (
    Rates,
    advice,
    check_growth,
    check_rule,
    follow,
    forget,
    rates_restored_on_error,
    scale_states,
)


@dataclass(frozen=True, repr=False)
class Grown(api.Grown):
    """A network that has grown in place, with the plan and the report.

    Attributes:
        model: the module that was given.
        plan: what was done, as data.
        report: what was measured.
        init: what filled the new weights.
        advice: what to do about learning rates, with its reason.
        parts: which growth wrote which entries of the parameters, and how often each is copied.
    """

    advice: str = ""
    parts: tuple[Part, ...] = ()

    def __repr__(self) -> str:
        """Return a line: what holds what; ``print(grown.report)`` tells what was measured."""
        names = len({part.name for part in self.parts})
        verdict = self.report.verification.verdict
        return (
            f"Grown({type(self.model).__name__}, verification={verdict!r}, {len(self.parts)} parts "
            f"of {names} parameters)"
        )


@exclusive
def grow_(
    model: nn.Module,
    width: Width | Mapping[str, Width] = "2x",
    example_inputs: object = None,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: object = None,
    averages: Iterable[nn.Module] | nn.Module = (),
    lr: Rates = "none",
    **options: Any,
) -> Grown:
    """Make a network wider in place, in the middle of its training, without a jump of the loss.

    The module stays the same object, and so do its submodules, their hooks and every parameter that
    does not change; wider parameters are new objects, which the optimizer then holds. If anything
    is refused, all is as it was. Call it between steps: gradients that wait for one are dropped.

    Forward hooks of modules may be a part of what is computed, so copies run with them: a hook that
    counts or records does so here too, many times. Remove it before and register it afterwards.

    Args:
        model: the network, or what ``torch.compile`` made of it. It is not called but on copies.
        width: as for :func:`fxgrow.widen`.
        example_inputs: likewise.
        optimizer: what trains it, or several: they go on as with :func:`fxgrow.grow_optimizer_`,
            in the same groups. One that was not given fails at its next step, instead of training
            what the network no longer has.
        scheduler: of the learning rate, or several: checked to drive a given optimizer. They go on
            as they are.
        averages: copies of the network that average its weights
            (:class:`torch.optim.swa_utils.AveragedModel` or any other), which grow in place too.
        lr: what happens to learning rates from then on, see :mod:`fxgrow.training.rates`:
            ``none``; ``width``, with which copies (``pairing="replicate"``) go on as the narrow
            network would; ``variance_transfer``, by the norms of what each growth wrote;
            ``warm_up``. Settings of optimizers and schedulers stay as they are.
        **options: all others of :func:`fxgrow.widen`.

    Returns:
        The same module, with plan, report, advice and parts.

    Raises:
        TraceError: the network cannot be followed.
        PlanError: the request is malformed, nothing that it selects can grow, or something that
            was given cannot follow; it is named, and nothing is changed.
        NotPreservedError: ``strict``, and the plan predicts a change of the output.
        VerificationError: the grown network does not compute what the plan predicts.

    Example:
        >>> import torch, fxgrow.training
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> grown = fxgrow.training.grow_(net, "2x", optimizer=optimizer)
        >>> grown.model is net, optimizer.param_groups[0]["params"][0].shape
        (True, torch.Size([16, 4]))
    """

    def widened(network: nn.Module) -> api.Grown:
        return api.widen(network, width, example_inputs, **options)

    return _in_place(widened, model, optimizer, scheduler, averages, lr)


@exclusive
def deepen_(
    model: nn.Module,
    blocks: Mapping[str, str],
    example_inputs: object = None,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: object = None,
    averages: Iterable[nn.Module] | nn.Module = (),
    lr: Rates = "none",
    **options: Any,
) -> Grown:
    """Make a network deeper in place, in the middle of its training, without a jump of the loss.

    Args:
        model: as for :func:`grow_`, as all else.
        blocks: as for :func:`fxgrow.deepen`.
        example_inputs: likewise.
        optimizer: what trains the network, or several.
        scheduler: of the learning rate, or several.
        averages: copies of the network that average its weights.
        lr: what happens to learning rates.
        **options: all others of :func:`fxgrow.deepen`.

    Raises:
        TraceError, PlanError, NotPreservedError, VerificationError: as for :func:`grow_`.
    """

    def deepened(network: nn.Module) -> api.Grown:
        return deepen(network, blocks, example_inputs, **options)

    return _in_place(deepened, model, optimizer, scheduler, averages, lr)


def _in_place(
    grow: Callable[[nn.Module], api.Grown],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    scheduler: object,
    averages: Iterable[nn.Module] | nn.Module,
    lr: str,
) -> Grown:
    """Grow a copy, then make the network what that is, with all that follows it."""
    network, optimizers, means = unwrapped(model), optimizers_of(optimizer), averaged(averages)
    check_schedulers(scheduler, optimizers)
    check_rule(lr)
    grown = grow(network)
    check_growth(network, grown, lr, optimizers)
    with all_or_nothing(network, optimizers, means):
        put_in_place(network, grown, lr, optimizers, means, within=model)
        told, parts = advice(grown.plan, lr) + _of_config(network), parts_of(network)
    return Grown(model, grown.plan, grown.report, grown.init, advice=told, parts=parts)


def _of_config(network: nn.Module) -> str:
    """Return what to know of a configuration beside a network, which tells the old sizes on.

    What resumes a training builds the network from it, before its first growth.
    """
    if not callable(getattr(getattr(network, "config", None), "to_dict", None)):
        return ""
    return (
        " The sizes in the network's config stay those before the first growth, from which regrow_ "
        "makes these again: where save_pretrained writes it, keep "
        "fxgrow.training.state_dict(model) beside it."
    )


@contextlib.contextmanager
def all_or_nothing(
    network: nn.Module, optimizers: Sequence[Optimizer], means: Sequence[nn.Module]
) -> Iterator[None]:
    """Undo growths if an error is raised within, otherwise drop what waits for the old parameters.

    Args:
        network: the network, in which modules grow.
        optimizers: what trains it.
        means: copies of it that average its weights.
    """
    before = dict(network.named_parameters())
    with (
        rates_restored_on_error(network),
        restored_on_error(optimizers),
        undone_on_error((network, *means)),
    ):
        yield
    after = set(network.parameters())
    for parameter in after:
        parameter.grad = None  # of some parameters alone it would make a partial step
    stale.take_back(after)
    stale.leave((name, p) for name, p in before.items() if p not in after)


def put_in_place(
    network: nn.Module,
    grown: api.Grown,
    rule: str,
    optimizers: Sequence[Optimizer],
    means: Sequence[nn.Module] = (),
    *,
    within: nn.Module | None = None,
) -> None:
    """Make a network what a grown copy of it is; call it within :func:`all_or_nothing`.

    Args:
        network: the network.
        grown: what a plan made of it, which is taken apart.
        rule: of learning rates from then on.
        optimizers: what trains it.
        means: copies of it that average its weights.
        within: the network that it is in, if that is known.

    Raises:
        PlanError: something cannot follow.
    """
    plan = grown.plan
    grown_means = grown_averages(plan, means, network)
    keep_unchanged(network, grown.model, plan)
    for one in optimizers:
        grow_optimizer_(one, network, grown)
    adopt(network, grown.model, plan)
    for mean, other in zip(means, grown_means, strict=True):
        adopt(mean, other, plan)
        forget(mean)
    add_stage(network, plan, rule, within=within)
    if rule == "width":
        scale_states(network, plan, optimizers)
    follow(network, rule)
