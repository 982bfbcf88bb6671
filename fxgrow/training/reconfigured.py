"""Models of transformers that have grown in training, with a configuration of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxgrow.errors import PlanError
from fxgrow.files.fitting import config_of
from fxgrow.files.pretrained import example_inputs as inputs_for
from fxgrow.files.ungoverned import UngovernedError
from fxgrow.modules.architectures import Architecture
from fxgrow.modules.calling import arguments_of
from fxgrow.training.generated import extended
from fxgrow.training.history import stages_of

_BY_RECORD = (
    "Keep the weights, the configuration that the training began with and "
    "fxgrow.training.state_dict(model), from which regrow_ makes the network again. A later "
    "training can leave out what no configuration tells (exclude=, where=)."
)


def reconfigured(model: nn.Module, example_inputs: object = None) -> nn.Module:
    """Return a grown model of transformers as its class builds it from a configuration of its size.

    ``grow_`` leaves ``model.config`` as it was, so that a run can be resumed from it. This is for
    the end of a training::

        reconfigured(model).save_pretrained("grown")

    writes a directory that ``from_pretrained`` and :func:`fxgrow.load` read.

    Args:
        model: a ``PreTrainedModel`` that has grown in training; only read.
        example_inputs: what both models run on, to see that they compute the same; None (default)
            draws them as the configuration tells.

    Returns:
        A new model of the same class, on the same device and in the same mode, with the weights of
        the grown one.

    Raises:
        PlanError: the model has no configuration, or has not grown.
        SourceError: no configuration has these sizes, as where layers differ, or heads are of
            another number than the width asks for.
    """
    config: Any = getattr(model, "config", None)
    told: Callable[[], dict[str, Any]] | None = getattr(config, "to_dict", None)
    stages = stages_of(model)
    if told is None or not stages:
        raise PlanError(
            f"{type(model).__name__} has no configuration of transformers that growth has left "
            "behind.",
            way_out="Give the model that grow_ was given, as it is now.",
        )
    kind: Any = extended(type(model))
    steps = [step for stage in stages for step in stage.plan.steps]
    plan = replace(steps[-1], after=tuple(steps[:-1]))
    fields = {**told(), "architectures": [kind.__name__]}
    architecture = Architecture(f"transformers:{kind.__name__}", {"config": fields})
    given = inputs_for(model) if example_inputs is None else example_inputs
    arguments = None if given is None else arguments_of(given)
    try:
        found = config_of(architecture, plan, copy.deepcopy(model).cpu().eval(), arguments)
    except UngovernedError as error:
        raise UngovernedError(error.message, name=error.name, way_out=_BY_RECORD) from error
    first = next(model.parameters(), torch.empty(0))
    result: nn.Module = kind(type(config).from_dict({**fields, **found}))
    result.to(first.device, first.dtype).load_state_dict(model.state_dict())
    return result.train(model.training)
