"""A growth that fails at any point leaves all as it was, and rates belong to names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow.training.in_place as in_place
from fxgrow.errors import FxgrowError
from fxgrow.training import grow_, regrow_, state_dict

COPIES: dict[str, Any] = {"pairing": "replicate", "split_noise": 0.0}


def build() -> nn.Sequential:
    """Return a network, always with the same weights."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> Tensor:
    """Return the output after some steps."""
    torch.manual_seed(2)
    x = torch.randn(16, 4, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - x[:, :2]).square().mean().backward()
        optimizer.step()
    return net(x).detach()


@pytest.mark.parametrize(
    "what", ["adopt", "add_stage", "scale_states", "forget", "follow", "advice", "parts_of"]
)
def test_what_fails_late_changes_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network trains on as one that nobody tried to grow, and can grow afterwards."""
    net, other = build(), build()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    beside = torch.optim.Adam(other.parameters(), lr=0.1)
    trained(net, optimizer), trained(other, beside)
    mean, held = copy.deepcopy(net), list(net.parameters())

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(in_place, what, interrupt)
        with pytest.raises(KeyboardInterrupt):
            grow_(net, "2x", optimizer=optimizer, averages=mean, lr="width", **COPIES)
    assert all(one is two for one, two in zip(net.parameters(), held, strict=True))
    assert state_dict(net) == {"schema": 1, "stages": [], "warming": 0}
    assert mean[0].out_features == 8
    assert all(p.grad is not None for p in held)
    assert torch.equal(trained(net, optimizer), trained(other, beside))
    grow_(net, "2x", optimizer=optimizer, averages=mean, lr="width", **COPIES)
    assert torch.allclose(trained(net, optimizer), trained(other, beside), rtol=1e-9)


def test_a_second_growth_that_fails_keeps_the_rates_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are those of the parameters that it has again."""
    net, other = build(), build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    beside = torch.optim.SGD(other.parameters(), lr=0.1)
    grow_(net, "2x", optimizer=optimizer, lr="width", **COPIES)
    with monkeypatch.context() as patch:
        patch.setattr(in_place, "advice", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            grow_(net, "2x", optimizer=optimizer, lr="warm_up")
    assert torch.allclose(trained(net, optimizer), trained(other, beside), rtol=1e-9)


def test_a_record_whose_second_stage_is_wrong_changes_nothing() -> None:
    """Neither the network nor the optimizer has grown."""
    grown = build()
    grow_(grown, "2x"), grow_(grown, "2x")
    state = state_dict(grown)
    state["stages"][1] = dict(state["stages"][0])
    net = build()
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.raises(FxgrowError):
        regrow_(net, state, optimizer=optimizer)
    assert net[0].out_features == 8
    assert optimizer.param_groups[0]["params"] == list(net.parameters())
    assert state_dict(net)["stages"] == []


@pytest.mark.parametrize("rule", ["width", "variance_transfer", "warm_up"])
@pytest.mark.parametrize("where", ["whole", "layer", "copied"])
def test_loading_by_assignment_keeps_rates(rule: Any, where: str) -> None:
    """Parameters that loading puts into modules take steps as those did that they replace."""
    net = build()
    grow_(net, "2x", lr=rule, **(COPIES if rule == "width" else {"preset": "random"}))
    saved = copy.deepcopy(net.state_dict())
    again = regrow_(build(), state_dict(net))
    if where == "layer":
        again.load_state_dict(saved)
        again[2].load_state_dict({n: saved[f"2.{n}"] for n in ("weight", "bias")}, assign=True)
    else:
        again.load_state_dict(saved, assign=True)
    again = copy.deepcopy(again) if where == "copied" else again
    expected = trained(net, torch.optim.SGD(net.parameters(), lr=0.5))
    found = trained(again, torch.optim.SGD(again.parameters(), lr=0.5))
    assert torch.allclose(found, expected, rtol=1e-12)


def test_handles_of_hooks_go_on() -> None:
    """A hook that was registered before a growth is removed by its handle after it."""
    net, ran = build(), []
    weight = net[0].weight
    handles = [
        weight.register_hook(lambda grad: ran.append("gradient")),
        weight.register_post_accumulate_grad_hook(lambda one: ran.append(tuple(one.shape))),
    ]
    grow_(net, "2x")
    x = torch.ones(2, 4, dtype=torch.float64)
    net(x).sum().backward()
    assert ran == ["gradient", (16, 4)]
    for handle in handles:
        handle.remove()
    net(x).sum().backward()
    assert len(ran) == 2


def test_what_a_growth_returns_is_shown_in_a_line() -> None:
    """It holds plans and parts of thousands of lines."""
    assert len(repr(grow_(build(), "2x"))) < 120
