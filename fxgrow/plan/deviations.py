"""How far old weights spread: of all together, and of those that go into each output.

All is computed on contiguous copies, so that it is the same to the bit in every layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where new entries lie: slices along one dim of a tensor.

    Attributes:
        name: fully qualified name of the tensor.
        role: what the new entries are for: ``writer0``, ``reader1``, …: a role and a dim.
        dim: along which they lie, in the reference as in what is filled.
        outputs: the dims whose index tells the output that an entry contributes to; () for entries
            that no output reads (the rows of a writer, a bias).
        groups: for the weight of a grouped convolution, ``dim`` of the reference holds as many
            slices for each of these groups in turn.
        group_of: then the group of each new slice.
    """

    name: str
    role: str
    dim: int = 0
    outputs: tuple[int, ...] = ()
    groups: int = 1
    group_of: tuple[int, ...] = ()


def deviation_of(reference: Tensor) -> float:
    """Return the standard deviation of the reference, 0 where it tells nothing."""
    if reference.numel() < 2:
        return 0.0
    deviation = float(_wide(reference).std())
    return deviation if math.isfinite(deviation) else 0.0


def _wide(reference: Tensor) -> Tensor:
    """Return a reference in a dtype and a layout in which sums come out the same every time."""
    return (reference.float() if reference.dtype.itemsize < 4 else reference).contiguous()


def quick_deviation_of(reference: Tensor) -> float:
    """Return what :func:`deviation_of` does up to rounding, five times as fast for most weights."""
    if reference.ndim < 2 or reference.numel() < 2:
        return deviation_of(reference)
    rows, count = _wide(reference).flatten(1), reference.numel()
    squares = float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
    around = squares - float(rows.sum(1).double().sum()) ** 2 / count
    if not squares / 16 < around < math.inf:
        return deviation_of(reference)
    return math.sqrt(around / (count - 1))


def _spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviation and the root mean square of each row, in float64.

    A deviation that is rounding alone is 0.
    """
    count, eps = rows.shape[1], torch.finfo(rows.dtype).eps
    squares = torch.linalg.vector_norm(rows, dim=1).double().square()
    mean = rows.mean(1, keepdim=True)
    around = squares - count * mean[:, 0].double().square()
    if bool((around < squares / 16).any()):  # where little is left of a difference
        around = torch.linalg.vector_norm(rows - mean, dim=1).double().square()
        around = torch.where(around < 64 * count * eps**2 * squares, 0.0, around)
    return (around / max(count - 1, 1)).sqrt(), (squares / max(count, 1)).sqrt()


_FEW = 4  # entries, of which a deviation says little


def deviation_by_output(reference: Tensor, place: Place) -> Tensor | None:
    """Return the standard deviation of the old entries that go into each output.

    Outputs of zero deviation take that of the smallest other one. So do all of them where each
    has fewer than four entries, and then the root mean square stands for the deviation.

    Args:
        reference: the old weights.
        place: where the new ones lie among them.

    Returns:
        A tensor that multiplies new entries of deviation 1: of size 1 in the dims that are not of
        outputs, but for convolution groups. None if all of the reference is alike, or nothing.
    """
    if not reference.numel():
        return None
    groups, outputs = place.groups, tuple(d for d in place.outputs if d != place.dim)
    first = (place.dim, *outputs)
    front = reference.movedim(first, tuple(range(len(first))))
    sizes = front.shape[1 : len(first)]
    slices = front.reshape(groups, -1, *front.shape[1:]).movedim(1, len(first))
    deviation, size = _spread(_wide(slices.reshape(groups * math.prod(sizes), -1)))
    few = math.prod(reference.shape) < _FEW * len(size)
    found = size if few else deviation
    live = found.isfinite() & (found > 0)
    if not bool(live.any()):
        return None
    smallest = found[live].min()
    found = smallest.expand(len(found)) if few else torch.where(live, found, smallest)
    spread = found.to(dtype_of_draws(reference.dtype)).reshape(
        groups, *sizes, *[1] * (reference.ndim - len(first))
    )
    if groups > 1:
        spread = spread[list(place.group_of)]
    return spread.movedim(tuple(range(len(first))), first)


def dtype_of_draws(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers for a tensor are drawn."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
