"""Constants that a graph has taken from the code, in float64.

Code computes some tensors from numbers alone, in torch's default dtype: the angles of a sinusoidal
embedding, say. Where the grown network has a graph in place of the code, these are frozen there in
that dtype, while the old network computes them anew, in float64 where it is judged. Here the code
is traced once more in float64, and what differs from a frozen constant by its rounding alone takes
its place.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from fxgrow.errors import TraceError
from fxgrow.labels.graphs import open_graph
from fxgrow.modules.expectation import Expectation
from fxgrow.verification.forward import lent_copy

_NAME = re.compile(r"_tensor_constant\d+")  # as torch.fx calls them
_ROUNDING = 8.0  # units of the frozen dtype, relative to the largest entry


def exact_constants(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Return constants of graphs in float64, by their names in the grown network.

    Args:
        before: the old network; only read.
        after: the grown one; only read.
    """
    found: dict[str, Tensor] = {}
    old = dict(before.named_modules())
    for path, part in after.named_modules():
        frozen = dict(_frozen(part)) if isinstance(part, fx.GraphModule) else {}
        if not frozen or path not in old or isinstance(old[path], fx.GraphModule):
            continue
        computed = _computed(old[path])
        for name, constant in frozen.items():
            exact = next((each for each in computed if _is_rounded(constant, each)), None)
            if exact is not None:
                found[f"{path}.{name}" if path else name] = exact
    return found


def _frozen(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the constants of a graph that are numbers of a lower precision than float64."""
    held = {**vars(part), **part._buffers}
    for name, value in held.items():
        is_constant = _NAME.fullmatch(name) and isinstance(value, Tensor)
        if is_constant and value.is_floating_point() and value.dtype != torch.float64:
            yield name, value


def _computed(module: nn.Module) -> list[Tensor]:
    """Return the constants of a module's code, in float64; none where it cannot be traced so."""
    copied = lent_copy(module)
    known = set(vars(copied)) | set(copied._buffers)
    try:
        with Expectation(exact=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            open_graph(copied)
    except TraceError:
        return []
    held = {**vars(copied), **copied._buffers}
    return [
        value
        for name, value in held.items()
        if name not in known and isinstance(value, Tensor) and value.dtype == torch.float64
    ]


def _is_rounded(constant: Tensor, exact: Tensor) -> bool:
    """Return whether a constant is another up to the rounding of its dtype."""
    if constant.shape != exact.shape or not constant.numel():
        return False
    exact = exact.to(constant.device)
    reach = float(exact.abs().max()) * torch.finfo(constant.dtype).eps * _ROUNDING
    return bool(((constant.double() - exact).abs() <= reach).all())
