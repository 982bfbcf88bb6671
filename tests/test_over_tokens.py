"""Layers over tokens: their channels are the tokens, and the features of a token pass through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.channels.analysis import analyse
from fxgrow.labels.trace import trace

TOKENS, FEATURES = 5, 6


class SpatialGate(nn.Module):
    """A block of gMLP: half of the features gates the other half, mixed over the tokens."""

    def __init__(self, mixed: str, kernel: int = 1) -> None:
        super().__init__()
        self.mixed = mixed
        self.embed = nn.Linear(3, FEATURES)
        self.up, self.down = nn.Linear(FEATURES, 16), nn.Linear(8, FEATURES)
        self.conv = nn.Conv1d(TOKENS, TOKENS, kernel, padding=kernel // 2)
        self.head = nn.Linear(FEATURES, 2)

    def over_tokens(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        match self.mixed:
            case "linear":
                return F.linear(x.transpose(1, 2), weight[..., 0], bias).transpose(1, 2)
            case "einsum":
                return torch.einsum("bnd,mn->bmd", x, weight[..., 0])
            case "matmul":
                return weight[..., 0] @ x
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        kept, gate = F.gelu(self.up(x)).chunk(2, dim=-1)
        return self.head(x + self.down(kept * self.over_tokens(gate)))


def built(mixed: str, kernel: int = 1) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return SpatialGate(mixed, kernel).double(), torch.randn(2, TOKENS, 3, dtype=torch.float64)


@pytest.mark.parametrize("mixed", ["convolution", "linear", "einsum", "matmul"])
@pytest.mark.parametrize("width", ["2x", "1.5x"])
def test_features_pass_a_layer_over_tokens(mixed: str, width: str) -> None:
    net, x = built(mixed)
    grown = fxgrow.widen(net, width, x, where="all")
    assert grown.report.verification.verdict == "preserved"
    assert [group.name for group in grown.plan.groups] == ["embed", "up"]
    torch.testing.assert_close(grown.model(x), net(x), rtol=0, atol=1e-10)


def test_a_kernel_over_features_mixes_them_and_says_so() -> None:
    reasons = {group.name: group.reason for group in analyse(trace(*built("conv", 3))).groups}
    assert reasons["up"].startswith("a convolution over these positions (aten.convolution at conv)")


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(TOKENS, TOKENS, 1, groups=TOKENS),
        nn.ConvTranspose1d(TOKENS, TOKENS, 1),
        nn.Conv1d(TOKENS, TOKENS, 1),
    ],
)
def test_tokens_alone_or_transposed(conv: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(3, 4), conv, nn.Linear(4, 2)).double()
    x = torch.randn(2, TOKENS, 3, dtype=torch.float64)
    assert fxgrow.widen(net, "2x", x).model[0].out_features == 8


@pytest.mark.parametrize(
    "conv", [nn.Conv1d(TOKENS, TOKENS, 1, stride=2), nn.Conv1d(5, 5, 1, padding=1)]
)
def test_positions_that_are_left_out_or_put_in_are_no_features(conv: nn.Module) -> None:
    read = conv(torch.zeros(2, TOKENS, 4)).shape[-1]
    net = nn.Sequential(nn.Linear(3, 4), conv, nn.Linear(read, 2))
    (group,) = (g for g in analyse(trace(net, torch.randn(2, TOKENS, 3))).groups if g.name == "0")
    assert "over these positions" in group.reason
