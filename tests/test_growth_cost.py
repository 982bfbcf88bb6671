"""Growth from data is computed within bounds, and its cost is told before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.errors import FxgrowError
from fxgrow.grow.data import effort, inits
from fxgrow.grow.data.sums import Moments, Product, stacked


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


def test_a_product_with_several_columns_of_each_channel_equals_the_matrix() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 7).double(), torch.randn(3, 4, 9).double()
    wanted = torch.einsum("nm,ncd->dmc", left, right).flatten(1)
    product = Product.of(left[:1], right[:1]) + Product.of(left[1:], right[1:])
    torch.testing.assert_close(product.formed().T, wanted, rtol=0, atol=1e-12)
    matrix, expand = stacked([product])
    assert matrix.shape == (9, 3 * 4)
    torch.testing.assert_close(expand(matrix), wanted, rtol=0, atol=1e-12)


class Counted(nn.Module):
    """A layer that counts how often it runs on numbers."""

    runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.runs += x.device.type != "meta" and not torch.is_grad_enabled()
        return x


def test_the_first_batch_runs_once_before_growth() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    net.append(Counted())
    x = torch.randn(16, 6)
    fxgrow.inspect(net, x)
    Counted.runs = 0
    init = fxgrow.GradMax(nn.functional.mse_loss, [(x, torch.randn(16, 2))])
    growth = fxgrow.inspect(net, x, growth=init).growth
    assert growth is not None
    assert len(growth.groups) == 2
    assert Counted.runs == 1


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
    assert told[1] == "computing growth of 2 groups"  # that it takes a moment needs no telling
    assert told[2:] == ["0 (1 of 2)", "2 (2 of 2)"]
    growth = fxgrow.inspect(net, growth=init, exclude=["2"]).growth
    assert growth is not None
    assert [group.name for group in growth.groups] == ["0"]
    monkeypatch.setattr(inits, "_LONG", 0.0)
    fxgrow.inspect(net, growth=init, progress=told.append)
    assert any(text.startswith("computing growth of 2 groups: about ") for text in told)
    monkeypatch.setattr(effort, "MOST_MEMORY", 10)
    with pytest.raises(FxgrowError, match="fewer samples"):
        fxgrow.widen(net, "2x", init=init)
