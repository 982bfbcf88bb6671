"""The claims of one call, each held against numbers.

*Flow*: with the channels of all operands in another order, the result is in that order too.
*Locality*: where one channel changes, nothing changes but what carries its label.
*Widening*: with more channels, what the old labels say of the result stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fxgrow.labels.forest import IntArray
from fxgrow.labels.validate.claims import BoolArray, Claims, Labelled, Located, SampleCall, Way
from fxgrow.modules.calling import tensors_in

_SLACK = {  # of the largest entry
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
_OTHER_SLACK = 1e-4


@dataclass(frozen=True)
class SampleCase:
    """One call on numbers, labelled in one way.

    Attributes:
        call: the call.
        way: how its operands come in.
        operands: the numbers.
        results: what it makes of them.
        labelled: the run on labels.
        claims: what that says.
        random: where to draw from.
    """

    call: SampleCall
    way: Way
    operands: Sequence[Tensor]
    results: Sequence[Tensor]
    labelled: Labelled
    claims: Claims
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))


class UnmatchedError(Exception):
    """What the wide call claims says nothing about the old one: a literal size, say."""


def run(call: SampleCall, operands: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Return the tensors that a call makes of operands, which stay as they are."""
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return tensors_in(call.on([x.clone() for x in operands]))


def check_flow(case: SampleCase) -> str:
    """Put alike channels in another order in all operands; return what is wrong, or ""."""
    claims = case.claims
    image = np.arange(len(claims.group))
    for members in claims.signatures().values():
        image[members] = case.random.permutation(np.roll(members, 1))
    if (image == np.arange(len(image))).all():
        return ""
    moved = [_reordered(*pair, image) for pair in zip(case.operands, claims.operands, strict=True)]
    expected = [_reordered(*p, image) for p in zip(case.results, claims.results, strict=True)]
    return difference(case, expected, run(case.call, moved), "channels in another order")


def _reordered(x: Tensor, layers: Sequence[Located], image: IntArray) -> Tensor:
    """Return a tensor in which each channel stands where its image stood."""
    for layer in layers:
        order = np.argsort(layer.channels, kind="stable")
        starts = np.searchsorted(layer.channels[order], np.arange(len(image)))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - starts[layer.channels[order]]
        x = taken(x, layer.dims, order[starts[image[layer.channels]] + rank], layer.shape)
    return x


def taken(x: Tensor, dims: Sequence[int], places: IntArray, shape: Sequence[int]) -> Tensor:
    """Return the entries at flat places in some dims, which are of a shape then."""
    if not dims:
        return x
    order = [*dims, *(dim for dim in range(x.ndim) if dim not in dims)]
    front = x.permute(order)
    rest = front.shape[len(dims) :]
    found = front.reshape(-1, *rest)[torch.from_numpy(places)].reshape(*shape, *rest)
    return laid_out_as(x, found.permute(np.argsort(order).tolist()))


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return y with the order of its dims in memory that x has."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    return y.permute(order).contiguous().permute(np.argsort(order).tolist()) if order else y


def difference(
    case: SampleCase, expected: Sequence[Tensor], found: Sequence[Tensor], what: str
) -> str:
    """Return how two results differ, or ""."""
    if len(expected) != len(found):
        return f"{what}: {len(found)} results for {len(expected)}"
    for place, (before, after) in enumerate(zip(expected, found, strict=True)):
        if case.claims.is_open[place]:
            continue
        if before.shape != after.shape:
            return f"{what}: result {place} is of {list(after.shape)}, not {list(before.shape)}"
        wrong = ~alike(before, after)
        if wrong.any():
            return f"{what}: {int(wrong.sum())} of {wrong.numel()} entries of result {place} differ"
    return ""


def alike(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors of one shape agree, but for rounding."""
    equal = (a == b) | ((a != a) & (b != b))
    if not (a.is_floating_point() or a.is_complex()) or not a.numel():
        return equal
    size = torch.nan_to_num(a.abs(), 0.0, 0.0, 0.0).max()
    return equal | ((a - b).abs() <= _SLACK.get(a.dtype, _OTHER_SLACK) * (1 + size))


def check_locality(case: SampleCase) -> str:
    """Change one channel of each kind; return what is wrong, or ""."""
    claims = case.claims
    for members in itertools.islice(claims.signatures().values(), 3):
        channel = int(case.random.choice(members))
        if claims.is_read[channel] or claims.is_mixed[channel]:
            continue
        changed = [
            _changed(x, layers, channel, case.random)
            for x, layers in zip(case.operands, claims.operands, strict=True)
        ]
        found = run(case.call, changed)
        for place, (before, after) in enumerate(zip(case.results, found, strict=True)):
            if claims.is_open[place]:
                continue
            if before.shape != after.shape:
                return f"another channel: result {place} has another shape"
            wrong = ~alike(before, after)
            for layer in claims.results[place]:
                wrong &= ~carried(layer, layer.channels == channel, wrong.shape)
            if wrong.any():
                count = int(wrong.sum())
                return f"one channel changed, and {count} entries of others in result {place}"
    return ""


def carried(layer: Located, mine: BoolArray, shape: Sequence[int]) -> Tensor:
    """Return where some positions of a layer are in a tensor of a shape."""
    sizes = [size if dim in layer.dims else 1 for dim, size in enumerate(shape)]
    return torch.from_numpy(mine).reshape(sizes)


def _changed(
    x: Tensor, layers: Sequence[Located], channel: int, random: np.random.Generator
) -> Tensor:
    """Return a tensor with other values in one channel, such as it has elsewhere."""
    for layer in layers:
        mine = layer.channels == channel
        if not mine.any():
            continue
        places = np.arange(len(mine))
        others = np.flatnonzero(~mine)
        if len(others):
            places[mine] = random.choice(others, int(mine.sum()))
        x = taken(x, layer.dims, places, layer.shape)
        if x.is_floating_point() or x.is_complex():
            factor = np.where(mine, random.uniform(0.8, 1.0), 1.0).astype("f8")
            sizes = [size if dim in layer.dims else 1 for dim, size in enumerate(x.shape)]
            x = x * torch.from_numpy(factor).reshape(sizes).to(x.dtype)
    return x
