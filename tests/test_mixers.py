"""Normalisations over channels: whole copies keep their statistics, anything else is refused."""

from __future__ import annotations

import pytest
import torch
from networks import max_rel, torchvision_model
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import PlanError


class RootMeanSquare(nn.Module):
    """An RMSNorm written out by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Normed(nn.Module):
    """Linear → norm → GELU → linear."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), norm, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.norm(self.first(x))))


def random_norm(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "by hand": lambda: RootMeanSquare(8),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", ["2x", "3x"])
def test_whole_copies_pass_norms_over_channels(norm: str, width: str) -> None:
    torch.manual_seed(0)
    model = Normed(random_norm(NORMS[norm]())).double()
    pairing = "replicate" if norm == "GroupNorm" else "vv_z_negz"
    grown = fxgrow.widen(model, width, torch.randn(4, 5, dtype=torch.float64), pairing=pairing)
    (group,) = grown.plan.groups
    assert (group.pairing, group.preserves) == ("replicate", "exact")
    assert "whole copies" in grown.report.to_dict()["groups"][0]["reason"]
    assert grown.report.verification.verdict == "preserved"
    assert grown.model.last.in_features == 8 * int(width[0])
    assert grown.report.verification.without_gradient == ()


@pytest.mark.parametrize("width", ["+1", "1.5x", "+7", "+9", "+17"])
@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm", "by hand"])
def test_other_widths_need_channels_that_the_norm_ignores(norm: str, width: str) -> None:
    torch.manual_seed(0)
    model = Normed(random_norm(NORMS[norm]())).double()
    grown = fxgrow.widen(model, width, torch.randn(4, 5, dtype=torch.float64))
    assert grown.plan.preserves == "exact"
    assert grown.report.verification.verdict == "preserved"
    assert grown.report.verification.eval.float64.max_rel <= 1e-13
    assert grown.report.verification.without_gradient == ()
    assert grown.plan.warnings == ()  # the eps stays: weights fit the stock architecture


def test_attributes_of_norms_follow() -> None:
    grown = fxgrow.widen(Normed(nn.LayerNorm(8)), "2x").model
    assert grown.norm.normalized_shape == (16,)


def test_groups_that_meet_in_one_norm_must_grow_alike() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 6)
            self.norm, self.last = nn.LayerNorm(10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(torch.cat([self.a(x), self.b(x)], -1)))

    model = Joined().double()
    grown = fxgrow.widen(model, "2x", torch.randn(4, 5, dtype=torch.float64))
    assert grown.report.verification.verdict == "preserved"
    with pytest.raises(PlanError, match="do not grow alike"):
        fxgrow.widen(model, {"a": "2x"})


@pytest.mark.filterwarnings("ignore:3.eps becomes")
@pytest.mark.parametrize("norm", ["LayerNorm", "GroupNorm"])
def test_norms_over_channels_absorb_a_gain_exactly_by_their_eps(norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), random_norm(NORMS[norm]())
    ).double()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)  # so that eps counts
    x = torch.randn(4, 5, dtype=torch.float64)
    grown = fxgrow.widen(model, "2x", x, rescaling="default_vt", include=["0"])
    (group,) = grown.plan.groups
    assert (group.preserves, group.absorbed_by) == ("exact", ("3",))
    assert grown.model[3].eps == pytest.approx(model[3].eps * 0.5)
    assert grown.report.verification.verdict == "preserved"
    assert grown.report.verification.train.float64.max_rel <= 1e-10
    grown.model[3].eps = model[3].eps
    assert max_rel(model(x), grown.model(x)) > 1e-6


def test_an_eps_that_no_attribute_holds_cannot_absorb() -> None:
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), RootMeanSquare(8))
    grown = fxgrow.widen(model.double(), "2x", rescaling="default_vt", include=["0"])
    assert grown.plan.groups[0].preserves == "no"
    assert grown.report.verification.eval.residual.max_rel <= 1e-10


@pytest.mark.sweep
def test_streams_of_a_convnext_grow_through_their_norms() -> None:
    model = torchvision_model("convnext_tiny")
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    grown = fxgrow.widen(model, "2x", image, where="all")
    assert [refused.name for refused in grown.plan.refused] == ["classifier.2"]
    with torch.no_grad():
        assert max_rel(model(image), grown.model(image)) <= 1e-10


def test_new_convolution_groups_cannot_read_copies() -> None:
    class ChannelsLast(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 2, 3), ChannelsLast(2), nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 3, 1)
    ).double()  # fmt: skip
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(fxgrow.PlanError, match="new groups of 2 want twins"):
        fxgrow.widen(net, "2x", x, grouped="count")
    grown = fxgrow.widen(net, "2x", x, grouped="width")
    assert grown.report.verification.verdict == "preserved"
