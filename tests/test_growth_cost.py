"""Growth from data is computed within bounds, and its cost is told before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.errors import FxgrowError
from fxgrow.grow.data import effort
from fxgrow.grow.data.sums import Moments, Product


@pytest.mark.parametrize("cuts", [(5,), (2, 3), (1, 1, 3)])
def test_moments_of_few_rows_equal_those_of_the_matrix(cuts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rows, others = torch.randn(5, 9).double(), torch.randn(5, 4).double()
    few: Moments | None = None
    for x, y in zip(rows.split(cuts), others.split(cuts), strict=True):
        few = Moments.of(x, y) if few is None else few + Moments.of(x, y)
    assert few is not None
    assert not few.whole
    whole = Moments(rows.T @ rows, rows.T @ others, whole=True)
    found, expected = (m / 3 for m in (few, whole))
    roots = [m.root(torch.float64) for m in (found, expected)]
    torch.testing.assert_close(roots[0] @ roots[0].T, roots[1] @ roots[1].T, rtol=0, atol=1e-8)
    one, other = (a @ b for a, b in (m.solution(torch.float64) for m in (found, expected)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_a_product_of_few_rows_equals_the_matrix() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 7).double(), torch.randn(3, 9).double()
    matrix, basis = (Product.of(left[:1], right[:1]) + Product.of(left[1:], right[1:])).small()
    assert basis is not None
    assert matrix.shape == (9, 3)
    torch.testing.assert_close(matrix @ basis.T, right.T @ left, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [fxgrow.Tiny, fxgrow.GradMax])
def test_cost_is_told_and_what_is_too_large_is_refused(
    method: type[fxgrow.Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    batches = [(torch.randn(16, 6), torch.randn(16, 2))]
    init = method(nn.functional.mse_loss, batches)
    told: list[str] = []
    fxgrow.inspect(net, growth=init, progress=told.append)
    assert told[1].startswith("computing growth of 2 groups: about ")
    assert told[2:] == ["0 (1 of 2)", "2 (2 of 2)"]
    growth = fxgrow.inspect(net, growth=init, exclude=["2"]).growth
    assert growth is not None
    assert [group.name for group in growth.groups] == ["0"]
    monkeypatch.setattr(effort, "MOST_MEMORY", 10)
    with pytest.raises(FxgrowError, match="fewer samples"):
        fxgrow.widen(net, "2x", init=init)
