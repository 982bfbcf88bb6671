"""What a new block refers to, without holding it, is the network that has grown, not a copy."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxgrow.training import deepen_, grow_, regrow_, state_dict

X = torch.randn(5, 4)


class Block(nn.Module):
    """A residual block that is scaled by a parameter of the network around it."""

    def __init__(self, refer: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 16), nn.Linear(16, 8)
        object.__setattr__(self, "held", None)
        self.refer = refer

    def parent(self) -> Any:
        """Return the network around."""
        held: Any = self.held
        if isinstance(held, nn.Module):
            return held
        if isinstance(held, weakref.ref):
            return held()
        if isinstance(held, tuple):
            return held[0]
        return held["net"][0] if isinstance(held, dict) else held.__self__

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.into(x))) * self.parent().scale


class Network(nn.Module):
    """Two such blocks."""

    def __init__(self, refer: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.5))
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.Sequential(Block(refer), Block(refer))
        for block in self.blocks:
            object.__setattr__(block, "held", refer(self))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))

    def act(self) -> None:
        """Be referred to."""


def plainly(net: Any) -> Any:
    """Refer to a network by an attribute."""
    return net


def in_a_tuple(net: Any) -> Any:
    """Refer to it within a tuple."""
    return (net,)


def in_a_dict(net: Any) -> Any:
    """Refer to it within a list in a dict."""
    return {"net": [net]}


def by_a_method(net: Any) -> Any:
    """Refer to it by a method that is bound to it."""
    return net.act


@pytest.mark.parametrize("refer", [plainly, in_a_tuple, in_a_dict, by_a_method, weakref.ref])
def test_new_blocks_refer_to_the_network_that_has_grown(refer):
    net = Network(refer)
    optimizer, before = torch.optim.SGD(net.parameters(), lr=0.1), net(X)
    deepen_(net, {"blocks": "+1"}, X, optimizer=optimizer)
    grow_(net, "2x", X, optimizer=optimizer)
    deepen_(net, {"blocks": "+1"}, X, optimizer=optimizer)
    assert [block.parent() is net for block in net.blocks] == [True] * 4
    torch.testing.assert_close(net(X), before)
    net(X).sum().backward()
    mine = net.scale.grad
    assert mine is not None
    assert mine.item() != 0
    again = regrow_(Network(refer), state_dict(net))
    assert all(block.parent() is again for block in again.blocks)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(X), net(X))


def test_new_blocks_refer_to_what_the_network_is_a_part_of():
    whole = nn.Module()
    whole.net = Network(plainly)
    for block in whole.net.blocks:
        object.__setattr__(block, "whole", whole)
    deepen_(whole.net, {"blocks": "+1"}, X)
    assert [block.whole is whole for block in whole.net.blocks] == [True] * 3
