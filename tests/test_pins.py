"""Each kind of pin: a network it occurs in, a sentence that is whole, and what would be needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.channels.analysis import analyse
from fxgrow.labels.pins import Pin, PinKind
from fxgrow.labels.trace import trace


class Net(nn.Module):
    """Two layers of eight channels, in heads of four, and what is asked about."""

    def __init__(self, between: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(5, 8)
        self.table = nn.Parameter(torch.randn(8, 8))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, self.first(x), self.second(x))


def heads(x: Tensor) -> Tensor:
    """``(N, 2 · 4)`` as ``(2, N, 4)``."""
    return x.view(-1, 2, 4).transpose(0, 1)


def outer(x: Tensor, y: Tensor) -> Tensor:
    """``(N, 8)`` and ``(N, 8)`` as ``(N, 8, 8)``, with channels along two dims."""
    return x[:, :, None] * y[:, None, :]


def written(x: Tensor, y: Tensor) -> Tensor:
    table = outer(x, y)
    table[:, 0] = y
    return table


def slope(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        given = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(F.linear(given, net.table).sin().sum(), given)
    return found


NETS: dict[PinKind, Callable[[Net, Tensor, Tensor], Tensor]] = {
    PinKind.OUTPUT: lambda net, x, y: x + y,
    PinKind.NO_RULE: lambda net, x, y: x.view(torch.int32).to(x.dtype),
    PinKind.TIED: lambda net, x, y: F.linear(x, net.table) @ net.table,
    PinKind.BOTH_SIDES: lambda net, x, y: F.conv1d(
        x.sum(1, keepdim=True)[..., None].expand(3, 2, 1), net.table[0].view(4, 2, 1)
    ),
    PinKind.BACKWARD: lambda net, x, y: slope(net, x),
    PinKind.BROADCAST: lambda net, x, y: x + y[:, :1],
    PinKind.FIXED: lambda net, x, y: x + torch.arange(8),
    PinKind.CONSTANTS: lambda net, x, y: torch.cat([x[:, :4], torch.arange(4).expand(3, 4)], 1) + y,
    PinKind.ONE_HEAD: lambda net, x, y: (heads(x) + heads(x).flip(0)) @ heads(y).mT,
    PinKind.EVERY_HEAD: lambda net, x, y: heads(x) @ y[:, :4].t().expand(2, 4, 3),
    PinKind.ACTIVATIONS: lambda net, x, y: x @ y.t(),
    PinKind.PARAMETERS: lambda net, x, y: x + (net.table @ net.second.weight).sum(1),
    PinKind.CURVED: lambda net, x, y: F.linear(x, net.table.square()),
    PinKind.NOISE: lambda net, x, y: x + torch.randn_like(x),
    PinKind.MIXED: lambda net, x, y: x.softmax(1),
    PinKind.POSITIONS: lambda net, x, y: F.avg_pool1d(x, 2),
    PinKind.LOOKED_UP: lambda net, x, y: x[:, [1, 0, 2]],
    PinKind.LAYOUT: lambda net, x, y: x.contiguous().as_strided((8, 3), (1, 8)),
    PinKind.OVERWRITTEN: lambda net, x, y: written(x, y),
    PinKind.ONE_DIM: lambda net, x, y: outer(x, y).flatten(1),
    PinKind.EMPTY: lambda net, x, y: torch.cat([x, (y[:0] @ net.table)]),
    PinKind.LAYER_NORM: lambda net, x, y: F.layer_norm(x, (3, 8)),
    PinKind.GROUP_NORM: lambda net, x, y: F.group_norm(x, 2),
    PinKind.KERNEL: lambda net, x, y: F.conv1d(torch.ones(1, 8, 4), x[..., None]),
    PinKind.GROUPED: lambda net, x, y: F.conv_transpose1d(
        x[..., None], net.table[..., None], groups=2
    ),
}


# Others are of a whole, of which a part is followed, of parametrizations (test_weight_norm.py), or
# of layers of at most one channel (test_single_channels.py).
ELSEWHERE = (PinKind.OUTSIDE, PinKind.COMPUTED, PinKind.SINGLE, PinKind.NOT_RUN)
ANYWHERE = [kind for kind in PinKind if kind not in ELSEWHERE]


@pytest.mark.parametrize("kind", ANYWHERE, ids=lambda kind: kind.name)
def test_every_kind_of_pin_has_a_network_and_is_told_whole(kind: PinKind) -> None:
    found = fxgrow.inspect(Net(NETS[kind]), torch.randn(3, 5))
    (part,) = found.parts
    pins = [pin for _, pin in part.channels.pinned if pin.kind is kind]
    assert pins
    for pin in pins:
        assert "{" not in str(pin)
        assert pin.remedy
        assert bool(pin.place) is (kind not in (PinKind.OUTPUT, PinKind.TIED))
        assert str(pin).endswith(f"({pin.place})" if pin.place else pin.kind.sentence[-6:])
    for group, told in zip(part.groups, found.to_dict()["groups"], strict=True):
        pinned = group.pin is not None
        assert told["reason"] == (str(group.pin) if pinned else "")
        assert told["needed"] == (group.pin.remedy if pinned else "")


def test_a_parameter_that_others_use_is_pinned_where_only_a_part_is_followed() -> None:
    net = nn.ModuleDict({"part": nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 2))})
    net["other"] = nn.Linear(5, 8)
    net["other"].weight = net["part"][0].weight
    group = analyse(trace(net, torch.randn(3, 5), "part")).groups[0]
    assert group.pin == Pin(PinKind.OUTSIDE, details=("other.weight", "part"))
    assert str(group.pin) == "other.weight is the same tensor, outside of part"


def test_a_pin_without_what_fills_its_sentence_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 1 details, not 0"):
        Pin(PinKind.MIXED, "aten.cumsum at 0")


def test_memory_that_is_read_as_another_dtype_is_pinned() -> None:
    class Bits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            bits = self.first(x).view(torch.int32).bitwise_and(-65536)
            return self.last(bits.view(torch.float32))

    with pytest.raises(fxgrow.FxgrowError, match=r"first: no rule for aten\.view\.dtype"):
        fxgrow.widen(Bits(), "2x", torch.randn(2, 6))


def test_of_two_sides_of_a_grouped_convolution_the_one_that_does_not_divide_is_told() -> None:
    net = nn.Sequential(nn.Conv1d(1, 8, 3), nn.Conv1d(8, 12, 3, groups=4), nn.Conv1d(12, 1, 3))
    grown = fxgrow.widen(net, "1.5x", torch.randn(2, 1, 16))
    assert [group["name"] for group in grown.report.to_dict()["groups"]] == ["0"]
    with pytest.raises(
        fxgrow.PlanError, match=r"^1 cannot be widened: width 18 .* possible: 16 or 20"
    ):
        fxgrow.widen(net, {"1": "1.5x"}, torch.randn(2, 1, 16))


def test_channels_go_on_through_conjugates() -> None:
    def product(net: Net, x: Tensor, y: Tensor) -> Tensor:
        numbers = torch.fft.rfft(x, dim=0) * torch.conj(torch.fft.rfft(y, dim=0))
        return F.linear(torch.fft.irfft(numbers, n=len(x), dim=0), net.table)[:, :2]

    net = Net(product).double()
    grown = fxgrow.widen(net, "2x", torch.randn(4, 5, dtype=torch.float64))
    assert grown.model.first.out_features == 16
    assert grown.report.verification.verdict == "preserved"


def test_a_network_that_takes_other_tensors_at_other_sizes_tells_which() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)
            self.wide, self.slim = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).relu()
            return self.last(hidden) + (self.wide if hidden.shape[1] > 8 else self.slim)

    with pytest.raises(fxgrow.PlanError, match="takes wide at the new sizes, where it takes slim"):
        fxgrow.widen(Chosen(), "2x", torch.randn(3, 5))
