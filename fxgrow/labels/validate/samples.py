"""Calls to validate the rules on: torch's own operator samples and, by hand, torchvision's."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor

from fxgrow.labels.validate.claims import SampleCall

MOST_ENTRIES = 20_000  # of an operand: no claim becomes truer with its size
_DTYPE = torch.float64


def operators() -> dict[str, Callable[[], Iterator[SampleCall]]]:
    """Return, for each operator, what makes its calls; in-place variants are of their own name."""
    from torch.testing._internal.common_methods_invocations import op_db

    found: dict[str, Callable[[], Iterator[SampleCall]]] = {}
    for info in op_db:
        if _DTYPE not in info.supported_dtypes("cpu"):  # type: ignore[no-untyped-call]
            continue
        variants = {"": info.op, "_": info.inplace_variant}
        for mark, function in variants.items():
            if function is not None:
                name = f"{info.full_name}{mark}"
                found[name] = functools.partial(_sampled, info, name, function)
    return found | {name: functools.partial(_by_hand, name) for name in BY_HAND}


def _by_hand(name: str) -> Iterator[SampleCall]:
    return (SampleCall(name, *call) for call in BY_HAND[name]())


def _sampled(info: Any, name: str, function: Callable[..., Any]) -> Iterator[SampleCall]:
    """Yield torch's samples of an operator, each kind of call once."""
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of tensors that are new to torch
        samples = [*info.sample_inputs("cpu", _DTYPE, requires_grad=False)]
    for sample in samples:
        call = SampleCall(name, function, (sample.input, *sample.args), sample.kwargs)
        told = str(call)
        if (
            told not in seen
            and _is_plain(call)
            and not (name[-1] == "_" and sample.broadcasts_input)
        ):
            seen.add(told)
            yield call


def _is_plain(call: SampleCall) -> bool:
    """Return whether the operands are dense tensors of a size that can be compared."""
    return bool(call.operands) and all(
        x.layout is torch.strided and not x.is_nested and x.numel() <= MOST_ENTRIES
        for x in call.operands
    )


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=_DTYPE, generator=torch.Generator().manual_seed(sum(shape)))


def _boxes(count: int, size: float) -> Tensor:
    """Return boxes (batch index, x1, y1, x2, y2) of two images of some size; shape (count, 5)."""
    corners = (
        torch.rand(count, 2, dtype=_DTYPE, generator=torch.Generator().manual_seed(0)) * size / 2
    )
    image = (torch.arange(count) % 2).to(_DTYPE)
    return torch.cat([image[:, None], corners, corners + size / 3], 1)


Arguments = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _roi(name: str) -> Callable[[], Iterator[Arguments]]:
    """Return calls of an operator that pools the inside of boxes."""
    bins = 2 if name.startswith("ps_") else 3  # a position-sensitive one has channels for each bin
    channels = 12 if name.startswith("ps_") else 4

    def calls() -> Iterator[Arguments]:
        x, boxes = _drawn(2, channels, 8, 8), _boxes(3, 8.0)
        given: list[tuple[Any, ...]] = [(1.0, bins, bins)]
        if name == "roi_align":
            given = [(1.0, bins, bins, 2, True), (0.5, bins, bins, -1, False)]
        elif name == "ps_roi_align":
            given = [(1.0, bins, bins, 2)]
        for rest in given:
            yield getattr(torch.ops.torchvision, name), (x, boxes, *rest), {}

    return calls


def _deformed() -> Iterator[Arguments]:
    """Yield deformable convolutions, with and without a mask, groups and a bias."""
    for groups, offset_groups, masked, biased in (
        (1, 1, True, True), (1, 2, True, False), (2, 1, False, True), (4, 2, False, False),
    ):  # fmt: skip
        x, weight = _drawn(2, 4, 6, 6), _drawn(8, 4 // groups, 3, 3)
        offset = _drawn(2, offset_groups * 18, 4, 4)
        mask = _drawn(2, offset_groups * 9, 4, 4).sigmoid() if masked else None
        bias = _drawn(8) if biased else None
        yield torchvision.ops.deform_conv2d, (x, offset, weight, bias), {"mask": mask}


def _suppressed() -> Iterator[Arguments]:
    boxes = _boxes(6, 8.0)[:, 1:]
    yield torch.ops.torchvision.nms, (boxes, _drawn(6).sigmoid(), 0.5), {}


def _written() -> Iterator[Arguments]:
    """Yield writes into views, which the tensor they are of sees."""

    def into(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def write(x: Tensor, y: Tensor) -> Tensor:
            whole = x * 1.0
            view(whole).copy_(y)
            return whole

        return write

    yield into(lambda x: x[:, :2]), (_drawn(3, 4), _drawn(3, 2)), {}
    yield into(lambda x: x[:, 1]), (_drawn(3, 4), _drawn(3)), {}
    yield into(lambda x: x.t()), (_drawn(3, 4), _drawn(4, 3)), {}
    yield into(lambda x: x[1:]), (_drawn(3, 4), _drawn(2, 4)), {}
    yield into(lambda x: x.view(3, 2, 2)), (_drawn(3, 4), _drawn(3, 2, 2)), {}
    yield into(lambda x: x[:, ::2]), (_drawn(3, 4), _drawn(3, 2)), {}


BY_HAND: dict[str, Callable[[], Iterator[Arguments]]] = {
    **{
        f"torchvision.{x}": _roi(x)
        for x in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
    },
    "torchvision.deform_conv2d": _deformed,
    "torchvision.nms": _suppressed,
    "written into a view": _written,
}
