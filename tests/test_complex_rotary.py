"""Rotary embeddings as products of complex numbers, made of neighbours."""

from __future__ import annotations

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow


class Rotary(nn.Module):
    """Attention with grouped keys; queries and keys are turned by angles for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.groups, self.size = 4, 2, 4
        self.first, self.norm, self.last = nn.Linear(5, 16), nn.RMSNorm(16), nn.Linear(16, 3)
        self.q, self.k = nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.v, self.o = nn.Linear(16, 8, bias=False), nn.Linear(16, 16, bias=False)
        angles = torch.outer(torch.arange(32.0), 10.0 ** -torch.arange(2.0))
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        turns = self.turns[: x.shape[1]].view(1, x.shape[1], 1, -1)
        return torch.view_as_real(pairs * turns).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        (b, n, _), stream = x.shape, self.first(x)
        y = self.norm(stream)
        q = self.turned(self.q(y).view(b, n, self.heads, self.size))
        k = self.turned(self.k(y).view(b, n, self.groups, self.size))
        v = self.v(y).view(b, n, self.groups, self.size)
        times = self.heads // self.groups
        k, v = k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = (q @ k.transpose(2, 3) * 0.5).softmax(-1) @ v
        y = stream + self.o(mixed.transpose(1, 2).reshape(b, n, -1))
        out: Tensor = self.last(y)
        return out


@pytest.mark.parametrize(("where", "names"), [("hidden", {"q"}), ("all", {"q", "first"})])
def test_heads_and_streams_grow_with_complex_numbers(where: str, names: set[str]) -> None:
    net, x = Rotary().double().eval(), torch.randn(2, 6, 5).double()
    grown = fxgrow.widen(net, "2x", x, where=where)
    assert {group.name for group in grown.plan.groups} == names
    assert max_rel(net(x), grown.model(x)) < 1e-12
    longer = torch.randn(1, 9, 5).double()
    assert max_rel(net(longer), grown.model(longer)) < 1e-12


def test_both_parts_of_a_number_are_one_channel() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.view_as_complex(self.first(x).view(len(x), -1, 2))
            y: Tensor = self.last(torch.view_as_real(z * z.abs()).flatten(1))
            return y

    net, x = Pairs().double().eval(), torch.randn(3, 4).double()
    grown = fxgrow.widen(net, "2x", x)
    assert [group.width for group in grown.plan.groups] == [(6, 12)]
    assert max_rel(net(x), grown.model(x)) < 1e-12
