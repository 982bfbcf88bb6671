"""Let the configuration of a network that was cut out of a larger one tell its own sizes."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fxgrow.errors import FxgrowError
from fxgrow.files.fitting import config_of
from fxgrow.files.pretrained import example_inputs as inputs_for
from fxgrow.modules.architectures import Architecture
from fxgrow.modules.calling import arguments_of
from fxgrow.plan.schema import Plan


def fit_config_(network: nn.Module, plan: Plan, example_inputs: object = None) -> None:
    """Set the fields of a configuration that govern a network's sizes, in place.

    What a run resumes from is built from it. Where no fields give these sizes, it stays as it was.

    Args:
        network: a model of transformers, cut out of a larger one of whose sizes its configuration
            still tells; any other stays as it is.
        plan: what cut it out.
        example_inputs: of the network; None draws them as the configuration tells.
    """
    config: Any = getattr(network, "config", None)
    if not (callable(getattr(config, "to_dict", None)) and callable(_from_dict(config))):
        return
    kind = type(network).__name__
    fields = {**config.to_dict(), "architectures": [kind]}
    architecture = Architecture(f"transformers:{kind}", {"config": fields})
    try:
        given = inputs_for(network) if example_inputs is None else example_inputs
        arguments = None if given is None else arguments_of(given)
        found = config_of(architecture, plan, copy.deepcopy(network).cpu().eval(), arguments)
    except FxgrowError:
        return  # it is no class of transformers, or none of its configurations has these sizes
    _change(config, _from_dict(config)(fields), _from_dict(config)({**fields, **found}))


def _from_dict(config: object) -> Any:
    return getattr(type(config), "from_dict", None)


def _change(config: Any, before: Any, after: Any) -> None:
    """Set in a configuration what differs between two others: modules hold it, and parts of it."""
    for name, value in vars(after).items():
        mine, old = getattr(config, name, None), vars(before).get(name)
        if callable(getattr(mine, "to_dict", None)) and type(old) is type(value):
            _change(mine, old, value)
        elif value != old:
            setattr(config, name, value)
