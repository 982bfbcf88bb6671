"""Give new entries of batch norms the statistics of data, so that they change little in training.

Of new units: a batch norm that begins as the identity in eval mode normalises in train mode all the
same. If its statistics, and the weight and bias that undo them, are those of data, what it does to
a batch in train mode is what tells the batch from the data (Chen et al. 2016, Net2DeeperNet,
section 2.4).

Of new channels: whatever their statistics are, the function is kept as long as those of twins are
equal, since twins cancel where they are read. With those of data, new channels are in eval mode
what they are in train mode, from the first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fxgrow.errors import PlanError
from fxgrow.modules.calling import arguments_of, call
from fxgrow.modules.standin import stand_in
from fxgrow.plan.requests import Deepen
from fxgrow.plan.schema import Plan


def new_norms(plan: Plan) -> tuple[str, ...]:
    """Return the batch norms of the units that a plan by ``net2deeper`` inserts."""
    if not isinstance(plan.request, Deepen) or plan.request.method != "net2deeper":
        return ()
    suffix = ".running_var"
    return tuple(name.removesuffix(suffix) for name in plan.tensors if name.endswith(suffix))


def calibrate_(network: nn.Module, norms: Collection[str], batches: Iterable[object]) -> None:
    """Set batch norms to the identity by the statistics of what they get, in place.

    With m and v the mean and the biased variance of each channel over all batches: running_mean is
    m, running_var is v, weight is √(v + eps) and bias is m, so that nothing changes in eval mode.

    Args:
        network: run in eval mode; floating-point inputs are given in its dtype.
        norms: names of batch norms with weight, bias and statistics.
        batches: inputs: each a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        PlanError: there is no batch, a batch does not run, or a norm gets nothing.
    """
    found = identity_entries(network, dict.fromkeys(norms), batches)
    with torch.no_grad():
        for name, values in found.items():
            norm = _keeping(network.get_submodule(name))
            for part, value in values.items():
                getattr(norm, part).copy_(value)


def identity_entries(
    network: nn.Module, norms: Mapping[str, Tensor | None], batches: Iterable[object]
) -> dict[str, dict[str, Tensor]]:
    """Return what makes batch norms the identity on what they get, by the names of their tensors.

    Args:
        network: run in eval mode; floating-point inputs are given in its dtype.
        norms: by the name of a batch norm, the positions of the channels to tell of; None for all.
        batches: inputs: each a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        PlanError: as for :func:`calibrate_`.
    """
    sums: dict[str, list[Tensor]] = {name: [] for name in norms}

    def listener(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def listen(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            del module, output
            given, places = arguments[0].detach(), norms[name]
            if places is not None:
                given = given.index_select(1, places.to(given.device))
            values = given.double().transpose(0, 1).flatten(1)  # (channels, positions)
            count = torch.full_like(values[:, 0], values.shape[1])
            sums[name].append(torch.stack([count, values.sum(1), values.square().sum(1)]))

        return listen

    _run(network, {name: listener(name) for name in sums}, batches)
    found = {}
    for name, told in sums.items():
        count, total, squares = torch.stack(_given(name, told)).sum(0)
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        weight = (variance + _keeping(network.get_submodule(name)).eps).sqrt()
        values = {"running_mean": mean, "running_var": variance, "weight": weight, "bias": mean}
        found[name] = values
    return found


def new_entries(plan: Plan) -> dict[str, Tensor]:
    """Return, for each batch norm that a plan widens, the positions of its new channels.

    Copies of old channels, which keep the statistics of these, are none.
    """
    found = {}
    for name, edit in plan.tensors.items():
        owner, _, part = name.rpartition(".")
        if part != "running_var" or not edit.axes:
            continue
        kinds = [run.kind for run in edit.axes[0].runs for _ in range(run.length)]
        positions = [at for at, kind in enumerate(kinds) if kind == "one"]
        if positions:
            found[owner] = torch.tensor(positions)
    return found


def calibrate_new_(
    network: nn.Module, entries: Mapping[str, Tensor], batches: Iterable[object]
) -> None:
    """Give new channels of batch norms the statistics of what they get, in place.

    The network runs in eval mode, but for new channels, which each batch norm normalises by the
    batch, as it will in train mode: then what comes behind gets what it will get. The statistics
    are the means over the batches, as those of a batch norm without momentum are. Channels whose
    statistics are equal up to rounding, as those of twins are, get the same ones to the bit.

    Args:
        network: a grown one; floating-point inputs are given in its dtype.
        entries: positions of new channels by the name of a batch norm; see :func:`new_entries`.
        batches: inputs: each a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        PlanError: no norm has new channels, there is no batch, a batch does not run, or a norm gets
            nothing.
    """
    if not entries:
        raise PlanError(
            "no batch norm that keeps statistics gets new channels to calibrate.",
            way_out="Leave calibration out.",
        )
    found: dict[str, list[Tensor]] = {name: [] for name in entries}

    def listener(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def listen(norm: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            norm, new = _keeping(norm), entries[name].to(output.device)
            values = arguments[0].detach().index_select(1, new).double().transpose(0, 1).flatten(1)
            variance, mean = torch.var_mean(values, 1, correction=0)
            count = values.shape[1]
            found[name].append(torch.stack([mean, variance * count / max(count - 1, 1)]))
            factor, shift = (variance + norm.eps).rsqrt(), torch.zeros_like(mean)
            if norm.affine:
                factor, shift = factor * norm.weight[new], norm.bias[new].to(shift)
            shape = (1, -1, *[1] * (output.ndim - 2))
            normal = arguments[0].index_select(1, new).double() - mean.view(shape)
            normal = normal * factor.view(shape) + shift.view(shape)
            return output.index_copy(1, new, normal.to(output))

        return listen

    _run(network, {name: listener(name) for name in entries}, batches)
    for name, told in found.items():
        norm = _keeping(network.get_submodule(name))
        mean, variance = torch.stack(_given(name, told)).mean(0)
        buffers = {"running_mean": mean, "running_var": variance}
        like = _first_alike(mean, variance, torch.finfo(norm.get_buffer("running_var").dtype).eps)
        for part, values in buffers.items():
            buffer = norm.get_buffer(part)
            buffer.index_copy_(0, entries[name].to(buffer.device), values[like].to(buffer))


def _first_alike(mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """Return, for each channel, the first one whose statistics are its own up to rounding."""
    deviation = variance.sqrt()
    room = 64 * eps * (deviation + mean.abs())
    near = (mean[:, None] - mean).abs() <= room
    near &= (deviation[:, None] - deviation).abs() <= room
    first = near.int().argmax(1)
    return first[first]  # twins whose first alike are two that are alike themselves


def _run(
    network: nn.Module, hooks: Mapping[str, Callable[..., object]], batches: Iterable[object]
) -> None:
    """Run a network on batches in eval mode, with hooks behind some of its modules.

    Raises:
        PlanError: a batch does not run.
    """
    floating = (p.dtype for p in network.parameters() if p.is_floating_point())
    dtype = next(floating, torch.float32)

    def typed(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    copied = stand_in(network, {}).eval()  # a forward may set what it finds unset
    for name, hook in hooks.items():
        copied.get_submodule(name).register_forward_hook(hook)
    try:
        with torch.no_grad():
            for batch in batches:
                call(copied, pytree.tree_map_only(Tensor, typed, arguments_of(batch)))
    except (RuntimeError, TypeError, ValueError) as error:
        raise PlanError(
            f"the network does not run on the batches for calibration: {error}.",
            way_out="Give its inputs, without targets.",
        ) from error


def _given(name: str, found: list[Tensor]) -> list[Tensor]:
    """Return what a norm was given.

    Raises:
        PlanError: nothing.
    """
    if not found:
        raise PlanError(f"{name} got nothing to calibrate it by.", name=name)
    return found


def _keeping(norm: nn.Module) -> _BatchNorm:
    """Return a batch norm that keeps statistics.

    Raises:
        PlanError: it is none.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise PlanError(f"{type(norm).__name__} keeps no statistics.")
    return norm
