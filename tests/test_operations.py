"""Networks with operations that few networks have: followed, grown, and the same function."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxgrow


class IndexAdd(nn.Module):
    """Messages added up at nodes, as in a graph network; the nodes begin with values or zeros."""

    def __init__(self, begin: str) -> None:
        super().__init__()
        self.message, self.node, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.begin = begin

    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([0, 2, 1, 0, 2, 2])
        message = self.message(x).relu()
        nodes = self.node(x) if self.begin != "zeros" else message.new_zeros(6, message.shape[1])
        if self.begin == "scatter":
            wide = index[:, None].expand(-1, message.shape[1])
            return self.out(nodes.scatter_add(0, wide, message).relu())
        return self.out(nodes.index_add(0, index, message).relu())


class Deformed(nn.Module):
    """A deformable convolution between two others, with offsets and a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.offset, self.mask = (nn.Conv2d(3, c, 3, padding=1) for c in (6, 18, 9))
        self.deformed = torchvision.ops.DeformConv2d(6, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        sampled = self.deformed(self.stem(x).relu(), self.offset(x), self.mask(x).sigmoid())
        return self.out(sampled.relu())


class TwoSided(nn.Module):
    """Two hidden layers that one bilinear form reads, and writes a third."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 6)
        self.form, self.out = nn.Bilinear(4, 6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.form(self.left(x).relu(), self.right(x).tanh()).relu())


CASES = {
    "index_add": (lambda: IndexAdd("values"), (6, 5), {"message"}),
    "index_add to zeros": (lambda: IndexAdd("zeros"), (6, 5), {"message"}),
    "scatter_add": (lambda: IndexAdd("scatter"), (6, 5), {"message"}),
    "deform_conv2d": (Deformed, (2, 3, 7, 7), {"stem", "deformed"}),
    "bilinear": (TwoSided, (7, 5), {"left", "right", "form"}),
}


@pytest.mark.parametrize("width", ["2x", "1.5x"])
@pytest.mark.parametrize("name", CASES)
def test_what_it_computes_stays(name: str, width: str) -> None:
    make, shape, writers = CASES[name]
    torch.manual_seed(0)
    net, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    grown = fxgrow.widen(net, width, x)
    assert {name for group in grown.plan.groups for name in group.writers} >= writers
    assert grown.report.verification.verdict == "preserved"
    torch.testing.assert_close(grown.model(x), net(x), rtol=1e-10, atol=1e-10)


def test_a_response_normalised_over_neighbours_is_pinned_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.LocalResponseNorm(3), nn.Conv2d(6, 2, 1))
    found = fxgrow.inspect(net, torch.empty(1, 3, 4, 4)).to_dict()["groups"]
    (group,) = (group for group in found if group["name"] == "0")
    assert (group["kind"], "avg_pool3d" in group["reason"]) == ("pinned", True)
