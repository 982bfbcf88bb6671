"""Why channels are pinned by a weight that is computed: by what, and how to take that off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

from fxgrow.channels.channels import Channels
from fxgrow.labels.pins import Pin, PinKind

_PARAMETRIZE = "torch.nn.utils.parametrize"


class _Computed(NamedTuple):
    """A weight that a layer computes of other tensors.

    Attributes:
        layer: the layer.
        tensors: what the names of these tensors begin with.
        rule: what computes it.
        removal: the call that takes that off.
    """

    layer: str
    tensors: str
    rule: str
    removal: str


def with_computed_weights_told(channels: Channels, model: nn.Module) -> Channels:
    """Return channels whose pins say what computes a weight, where that is what pins them.

    The operations that it is made of say what they do, and not what for.

    Args:
        channels: of a run of the model.
        model: the network.
    """
    pins = dict(channels.pins)
    for weight in _computed(model):
        pin = Pin(PinKind.COMPUTED, details=(weight.layer, weight.rule, weight.removal))
        for index, axis in enumerate(channels.axes):
            if not axis.tensor.startswith(weight.tensors):
                continue
            for channel in channels.of_axis(index).tolist():
                if channel in pins and _is_inside(pins[channel].place, weight.layer):
                    pins[channel] = pin
    return replace(channels, pins=pins)


def _computed(model: nn.Module) -> Iterator[_Computed]:
    """Yield the weights that are computed by what cannot be seen through."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                removal = f"torch.nn.utils.remove_spectral_norm(layer, {hook.name!r})"
                yield _Computed(name, f"{prefix}{hook.name}_orig", "spectral norm", removal)
        if is_parametrized(module):
            for local, rules in module.parametrizations.items():
                told = [_told(rule) for rule in rules]
                if told != ["weight norm"]:
                    removal = f"{_PARAMETRIZE}.remove_parametrizations(layer, {local!r})"
                    tensors = f"{prefix}parametrizations.{local}."
                    yield _Computed(name, tensors, " and ".join(told), removal)


def _told(rule: nn.Module) -> str:
    """Return what a parametrization is called."""
    name = type(rule).__name__
    known = {"_WeightNorm": "weight norm", "_SpectralNorm": "spectral norm"}
    return known.get(name, name.strip("_"))


def _is_inside(place: str, layer: str) -> bool:
    """Return whether an operation of a pin ran in a layer, or in what computes its weight."""
    where = place.partition(" at ")[2]
    return bool(layer) and (where == layer or where.startswith(f"{layer}.parametrizations."))
