"""Sizes that a network's own code fixes: followed to attributes, or rewritten in its graph."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import max_rel
from torch import Tensor, fx, nn
from torchvision.models import SwinTransformer, VisionTransformer

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


class Shaped(nn.Module):
    """Code that no graph can be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if len([*x.shape]) > 7:  # symbolic tracing stops here
            return x
        y = torch.relu(self.a(x)).view(-1, 2, 3).flatten(1)
        return self.d(torch.relu(self.c(self.b(y))))


def in_code(net: nn.Module, width: str, x: Tensor, **settings: str) -> fxgrow.Grown:
    """Widen a network whose result keeps its class and has hooks, and says so."""
    with pytest.warns(fxgrow.FxgrowWarning, match="hooks of fxgrow's"):
        grown = fxgrow.widen(net, width, x, **settings)  # type: ignore[arg-type]
    assert type(grown.model) is type(net)
    assert not grown.plan.refused
    return grown


def test_sizes_are_given_to_calls_in_code_that_has_no_graph() -> None:
    net, x = Shaped().double(), torch.randn(3, 4, dtype=torch.float64)
    grown = in_code(net, "2x", x)
    assert [group.name for group in grown.plan.groups] == ["a", "b", "c"]
    again = in_code(grown.model, "2x", x)
    assert again.model.a.out_features == 24
    for model in (
        grown.model,
        again.model,
        copy.deepcopy(again.model),
        Plan.from_json(again.plan.to_json()).apply(grown.model),
        pickle.loads(pickle.dumps(again.model)),
        torch.export.export(again.model, (x,)).module(),
    ):
        torch.testing.assert_close(model(x), net(x))
    assert again.model(torch.cat([x, x])).shape == (6, 2)  # of another batch size


def test_hooks_let_go_when_code_fails() -> None:
    net, x = Shaped(), torch.randn(3, 4)
    model = in_code(net, "2x", x).model
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    torch.testing.assert_close(model(x), net(x))
    assert torch.zeros(2, 6).view(-1, 2, 3).shape == (2, 2, 3)  # the same sizes elsewhere


def test_one_line_that_needs_two_changes_is_refused_and_the_rest_grows() -> None:
    class Looped(Shaped):
        def forward(self, x: Tensor) -> Tensor:
            if len([*x.shape]) > 7:
                return x
            sides = [y.view(-1, 2, 3).flatten(1) for y in (torch.relu(self.a(x)), x.repeat(1, 3))]
            return self.d(torch.relu(self.c(self.b(sides[0])))) + sides[1].sum()

    net, x = Looped(), torch.randn(3, 4)
    grown = fxgrow.widen(net, "2x", x)
    assert [group.name for group in grown.plan.groups] == ["b", "c"]
    (refusal,) = grown.plan.refused
    assert refusal.name == "a"
    assert "fixes sizes [-1, 2, 3] in view, where [-1, 2, 6] are needed" in refusal.reason


def test_heads_inside_functions_that_decide_by_sizes_grow_at_every_size() -> None:
    torch.manual_seed(0)
    net = SwinTransformer([2, 2], 8, [1, 1], [2, 2], [4, 4], num_classes=3, dropout=0.0).double()
    nn.init.normal_(net.head.weight)
    net, x = net.eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    grown = in_code(net, "2x", x)
    assert grown.model.features[1][0].attn.qkv.weight.shape == (48, 8)
    for size in (16, 24, 32):
        image = torch.randn(1, 3, size, size, dtype=torch.float64)
        assert max_rel(net(image), grown.model(image)) < 1e-12


def test_what_a_forward_does_not_use_is_kept_beside_rewritten_sizes() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv1d(3, 20, 1), nn.Linear(20, 4)
            self.unused = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).amax(2, keepdim=True).view(-1, 20))

    net, x = Kept().double(), torch.randn(2, 3, 7, dtype=torch.float64)
    model = rewritten(net, "2x", x).model
    assert model.first.out_channels == 40
    for kept in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(kept.state_dict()) == set(net.state_dict())
        torch.testing.assert_close(kept(x), net(x))
