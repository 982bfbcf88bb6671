"""Tensors that a forward makes in a precision of its own, in networks judged in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.modules.expectation import Expectation
from fxgrow.verification.constants import exact_constants
from fxgrow.verification.exact import Exact
from fxgrow.verification.weights import own


class Net(nn.Module):
    """Two layers, the first of which is joined by what is made of eight numbers of its own."""

    def __init__(self, make: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.t, self.o = nn.Linear(5, 12), nn.Linear(8, 12), nn.Linear(12, 4)
        self.own = torch.randn(8)  # neither a parameter nor a buffer
        self.make = make

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        return self.o(F.silu(self.e(x) + self.t(self.make(self, x, steps))))


def sinusoids(angles: Tensor) -> Tensor:
    return torch.cat([angles.sin(), angles.cos()], 1)


FORMS: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "int × exp(int)": lambda net, x, t: sinusoids(t[:, None] * torch.exp(-torch.arange(4) * 2.3)),
    "float() × exp": lambda net, x, t: sinusoids(
        t[:, None].float() * torch.exp(-math.log(1e4) * torch.arange(0, 4).float() / 4)
    ),
    "true division": lambda net, x, t: (t / 100)[:, None] * torch.arange(1, 9),
    "sin of ints": lambda net, x, t: torch.sin(t)[:, None].expand(-1, 8),
    "mean of ints": lambda net, x, t: (t - t.float().mean())[:, None].expand(-1, 8) / t.max(),
    "power": lambda net, x, t: sinusoids(t[:, None] * 10000 ** (-torch.arange(4) / 4)),
    "linspace": lambda net, x, t: torch.linspace(0, 1, 8).expand(len(x), 8),
    "zeros": lambda net, x, t: torch.zeros(len(x), 8) + x[:, :1],
    "tensor": lambda net, x, t: torch.tensor([0.1, 2, 3, 4, 5, 6, 7, 8]).expand(len(x), 8),
    "default dtype": lambda net, x, t: torch.full(
        (len(x), 8), 0.1, dtype=torch.get_default_dtype()
    ),
    "one_hot": lambda net, x, t: F.one_hot(t % 8, 8).float(),
    "from_numpy": lambda net, x, t: torch.from_numpy(np.arange(8, dtype="f4")).expand(len(x), 8),
    "an attribute": lambda net, x, t: sinusoids(t[:, None] * net.own[:4]),
    "a product": lambda net, x, t: torch.eye(8)[t % 8] @ torch.randn(8, 8),
    "where": lambda net, x, t: torch.where(t[:, None] > 3, 0.1, 0.7).expand(-1, 8),
    "randn": lambda net, x, t: torch.randn(len(x), 8),
}
INPUTS = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 7, 90]))


@pytest.mark.parametrize("name", FORMS)
def test_what_a_forward_makes_in_its_own_precision_meets_a_network_in_float64(name: str) -> None:
    net = Net(FORMS[name]).eval()
    grown = fxgrow.widen(net, "2x", INPUTS, where="all")
    found = grown.report.verification
    assert (found.verdict, found.eval.float64.max_rel < 1e-12) == ("preserved", True)
    assert grown.model.e.weight.shape == (24, 5)
    outputs = []
    for model in (net, grown.model):
        torch.manual_seed(0)
        outputs.append(copy.deepcopy(model)(*INPUTS))
    assert torch.allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_all_that_is_made_of_it_is_in_float64(name: str) -> None:
    net = Net(FORMS[name]).double()
    run = Expectation(exact=True)
    with torch.no_grad(), run:
        found = net.make(net, INPUTS[0].double(), INPUTS[1]) @ torch.ones(8, 1)
    assert found.dtype is torch.float64
    assert run.casts


def test_what_is_written_into_stays_where_it_is() -> None:
    x, made = torch.zeros(4, dtype=torch.float64), torch.zeros(4)  # made before, in float32
    with Expectation(exact=True):
        made[1:] = x[1:] + 1
        made.add_(torch.ones(4))
        found = made + x
    assert made.tolist() == [1.0, 2.0, 2.0, 2.0]
    assert found.dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_and_truth_values_stay_what_they_are(dtype: torch.dtype) -> None:
    with Expectation(exact=True):
        found: Any = torch.zeros(3, dtype=dtype).clone()
        assert (found.dtype, torch.arange(3).dtype) == (dtype, torch.int64)
        assert torch.randperm(3).dtype is torch.int64


class Kept(nn.Module):
    """A layer that keeps a bank of what it gave, or a state, in an attribute."""

    def __init__(self, *, bank: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.o = nn.Linear(5, 12), nn.Linear(12, 4)
        self.kept = torch.zeros(5, 4) if bank else None
        self.bank = bank

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(torch.relu(self.e(x)))
        if self.bank:
            self.kept[torch.arange(2)] = y[:2].detach()
            return y + self.kept.mean()
        before = self.__dict__.get("state", 0.0)
        self.state = 0.5 * before + y.detach()
        return self.state + y


@pytest.mark.parametrize("bank", [True, False])
def test_what_a_forward_keeps_in_attributes_begins_anew_in_each_run(bank: bool) -> None:
    net = Kept(bank=bank).eval()
    grown = fxgrow.widen(net, "2x", INPUTS[0])
    assert grown.report.verification.verdict == "preserved"
    exact = Exact(net, own(net))
    found = []
    for _ in range(2):
        exact.reset()
        with torch.no_grad(), Expectation(exact=True):
            found.append(exact.module(INPUTS[0].double()))
    assert torch.equal(*found)
    assert net.__dict__.get("state") is None
    assert not bank or not bool(net.kept.any())


class _Timed(nn.Module):
    """Angles computed in torch's default dtype, beside a width that a graph has to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Linear(8, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(-2.3 * torch.arange(4) / 4)
        h = self.first(x) + self.embed(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
        return self.last(h.relu().reshape(-1, 2, 3).reshape(-1, 6))


def test_what_a_graph_froze_in_float32_is_judged_as_the_code_computes_it():
    net, inputs = _Timed().eval(), (torch.randn(4, 5), torch.arange(4) * 251)
    with pytest.warns(fxgrow.FxgrowWarning, match="GraphModule"):
        grown = fxgrow.widen(net, "2x", inputs, where="all")
    assert isinstance(grown.model, torch.fx.GraphModule)
    assert grown.report.verification.verdict == "preserved"
    assert grown.report.verification.eval.float64.max_rel < 1e-13
    (name,) = exact_constants(net, grown.model)
    frozen = getattr(grown.model, name)
    assert frozen.dtype == torch.float32
    frozen[1] *= 1 + 1e-5  # no rounding
    assert not exact_constants(net, grown.model)
    assert fxgrow.verify(net, grown.model, inputs).verdict == "failed"
