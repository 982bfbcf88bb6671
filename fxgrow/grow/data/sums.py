"""Sums over the batches of outer products, as the matrix or as the rows, whichever is smaller.

With rows X, (n, d), the second moments are S = Xᵀ·X. Where fewer rows than inputs were seen, n < d,
S is never formed: with X·Xᵀ = U·Λ·Uᵀ, the root of its pseudo-inverse is Xᵀ·U·Λ⁻¹, (d, r).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxgrow.grow.data.directions import inverse_root, tolerance


@dataclass(frozen=True, eq=False)
class Moments:
    """XᵀX and XᵀY over all batches; add, and divide by a number.

    Attributes:
        rows: X, (n, d); where ``whole``, XᵀX, (d, d).
        others: Y, (n, m); where ``whole``, XᵀY, (d, m); m may be 0.
        whole: whether the products are formed, which they are from n = d on.
    """

    rows: Tensor
    others: Tensor
    whole: bool = False

    @classmethod
    def of(cls, rows: Tensor, others: Tensor | None = None) -> Moments:
        """Return the moments of rows (n, d), and of these with others (n, m)."""
        others = rows.new_zeros(len(rows), 0) if others is None else others
        return cls(rows, others)._settled()

    def _settled(self) -> Moments:
        if self.whole or self.rows.shape[0] < self.rows.shape[1]:
            return self
        return self._formed()

    def _formed(self) -> Moments:
        if self.whole:
            return self
        return Moments(self.rows.T @ self.rows, self.rows.T @ self.others, whole=True)

    def __add__(self, other: Moments) -> Moments:
        if self.whole or other.whole:
            a, b = self._formed(), other._formed()
            return Moments(a.rows + b.rows, a.others + b.others, whole=True)
        rows = torch.cat([self.rows, other.rows])
        return Moments(rows, torch.cat([self.others, other.others]))._settled()

    def __truediv__(self, count: float) -> Moments:
        part = count if self.whole else count**0.5
        return replace(self, rows=self.rows / part, others=self.others / part)

    def root(self, dtype: torch.dtype) -> Tensor:
        """Return R, (d, r), with R·Rᵀ the pseudo-inverse of XᵀX.

        Args:
            dtype: what the rows were computed in; what may be their rounding counts as zero.
        """
        if self.whole:
            return inverse_root(self.rows, dtype)
        values, vectors = torch.linalg.eigh(self.rows @ self.rows.T)
        kept = values > values.clamp(min=0).amax() * tolerance(self.rows.shape[1], dtype)
        root: Tensor = self.rows.T @ (vectors[:, kept] / values[kept])
        return root

    def solution(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the smallest M with XᵀX·M = XᵀY as factors, (d, r) and (r, m).

        Args:
            dtype: as for :meth:`root`.
        """
        root = self.root(dtype)
        if self.whole:
            return root, root.T @ self.others
        return root, (self.rows @ root).T @ self.others


@dataclass(frozen=True, eq=False)
class Product:
    """YᵀX over all batches; add, and divide by a number.

    Where a reader has several columns for each channel, X has a row for each of these: YᵀX is
    (m, columns, d), of which the first two dims are taken as one.

    Attributes:
        parts: Y and X, (n, m) and (n, columns · d), while these are smaller; else YᵀX alone,
            (m · columns, d).
        columns: of each channel.
    """

    parts: tuple[Tensor, ...]
    columns: int = 1

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Product:
        """Return the product of rows Y (n, m) and X, (n, d) or (n, columns, d)."""
        columns = right.shape[1] if right.ndim > 2 else 1
        return cls((left, right.flatten(1)), columns)._settled()

    def formed(self) -> Tensor:
        """Return YᵀX, (m · columns, d)."""
        if len(self.parts) == 1:
            return self.parts[0]
        left, right = self.parts
        return (left.T @ right).reshape(left.shape[1] * self.columns, -1)

    def _settled(self) -> Product:
        if len(self.parts) == 1:
            return self
        left, right = self.parts
        if len(left) < min(left.shape[1], right.shape[1]):
            return self
        return Product((self.formed(),))

    def __add__(self, other: Product) -> Product:
        if len(self.parts) == 1 or len(other.parts) == 1:
            return Product((self.formed() + other.formed(),))
        joined = zip(self.parts, other.parts, strict=True)
        return Product(tuple(torch.cat(both) for both in joined), self.columns)._settled()

    def __truediv__(self, count: float) -> Product:
        return Product((self.parts[0] / count, *self.parts[1:]), self.columns)

    def small(self) -> tuple[Tensor, Tensor | None]:
        """Return a matrix A and Q with orthonormal columns, such that XᵀY is A·Qᵀ.

        A is (d, n · columns) and Q (m, n), which acts on each column, while there are fewer rows
        than either has entries; else A is the product, (d, m · columns), and Q None.
        """
        if len(self.parts) == 1:
            return self.parts[0].T, None
        left, right = self.parts
        basis, triangle = torch.linalg.qr(left.T)  # (m, n), (n, n)
        return (triangle @ right).reshape(len(triangle) * self.columns, -1).T, basis


def stacked(products: Sequence[Product]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the products one below the other, transposed, as A, and what multiplies by Qᵀ.

    Of A·Qᵀ with orthonormal columns of Q: A is small where there are few rows.
    """
    matrix, basis = torch.cat([p.formed() for p in products]).T if len(products) > 1 else None, None
    if matrix is None:
        matrix, basis = products[0].small()
    return matrix, lambda vectors: vectors if basis is None else expanded(vectors, basis)


def expanded(vectors: Tensor, basis: Tensor) -> Tensor:
    """Return vectors, (k, n · columns), times the transpose of a basis: (k, m · columns).

    Args:
        vectors: over the columns of A.
        basis: Q, (m, n); see :meth:`Product.small`.
    """
    count, (whole, rank) = len(vectors), basis.shape
    by_column = vectors.reshape(count, rank, vectors.shape[1] // rank)
    return torch.einsum("mn,knc->kmc", basis, by_column).reshape(count, whole * by_column.shape[2])
