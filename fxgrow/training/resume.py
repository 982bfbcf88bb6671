"""Resume a training in which a network has grown: what to keep, and how to grow again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from torch import nn
from torch.optim import Optimizer

import fxgrow.api.widen as api
from fxgrow.api.report.data import Report
from fxgrow.apply.module import check_source, remade
from fxgrow.errors import PlanError, SourceError, shown
from fxgrow.modules.exclusive import exclusive
from fxgrow.plan.schema import MOST_STEPS, Plan
from fxgrow.training.followers import averaged, check_schedulers, optimizers_of, unwrapped
from fxgrow.training.history import named_module, stages_within
from fxgrow.training.in_place import all_or_nothing, put_in_place
from fxgrow.training.rates import RATES, WARM_UP, follow, steps_left
from fxgrow.training.shorter import as_before, module_at
from fxgrow.verification.findings import Verification

SCHEMA = 1


def state_dict(model: nn.Module) -> dict[str, Any]:
    """Return how a network has grown, to be saved beside its weights.

    Args:
        model: the network, grown by :func:`grow_` and :func:`deepen_` (or modules in it).

    Returns:
        Strings, numbers, lists and dicts, which ``torch.load(…, weights_only=True)`` reads.

    Example:
        >>> import torch, fxgrow.training
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> _ = fxgrow.training.grow_(net, "2x")
        >>> len(fxgrow.training.state_dict(net)["stages"])
        1
    """
    stages = [
        {"module": name, "lr": stage.lr, "plan": stage.plan.to_json()}
        for name, stage in stages_within(unwrapped(model))
    ]
    return {"schema": SCHEMA, "stages": stages, "warming": steps_left(unwrapped(model))}


@exclusive
def regrow_(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: object = None,
    averages: Iterable[nn.Module] | nn.Module = (),
) -> nn.Module:
    """Give a network the shape that another one has grown to, in place, to load its weights.

    Args:
        model: the network as its code builds it, before any growth; or as deep already as it became
            (from a configuration that was saved with it). What is new in it holds nothing yet: load
            the weights next, then the optimizer's state. Its dtypes stay its own.
        state: what :func:`state_dict` returned; anybody's, so it is checked.
        optimizer: a new one over the network, or several; they hold its new parameters afterwards.
        scheduler: as for :func:`grow_`.
        averages: copies of the network, which take the same shape.

    Returns:
        The network.

    Raises:
        SourceError: the state is none of :func:`state_dict`'s.
        PlanError: it is of another network, or something cannot follow. Nothing is changed.

    Example:
        >>> import torch, fxgrow.training
        >>> def build():
        ...     return torch.nn.Sequential(
        ...         torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ...     )
        >>> net = build()
        >>> _ = fxgrow.training.grow_(net, "2x")
        >>> saved = {"model": net.state_dict(), "growth": fxgrow.training.state_dict(net)}
        >>> again = fxgrow.training.regrow_(build(), saved["growth"])
        >>> again.load_state_dict(saved["model"])
        <All keys matched successfully>
    """
    network, optimizers, means = unwrapped(model), optimizers_of(optimizer), averaged(averages)
    check_schedulers(scheduler, optimizers)
    stages = _checked(state)
    present = [stage.plan for _, stage in stages_within(network)]
    if present != [plan for _, _, plan in stages[: len(present)]]:
        raise PlanError(
            "the network has grown already, in another way than the record says.",
            way_out="Build it anew, as it was before its first growth.",
        )
    left, all_of_it = _steps_left(state), {*network.parameters()}
    with contextlib.ExitStack() as undone:
        for name in dict.fromkeys(name for name, _, _ in stages) if not present else ():
            parts = [
                part for one in (network, *means) if (part := module_at(one, name)) is not None
            ]
            plans = [plan for named, _, plan in stages if named == name]
            undone.enter_context(as_before(parts, plans))
        undone.enter_context(all_or_nothing(network, optimizers, means))
        _leave_out(optimizers, all_of_it - {*network.parameters()})
        for name, lr, plan in stages[len(present) :]:
            part = grown = named_module(network, name)
            _check_part(plan, part)
            for step in plan.steps:
                grown = remade(step, grown)
            result = api.Grown(grown, plan, Report(plan, Verification("skipped")))
            inner = [named_module(mean, name) for mean in means]
            put_in_place(part, result, lr, optimizers, inner, within=network)
        follow(network, "none", left=left)
    return model


def _leave_out(optimizers: Sequence[Optimizer], gone: Set[nn.Parameter]) -> None:
    """Have optimizers hold some parameters no more, of blocks that growth is yet to bring."""
    for group in (group for one in optimizers for group in one.param_groups):
        group["params"] = [parameter for parameter in group["params"] if parameter not in gone]


def _check_part(plan: Plan, part: nn.Module) -> None:
    """Return if a plan is for a module.

    Raises:
        PlanError: it is not.
    """
    try:
        # A trainer may bring it to the training's precision only after it has read a checkpoint.
        check_source(plan.steps[0], part, dtypes=False)
    except PlanError as error:
        raise PlanError(
            f"the record is of another network: {error.message}",
            name=error.name,
            way_out="Build the network as it was before its first growth: by seed_network, if that "
            "made it.",
        ) from error


def _steps_left(state: Mapping[str, Any]) -> int:
    """Return how many steps of a warm-up a state tells are left.

    Raises:
        SourceError: it tells something else.
    """
    left = state.get("warming", 0)
    if type(left) is not int or not 0 <= left <= WARM_UP:
        raise SourceError(
            f"{shown(repr(left))} is no number of steps that are left of a warm-up of {WARM_UP}.",
            way_out="Give what fxgrow.training.state_dict(model) returned.",
        )
    return left


def _checked(state: object) -> list[tuple[str, str, Plan]]:
    """Return the stages of a state: the module's name, the rule of rates and the plan of each.

    Raises:
        SourceError: it is not in the form of :func:`state_dict`.
        PlanError: a plan is none.
    """
    way_out = "Give what fxgrow.training.state_dict(model) returned."
    if not isinstance(state, Mapping) or state.get("schema") != SCHEMA:
        kind = type(state).__name__
        raise SourceError(f"this {kind} does not tell how a network has grown.", way_out=way_out)
    stages = state.get("stages")
    if not isinstance(stages, (list, tuple)) or len(stages) > MOST_STEPS:
        raise SourceError(
            f"the stages of growth are not a list of at most {MOST_STEPS}.", way_out=way_out
        )
    found: list[tuple[str, str, Plan]] = []
    for stage in stages:
        texts = [stage.get(key) if isinstance(stage, Mapping) else None for key in _TEXTS]
        if not all(isinstance(text, str) for text in texts):
            raise SourceError(
                "a stage of growth is not told by module, lr and plan.", way_out=way_out
            )
        module, lr, plan = map(str, texts)
        if lr not in RATES:
            raise SourceError(f"there is no rule {shown(lr)} for learning rates.", way_out=way_out)
        found.append((module, lr, Plan.from_json(plan)))
    return found


_TEXTS = ("module", "lr", "plan")
