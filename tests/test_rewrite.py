"""Sizes that a network's own code fixes: followed to attributes, or rewritten in its graph."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import max_rel
from torch import Tensor, fx, nn
from torchvision.models import VisionTransformer

import fxgrow
from fxgrow.plan.schema import Plan


class Views(nn.Module):
    """Every literal that a width can hide in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 8 * 4)
        self.conv = nn.Conv2d(8, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).view(-1, 8, 2, 2)
        y = torch.relu(self.norm(self.conv(y)))
        return self.last(y.reshape(x.shape[0], 6, 4).unflatten(2, (2, 2)))


class Splits(nn.Module):
    """A fused projection, taken apart by literal sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 10)
        self.first, self.second, self.third = nn.Linear(2, 3), nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        a, b = y[:, :5].split([2, 3], dim=1)
        c = y.narrow(1, 5, 5)
        return self.first(a) + self.second(torch.tanh(c)) + self.third(b[..., -3:])


class Stated(nn.Module):
    """The same as in code, but from attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.sides = 8, (2, 2)
        self.fc = nn.Linear(5, 8 * 4)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.fc(x)).view(-1, self.channels, *self.sides))


def rewritten(net: nn.Module, width: str, x: Tensor, **settings: str) -> fxgrow.Grown:
    """Widen a network whose result is a GraphModule, and says so."""
    with pytest.warns(fxgrow.FxgrowWarning, match="GraphModule with the same names"):
        grown = fxgrow.widen(net, width, x, **settings)  # type: ignore[arg-type]
    assert isinstance(grown.model, fx.GraphModule)
    return grown


@pytest.mark.parametrize("width", ["2x", "1.5x"])
@pytest.mark.parametrize("make", [Views, Splits])
def test_literal_sizes_are_rewritten_in_the_graph(make: type[nn.Module], width: str) -> None:
    torch.manual_seed(0)
    net = make().double()
    x = torch.randn(3, next(net.parameters()).shape[1], dtype=torch.float64)
    if width == "1.5x" and make is Splits:
        width = "+10"  # halves of 5 would not be whole
    grown = rewritten(net, width, x)
    assert not grown.plan.refused
    assert set(grown.model.state_dict()) == set(net.state_dict())
    for train in (False, True):
        net.train(train), grown.model.train(train)
        assert max_rel(net(x), grown.model(x)) < 1e-12
    again = rewritten(grown.model, "2x", x)
    assert max_rel(net(x), again.model(x)) < 1e-12


def test_a_rewritten_network_copies_pickles_exports_and_trains() -> None:
    torch.manual_seed(0)
    grown = rewritten(Views(), "2x", torch.randn(3, 5))
    x = torch.randn(3, 5)
    model = grown.model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(3):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_sizes_from_attributes_keep_the_class() -> None:
    torch.manual_seed(0)
    net = Stated().double().eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x)
    assert type(grown.model) is Stated
    assert (grown.model.channels, grown.model.sides) == (16, (2, 2))
    assert not grown.plan.sizes
    assert max_rel(net(x), grown.model(x)) < 1e-12


def test_a_plan_with_rewritten_sizes_survives_json() -> None:
    net, x = Views(), torch.randn(3, 5)
    plan = rewritten(net, "2x", x).plan
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.sizes
    torch.testing.assert_close(again.apply(net).eval()(x), net.eval()(x))


def vision_transformer() -> nn.Module:
    """Return a small one; its head does not start at zero."""
    torch.manual_seed(0)
    net = VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5)
    nn.init.normal_(net.heads[-1].weight, 0, 0.1)
    return net.double().eval()


@pytest.mark.parametrize("pairing", ["vv_z_negz", "replicate"])
def test_new_heads_without_a_wider_stream_are_written_into_the_graph(pairing: str) -> None:
    net, x = vision_transformer(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    grown = rewritten(net, "2x", x, pairing=pairing)
    assert len(grown.plan.groups) == 4  # two MLPs, two attentions
    weight = grown.model.get_parameter(
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    )
    assert weight.shape == (96, 16)
    assert max_rel(net(x), grown.model(x)) < 1e-12
    grown.model.train()
    assert max_rel(net.train()(x), grown.model(x)) < 1e-12


def test_what_cannot_be_rewritten_is_refused_and_the_rest_grows() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
            self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            if len([*x.shape]) > 7:  # symbolic tracing stops here
                return x
            y = torch.relu(self.a(x)).view(-1, 2, 3).flatten(1)
            return self.d(torch.relu(self.c(self.b(y))))

    net, x = Shaped(), torch.randn(3, 4)
    grown = fxgrow.widen(net, "2x", x)
    assert [group.name for group in grown.plan.groups] == ["b", "c"]
    (refusal,) = grown.plan.refused
    assert refusal.name == "a"
    assert "fixes sizes [-1, 2, 3] in view, where [-1, 2, 6] are needed" in refusal.reason
