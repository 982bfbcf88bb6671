"""Tables and tuples that a network's parts share: rotations, split attention, sizes of parts."""

from __future__ import annotations

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow


class RotatedAttention(nn.Module):
    """Attention on a residual stream; one table turns the positions of all heads alike."""

    def __init__(self, width: int = 8, heads: int = 2, size: int = 4, length: int = 5) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.embed = nn.Linear(3, width)
        self.qkv = nn.Linear(width, 3 * heads * size)
        self.register_buffer("table", torch.randn(length, size))
        self.out = nn.Linear(heads * size, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, length, _ = x.shape
        qkv = self.qkv(x).view(n, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = (torch.cat([part[:, :, :0], part * self.table], 2) for part in (q, k))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.out(mixed.transpose(1, 2).reshape(n, length, -1)))


class SplitAttention(nn.Module):
    """Two branches of channels, weighed by a softmax over the branches, and a split by sizes."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width, self.parts = width, (2 * width, width, width)
        self.branches = nn.Conv2d(3, 2 * width, 1)
        self.weigh = nn.Conv2d(width, 2 * width, 1)
        self.mix = nn.Conv2d(width, 4 * width, 1)
        self.one, self.two = nn.Conv2d(2 * width, 4, 1), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.branches(x).unflatten(1, (2, self.width))
        shares = self.weigh(x.sum(1).mean((2, 3), keepdim=True)).unflatten(1, (2, self.width))
        x = self.mix((x * shares.softmax(1)).sum(1))
        first, second, third = torch.split(x, self.parts, 1)
        return self.one(first.relu()) + self.two(second * third)


def test_heads_that_share_a_table_of_rotations_grow_in_number() -> None:
    torch.manual_seed(0)
    net = RotatedAttention().double().eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x)
    assert [(g.name, g.width) for g in grown.plan.groups] == [("qkv", (24, 48))]
    assert grown.model.get_buffer("table").shape == (5, 4)
    assert max_rel(net(x), grown.model(x)) < 1e-12


def test_branches_under_a_softmax_and_parts_of_a_split_grow() -> None:
    torch.manual_seed(0)
    net = SplitAttention().double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x)
    assert [g.name for g in grown.plan.groups] == ["branches", "mix"]
    assert grown.model.parts == (24, 12, 12)
    assert max_rel(net(x), grown.model(x)) < 1e-12


class Patches(nn.Module):
    """A linear layer of patches, for images of one size or of any."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size
        self.linear = nn.Linear(3 * 4 * 4, 5)
        if size is not None:
            self.pretrained_cfg = {"input_size": (3, size, size)}

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        if self.size not in (None, height):
            raise ValueError(height)
        x = x.reshape(n, 3, height // 4, 4, width // 4, 4).permute(0, 2, 4, 1, 3, 5)
        return self.linear(x.reshape(n, -1, 3 * 4 * 4)).mean(1)


@pytest.mark.parametrize(("declared", "found"), [(None, 224), (40, 40)])
def test_images_are_tried_at_the_size_that_a_network_declares(
    declared: int | None, found: int
) -> None:
    (followed,) = fxgrow.inspect(Patches(declared)).parts
    assert followed.traced.input_shapes == ((2, 3, found, found),)
