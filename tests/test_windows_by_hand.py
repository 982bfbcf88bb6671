"""Window attention as people write it: branches on sizes, and several calls on one line."""

from __future__ import annotations

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn
from torch.nn import functional

import fxgrow


class Window(nn.Module):
    """Attention in windows of 4 × 4 with a table of relative positions; channels come last."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm, self.table = heads, nn.LayerNorm(width), nn.Embedding(49, heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)
        apart = at.view(-1, 1, 2) - at.view(1, -1, 2) + 3
        self.register_buffer("places", apart[..., 0] * 7 + apart[..., 1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = self.norm(x)
        if h % 4 or w % 4:
            y = functional.pad(y, (0, 0, 0, -w % 4, 0, -h % 4))
        rows, columns = y.shape[1] // 4, y.shape[2] // 4
        y = y.view(b, rows, 4, columns, 4, c).transpose(2, 3).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * 0.5 + self.table(self.places).permute(2, 0, 1)
        # One line: what is reshaped first has the width of all heads, and the rest that of x.
        # fmt: off
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)).reshape(b, rows, columns, 4, 4, c)  # noqa: E501
        # fmt: on
        return x + y.transpose(2, 3).reshape(b, 4 * rows, 4 * columns, c)[:, :h, :w]


class Windows(nn.Module):
    """An image through a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Conv2d(3, 8, 2, 2), Window(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.block(self.first(x).permute(0, 2, 3, 1)).mean((1, 2)))
        return y


@pytest.mark.filterwarnings("ignore:the code of block fixes sizes")
def test_calls_on_one_line_are_told_apart() -> None:
    net = Windows().double().eval()
    images = [torch.randn(2, 3, 16, 16).double(), torch.randn(1, 3, 20, 28).double()]
    grown = fxgrow.widen(net, "2x", images[0])
    assert [group.width for group in grown.plan.groups] == [(24, 48)]
    assert any("#" in size.at for edit in grown.plan.steps for size in edit.sizes)
    read = fxgrow.Plan.from_json(grown.plan.to_json()).apply(net)
    again = fxgrow.widen(grown.model, "1.5x", images[0])
    for other in (grown.model, read, again.model):
        for x in images:
            assert max_rel(net(x), other(x)) < 1e-12
