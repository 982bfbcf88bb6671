"""Channels with several rows of one axis: each row continues the one that takes the same way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_layers import Calls, check_preserved, data, made
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.channels.channels import resolve
from fxgrow.labels.space import LabelSpace


def test_what_brings_rows_of_an_axis_together_joins_no_rows() -> None:
    space = LabelSpace()
    one, bias, other = (space.axis(name, 0, 4) for name in ("one", "bias", "other"))
    space.unify(one, bias)
    space.unify(one[:2], one[2:])  # a gate
    space.unify(other, one[[1, 0, 3, 2]])
    space.unify(other, bias)  # says that 0 is 1, which would join rows
    alone = space.axis("alone", 0, 3)
    space.unify(alone, space.axis("its bias", 0, 3))
    rows = resolve(space).rows.of_label
    assert rows[one.numpy()].tolist() == rows[bias.numpy()].tolist() == one.tolist()
    assert rows[other.numpy()].tolist() == one[[1, 0, 3, 2]].tolist()
    assert rows[alone.numpy() + 3].tolist() == rows[alone.numpy()].tolist() == alone.tolist()


def test_what_repeats_rows_makes_more_of_them() -> None:
    space = LabelSpace()
    columns = space.axis("flattened", 1, 6)
    one = space.axis("one", 0, 2)
    space.unify(one[:, None].expand(2, 3).contiguous(), columns)
    channels = resolve(space)
    assert channels.rows.of_label[columns.numpy()].tolist() == columns.tolist()
    ((left, right, _),) = channels.rows.constraints
    pairs = zip(one.repeat_interleave(3).tolist(), columns.tolist(), strict=True)
    assert sorted(zip(left.tolist(), right.tolist(), strict=True)) == sorted(pairs)
    assert channels.of_axis(0).tolist() == [0, 0, 0, 1, 1, 1]
    assert len(np.unique(channels.ranks(np.zeros(100, dtype=np.uint64))[:6])) == 3


class Shortcut(nn.Module):
    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alike": torch.mul,  # either half may be first
    "unlike": lambda first, second: first * torch.tanh(second),
}


@pytest.mark.parametrize("width", ["1.5x", "2x", "3x"])
@pytest.mark.parametrize("gate", GATES)
def test_a_shuffle_before_a_gate(width: str, gate: str) -> None:
    """Which half of the gate a row is in decides for all that is added to it, too."""
    halve = Calls(lambda x: GATES[gate](*x.chunk(2, 1)))
    branch = (nn.ChannelShuffle(2), halve, nn.Conv2d(2, 4, 1))
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Shortcut(*branch), nn.Conv2d(4, 2, 1)))
    check_preserved(net, data(2, 3, 5, 5), width, where="all")


class Branches(nn.Module):
    """The same channels, treated in several ways, side by side, shuffled, and read."""

    def __init__(self, treat: str, shuffles: tuple[int, ...], reader: nn.Module) -> None:
        super().__init__()
        self.into, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.residual, self.depthwise = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=4)
        self.treat, self.shuffles, self.reader = treat, shuffles, reader
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        treated = {
            "norm": self.norm,
            "tanh": torch.tanh,
            "sum": lambda x: x + self.residual(x),
            "sum from the right": lambda x: self.residual(x) + x,
            "depthwise": self.depthwise,
            "same": lambda x: x,
        }
        x = torch.cat([treated[name](x) for name in self.treat.split(", ")], 1)
        for groups in self.shuffles:
            x = F.channel_shuffle(x, groups)
        return self.reader(x).mean((2, 3))


READERS = {
    "a convolution": lambda n: nn.Conv2d(n, 2, 1),
    "a grouped one": lambda n: nn.Conv2d(n, 2, 1, groups=2),
    "a flattened map": lambda n: nn.Sequential(
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * n, 4), nn.Unflatten(1, (4, 1, 1))
    ),
    "a depthwise one": lambda n: nn.Sequential(nn.Conv2d(n, n, 1, groups=n), nn.Conv2d(n, 2, 1)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize(
    "treat", ["norm, tanh, sum", "sum from the right, tanh, same", "depthwise, same, same"]
)
def test_branches_of_the_same_channels_are_told_apart_behind_a_shuffle(
    treat: str, groups: int, reader: str
) -> None:
    net = made(lambda: Branches(treat, (groups,), READERS[reader](12)))
    check_preserved(net, data(2, 3, 6, 6), "+4", where="all")


def test_a_channel_whose_rows_part_otherwise_is_refused() -> None:
    """What one convolution group read of a channel would be read by another one at this width."""

    def build() -> nn.Module:
        net = Branches("same, norm", (4, 2), READERS["a grouped one"](12))
        net.into, net.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        return net

    with pytest.raises(fxgrow.PlanError, match="would have no place"):
        fxgrow.widen(made(build), "2x", data(2, 3, 6, 6), where="all", include=["into"])


def test_a_norm_that_wants_copies_refuses_channels_that_are_copies_of_none() -> None:
    """Two channels are shuffled in place; of four, the shuffle adds the inner two to each other."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + y + F.channel_shuffle(y, 2)

    net = made(lambda: nn.Sequential(nn.Conv2d(3, 2, 3), Inner(), nn.Conv2d(2, 2, 1)))
    with pytest.raises(fxgrow.PlanError, match="copies of none"):
        fxgrow.widen(net, "2x", data(2, 3, 5, 5), where="all")


def test_channels_that_are_not_as_many_as_a_layer_reads_are_refused() -> None:
    """A transposed convolution takes any number of them on meta tensors."""
    space = LabelSpace()
    with pytest.raises(ValueError, match="4 channels meet 2"):
        space.unify(space.axis("one", 0, 4), space.axis("other", 0, 2))

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, 1)
            return x + torch.cat([first, torch.relu(second)], 1)

    layers = (
        nn.Conv2d(3, 2, 3),
        Half(),
        nn.ConvTranspose2d(2, 2, 3),
        Calls(lambda x: x.mean((2, 3))),
    )
    net = made(lambda: nn.Sequential(*layers, nn.Linear(2, 3)))
    groups = fxgrow.inspect(net, data(2, 3, 5, 5)).to_dict()["groups"]
    assert next(group["kind"] for group in groups if group["name"] == "0") == "pinned"


def test_a_width_of_one_behind_a_gate_is_refused() -> None:
    """It has no label, because it could be broadcast."""
    gate, up = Calls(lambda x: torch.mul(*x.chunk(2, 1))), nn.ConvTranspose2d(1, 2, 3)
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 2, 3), gate, up, nn.Conv2d(2, 2, 1)))
    (refusal,) = fxgrow.widen(net, "2x", data(2, 3, 5, 5)).plan.refused
    assert refusal.name == "0"


def test_sizes_in_code_are_told_and_not_the_guesses_at_where_they_come_from() -> None:
    """The one in the slice could be the convolution's number of groups, and is not."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Conv2d(3, 2, 3), nn.ConvTranspose2d(2, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.into(x)
            return self.out(x + torch.cat([x[:, :1], torch.relu(x[:, 1:2])], 1))

    with pytest.raises(fxgrow.PlanError, match="of fixed width"):
        fxgrow.widen(made(First), "2x", data(2, 3, 5, 5))
