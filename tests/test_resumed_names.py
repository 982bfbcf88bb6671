"""Modules that have grown are found again by the names that they had as they grew."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxgrow.training import deepen_, grow_, parts_of, regrow_, state_dict


class Residual(nn.Module):
    """A block that adds to what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + self.b(torch.relu(self.a(x)))


def build() -> nn.Sequential:
    """Return blocks between two layers."""
    blocks = nn.Sequential(Residual(), Residual(), Residual())
    return nn.Sequential(nn.Linear(4, 8), blocks, nn.Linear(8, 2))


def test_a_block_that_grew_and_was_then_moved_by_new_ones_resumes() -> None:
    """Its growth is told by the name that it had then, and its parts by the one it has."""
    x, net = torch.randn(6, 4), build()
    grow_(net[1][1], "2x", torch.randn(6, 8))
    deepen_(net, {"1.0": "+1"}, x)
    assert [one["module"] for one in state_dict(net)["stages"]] == ["1.1", ""]
    again = regrow_(build(), state_dict(net))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x))
    assert {part.name for part in parts_of(net) if part.stage == 1} >= {"1.2.a.weight"}
    assert [one["module"] for one in state_dict(again)["stages"]] == ["1.1", ""]


def test_a_new_block_that_is_like_one_that_grew_has_not_grown() -> None:
    """It begins with what its model has, whose growth is told once."""
    x, net = torch.randn(6, 4), build()
    grow_(net[1][1], "2x", torch.randn(6, 8))
    deepen_(net, {"1.1": "+1"}, x)
    assert [one["module"] for one in state_dict(net)["stages"]] == ["1.1", ""]
    again = regrow_(build(), state_dict(net))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x))
