"""``nn.MultiheadAttention`` with masks that its caller makes, grown with or without its stream."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow

Mix = Callable[[nn.MultiheadAttention, Tensor, Tensor], Tensor]


class Masked(nn.Module):
    """A residual block of attention between two linear layers."""

    def __init__(self, mix: Mix, **options: Any) -> None:
        super().__init__()
        self.mix, self.first = mix, nn.Linear(5, 8)
        self.att = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        y: Tensor = self.last(self.norm(hidden + self.mix(self.att, hidden, x)))
        return y


def later(h: Tensor) -> Tensor:
    return torch.ones(h.size(1), h.size(1), dtype=torch.bool).triu(1)


def padding(att: nn.MultiheadAttention, h: Tensor, x: Tensor) -> Tensor:
    mixed: Tensor = att(h, h, h, key_padding_mask=x[..., 0] > 1)[0]
    return mixed


def repeated(att: nn.MultiheadAttention, h: Tensor, x: Tensor) -> Tensor:
    mask = later(h).unsqueeze(0).repeat(h.size(0) * att.num_heads, 1, 1)
    mixed: Tensor = att(h, h, h, attn_mask=mask)[0]
    return mixed


def expanded(att: nn.MultiheadAttention, h: Tensor, x: Tensor) -> Tensor:
    mask = later(h).expand(h.size(0) * att.num_heads, -1, -1)
    mixed: Tensor = att(h, h, h, attn_mask=mask, key_padding_mask=x[..., 0] > 9)[0]
    return mixed


def for_each_sample(att: nn.MultiheadAttention, h: Tensor, x: Tensor) -> Tensor:
    mask = (x @ x.transpose(1, 2)).repeat_interleave(att.num_heads, 0)
    mixed: Tensor = att(h, h, h, attn_mask=mask)[0]
    return mixed


def from_inputs(att: nn.MultiheadAttention, h: Tensor, x: Tensor) -> Tensor:
    mixed: Tensor = att(h, x, x, key_padding_mask=x[..., 0] > 1)[0]
    return mixed


CALLS: dict[str, tuple[Mix, dict[str, Any]]] = {
    "padding": (padding, {}),
    "repeated for each head": (repeated, {}),
    "expanded for each head": (expanded, {}),
    "for each sample": (for_each_sample, {}),
    "dropout": (padding, {"dropout": 0.1}),
    "learned keys": (padding, {"add_bias_kv": True, "add_zero_attn": True}),
    "other keys": (from_inputs, {"kdim": 5, "vdim": 5, "bias": False}),
}


def net_and_inputs(name: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    mix, options = CALLS[name]
    shapes = ((2, 6, 5), (3, 4, 5))
    return Masked(mix, **options).double().eval(), [torch.randn(s).double() for s in shapes]


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")
@pytest.mark.parametrize("where", ["hidden", "all"])
@pytest.mark.parametrize("name", CALLS)
def test_heads_grow_whatever_their_mask(name: str, where: str) -> None:
    net, (x, other) = net_and_inputs(name)
    grown = fxgrow.widen(net, "1.5x", x, where=where)
    names = {"hidden": {"att"}, "all": {"att", "first"}}[where]
    assert {group.name for group in grown.plan.groups} == names
    for inputs in (x, other):
        assert max_rel(net(inputs), grown.model(inputs)) < 1e-12


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")
@pytest.mark.parametrize("name", ["repeated for each head", "dropout"])
def test_what_was_opened_is_pickled_copied_and_trained(name: str) -> None:
    net, (x, _) = net_and_inputs(name)
    grown = fxgrow.widen(net, "2x", x).model
    again = pickle.loads(pickle.dumps(grown))
    for other in (again, copy.deepcopy(grown)):
        assert torch.equal(other.eval()(x), grown.eval()(x))
    drops = not torch.equal(again.train()(x), again(x))
    assert drops == (name == "dropout")


def test_a_reason_names_what_stays_and_asks_for_nothing_that_is_given() -> None:
    def returned(att: nn.MultiheadAttention, h: Tensor, x: Tensor) -> Tensor:
        mixed, weights = att(h, h, h, average_attn_weights=False)
        return mixed + weights.cumsum(1).mean((1, 3))[..., None]

    net, x = Masked(returned), torch.randn(2, 6, 5)
    with pytest.raises(fxgrow.PlanError) as told:
        fxgrow.widen(net, "2x", x, where="all")
    assert "att cannot: cumsum over the channels mixes all of them" in str(told.value)
    assert 'where="all"' not in str(told.value)
