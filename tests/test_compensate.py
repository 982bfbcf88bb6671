"""Compensation by weights: the function and the class stay, and so do the rescaled weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mlp(*between: nn.Module) -> nn.Sequential:
    net = nn.Sequential()
    net.add_module("into", nn.Linear(4, 8))
    for place, module in enumerate(between):
        net.add_module(f"between{place}", module)
    net.add_module("head", nn.Linear(8, 4))
    return net


class Residual(nn.Module):
    """A branch beside a skip."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Scaled(nn.Module):
    """A branch whose output is scaled channel by channel, as ConvNeXt has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.head = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.head(nn.functional.gelu(self.into(self.norm(x))))


class Chain(nn.Module):
    """A sum of what batch norms return before a head: all of it must take the factor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.second, self.second_norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        return self.head(torch.relu(x + self.second_norm(self.second(x))))


def stirred(net: nn.Module) -> nn.Module:
    """Return a network in float64 whose norms are not as they began."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.double().eval()


Make = Callable[[], nn.Module]
FOLDED: dict[str, tuple[Make, dict[str, Any], set[str]]] = {
    "a batch norm between": (lambda: mlp(nn.BatchNorm1d(8), nn.ReLU()), {}, {"between0"}),
    "a norm before the branch": (
        lambda: Residual(nn.LayerNorm(4), *mlp(nn.ReLU())), {}, {"branch.0"},
    ),
    "a layer behind": (
        lambda: nn.Sequential(mlp(nn.ReLU()), nn.ReLU(), nn.Linear(4, 3)),
        {"include": ["0.into"]}, {"2"},
    ),
    "a layer before": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), mlp(nn.ReLU())),
        {"include": ["2.into"]}, {"0"},
    ),
    "a layer scale": (Scaled, {}, {"scale"}),
    "all norms of a sum": (
        Chain, {"where": "all"}, {"first_norm", "second_norm"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("rescaling", ["default_vt", None], ids=["root", "output"])
@pytest.mark.parametrize("name", FOLDED)
def test_weights_take_the_factor_up(name: str, rescaling: str | None) -> None:
    make, options, payers = FOLDED[name]
    net = stirred(make())
    rescaling = rescaling or _by_layer(net)
    grown = fxgrow.widen(net, "2x", X, rescaling=rescaling, compensate=True, strict=True, **options)
    assert type(grown.model) is type(net)
    assert not grown.plan.multipliers
    assert grown.report.verification.verdict == "preserved"
    with torch.no_grad():
        before, after = net(X), grown.model.eval()(X)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-10

    told = [group.reason for group in grown.plan.groups if group.reason]
    assert told
    assert all(f"{payer} (× " in " ".join(told) for payer in payers)

    plain = fxgrow.widen(net, "2x", X, rescaling=rescaling, verify=False, **options)
    assert plain.plan.preserves == "scaled"
    factors = {name: f for group in grown.plan.groups for name, f in group.factors.items()}
    assert factors == {n: f for group in plain.plan.groups for n, f in group.factors.items()}
    for layer in factors:  # the rescaled weights are what they are without compensation
        weight = f"{layer}.weight"
        assert torch.equal(grown.model.state_dict()[weight], plain.model.state_dict()[weight])


def _by_layer(net: nn.Module) -> str | dict[str, str]:
    """Return the rescaling of a network's heads as output layers, and of all other layers."""
    heads = [name for name, _ in net.named_modules() if name.rpartition(".")[2] == "head"]
    return {**dict.fromkeys(heads, "vt_output"), "*": "default_vt"}


def test_nothing_but_rescaled_weights_leaves_it_to_a_multiplier() -> None:
    grown = fxgrow.widen(stirred(mlp(nn.ReLU())), "2x", X, rescaling="default_vt", compensate=True)
    assert isinstance(grown.model, torch.fx.GraphModule)
    assert grown.report.verification.verdict == "preserved"


def test_what_lets_no_factor_pass_leaves_it_to_a_multiplier() -> None:
    net = stirred(Residual(nn.LayerNorm(4), *mlp(nn.GELU())))
    grown = fxgrow.widen(net, "2x", X, rescaling="default_vt", compensate=True)
    assert [m.consumer for m in grown.plan.multipliers] == ["add"]
    assert grown.report.verification.verdict == "preserved"


def test_a_norm_that_others_read_as_well_takes_nothing() -> None:
    """What the norm returns is added as it is, so that the factor would show there."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(4), mlp(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return x + self.mlp(x)

    net = stirred(Shared())
    grown = fxgrow.widen(net, "2x", X, rescaling="default_vt", compensate=True)
    assert grown.plan.multipliers
    assert torch.equal(grown.model.state_dict()["norm.weight"], net.state_dict()["norm.weight"])
    assert grown.report.verification.verdict == "preserved"


def test_an_output_layer_takes_the_factor_itself_and_not_its_root() -> None:
    grown = fxgrow.widen(stirred(mlp(nn.ReLU())), "12", X, rescaling=_by_layer(mlp()))
    assert grown.plan.groups[0].factors == {"into": 1.0, "head": pytest.approx(8 / 12)}
    weight = torch.ones(2, 3)
    assert torch.equal(fxgrow.apply_rescaling(weight, "vt_output", new_fan_in=6), weight / 2)
