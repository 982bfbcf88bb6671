"""Growth from data is computed within bounds, and its cost is told before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxgrow
from fxgrow.errors import FxgrowError
from fxgrow.grow.data import effort, inits
from fxgrow.grow.data.pairs import LayerPair, Reader
from fxgrow.grow.data.statistics import channel_dim, patches
from fxgrow.grow.data.sums import Moments, Product, stacked
from fxgrow.modules.calling import tensors_in


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


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 5, 4, padding=2, dilation=3, stride=2), (2, 3, 20)),
        (nn.Conv2d(3, 5, 3, padding=1, stride=2), (2, 3, 9, 8)),
        (nn.Conv2d(3, 5, (3, 2), padding="same", dilation=2), (2, 3, 9, 8)),
        (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 9, 8)),
        (nn.Conv2d(3, 5, 3), (3, 9, 8)),  # without a batch
        (nn.Conv3d(2, 5, (2, 3, 1), padding=(1, 0, 2), stride=(1, 2, 1)), (2, 2, 5, 6, 4)),
        (nn.Linear(3, 5), (2, 7, 3)),
    ],
)
def test_a_layer_of_its_patches_is_the_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = layer.double(), torch.randn(*shape).double()
    dim = channel_dim(layer)  # type: ignore[arg-type]
    rows = patches(layer, x).movedim(dim, -1)  # type: ignore[arg-type]
    found = (rows @ layer.weight.flatten(1).T + layer.bias).movedim(-1, dim)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-12)


class Flattened(nn.Module):
    """A convolution flattened into columns, behind code that may work in place."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early, self.a = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)
        self.b = nn.Linear(4 * 9, 5)
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.early(x)
        if self.in_place:
            x += 1
        else:
            x = x + 1
        return self.b(nn.functional.max_pool2d(self.a(x).relu(), 2).flatten(1))


def test_code_that_works_in_place_before_the_layers_says_the_same() -> None:
    torch.manual_seed(1)
    batch = torch.randn(60, 2, 10, 10), torch.randn(60, 5)
    weights = []
    for in_place in (False, True):
        init = fxgrow.Tiny(nn.functional.mse_loss, [batch])
        net = Flattened(in_place=in_place)
        grown = fxgrow.widen(net, "+2", batch[0], init=init, include=["a"])
        weights.append(grown.model.get_parameter("a.weight"))
    assert torch.equal(*weights)


def test_no_matrix_of_all_columns_by_all_columns_is_made() -> None:
    """A reader of 16 · 64 columns sees 4 samples, which it fits; what is held is as large."""
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tensors_in(found) if t.is_floating_point())
            return found

    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 16, 1), nn.ReLU(), nn.MaxPool2d(1), nn.Flatten())
    net.append(nn.Linear(16 * 64, 5))
    batch = torch.randn(4, 2, 8, 8), torch.randn(4, 5)
    init = fxgrow.Tiny(nn.functional.mse_loss, [batch])
    with Watch(), pytest.raises(FxgrowError, match="old weights can do what the loss asks for"):
        fxgrow.widen(net, "+2", batch[0], init=init)
    assert max(sizes) < (16 * 64) ** 2 / 8


def test_what_is_told_counts_all_runs() -> None:
    """Of runs of known length, each part of the work is in what is told."""
    plain = effort.Effort(2.0, {"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.25}, {"a": 8, "b": 8})
    assert plain.total(["a"], 3) == 3 * (2.0 + 1.5) + 0.5
    assert plain.total(["a"], 3, forwards=8) == plain.total(["a"], 3) + 8 * 2.0
    assert plain.total(["a", "b"], 3) == plain.total(["a"], 3) + 0.25  # the same runs are for both
    shown = replace(plain, before={"a": 0.5}, blocks={"a": 9})
    reader = Reader("r", torch.zeros(4, 1, dtype=torch.int64), (2,))
    pair = LayerPair("a", 4, "w", (reader,), has_bias=True)
    asked = shown.asked(pair, 0.5 + 8 * 0.125)  # up to the writer, and eight runs behind it
    assert asked.total(["a"], 3) == plain.total(["a"], 3) + 3 * (0.5 + 2 * 9 * 0.125)
    scalar = replace(reader, slopes=(0.0, 1.0))
    assert shown.asked(replace(pair, readers=(scalar,)), 9.0) is shown
