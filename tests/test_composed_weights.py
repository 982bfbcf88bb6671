"""Weights that are computed of several parameters: sums, masks, noise times its deviation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.channels.analysis import analyse
from fxgrow.labels.trace import trace


class Noisy(nn.Module):
    """A linear layer with learned noise; what was drawn for it is in buffers (Fortunato 2018)."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inside, out
        for name, shape in (("weight", (out, inside)), ("bias", (out,))):
            self.register_parameter(f"{name}_mu", nn.Parameter(torch.randn(shape)))
            self.register_parameter(f"{name}_sigma", nn.Parameter(torch.randn(shape)))
            self.register_buffer(f"{name}_epsilon", torch.zeros(shape))
        self.reset_noise()

    def reset_noise(self) -> None:
        across, down = torch.randn(self.in_features), torch.randn(self.out_features)
        self.weight_epsilon.copy_(torch.outer(down, across))
        self.bias_epsilon.copy_(down)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.weight_mu, self.bias_mu)
        weight = self.weight_mu + self.weight_sigma * self.weight_epsilon
        return F.linear(x, weight, self.bias_mu + self.bias_sigma * self.bias_epsilon)


def in_line(first: nn.Module, second: nn.Module) -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), first, nn.ReLU(), second).double()
    return net, torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.parametrize("pairing", ["vv_z_negz", "v_zero", "replicate"])
def test_noise_in_buffers_grows_in_both_modes(pairing: str) -> None:
    torch.manual_seed(0)
    net, x = in_line(Noisy(6, 8), Noisy(8, 3))
    grown = fxgrow.widen(net, "2x", x, pairing=pairing)
    assert grown.report.verification.verdict == "preserved"
    assert [group.width for group in grown.plan.groups] == [(6, 12), (8, 16)]
    for training in (False, True):
        net.train(training)
        grown.model.train(training)
        torch.testing.assert_close(grown.model(x), net(x), rtol=0, atol=1e-10)


def test_channels_of_zeros_are_zero_with_noise_too() -> None:
    """What the noise is multiplied by is used in train mode alone."""
    torch.manual_seed(0)
    net, x = in_line(Noisy(6, 8), Noisy(8, 3))
    with pytest.raises(fxgrow.PlanError, match="has no slope at zero"):
        fxgrow.widen(net, "2x", x, pairing="zero_z")
    net[1], net[3] = nn.Tanh(), nn.Tanh()
    grown = fxgrow.widen(net, "2x", x, pairing="zero_z")
    assert [group.width for group in grown.plan.groups] == [(6, 12), (8, 16)]
    for training in (False, True):
        torch.testing.assert_close(
            grown.model.train(training)(x), net.train(training)(x), rtol=0, atol=1e-12
        )
    hidden = grown.model.train()[:3](x)
    assert not hidden[:, 8:].any()
    assert grown.model[4].weight_sigma[:, 8:].all()


def test_a_grown_layer_draws_its_noise_anew() -> None:
    net, x = in_line(Noisy(6, 8), Noisy(8, 3))
    layer = fxgrow.widen(net, "2x", x).model[2]
    assert (layer.in_features, layer.out_features) == (12, 16)
    layer.reset_noise()


class Composed(nn.Module):
    """A linear layer whose weight is made of three matrices, or of two and a vector."""

    def __init__(self, made: Callable[..., Tensor], inside: int, out: int) -> None:
        super().__init__()
        self.made = made
        self.a, self.b = (nn.Parameter(torch.randn(out, inside)) for _ in range(2))
        self.register_buffer("mask", (torch.rand(out, inside) > 0.3).float())
        self.g = nn.Parameter(torch.randn(out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.made(self.a, self.b, self.mask, self.g))


MADE = {
    "a sum": lambda a, b, mask, g: a + b,
    "a difference": lambda a, b, mask, g: a - 2 * b,
    "masked, mask first": lambda a, b, mask, g: mask * a,
    "a masked sum": lambda a, b, mask, g: mask * (a + b),
    "a product": lambda a, b, mask, g: a * b,
    "a product in a sum": lambda a, b, mask, g: torch.addcmul(a, b, mask),
    "a factor for each row": lambda a, b, mask, g: (a + b * mask) * g,
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("pairing", ["vv_z_negz", "replicate"])
def test_what_a_weight_is_made_of_grows_together(made: Callable[..., Tensor], pairing: str) -> None:
    torch.manual_seed(0)
    net, x = in_line(Composed(made, 6, 8), Composed(made, 8, 3))
    grown = fxgrow.widen(net, "2x", x, pairing=pairing)
    assert grown.report.verification.verdict == "preserved"
    assert len(grown.plan.groups) == 2


def test_a_mask_keeps_its_two_values() -> None:
    net, x = in_line(Composed(MADE["masked, mask first"], 6, 8), nn.Linear(8, 3))
    mask = fxgrow.widen(net, "2x", x).model[2].mask
    assert mask.shape == (16, 12)
    assert set(mask.unique().tolist()) == {0.0, 1.0}


CURVED = {
    "a square": lambda a, b, mask, g: a * a,
    "a factor that is in the other": lambda a, b, mask, g: a * (a + b),
    "a quotient": lambda a, b, mask, g: 1 / a,
    "one term for each row": lambda a, b, mask, g: a + g,
    "an exponential in a sum": lambda a, b, mask, g: a + b.exp(),
}


@pytest.mark.parametrize("made", CURVED.values(), ids=CURVED)
def test_columns_do_not_cancel_in_what_is_not_linear(made: Callable[..., Tensor]) -> None:
    net, x = in_line(Composed(made, 6, 8), Composed(made, 8, 3))
    reasons = {group.name: group.reason for group in analyse(trace(net, x)).groups}
    assert "is not linear in" in reasons["0"]


def test_noise_that_a_forward_draws_for_each_column_is_the_reason() -> None:
    def drawn(a: Tensor, b: Tensor, mask: Tensor, g: Tensor) -> Tensor:
        return a + b * torch.randn(a.shape, dtype=a.dtype) / math.sqrt(2)

    net, x = in_line(Composed(drawn, 6, 8), nn.Linear(8, 3))
    reasons = {group.name: group.reason for group in analyse(trace(net, x)).groups}
    assert reasons["0"].startswith("noise is drawn for each of its channels")
