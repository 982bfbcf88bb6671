"""New weights from data for a plan that was read: they are computed again, as when it was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from fxgrow.api.widen import plan
from fxgrow.errors import PlanError
from fxgrow.grow.data import DataDriven
from fxgrow.plan.init import init_name, told_init
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan


def computed_again(
    made: Plan,
    model: nn.Module,
    init: object,
    example_inputs: object = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Plan:
    """Have an init from data compute the new weights of a plan, unless it holds them.

    Args:
        made: the plan.
        model: the network it is carried out on; only read.
        init: what fills new weights; one that takes no data is left alone.
        example_inputs: on which the network is followed; None takes those of the first batch.
        progress: told what is being computed.

    Returns:
        The plan itself.

    Raises:
        PlanError: the plan was made with another init, or from these batches other channels are
            computed than the plan makes room for.
    """
    request = made.request
    if not isinstance(init, DataDriven) or _holds(init, made):
        return made
    planned = request.drawing.init
    if not isinstance(request, Widen) or init_name(init) != planned:
        names = [planned] if isinstance(planned, str) else dict.fromkeys(planned.values())
        raise PlanError(
            f"this plan was not made with {init.name}: its new weights are those of "
            f"{', '.join(map(told_init, names))}.",
            name=init.name,
            way_out="Give the init that it was made with, or none where it needs no data; or make "
            f"a plan with {init.name} (fxgrow.widen).",
        )
    after = replace(made.after[-1], after=made.after[:-1]) if made.after else None
    # A plan does not tell whether the method's own pairing was asked for, which changes twins.
    asked = [None, request.pairing] if request.pairing == init.pairing else [request.pairing]
    for pairing in asked:
        plan(
            model, request.width, example_inputs, request.rescaling, pairing, init=init,
            where=request.where, include=request.include, exclude=request.exclude,
            gain=request.gain, noise=request.noise, multiple_of=request.multiple_of,
            grouped=request.grouped, seed=request.seed, compensate=request.compensate,
            split_noise=request.split_noise, module=request.module, budget=request.budget,
            output_init=request.output_init, input_init=request.input_init, after=after,
            progress=progress,
        )  # fmt: skip
        if _holds(init, made):
            return made
    raise PlanError(
        f"from these batches and weights {init.name} computes other channels than the plan makes "
        "room for.",
        way_out="Give the batches that it was made with; or use `fxgrow widen` with "
        "these, which makes a plan of its own.",
    )


def _holds(init: DataDriven, made: Plan) -> bool:
    """Return whether an init holds new weights for a plan."""
    try:
        init.computed_for(made)
    except PlanError:
        return False
    return True
