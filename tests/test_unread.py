"""What is computed and leads to no output binds no channel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow

Use = Callable[["Averaged", Tensor, Tensor], Tensor]


class Averaged(nn.Module):
    """Normalised channels, beside which their largest is taken for some use."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use, self.kept = use, torch.zeros(2)
        self.first, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        largest = hidden.cumsum(-1).amax(-1, keepdim=True)
        return self.use(self, self.last(self.norm(hidden)), largest)


def keep(net: Averaged, y: Tensor, largest: Tensor) -> Tensor:
    net.kept = largest
    return y


def write(net: Averaged, y: Tensor, largest: Tensor) -> Tensor:
    y[..., :1] = largest
    return y


USES: dict[str, Use] = {
    "added": lambda _, y, largest: y + largest,
    "kept in an attribute": keep,
    "written in place": write,
}


def test_what_is_thrown_away_binds_nothing() -> None:
    net, x = Averaged(lambda _, y, largest: y).double().eval(), torch.randn(2, 5).double()
    grown = fxgrow.widen(net, "1.5x", x)
    assert [group.width for group in grown.plan.groups] == [(8, 12)]
    assert max_rel(net(x), grown.model(x)) < 1e-12


@pytest.mark.parametrize("use", USES)
def test_what_is_used_binds_as_ever(use: str) -> None:
    net, x = Averaged(USES[use]).double().eval(), torch.randn(2, 5).double()
    groups = fxgrow.inspect(net, x).to_dict()["groups"]
    assert "cumsum" in next(group for group in groups if group["name"] == "first")["reason"]


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")
@pytest.mark.parametrize("where", ["hidden", "all"])
def test_attention_whose_weights_nobody_reads_grows_by_single_heads(where: str) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.att = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            mixed: Tensor = self.att(hidden, hidden, hidden)[0]
            y: Tensor = self.last(self.norm(hidden + mixed))
            return y

    net, x = Attending().double().eval(), torch.randn(2, 6, 5).double()
    grown = fxgrow.widen(net, "1.5x", x, where=where)
    assert ("att", (24, 36)) in [(group.name, group.width) for group in grown.plan.groups]
    assert max_rel(net(x), grown.model(x)) < 1e-12
