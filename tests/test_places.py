"""What is written at positions, packed, or parted by sizes in the code: grows, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxgrow

Forward = Callable[["Net", Tensor], Tensor]
ROWS = torch.tensor([0, 2])
EVERY = torch.tensor([0, 2, 1, 1])


class Net(nn.Module):
    """A hidden layer, another on some rows of it, and what a test does between."""

    def __init__(self, between: Forward) -> None:
        super().__init__()
        self.a, self.m, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(self.between(self, h) + self.m(h))


def _places(h: Tensor) -> Tensor:
    return EVERY[:, None].expand_as(h)


WRITTEN: dict[str, Forward] = {
    "index_copy": lambda net, h: h.index_copy(0, ROWS, net.m(h[ROWS])),
    "index_copy_": lambda net, h: torch.zeros_like(h).index_copy_(0, ROWS, net.m(h[ROWS])),
    "index_fill": lambda net, h: h.index_fill(0, ROWS, 0.0),
    "scatter": lambda net, h: torch.zeros_like(h).scatter(0, _places(h), net.m(h)),
    "scatter of a number": lambda net, h: h.scatter(0, _places(h)[:2], 0.0),
    "mean": lambda net, h: torch.zeros_like(h).scatter_reduce(0, _places(h), net.m(h), "mean"),
    "max": lambda net, h: torch.zeros_like(h).scatter_reduce(0, _places(h), net.m(h), "amax"),
    "index_reduce": lambda net, h: h.index_reduce(0, ROWS, net.m(h[ROWS]), "amin"),
    "masked_scatter": lambda net, h: h.masked_scatter((EVERY > 0)[:, None], net.m(h)),
    "take_along_dim": lambda net, h: torch.take_along_dim(h, _places(h), 0),
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_at_rows_keeps_its_channels(name: str) -> None:
    net, x = Net(WRITTEN[name]).double(), torch.randn(4, 6, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x, where="all")
    assert grown.model.a.out_features == 16
    assert grown.report.verification.verdict == "preserved"
    torch.testing.assert_close(grown.model(x), net(x), rtol=0, atol=1e-10)


def test_positions_of_their_own_for_each_channel_pin() -> None:
    def between(net: Net, h: Tensor) -> Tensor:
        return h.scatter(0, torch.arange(8)[None].expand(2, 8) % 4, 0.0)

    found = fxgrow.inspect(Net(between), torch.randn(4, 6))
    assert "looked up" in str(found)


class Packed(nn.Module):
    """Sequences of several lengths through a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase], back: str, **options: Any) -> None:
        super().__init__()
        self.e, self.r = nn.Linear(6, 8), kind(8, 8, batch_first=True, **options)
        self.o = nn.Linear(16 if self.r.bidirectional else 8, 3)
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([2, 5, 3])
        given = torch.relu(self.e(x))
        packed = pack_padded_sequence(given, lengths, batch_first=True, enforce_sorted=False)
        out, state = self.r(packed)
        if self.back == "state":
            return self.o((state[0] if isinstance(state, tuple) else state)[-1])
        filled = -1e4 if self.back == "filled" else 0.0
        return self.o(pad_packed_sequence(out, batch_first=True, padding_value=filled)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("back", ["padded", "filled", "state"])
def test_packed_sequences_pass_recurrent_layers(kind: type[nn.RNNBase], back: str) -> None:
    net, x = Packed(kind, back).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x, where="all")
    assert grown.report.verification.verdict == "preserved"
    assert grown.model.r.hidden_size == 16
    scale = 1e4 if back == "filled" else 1.0
    torch.testing.assert_close(grown.model(x), net(x), rtol=0, atol=1e-11 * scale)


def test_packed_sequences_pass_layers_of_two_directions() -> None:
    net = Packed(nn.LSTM, "padded", bidirectional=True, num_layers=2)
    grown = fxgrow.widen(net, "2x", torch.randn(3, 5, 6), where="all")
    assert grown.report.verification.verdict == "preserved"
    assert grown.model.r.hidden_size == 16


@pytest.mark.parametrize("other", [False, True])
def test_what_is_written_into_views_of_one_number_is_seen(other: bool) -> None:
    def between(net: Net, h: Tensor) -> Tensor:
        z = torch.full((4, 2, h.shape[1]), 0.5)
        z[:, 0] = h
        if other:
            z[:, 1] = net.m(h)
        return z.sum(1)

    grown = fxgrow.widen(Net(between), "2x", torch.randn(4, 6), where="all")
    assert grown.report.verification.verdict == "preserved"
    assert grown.model.a.out_features == 16


def _parted(treat: Callable[[Tensor, int], Tensor]) -> Forward:
    return lambda net, h: torch.cat([treat(c, i) for i, c in enumerate(h.split(4, 1))], 1)


def test_parts_with_numbers_of_their_own_stay_as_many() -> None:
    net, x = Net(_parted(lambda part, i: part * (i + 1))).double(), torch.randn(4, 6).double()
    with pytest.warns(fxgrow.FxgrowWarning, match="fixes sizes"):
        grown = fxgrow.widen(net, "2x", x, where="all")
    assert grown.report.verification.verdict == "preserved"
    torch.testing.assert_close(grown.model(x), net(x), rtol=0, atol=1e-10)


def test_parts_that_are_treated_alike_may_be_more() -> None:
    net = Net(_parted(lambda part, i: part.sigmoid() * part))
    grown = fxgrow.widen(net, "2x", torch.randn(4, 6), where="all")
    assert grown.report.verification.verdict == "preserved"


def test_means_of_parts_that_are_added_up_refuse_more_parts() -> None:
    def between(net: Net, h: Tensor) -> Tensor:
        return h + sum(part.mean(1, keepdim=True) * (i + 1) for i, part in enumerate(h.split(4, 1)))

    with pytest.raises(fxgrow.PlanError, match="cannot be widened") as caught:
        fxgrow.widen(Net(between), "2x", torch.randn(4, 6), where="all")
    assert "report this" not in str(caught.value)
