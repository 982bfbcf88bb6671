"""First states of zeros in plain attributes: they grow with the channels that they meet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow import training
from fxgrow.modules.tensors import states_of
from fxgrow.verification.exact import Exact
from fxgrow.verification.weights import own

HIDDEN, BATCH = 8, 3


class Stateful(nn.Module):
    """A recurrent layer whose first state is kept in an attribute, or in a container there."""

    def __init__(self, kind: type[nn.Module], keep: Callable[[], Any], *, goes_on: bool) -> None:
        super().__init__()
        self.layer, self.head = kind(5, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 4)
        self.state, self.goes_on = keep(), goes_on

    def forward(self, x: Tensor) -> Tensor:
        state = [*self.state.values()] if isinstance(self.state, dict) else self.state
        if isinstance(state, Tensor):
            first = state.to(x.device).detach().expand(1, len(x), -1).contiguous()
            out, last = self.layer(x, first)
        else:
            out, last = self.layer(x, tuple(s.detach() for s in state))
        if self.goes_on and isinstance(self.state, list):
            self.state[0], self.state[1] = last[0].detach(), last[1].detach()
        elif self.goes_on and isinstance(self.state, dict):
            self.state["h"], self.state["c"] = last
        elif self.goes_on:
            self.state = last
        return self.head(out[:, -1])


def zeros() -> Tensor:
    return torch.zeros(1, BATCH, HIDDEN)


KEPT: dict[str, tuple[type[nn.Module], Callable[[], Any]]] = {
    "GRU, a tensor": (nn.GRU, zeros),
    "GRU, one row": (nn.GRU, lambda: torch.zeros(1, 1, HIDDEN)),
    "RNN, a tensor": (nn.RNN, zeros),
    "LSTM, a tuple": (nn.LSTM, lambda: (zeros(), zeros())),
    "LSTM, a list": (nn.LSTM, lambda: [zeros(), zeros()]),
    "LSTM, a dict": (nn.LSTM, lambda: {"h": zeros(), "c": zeros()}),
}


class Convolved(nn.Module):
    """A ConvLSTM that overwrites its state at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.head = nn.Conv2d(3 + 6, 24, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.h, self.c = torch.zeros(2, 6, 5, 5), torch.zeros(2, 6, 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        for step in x.unbind(1):
            i, f, o, g = self.gates(torch.cat([step, self.h], 1)).chunk(4, 1)
            self.c = f.sigmoid() * self.c + i.sigmoid() * g.tanh()
            self.h = o.sigmoid() * self.c.tanh()
        return self.head(self.h)


class Cell(nn.Module):
    """A cell whose state is expanded to the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(5, HIDDEN), nn.Linear(HIDDEN, 4)
        self.h0 = torch.zeros(1, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.h0.expand(len(x), -1)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


def network(name: str, *, goes_on: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if name in KEPT:
        return Stateful(*KEPT[name], goes_on=goes_on).eval()
    return {"ConvLSTM": Convolved, "GRUCell": Cell}[name]().eval()


def data(name: str) -> Tensor:
    return torch.randn(2, 3, 3, 5, 5) if name == "ConvLSTM" else torch.randn(BATCH, 4, 5)


@pytest.mark.parametrize("name", [*KEPT, "ConvLSTM", "GRUCell"])
@pytest.mark.parametrize("width", ["2x", "1.5x"])
def test_a_state_in_an_attribute_grows_with_what_it_meets(name: str, width: str) -> None:
    net, x = network(name, goes_on="one row" not in name), data(name)
    grown = fxgrow.widen(net, width, x, where="all")
    verification = grown.report.verification
    assert verification is not None
    assert verification.verdict == "preserved"
    before, after = states_of(net), states_of(grown.model)
    assert before.keys() == after.keys()
    for state in before:
        assert after[state].ndim == before[state].ndim
        assert after[state].numel() > before[state].numel()
        assert not after[state].any()
    again = fxgrow.Plan.from_json(grown.plan.to_json()).apply(net)
    with torch.no_grad():
        for _ in range(3):  # a state that goes on is another one each time
            want = net(x)
            torch.testing.assert_close(grown.model(x), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(again(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["LSTM, a list", "LSTM, a dict", "GRU, a tensor", "ConvLSTM"])
def test_a_state_that_a_forward_left_is_told_by_name(name: str) -> None:
    net, x = network(name), data(name)
    plan = fxgrow.widen(net, "2x", x, where="all").plan
    net(x)
    state = "c" if name == "ConvLSTM" else "state"
    with pytest.raises(fxgrow.PlanError, match=f"{state}, a tensor of fixed width.*to zeros"):
        fxgrow.widen(net, "2x", x, where="all")
    with pytest.raises(fxgrow.PlanError, match=f"{state}.* holds what a forward left.*Reset"):
        plan.apply(net)


def test_zeros_that_no_channels_meet_are_no_part_of_a_plan() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)
            self.mean = torch.zeros(4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.b(self.a(x).relu())
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
            return out - self.mean

    net, x = Centred(), torch.randn(3, 5)
    plan = fxgrow.widen(net, "2x", x).plan
    assert "mean" not in plan.source
    net(x)
    assert plan.apply(net).a.out_features == 16


def test_a_forward_changes_no_list_of_states_of_the_network_that_grows() -> None:
    net = network("LSTM, a list")
    first = [*net.state]
    fxgrow.widen(net, "2x", data("LSTM, a list"), where="all")
    assert all(x is y for x, y in zip(net.state, first, strict=True))
    assert not any(x.any() for x in first)


def test_runs_in_float64_begin_with_the_first_state_in_a_container() -> None:
    net = network("LSTM, a list")
    exact, x = Exact(net, own(net)), data("LSTM, a list").double()
    with torch.no_grad():
        first = exact.module(x)
        assert not torch.equal(exact.module(x), first)
        exact.reset()
        assert torch.equal(exact.module(x), first)


def test_a_module_with_a_state_goes_through_a_file(tmp_path: Path) -> None:
    net, x = network("LSTM, a list"), data("LSTM, a list")
    net.state = [zeros(), zeros()]
    torch.save(net, tmp_path / "net.pt")
    opened = fxgrow.open_model(tmp_path / "net.pt", trust_pickle=True)
    grown = fxgrow.widen(opened.model, "2x", x, where="all")
    fxgrow.write_grown(opened, grown, tmp_path / "wide.pt")
    wide = fxgrow.load(tmp_path / "wide.pt", trust_pickle=True)
    assert [tuple(state.shape) for state in wide.state] == [(1, BATCH, 2 * HIDDEN)] * 2
    torch.testing.assert_close(wide(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["LSTM, a list", "ConvLSTM", "GRUCell"])
def test_a_first_state_grows_in_place(name: str) -> None:
    net, x = network(name), data(name)
    want = fxgrow.widen(net, "2x", x, where="all")
    shapes = {state: tensor.shape for state, tensor in states_of(want.model).items()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    training.grow_(net, "2x", x, optimizer=optimizer, where="all")
    assert {state: tensor.shape for state, tensor in states_of(net).items()} == shapes
    net(x).sum().backward()


class Learned(nn.Module):
    """A recurrent network whose first state is a parameter, an input, or noise."""

    def __init__(self, cell: bool, given: str) -> None:
        super().__init__()
        self.cell, self.given = cell, given
        self.first = nn.Parameter(torch.randn(1, 6))
        self.rnn = nn.GRUCell(3, 6) if cell else nn.RNN(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        if self.given == "a parameter":
            state = torch.tanh(self.first).expand(x.shape[1], -1)
        elif self.given == "noise":
            state = torch.randn(x.shape[1], 6, dtype=x.dtype)
        if not self.cell:
            return self.head(self.rnn(x, state[None].contiguous())[0])
        for token in x:
            state = self.rnn(token, state)
        return self.head(state)


STATE_INPUTS = tuple(torch.randn(shape, dtype=torch.float64) for shape in ((4, 2, 3), (2, 6)))


@pytest.mark.parametrize("cell", [True, False])
def test_a_learned_first_state_grows_with_the_layer(cell: bool) -> None:
    net = Learned(cell, "a parameter").double()
    grown = fxgrow.widen(net, "2x", STATE_INPUTS, where="all")
    assert grown.model.first.shape == (1, 12)
    assert grown.report.verification.verdict == "preserved"


@pytest.mark.parametrize("cell", [True, False])
@pytest.mark.parametrize(
    ("given", "reason"), [("an input", "an input of the network"), ("noise", "noise")]
)
def test_a_first_state_of_fixed_width_says_where_it_comes_from(
    cell: bool, given: str, reason: str
) -> None:
    net = Learned(cell, given).double()
    with pytest.raises(fxgrow.PlanError, match=rf"rnn: [^;]*{reason}"):
        fxgrow.widen(net, "2x", STATE_INPUTS, where="all")


@pytest.mark.parametrize("how", ["sum", "mean", "max", "of a part"])
def test_a_first_state_that_is_reduced_is_as_wide_as_what_it_meets(how: str) -> None:
    class Node(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            children = x.new_zeros(3, 6)
            if how == "max":
                state = children.max(0, keepdim=True)[0]
            elif how == "of a part":
                state = children.view(3, 6, 1)[:2].sum((0, 2)).unsqueeze(0)
            else:
                state = getattr(children, how)(0, keepdim=True)
            for _ in range(2):
                state = torch.tanh(self.into(x) + self.hidden(state))
            return self.out(state)

    model, x = Node().double(), torch.randn(3, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxgrow.FxgrowWarning)  # 6 is a literal
        grown = fxgrow.widen(model, "2x", x, where="all")
    assert grown.model.hidden.weight.shape == (12, 12)
    torch.testing.assert_close(grown.model(x), model(x))
