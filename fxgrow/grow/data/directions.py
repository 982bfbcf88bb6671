"""The algebra: from sums over the batches to new rows and columns, one for each singular value.

Of a new channel with row a (over the patches u that the writer reads) and column ω (over the
reader's outputs and kernel), the reader's outputs z move to first order by σ'(0)·ω·(a·u). With V
what z should move by, −∂L/∂z, and N = Σ u·Vᵀ the correlation of the two, ⟨V, δz⟩ = σ'(0)·aᵀNω.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxgrow.errors import PlanError

_MOST_STEPS = 30  # of the search for an amplitude, a factor of two each


@dataclass(frozen=True, eq=False)
class Directions:
    """New channels of one group, the strongest first; tensors are float64.

    Attributes:
        strengths: a singular value each, (k,).
        rows: (k, in, *kernel) of the writer.
        biases: (k,) of the writer; None if it has none.
        columns: (entries, k) of the readers: of each its outputs · kernel, one after the other.
        gains: what the loss falls by to first order, per learning rate or amplitude, (k,).
        none: why none may be left, where the method's own reason is not the one.
    """

    strengths: Tensor
    rows: Tensor
    biases: Tensor | None
    columns: Tensor
    gains: Tensor
    none: str = ""

    def __len__(self) -> int:
        return len(self.strengths)

    def chosen(self, index: Tensor) -> Directions:
        """Return some of the directions, by index."""
        return Directions(
            self.strengths[index],
            self.rows[index],
            None if self.biases is None else self.biases[index],
            self.columns[:, index],
            self.gains[index],
            self.none,
        )

    def first(self, count: int) -> Directions:
        """Return the strongest ``count`` directions."""
        return self.chosen(torch.arange(len(self), device=self.strengths.device)[: max(count, 0)])

    def turned(self, signs: Tensor) -> Directions:
        """Return the same directions with rows and columns times signs, (k,)."""
        return replace(
            self,
            rows=along(self.rows, signs, 0),
            biases=None if self.biases is None else self.biases * signs,
            columns=along(self.columns, signs, 1),
        )


def along(tensor: Tensor, factors: Tensor, dim: int) -> Tensor:
    """Return a tensor times a factor for each of its slices along a dim."""
    shape = [1] * tensor.ndim
    shape[dim] = -1
    return tensor * factors.view(shape)


@dataclass(frozen=True)
class Shapes:
    """Shapes of a pair of layers.

    Attributes:
        row: of one row of the writer, (in, *kernel).
        column: of one column, (entries,): over all readers, outputs and kernels.
        has_bias: whether the writer's bias counts as one more input, the last.
        dtype: of the weights: what rounding noise looks like.
    """

    row: tuple[int, ...]
    column: tuple[int, ...]
    has_bias: bool
    dtype: torch.dtype


def inverse_root(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Return R, (n, r), with R·Rᵀ the pseudo-inverse of a symmetric matrix of rank r.

    Args:
        gram: sum of outer products, (n, n), in float64.
        dtype: what the vectors were computed in; what may be their rounding counts as zero.
    """
    values, vectors = torch.linalg.eigh(gram)
    if not len(gram):  # a reader that reads nothing yet, and has no bias
        return gram.new_zeros(0, 0)
    kept = values > values.clamp(min=0).amax() * tolerance(len(gram), dtype)
    root: Tensor = vectors[:, kept] / values[kept].sqrt()
    return root


def gradmax(
    correlation: Tensor,
    scale: float,
    shapes: Shapes,
    expand: Callable[[Tensor], Tensor] = lambda vectors: vectors,
    most: int | None = None,
) -> Directions:
    """Return the columns that give zero rows the largest gradients (Evci et al. 2022).

    The gradient of the loss at a zero row read by the column ω is σ'(0)·N·ω (up to sign); of all k
    orthogonal columns of one norm, the leading singular vectors make the sum of squares largest.

    Args:
        correlation: N, of the writer's patches and −∂L/∂z times σ'(0): (inputs, out · kernel);
            with ``expand`` A of N = A·Qᵀ, (inputs, n).
        scale: norm of the columns.
        shapes: of the layers.
        expand: multiplies vectors, (k, n), by Qᵀ, of orthonormal rows: (k, out · kernel).
        most: the most directions to return; None for all.

    Returns:
        As many directions as the correlation has ranks; ``strengths`` are the norms of the
        gradients of the new rows.
    """
    size = max(len(correlation), math.prod(shapes.column))
    _, values, right = _decomposed(correlation, shapes.dtype, size=size, expand=expand, most=most)
    count = len(values)
    norms = values * scale
    return Directions(
        strengths=norms,
        rows=correlation.new_zeros(count, *shapes.row),
        biases=correlation.new_zeros(count) if shapes.has_bias else None,
        columns=_columns(right * scale, shapes),
        gains=norms.square(),
    )


def tiny(
    matrix: Tensor,
    root: Tensor,
    scale: float,
    shapes: Shapes,
    expand: Callable[[Tensor], Tensor] = lambda vectors: vectors,
    most: int | None = None,
) -> Directions:
    """Return the channels whose first-order move is nearest to V (Verbockhaven et al. 2024).

    With S the second moments of the patches, and S^−½·N = Σ λ·u·vᵀ, these are a = √λ·S^−½·u
    and ω = √λ·v; each moves the outputs such that ⟨V, δz⟩ = λ².

    Args:
        matrix: Rᵀ·N, (r, out · kernel), with N the correlation of the writer's patches, as the
            readers get them, and V, the part of −∂L/∂z that the reader's present inputs cannot
            reach; with ``expand`` A of Rᵀ·N = A·Qᵀ.
        root: R, (inputs, r), with R·Rᵀ the pseudo-inverse of S, (inputs, inputs).
        scale: root of the mean square of −∂L/∂z, beside which what is left may be rounding.
        shapes: of the layers.
        expand: as for :func:`gradmax`.
        most: likewise.

    Returns:
        As many directions as there are ranks; ``strengths`` are λ.
    """
    noise = scale * _left_over(shapes.dtype)
    left, values, right = _decomposed(matrix, shapes.dtype, noise, expand=expand, most=most)
    rows = (root @ left).T * values.sqrt()[:, None]  # (k, inputs)
    weights, biases = (rows[:, :-1], rows[:, -1]) if shapes.has_bias else (rows, None)
    return Directions(
        strengths=values,
        rows=weights.reshape(-1, *shapes.row),
        biases=biases,
        columns=_columns(right * values.sqrt()[:, None], shapes),
        gains=values.square(),
    )


def _columns(vectors: Tensor, shapes: Shapes) -> Tensor:
    """Return k vectors over (out · kernel) as columns (out, k, *kernel)."""
    return vectors.reshape(-1, *shapes.column).transpose(0, 1).contiguous()


def _decomposed(
    matrix: Tensor,
    dtype: torch.dtype,
    noise: float = 0.0,
    size: int = 0,
    *,
    expand: Callable[[Tensor], Tensor],
    most: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular vectors (m, k), values (k,) and vectors (k, n), without what is rounding.

    Signs are such that the largest entry of each right vector is positive.

    Args:
        matrix: to be decomposed.
        dtype: what it was computed in.
        noise: values below this are rounding, too.
        size: by which its rounding is judged; 0 for the larger of its own.
        expand: what is done to right vectors.
        most: the most of them to return; None for all.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)  # (m, k), (k,), (k, n)
    largest = float(values.amax()) if len(values) else 0.0
    kept = values > max(largest * tolerance(size or max(matrix.shape), dtype), noise)
    count = int(kept.sum()) if most is None else min(int(kept.sum()), most)  # the largest first
    left, values, right = left[:, :count], values[:count], expand(right[:count])
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()  # (k, 1)
    return left * signs.T, values, right * signs


def tolerance(size: int, dtype: torch.dtype) -> float:
    """Return the part of the largest value below which others are rounding."""
    return float(size * torch.finfo(dtype).eps)


def _left_over(dtype: torch.dtype) -> float:
    """Return what rounding may leave of a vector that a least-squares fit reaches, as a part of it.

    The fit is in float64, by normal equations, which costs half of the digits.
    """
    return float(max(math.sqrt(torch.finfo(torch.float64).eps), 10 * torch.finfo(dtype).eps))


def above(found: Sequence[Directions], threshold: float) -> list[Directions]:
    """Return, of each group, the directions at least as strong as this part of the strongest."""
    strongest = max((float(d.strengths[0]) for d in found if len(d)), default=0.0)
    counts = [int((d.strengths >= threshold * strongest).sum()) for d in found]
    return [directions.first(count) for directions, count in zip(found, counts, strict=True)]


def search_amplitude(
    loss: Callable[[float], float], before: float, gain: float
) -> tuple[float, float]:
    """Return the best amplitude that doubling or halving finds, and its loss.

    The lowest of the parabola through it and its neighbours is tried, too.

    Args:
        loss: of an amplitude; NaN counts as a loss that is too large.
        before: the loss at amplitude 0.
        gain: what it falls by per amplitude, to first order. The search starts where that would
            be a tenth of it.

    Raises:
        PlanError: no amplitude lowers the loss.

    Example:
        >>> search_amplitude(lambda a: (a - 4) ** 2, 16.0, gain=8.0)
        (4.0, 0.0)
    """
    amplitude = 0.1 * abs(before) / gain if before else 1.0
    best, behind = loss(amplitude), (0.0, before)
    factor = 2.0 if best < before else 0.5
    ahead = None
    for _ in range(_MOST_STEPS):
        found = loss(amplitude * factor)
        if best < before and not found < best:
            ahead = (amplitude * factor, found)
            break
        behind = (amplitude, best)
        amplitude, best = amplitude * factor, found
    if not best < before:
        raise PlanError(
            f"no amplitude of the new channels lowers the loss below {before:.6g}.",
            way_out="Its gradient may be no more than rounding; give more batches, or float64.",
        )
    if ahead is not None:
        refined = _lowest(behind, (amplitude, best), ahead)
        if (found := loss(refined)) < best:
            return refined, found
    return amplitude, best


def _lowest(*points: tuple[float, float]) -> float:
    """Return where the parabola through three points is lowest, the middle one if nowhere.

    The middle one must be the lowest of them.
    """
    (a, fa), (b, fb), (c, fc) = points
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    found = b - ((b - a) * left - (b - c) * right) / (2 * (left - right)) if left != right else b
    return found if math.isfinite(found) and min(a, c) < found < max(a, c) else b
