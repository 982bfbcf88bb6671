"""Rescaling: what happens to the old weights of a layer that writes or reads a widened group.

With f and f' the layer's fan_in before and after, Var the unbiased variance of all its old weights
and g the gain, the old weights are multiplied by (variance transfer, "VT"):

====================================  ==================
``none``                              1
``default_vt``                        √(f / f')
``vt_constraint_old_shape``           g / √(f · Var)
``vt_constraint_new_shape``           g / √(f' · Var)
``vt_output``                         f / f'
====================================  ==================

In a conv→norm→act→conv pair whose hidden width goes from h to h', α is the factor of the first
layer and β that of the second: ``default_vt`` gives α = 1 and β = √(h/h'). g is 1 unless asked
for; ``vt_output`` gives β = h/h', the paper's rule W·C/C' for a layer whose weights have variance
1/fan_in², as the output layer has. ``gain="relu"`` means √2, as in
:func:`torch.nn.init.calculate_gain`.

This module needs no torch, so the command line can list the names without loading it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, overload

from fxgrow.errors import PlanError, UsageError
from fxgrow.plan.by_layer import checked, setting_for, values_in
from fxgrow.plan.norm_tensors import NormTensors
from fxgrow.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """What a rescaling may look at.

    Attributes:
        fan_in: in_channels / groups × kernel area, before growth.
        new_fan_in: the same after growth.
        variance: unbiased variance of all old weights (nan if the rescaling did not ask for it).
        gain: the nonlinearity's gain.
    """

    fan_in: int
    new_fan_in: int
    variance: float
    gain: float


Factor: TypeAlias = Callable[[LayerStatistics], float]
RESCALINGS: Registry[Factor] = Registry("rescaling")
_GAINS = "Give a number, or a nonlinearity torch.nn.init.calculate_gain knows."
_GAINLESS = {"none", "default_vt", "vt_output"}
USES_VARIANCE = {"vt_constraint_old_shape", "vt_constraint_new_shape"}


@RESCALINGS.register("none")
def none(layer: LayerStatistics) -> float:
    """Keep the old weights bit for bit."""
    del layer
    return 1.0


@RESCALINGS.register("default_vt")
def default_vt(layer: LayerStatistics) -> float:
    """Keep the variance of the layer's output under the assumption of variance ~ 1/fan_in."""
    return math.sqrt(layer.fan_in / layer.new_fan_in)


@RESCALINGS.register("vt_constraint_old_shape")
def vt_constraint_old_shape(layer: LayerStatistics) -> float:
    """Give the old weights the variance g²/fan_in of a fresh layer of the old shape."""
    return layer.gain / math.sqrt(layer.fan_in * layer.variance)


@RESCALINGS.register("vt_constraint_new_shape")
def vt_constraint_new_shape(layer: LayerStatistics) -> float:
    """Give the old weights the variance g²/fan_in of a fresh layer of the new shape."""
    return layer.gain / math.sqrt(layer.new_fan_in * layer.variance)


@RESCALINGS.register("vt_output")
def vt_output(layer: LayerStatistics) -> float:
    """Keep the layer's output under the assumption of variance ~ 1/fan_in², as of output layers."""
    return layer.fan_in / layer.new_fan_in


_LEAST_GAIN = 1e-6  # beyond which weights would leave the range of their dtype


def gain_value(gain: float | str) -> float:
    """Return a gain given as a number or by the name of a nonlinearity.

    Raises:
        PlanError: the gain is not positive or the nonlinearity is unknown.

    Example:
        >>> gain_value(1.0), round(gain_value("relu") ** 2, 6)
        (1.0, 2.0)
    """
    if not isinstance(gain, (int, float, str)) or isinstance(gain, bool):
        raise UsageError(f"the gain {gain!r} cannot be read.", way_out=_GAINS)
    if isinstance(gain, str):
        try:
            gain = float(gain)
        except ValueError:
            from torch.nn.init import calculate_gain

            try:
                gain = float(calculate_gain(gain))  # type: ignore[arg-type]
            except ValueError:
                raise UsageError(
                    f"there is no gain {gain!r}.",
                    way_out=_GAINS,
                ) from None
    if not (gain > 0 and math.isfinite(gain)):
        raise UsageError(f"the gain must be positive, not {gain}.", way_out=_GAINS)
    if not _LEAST_GAIN <= gain <= 1 / _LEAST_GAIN:
        raise UsageError(
            f"the gain must be from {_LEAST_GAIN:g} to {1 / _LEAST_GAIN:g}, not {gain:g}.",
            way_out=_GAINS,
        )
    return float(gain)


def check_gain(gain: object, rescaling: str | Mapping[str, str]) -> None:
    """Return if some rescaling takes the gain that is asked for.

    Args:
        gain: one for all, or by layer.
        rescaling: likewise.

    Raises:
        UsageError: a gain other than 1 is given, and none of the rescalings looks at it.
    """
    gains = gain.values() if isinstance(gain, Mapping) else (gain,)
    names = values_in(rescaling)
    if any(str(one) not in ("1", "1.0") for one in gains) and _GAINLESS.issuperset(names):
        raise _says_nothing("a gain", names)


def check_gain_of_layers(
    gain: float | Mapping[str, float], rescaling: str | Mapping[str, str], layers: Iterable[str]
) -> None:
    """Return if each gain by glob is that of some layer whose rescaling takes it.

    Args:
        gain: one for all, or by glob over layers.
        rescaling: likewise.
        layers: the names of all that have weights which a rescaling may multiply.

    Raises:
        UsageError: a gain other than 1 is that of layers whose rescaling does not look at it.

    Example:
        >>> check_gain_of_layers({"fc": 2.0}, {"fc": "vt_constraint_old_shape"}, ["fc", "conv"])
    """
    if not isinstance(gain, Mapping):
        return
    taken = {glob: set[str]() for glob in gain}
    for layer in layers:
        glob = next((glob for glob in taken if fnmatchcase(layer, glob)), None)
        if glob is not None:
            taken[glob].add(setting_for(rescaling, [layer], "none"))
    for glob, names in taken.items():
        if names and gain[glob] != 1.0 and _GAINLESS.issuperset(names):
            raise _says_nothing(f"the gain of {glob!r}", names)


def _says_nothing(gain: str, rescalings: Iterable[str]) -> UsageError:
    """Return the error that a gain has no effect under these rescalings."""
    return UsageError(
        f"{gain} says nothing under the rescaling {' or '.join(sorted({*rescalings}))}.",
        way_out=f"Leave it out, or use --rescaling {' or '.join(sorted(USES_VARIANCE))} there.",
    )


def gain_by_layer(
    gain: float | str | Mapping[str, float | str],
) -> float | dict[str, float]:
    """Return a gain for all layers, or those by glob, as numbers.

    Raises:
        UsageError: it is neither, or one of them is no gain.
    """

    def read(one: object) -> float:
        return gain_value(one)  # type: ignore[arg-type]  # which refuses what is none

    return checked("gain", gain, read, over="layers", form="a number or a nonlinearity's name")


def rescaling_factor(rescaling: str, layer: LayerStatistics) -> tuple[float, str]:
    """Return the factor for a layer's old weights and why it is 1 where it had to be.

    Args:
        rescaling: a registered name.
        layer: the layer's sizes and variance.

    Returns:
        The factor, and a warning ("" if there is none): a variance that is zero, of one element,
        or not finite leaves the weights alone, and so does a layer that reads nothing yet.

    Raises:
        PlanError: no rescaling of that name.
    """
    rule = RESCALINGS[rescaling]
    if rescaling != "none" and not layer.fan_in:
        return 1.0, "it has read no channel so far, so there is nothing to rescale"
    if rescaling in USES_VARIANCE and not (layer.variance > 0 and math.isfinite(layer.variance)):
        return 1.0, f"its weights have variance {layer.variance:g}, so they are not rescaled"
    return rule(layer), ""


class Rescaled(NamedTuple):
    """What :func:`apply_rescaling` returns where it is given more than a weight.

    Attributes:
        weight, bias, norm: shaped as they were; None for what was not given.
    """

    weight: Tensor
    bias: Tensor | None
    norm: NormTensors | None


@overload
def apply_rescaling(
    weight: Tensor, rescaling: str, *, new_fan_in: int, fan_in: int | None = None,
    gain: float | str = 1.0, bias: None = None, norm: None = None,
) -> Tensor: ...  # fmt: skip


@overload
def apply_rescaling(
    weight: Tensor, rescaling: str, *, new_fan_in: int, fan_in: int | None = None,
    gain: float | str = 1.0, bias: Tensor, norm: NormTensors | None = None,
) -> Rescaled: ...  # fmt: skip


@overload
def apply_rescaling(
    weight: Tensor, rescaling: str, *, new_fan_in: int, fan_in: int | None = None,
    gain: float | str = 1.0, bias: Tensor | None = None, norm: NormTensors,
) -> Rescaled: ...  # fmt: skip


def apply_rescaling(
    weight: Tensor,
    rescaling: str,
    *,
    new_fan_in: int,
    fan_in: int | None = None,
    gain: float | str = 1.0,
    bias: Tensor | None = None,
    norm: NormTensors | None = None,
) -> Tensor | Rescaled:
    """Return a layer's old weights rescaled, for growth methods that work on tensors themselves.

    Args:
        weight: old weights of shape (out, in / groups, *kernel) or (out, in).
        rescaling: a registered name.
        new_fan_in: fan_in of the layer after growth, at least what it was.
        fan_in: fan_in before; in / groups × kernel area of ``weight`` by default.
        gain: a number, or a nonlinearity's name.
        bias: of the layer, shape (out,): it takes the weight's factor c. That of a layer whose
            input is c times what it was, as a reader's is behind a writer with a factor and no
            norm, takes both: multiply it by the writer's.
        norm: the batch norm that the layer's output goes through, of tensors of shape (out,): its
            statistics take c up, so that in eval mode it returns what it did. running_mean is
            multiplied by c, running_var becomes c²·(running_var + eps) − eps; where that is
            negative it becomes 0, and the weight makes up for it.

    Returns:
        A new tensor of the weight's shape; with a bias or a norm, a :class:`Rescaled` of all. What
        is given is not changed.

    Raises:
        PlanError: no rescaling of that name, no such gain, a fan_in that shrinks, shapes that do
            not fit together, or a norm without a weight whose running_var would be negative.

    Example:
        >>> import torch
        >>> apply_rescaling(torch.ones(2, 4), "default_vt", new_fan_in=16).tolist()
        [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
        >>> norm = NormTensors(running_mean=torch.ones(2), running_var=torch.ones(2))
        >>> apply_rescaling(
        ...     torch.ones(2, 4), "default_vt", new_fan_in=16, bias=torch.ones(2), norm=norm
        ... ).norm.running_mean.tolist()
        [0.5, 0.5]
    """
    old_fan_in = math.prod(weight.shape[1:]) if fan_in is None else fan_in
    for name, count, least in (("fan_in", old_fan_in, 0), ("new_fan_in", new_fan_in, 1)):
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise UsageError(f"{name} must be a number of inputs, {least} or more, not {count!r}.")
    if new_fan_in < old_fan_in:
        raise UsageError(
            f"a layer of fan_in {old_fan_in} would have {new_fan_in}, and fxgrow only grows.",
            way_out="Give new_fan_in as it is after growth: in / groups × kernel area.",
        )
    variance = weight.double().var().item() if weight.numel() > 1 else 0.0
    layer = LayerStatistics(old_fan_in, new_fan_in, variance, gain_value(gain))
    factor = rescaling_factor(rescaling, layer)[0]
    if bias is None and norm is None:
        return weight * factor
    if bias is not None and bias.shape != weight.shape[:1]:
        raise PlanError(
            f"a bias {tuple(bias.shape)} does not fit a weight {tuple(weight.shape)}.",
            way_out="It has one entry for each output.",
        )
    if norm is not None:
        norm = NormTensors.of(norm)
        norm.check(weight.shape[0])
        norm = norm.behind(factor)
    return Rescaled(weight * factor, None if bias is None else bias * factor, norm)
