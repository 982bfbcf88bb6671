"""Where the float64 weights of a judged network come from.

Those of the old network are its own. Those of the grown one are what was written, wherever the plan
makes them without rounding (copies, drawn rows, their negatives, zeros): a float32 number is a
float64 number. Where it multiplies or divides, they are what the plan makes of the old ones in
float64, so that the algebra shows as 1e-15 or so and not as the rounding of the weights.

A second time both are made of *drawn* weights: a head that is zero, a layer scale of 1e-6 or a
norm that begins as the identity would hide whatever is wrong before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fxgrow.apply.module import init_of_step
from fxgrow.apply.tensors import grow_tensor
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import TensorEdit
from fxgrow.plan.init import Init
from fxgrow.plan.names import names_after
from fxgrow.plan.schema import Plan
from fxgrow.verification.exact import Weights

_WITHOUT_ROUNDING = frozenset(("old", "borrowed", "new", "minus", "zero", "one"))
_BIAS, _AROUND_ONE = 0.2, 0.5  # half-widths of what drawn vectors are drawn from
_MEAN, _VARIANCE = "running_mean", "running_var"  # as the norms of torch call their statistics


def own(model: nn.Module) -> Weights:
    """Return a network's own weights; entries that are not finite are zero.

    The algebra can be checked without them.
    """
    tensors = named_tensors(model)

    def look_up(name: str) -> Tensor:
        return exactly(tensors[name])

    return look_up


def besides(known: Weights, names: Collection[str], model: nn.Module) -> Weights:
    """Return weights, and for names that they do not know (constants of a graph) a network's own.

    Args:
        known: the weights.
        names: that they know.
        model: the network.
    """
    constants = own(model)
    return lambda name: known(name) if name in names else constants(name)


def exactly(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 without entries that are not finite; others are only copied."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor.clone()
    return tensor.to(torch.float64, copy=True).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def not_finite(model: nn.Module) -> tuple[str, ...]:
    """Return the names of tensors with NaN or infinite entries."""
    found = named_tensors(model).items()
    # A finite sum has finite terms; an infinite one may have overflowed.
    return tuple(
        name
        for name, x in found
        if x.is_floating_point()
        and not math.isfinite(x.detach().sum())
        and not bool(torch.isfinite(x).all())
    )


def grown(
    plan: Plan,
    before: Weights,
    names: Collection[str],
    init: Init | None,
    written: Mapping[str, Tensor],
    *,
    lift: bool,
) -> Weights:
    """Return the weights that a plan makes of others.

    Args:
        plan: the plan.
        before: the old weights.
        names: of the old network's tensors, in its order.
        init: what fills new weights, where the plan was made with code of the user's.
        written: the grown network's own tensors; those that the plan does not name are these.
        lift: take those too that the plan makes without rounding.
    """
    current = before
    clean = dict.fromkeys(names, True)  # by name: whether nothing on the way here rounded
    for step in plan.steps:
        origins = {name: old for name, old, _ in names_after(clean, step)}
        current = _after(step, current, origins, init_of_step(init, step, plan))
        clean = {
            name: clean[old] and not rounds(step.tensors.get(step.aliases.get(name, name)), step)
            for name, old in origins.items()
        }

    def look_up(name: str) -> Tensor:
        if name not in clean or (lift and clean[name]):
            return exactly(written[name])
        return current(name)

    return look_up


def _after(step: Plan, before: Weights, origins: Mapping[str, str], init: Init | None) -> Weights:
    """Return the weights that one step makes of those before it."""

    def look_up(name: str) -> Tensor:
        first = step.aliases.get(name, name)
        if first in step.tensors:
            return grow_tensor(step, first, before, init)
        return before(origins[name])

    return look_up


def rounds(edit: TensorEdit | None, step: Plan) -> bool:
    """Return whether what an edit makes of a tensor depends on the dtype that it is made in."""
    if edit is None:
        return False
    if edit.fill:
        return edit.fill == "constant" and not edit.scale.is_integer()
    kinds = {run.kind for axis in edit.axes for run in axis.runs}
    drawing = step.request.drawing
    return bool(
        edit.scale != 1.0
        or edit.offset
        or edit.absorption is not None
        or edit.normed is not None
        or not kinds <= _WITHOUT_ROUNDING
        or drawing.noise
    )


def drawn(model: nn.Module, *, constant_only: bool = False) -> Weights:
    """Return weights of a network that are drawn: parameters, and the statistics of its norms.

    Matrices and kernels have variance 1/fan_in. Vectors are about as far from zero as most are:
    those around another number than zero are drawn around one, the others around zero. Variances
    are positive. Other buffers are constants of the code, and stay.

    Args:
        model: the network.
        constant_only: draw those tensors alone whose entries are all the same.
    """
    tensors = named_tensors(model)

    def look_up(name: str) -> Tensor:
        tensor = tensors[name]
        statistic = name.rpartition(".")[2]
        fixed = not isinstance(tensor, nn.Parameter) and statistic not in (_MEAN, _VARIANCE)
        if fixed or not tensor.is_floating_point() or not tensor.numel():
            return exactly(tensor)
        if constant_only and bool((tensor != tensor.reshape(-1)[0]).any()):
            return exactly(tensor)
        return _drawn(name, tensor.detach(), positive=statistic == _VARIANCE)

    return look_up


def _drawn(name: str, tensor: Tensor, *, positive: bool) -> Tensor:
    """Return numbers of a tensor's shape that depend on its name alone, and on what it is like."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    center, reach = 0.0, _BIAS
    if tensor.ndim > 1:
        reach = math.sqrt(3 * tensor.shape[0] / tensor.numel())
    elif positive or abs(float(tensor.double().mean())) > float(tensor.double().std(correction=0)):
        center, reach = 1.0, _AROUND_ONE
    made = torch.empty(tensor.shape, dtype=torch.float64)
    made.uniform_(center - reach, center + reach, generator=generator)
    return made.to(tensor.device)
