"""Networks that are as deep already as they had grown resume as those that are not."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fxgrow.errors import PlanError
from fxgrow.training import deepen_, grow_, regrow_, state_dict

X = torch.randn(5, 4)


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.into(x)))


class Network(nn.Module):
    """Blocks, whose number a configuration tells."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_layers=layers)
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def train(net: Network, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("spec", ["blocks", "blocks.0"])
@pytest.mark.parametrize("wide_first", [False, True])
@pytest.mark.parametrize("layers", [2, 4])  # as at first, and as at last
def test_a_run_goes_on_from_a_configuration_of_either_depth(layers, wide_first, spec):
    torch.manual_seed(0)
    net = Network(2)
    optimizer = torch.optim.AdamW(net.parameters())
    if wide_first:
        grow_(net, "2x", X, optimizer=optimizer)
    train(net, optimizer)
    for _ in range(2):
        deepen_(net, {spec: "+1"}, X, optimizer=optimizer)
    if not wide_first:
        grow_(net, "2x", X, optimizer=optimizer)
    train(net, optimizer)
    again = Network(layers)
    mean, own = copy.deepcopy(again), torch.optim.AdamW(again.parameters())
    assert regrow_(again, state_dict(net), optimizer=own, averages=[mean]) is again
    again.load_state_dict(net.state_dict())
    mean.load_state_dict(net.state_dict())
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.config.num_layers == mean.config.num_layers == 4
    train(net, optimizer)
    train(again, own)
    assert all(map(torch.equal, net.parameters(), again.parameters()))


def test_a_network_that_does_not_fit_stays_as_deep_as_it_is():
    net = Network(2)
    deepen_(net, {"blocks": "+2"}, X)
    other = Network(4)
    other.head = nn.Linear(8, 5)
    optimizer, held = torch.optim.SGD(other.parameters()), list(other.parameters())
    with pytest.raises(PlanError, match="record is of another network"):
        regrow_(other, state_dict(net), optimizer=optimizer)
    assert (len(other.blocks), other.config.num_layers) == (4, 4)
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, held)]
    assert [*map(id, other.parameters())] == [*map(id, held)]


def test_blocks_that_no_growth_brings_stay():
    net = Network(2)
    grow_(net, "2x", X)
    with pytest.raises(PlanError, match="record is of another network"):
        regrow_(Network(3), state_dict(net))


@pytest.mark.parametrize("layers", [2, 3])  # as at first, and as at last
def test_a_list_in_a_network_that_is_a_list_resumes(layers):
    def build(count: int) -> nn.Sequential:
        blocks = nn.Sequential(*(Block() for _ in range(count)))
        return nn.Sequential(nn.Linear(4, 8), blocks, nn.ReLU(), nn.Linear(8, 2))

    net, again = build(2), build(layers)
    deepen_(net, {"1": "+1"}, X)
    mean = copy.deepcopy(again)
    regrow_(again, state_dict(net), averages=mean).load_state_dict(net.state_dict())
    assert torch.equal(again(X), net(X))
    assert {name: x.shape for name, x in mean.state_dict().items()} == {
        name: x.shape for name, x in net.state_dict().items()
    }


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("spec", ["", "1"])
def test_a_network_that_is_a_list_of_blocks_resumes(layers, spec):
    net = nn.Sequential(*(Block() for _ in range(2)))
    again = nn.Sequential(*(Block() for _ in range(layers)))
    x = torch.randn(5, 8)
    deepen_(net, {spec: "+1"}, x)
    regrow_(again, state_dict(net)).load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x))
