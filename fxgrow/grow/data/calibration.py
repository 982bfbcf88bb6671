"""Give the batch norms of new units the statistics of data, so that they change little in training.

A batch norm that begins as the identity in eval mode normalises in train mode all the same. If its
statistics, and the weight and bias that undo them, are those of data, what it does to a batch in
train mode is what tells the batch from the data (Chen et al. 2016, Net2DeeperNet, section 2.4).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fxgrow.errors import PlanError
from fxgrow.modules.calling import arguments_of, call
from fxgrow.modules.standin import keeping_modes
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
    modules = {name: network.get_submodule(name) for name in norms}
    sums: dict[str, list[Tensor]] = {name: [] for name in modules}
    floating = (p.dtype for p in network.parameters() if p.is_floating_point())
    dtype = next(floating, torch.float32)

    def typed(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def listener(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def listen(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            del module
            values = arguments[0].detach().double().transpose(0, 1).flatten(1)
            count = torch.full_like(values[:, 0], values.shape[1])
            sums[name].append(torch.stack([count, values.sum(1), values.square().sum(1)]))

        return listen

    handles = [module.register_forward_pre_hook(listener(n)) for n, module in modules.items()]
    try:
        with torch.no_grad(), keeping_modes(network):
            network.eval()
            for batch in batches:
                call(network, pytree.tree_map_only(Tensor, typed, arguments_of(batch)))
    except (RuntimeError, TypeError, ValueError) as error:
        raise PlanError(
            f"the network does not run on the batches for calibration: {error}.",
            way_out="Give its inputs, without targets.",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for name, found in sums.items():
        if not found:
            raise PlanError(f"{name} got nothing to calibrate it by.", name=name)
        _set_(modules[name], torch.stack(found).sum(0))


def _set_(norm: nn.Module, sums: Tensor) -> None:
    """Set a norm by the count, the sum and the sum of squares of each channel."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise PlanError(f"{type(norm).__name__} keeps no statistics.")
    count, total, squares = sums
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    values: Mapping[str, Tensor] = {
        "running_mean": mean,
        "running_var": variance,
        "weight": (variance + norm.eps).sqrt(),
        "bias": mean,
    }
    with torch.no_grad():
        for name, value in values.items():
            getattr(norm, name).copy_(value)
