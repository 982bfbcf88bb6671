"""The small network that a schedule begins with, built by shrinking the one of full size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.api.deepen import plan_deepening
from fxgrow.api.widen import plan as plan_widening
from fxgrow.apply.module import meta_module, reshaped
from fxgrow.errors import PlanError, UsageError
from fxgrow.grow.obstacle import Obstacle
from fxgrow.grow.sizes.rerun import Resized, run_resized
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.tensors import modules_of, named_tensors
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan
from fxgrow.training.definition import built, definition_of
from fxgrow.training.schedule import GrowthSchedule
from fxgrow.training.seed_config import fit_config_
from fxgrow.training.shorter import shorten_
from fxgrow.version import __version__

_LEAVE_OUT = (
    "Leave it out of the schedule (exclude=), or give other widths (multiple_of=; rate=1 doubles)."
)


@exclusive
def seed_network(
    definition: nn.Module | Callable[[], nn.Module],
    schedule: GrowthSchedule,
    example_inputs: object = None,
    *,
    stage: int = 0,
    init: Callable[[nn.Module], object] | None = None,
    check: bool = True,
    **options: Any,
) -> nn.Module:
    """Return the network that a schedule begins with: a fresh one of the same class, but smaller.

    Growing it stage by stage ends exactly at the shapes of the definition. The configuration of a
    model of transformers tells the small sizes, where its fields can.

    Args:
        definition: the network of full size, which is not touched, or a function that makes it.
        schedule: in absolute widths, as :meth:`GrowthSchedule.geometric` makes it.
        example_inputs: as for :func:`fxgrow.widen`.
        stage: the stage to build for; 0 is the first.
        init: called with the result, to initialise it; after every layer's own
            ``reset_parameters``. What no layer initialises (a token, a table of positions) is cut
            from the definition's.
        check: plan the growth through all later stages first, on the meta device.
        **options: those of :func:`fxgrow.widen` that growth will be given, for the check.

    Raises:
        TraceError: the network cannot be followed.
        PlanError: it cannot be so narrow, or not grow back; the layer is named.

    Example:
        >>> import torch
        >>> from fxgrow.training import GrowthSchedule, seed_network
        >>> def build():
        ...     return torch.nn.Sequential(
        ...         torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)
        ...     )
        >>> schedule = GrowthSchedule.geometric(build, epochs=20)
        >>> seed_network(build, schedule)[0]
        Linear(in_features=4, out_features=8, bias=True)
    """
    full = built(definition)
    network = _narrowed(
        _shallower(full, schedule.blocks_at(stage)), schedule, stage, example_inputs
    )
    if check:
        check_growth(full, network, schedule, example_inputs, stage=stage, options=options)
    initialise_(network)
    if init is not None:
        init(network)
    return network


def initialise_(network: nn.Module) -> None:
    """Let every layer initialise itself, the outer ones after those in them, in place."""
    for module in reversed([*modules_of(network)]):
        for name in ("reset_parameters", "_reset_parameters"):
            own = getattr(module, name, None)
            if callable(own):
                own()
                break


def check_growth(
    full: nn.Module,
    network: nn.Module,
    schedule: GrowthSchedule,
    example_inputs: object = None,
    *,
    stage: int = 0,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Return if a network grows through the stages of a schedule to the shapes of another one.

    Args:
        full: the other one.
        network: as a stage begins.
        schedule: the stages.
        example_inputs: of both.
        stage: which one it is.
        options: of growth, those of :func:`fxgrow.widen`.

    Raises:
        PlanError: it does not; the first group or tensor that differs is named.
    """
    given = {"where": schedule.where, **(options or {})}
    for each in schedule.stages[stage + 1 :]:
        if each.blocks:
            network = meta_module(plan_deepening(network, each.blocks, example_inputs), network)
        if each.width:
            network = meta_module(_widening(network, each.width, example_inputs, given), network)
    wanted = {name: tuple(x.shape) for name, x in named_tensors(full).items()}
    found = {name: tuple(x.shape) for name, x in named_tensors(network).items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            have, want = found.get(name, "nothing"), wanted.get(name, "nothing")
            raise PlanError(
                f"the last stage has {have} for {name} where the definition has {want}.",
                name=name,
                way_out="Make the schedule from this definition (GrowthSchedule.geometric).",
            )


def _widening(
    network: nn.Module, width: Mapping[str, str], example_inputs: object, options: Mapping[str, Any]
) -> Plan:
    """Return the plan of a stage.

    Raises:
        PlanError: a group cannot grow so.
    """
    try:
        plan = plan_widening(network, width, example_inputs, **options)
    except UsageError:
        raise
    except PlanError as error:
        raise PlanError(error.message, name=error.name, way_out=_LEAVE_OUT) from error
    for refusal in plan.refused:
        asked = width.get(escape(refusal.name))
        if asked is not None:
            raise PlanError(
                f"{refusal.name} cannot be widened to {asked}: {refusal.reason}.",
                name=refusal.name,
                way_out=_LEAVE_OUT,
            )
    return plan


def _narrowed(
    model: nn.Module, schedule: GrowthSchedule, stage: int, example_inputs: object
) -> nn.Module:
    """Return a copy of a network at the widths of a stage.

    Raises:
        PlanError: it cannot have them.
    """
    known = definition_of(model, example_inputs)
    groups = {group.name: group for group in known.analysis.groups}
    widths: dict[str, int] = {}
    for name, width in schedule.widths_at(stage).items():
        group = groups.get(name)
        if group is None:
            raise PlanError(
                f"the network has no channel group {name!r}.",
                name=name,
                way_out="Make the schedule from this definition (GrowthSchedule.geometric).",
            )
        if width != group.width:
            widths[name] = width
    if not widths:
        return copy.deepcopy(model)
    sizes = known.sizes(widths)
    if sizes.refused:
        first = sizes.refused[0]
        raise _impossible(first.name, first.reason)
    run = run_resized(known.analysis, sizes)
    if isinstance(run, Obstacle):
        raise _impossible(run.name or next(iter(widths)), run.reason)
    old = named_tensors(model)
    tensors = {name: _corner(old[name], shape) for name, shape in sizes.shapes.items()}
    surgery = _surgery(widths, run)
    network = copy.deepcopy(reshaped(surgery, model, tensors))
    fit_config_(network, surgery, example_inputs)
    return network


def _impossible(name: str, reason: str) -> PlanError:
    return PlanError(
        f"{name} cannot be as narrow as the schedule says: {reason}.", name=name, way_out=_LEAVE_OUT
    )


def _corner(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the first entries of a tensor along each dim, as a tensor of their own."""
    part = tensor.detach()[tuple(slice(size) for size in shape)]
    return part.clone(memory_format=torch.contiguous_format)


def _surgery(widths: Mapping[str, int], run: Resized) -> Plan:
    """Return what makes a network so narrow as a plan that is carried out here and kept nowhere."""
    return Plan(
        request=Widen(width={name: str(width) for name, width in widths.items()}),
        scopes=(),
        source={},
        tensors={},
        parameters=(0, 0),
        flops=(0, 0),
        fxgrow=__version__,
        modules=run.modules,
        sizes=run.sizes,
    )


def _shallower(full: nn.Module, blocks: Mapping[str, int]) -> nn.Module:
    """Return a network with fewer blocks in some lists: without the last ones.

    The network itself if nothing changes; else a copy.

    Raises:
        PlanError: there is no such list, or it has fewer.
    """
    fewer: dict[str, int] = {}
    for name, count in blocks.items():
        try:
            have = len(full.get_submodule(name)._modules)
        except AttributeError:
            have = 0
        if have < count:
            raise PlanError(
                f"the network has {have} blocks in {name!r}, and the schedule {count}.",
                name=name,
                way_out="Name lists of blocks (nn.Sequential, nn.ModuleList) of the definition.",
            )
        if have > count:
            fewer[name] = count
    if not fewer:
        return full
    network = copy.deepcopy(full)
    for name, count in fewer.items():
        shorten_(network, name, count)
    return network
