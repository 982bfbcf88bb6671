"""Shortcuts without a parameter: channels of zeros beside those that come in (He 2016)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow


def rest(net: nn.Module, x: Tensor, parts: int = 1) -> tuple[int, ...]:
    """Return the sizes of the zeros that x lacks, or of one of several parts of them."""
    return (len(x), (net.planes - x.shape[1]) // parts, *x.shape[2:])


SHORTCUTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "pad on both sides": lambda net, x: F.pad(
        x, (0, 0, 0, 0, net.planes // 4, net.planes // 4), "constant", 0
    ),
    "pad by a literal": lambda net, x: F.pad(x, (0, 0, 0, 0, 3, 3)),
    "pad what is lacking": lambda net, x: F.pad(x, (0, 0, 0, 0, 0, net.planes - x.shape[1])),
    "times zero": lambda net, x: torch.cat((x, x.mul(0)), 1),
    "zeros_like": lambda net, x: torch.cat((x, torch.zeros_like(x)), 1),
    "zeros of its sizes": lambda net, x: torch.cat((x, torch.zeros(*x.shape, dtype=x.dtype)), 1),
    "zeros": lambda net, x: torch.cat((x, torch.zeros(rest(net, x), dtype=x.dtype)), 1),
    "new_zeros": lambda net, x: torch.cat((x, x.new_zeros(rest(net, x))), 1),
    "filled": lambda net, x: torch.cat((x, torch.empty(rest(net, x)).fill_(0).to(x)), 1),
    "zeros on both sides": lambda net, x: torch.cat(
        (x.new_zeros(rest(net, x, 2)), x, x.new_zeros(rest(net, x, 2))), 1
    ),
}


class Shortcut(nn.Module):
    """A stage that doubles the channels and halves the image."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.planes = name, 12
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 12, 3, 2, 1), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, 1, 1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        branch = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        both = branch + SHORTCUTS[self.name](self, x[:, :, ::2, ::2])
        return self.head(both.relu().mean((2, 3)))


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")  # of literals
@pytest.mark.parametrize("name", SHORTCUTS)
def test_zeros_beside_channels_grow_with_what_they_are_added_to(name: str) -> None:
    net, x = Shortcut(name).eval(), torch.randn(2, 3, 8, 8)
    grown = fxgrow.widen(net, "2x", x, where="all")
    assert grown.model.stem.out_channels == 12
    assert grown.model.conv2.out_channels == 24
    assert (type(grown.model) is Shortcut) == ("literal" not in name)
    assert grown.report.verification is not None
    assert grown.report.verification.verdict == "preserved"
    torch.testing.assert_close(grown.model(x), net(x), atol=1e-5, rtol=1e-4)
    bigger = torch.randn(1, 3, 12, 10)
    torch.testing.assert_close(grown.model(bigger), net(bigger), atol=1e-5, rtol=1e-4)


class Once(nn.Module):
    """A state of zeros that is concatenated and added to, once."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.hidden = how, 16
        self.enter, self.mix, self.head = nn.Linear(5, 16), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        data = self.enter(x).relu()
        width = self.hidden if self.how == "an attribute" else data.shape[-1]
        state = data.new_zeros(*data.shape[:2], width)
        return self.head(state + self.mix(torch.cat([state, data], -1)).tanh())


@pytest.mark.parametrize("how", ["an attribute", "another stream"])
def test_a_state_of_zeros_that_is_concatenated_once_grows(how: str) -> None:
    net, x = Once(how).eval(), torch.randn(2, 6, 5)
    grown = fxgrow.widen(net, "2x", x, where="all")
    assert grown.model.mix.weight.shape == (32, 64)
    assert grown.report.verification is not None
    assert grown.report.verification.verdict == "preserved"
    torch.testing.assert_close(grown.model(x), net(x), atol=1e-6, rtol=1e-5)
