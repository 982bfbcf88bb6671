"""Gains that meet in a parameter or a norm that is used twice: predicted, and told of whom."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from test_layers import data, made
from torch import Tensor, nn

import fxgrow
from fxgrow.api.requirements import require_exact


@pytest.mark.parametrize("image", [False, True])
def test_a_shared_bias_takes_one_gain(image: bool) -> None:
    """Where it has taken another, what it is added to is scaled."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.up = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            layer = nn.Conv2d(4, 4, 1) if image else nn.Linear(4, 4)
            self.layer, self.norm, self.out = layer, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(self.into(x))
            for _ in range(2):
                inner = self.layer(x) if image else self.layer(x.movedim(1, 3)).movedim(3, 1)
                x = torch.relu(self.norm(inner))
            return self.out(x)

    net = made(Again)
    nn.init.normal_(net.norm.running_mean)
    options = {"rescaling": "default_vt", "include": ["into"]}
    grown = fxgrow.widen(net, "2x", data(2, 3, 5, 5), **options)
    assert grown.report.verification.verdict == "as predicted"
    assert grown.report.verification.eval.residual.max_rel < 1e-12
    (group,) = grown.plan.groups
    assert (group.name, group.preserves) == ("into", "no")
    with pytest.raises(fxgrow.NotPreservedError, match="into"):
        fxgrow.widen(net, "2x", data(2, 3, 5, 5), strict=True, **options)


def test_whoever_gave_a_shared_bias_its_gain_is_named() -> None:
    """The second gain is one, and has no source of its own."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.up = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.shared, self.head = nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 2, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(self.into(x))
            for norm in self.norms:
                x = torch.relu(norm(self.shared(x)))
            return self.head(x)

    options = {"rescaling": "default_vt", "include": ["into"]}
    grown = fxgrow.widen(made(Again), "2x", data(2, 3, 5, 5), **options)
    (group,) = grown.plan.groups
    assert (group.name, group.preserves) == ("into", "no")
    assert "the bias of shared cannot take a gain of 1, having taken one of 0.7" in group.reason
    bare = replace(grown.plan, groups=(replace(group, preserves="exact"),))
    assert bare.preserves == "scaled"  # something is predicted, whoever does it
    with pytest.raises(fxgrow.NotPreservedError, match="would change"):
        require_exact(bare)


@pytest.mark.filterwarnings("ignore:.* becomes")
@pytest.mark.parametrize("affine", [False, True])
def test_a_shared_norm_of_the_sample_takes_one_gain_up(affine: bool) -> None:
    norm = nn.Sequential(nn.InstanceNorm2d(5, affine=affine))

    def again(gained: bool) -> nn.Module:
        class Again(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.into, self.up, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), norm
                self.head = nn.Conv2d(5, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                x = self.norm(self.up(self.into(x)))
                return self.head(self.norm(torch.tanh(x)) if gained else x)

        return made(Again)

    options = {"rescaling": "default_vt", "include": ["into"]}
    once = fxgrow.widen(again(False), "2x", data(2, 3, 5, 5), **options)
    assert once.plan.preserves == "exact"
    (edit,) = (edit for edit in once.plan.modules if edit.attribute == "eps")
    assert (edit.module, edit.after) == ("norm.0", pytest.approx(0.5e-5))
    twice = fxgrow.widen(again(True), "2x", data(2, 3, 5, 5), **options)
    assert twice.plan.groups[0].reason == "norm.0 is used twice, with different gains"
    assert twice.report.verification.eval.residual.max_rel < 1e-12


class RootMeanSquare(nn.Module):
    """An RMSNorm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), 1e-2

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@pytest.mark.filterwarnings("ignore:.* becomes")
@pytest.mark.parametrize("gained", ["first", "second"])
def test_a_written_out_norm_that_is_used_twice_takes_up_its_first_gain(gained: str) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.up, self.other = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(3, 5)
            self.norm, self.head = RootMeanSquare(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            ways = (lambda: self.up(self.into(x)), lambda: self.other(x))
            one, two = (self.norm(way()) for way in (ways if gained == "first" else ways[::-1]))
            return self.head(one + 2 * two)

    options = {"rescaling": "default_vt", "include": ["into"]}
    grown = fxgrow.widen(made(Again), "2x", data(4, 3), **options)
    assert "norm is used twice, with different gains" in grown.plan.groups[0].reason
    assert grown.report.verification.verdict == "as predicted"
    assert grown.report.verification.eval.residual.max_rel < 1e-12
    assert any(edit.attribute == "eps" for edit in grown.plan.modules) == (gained == "first")


@pytest.mark.parametrize("compensate", [False, True])
def test_a_constant_of_the_code_leaves_the_graph_to_multipliers(compensate: bool) -> None:
    """Each trace makes it anew, under another name."""

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.into(x)) * torch.tensor(0.5))

    options = {"rescaling": "default_vt", "compensate": compensate}
    grown = fxgrow.widen(made(Halved), "2x", data(4, 5), **options)
    assert grown.plan.preserves == ("exact" if compensate else "scaled")
    assert grown.report.verification.verdict == ("preserved" if compensate else "as predicted")


class Normed(nn.Module):
    """A reader of a hidden layer, and a norm behind it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.head = (
            nn.Linear(4, 6), nn.Linear(6, 8), norm, nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.down(torch.relu(self.up(x))))))


@pytest.mark.filterwarnings("ignore:.* a state_dict does not hold it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_the_eps_of_a_norm_takes_a_gain_in_any_dtype(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    net = Normed(kind(8, eps=1e-3)).to(dtype).eval()
    grown = fxgrow.widen(net, {"up": "2x"}, torch.randn(5, 4, dtype=dtype), rescaling="default_vt")
    assert grown.report.verification.verdict == "preserved"
    assert grown.report.verification.eval.float64.max_rel <= 1e-10
    assert grown.model.norm.eps == pytest.approx(5e-4, rel=1e-12)  # β² = 6/12


@pytest.mark.filterwarnings("ignore:.* a state_dict does not hold it")
def test_an_eps_of_the_dtype_takes_none_until_it_is_written_down() -> None:
    torch.manual_seed(0)
    net, x = Normed(nn.RMSNorm(8)).eval(), torch.randn(5, 4)
    with pytest.raises(fxgrow.PlanError, match="the eps of its dtype") as refused:
        fxgrow.widen(net, {"up": "2x"}, x, rescaling="default_vt")
    before = net(x)
    (eps,) = re.findall(r"set eps=([\d.e-]+)", str(refused.value))
    net.norm.eps = float(eps)
    assert torch.equal(net(x), before)
    grown = fxgrow.widen(net, {"up": "2x"}, x, rescaling="default_vt")
    assert grown.report.verification.verdict == "preserved"
