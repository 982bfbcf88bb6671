"""Old channels find their places among the new ones, or the width is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from networks import max_rel, small_images, torchvision_model
from torch import Tensor, nn
from torchvision.models import ShuffleNetV2

from fxgrow import widen
from fxgrow.channels.analysis import analyse
from fxgrow.channels.channels import Channels, resolve
from fxgrow.errors import PlanError
from fxgrow.grow.match.axis_edits import axis_edits
from fxgrow.grow.match.match import Matching, match
from fxgrow.grow.obstacle import Obstacle
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.trace import trace
from fxgrow.modules.uninitialised import build_uninitialised
from fxgrow.plan.pairing import v_zero


def two_readers(width: int, second: list[int]) -> Channels:
    """Return a writer of ``width`` channels; one layer reads all of them, another reads some."""
    space = LabelSpace()
    written = space.axis("write", 0, width)
    first = space.axis("first", 1, width)
    some = space.axis("second", 1, len(second))
    space.mark(written, "writer")
    space.mark(torch.cat([first, some]), "reader")
    space.unify(written, first)
    space.unify(written[second], some)
    return resolve(space)


def matched(old: Channels, new: Channels) -> Matching:
    """Return the matching of channels that all find a place."""
    found = match(old, new, v_zero, np.zeros(0, dtype=np.int64))
    assert isinstance(found, Matching)
    return found


def obstacle(old: Channels, new: Channels) -> Obstacle:
    """Return what is in the way of channels that do not."""
    found = match(old, new, v_zero, np.zeros(0, dtype=np.int64))
    assert isinstance(found, Obstacle)
    return found


def grown(old: Channels, new: Channels, tensor: str, weight: Tensor) -> Tensor:
    """Return a weight (rows or columns along dim 0) after its axis edit; new entries are 0."""
    matching = matched(old, new)
    (edit,) = axis_edits(old, new, matching)[tensor]
    positions: list[Tensor] = []
    for run in edit.runs:
        source = range(run.start, run.start + run.length)
        blank = torch.zeros_like(weight[0])
        positions += [weight[i] if run.kind == "old" else blank for i in source]
    return torch.stack(positions)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([2, 3], [1, 2, 3, 4]),  # one channel of {first} must take a place of {first, second}
        ([3], [0, 1, 2, 3, 4]),  # all of them
        ([0, 2], [4, 2, 1]),  # in another order
    ],
)
def test_channels_take_places_with_further_readers(before: list[int], after: list[int]) -> None:
    old, new = two_readers(4, before), two_readers(5, after)
    x = torch.randn(4, 7, dtype=torch.float64)
    first = torch.randn(4, 3, dtype=torch.float64)
    second = torch.randn(len(before), 3, dtype=torch.float64)
    y = grown(old, new, "write", x)
    assert y.shape == (5, 7)
    new_first, new_second = grown(old, new, "first", first), grown(old, new, "second", second)
    assert torch.allclose(new_first.T @ y, first.T @ x)
    assert torch.allclose(new_second.T @ y[after], second.T @ x[before])


def test_channels_keep_a_place_of_their_own_kind_where_there_is_one() -> None:
    old, new = two_readers(4, [2, 3]), two_readers(6, [2, 3, 4, 5])
    found = matched(old, new).old
    assert found.tolist() == [0, 1, 2, 3, -1, -1]


def test_a_channel_without_a_place_is_refused() -> None:
    old, new = two_readers(4, [1, 2, 3]), two_readers(6, [4, 5])
    text = "channels of write would have no place .*: 1 too few lead to first and second"
    found = obstacle(old, new)
    assert re.search(text, found.reason)
    assert found.name == "write"


def test_groups_that_do_not_fit_are_told_before_and_then() -> None:
    def grouped(groups: int) -> Channels:
        layers = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, groups=groups), nn.Conv2d(12, 3, 1)
        return analyse(trace(nn.Sequential(*layers))).channels

    assert "lead to 1 (1 has 6 groups, and 2 then)" in obstacle(grouped(6), grouped(2)).reason


def shuffler(*widths: int) -> Channels:
    """Return the channels of a ShuffleNetV2 with these output widths of its stages."""
    model = build_uninitialised(lambda: ShuffleNetV2([4, 8, 4], [*widths]), "meta")
    return analyse(trace(model)).channels


def rows(channels: Channels, tensor: str, dim: int) -> set[int]:
    """Return the channels of one axis."""
    (index,) = (i for i, a in enumerate(channels.axes) if (a.tensor, a.dim) == (tensor, dim))
    return set(channels.of_axis(index).tolist())


def test_a_shuffle_that_leads_channels_elsewhere_is_refused() -> None:
    # Channel i starts at position 2i + 1 and doubles it at each shuffle until it is in the upper
    # half, which is read: one of 48 is read seven blocks on, but none of 96.
    old, new = shuffler(24, 48, 96, 192, 1024), shuffler(48, 96, 192, 384, 2048)
    writer, reader = ("stage3.0.branch2.5.weight", 0), ("stage3.7.branch2.0.weight", 1)
    assert len(rows(old, *writer) & rows(old, *reader)) == 1
    assert not rows(new, *writer) & rows(new, *reader)
    text = "stage3.0.branch2.5 would have no place .* 1 too few lead to stage3.7.branch2.0"
    found = obstacle(old, new)
    assert re.search(text, found.reason)
    assert found.name == "stage3.0.branch2.5"


@pytest.mark.parametrize(
    "wider",
    [
        (24, 116, 232, 464, 1024),  # the sizes of x1_0
        (72, 144, 288, 576, 3072),
        (24, 100, 194, 386, 1026),  # 97 in the half of the middle stage: one more than is refused
    ],
)
def test_every_channel_of_a_shuffler_finds_one_place(wider: tuple[int, ...]) -> None:
    old, new = shuffler(24, 48, 96, 192, 1024), shuffler(*wider)
    found = matched(old, new).old
    assert np.array_equal(np.sort(found[found >= 0]), np.arange(old.count))


@pytest.mark.parametrize("train", [False, True])
def test_a_wider_shuffler_computes_the_same(train: bool) -> None:
    model, x = torchvision_model("shufflenet_v2_x0_5", num_classes=5), small_images()
    grown = widen(model, "3x", x, verify=False).model
    model.train(train), grown.train(train)
    with torch.no_grad():
        assert max_rel(model(x), grown(x)) < 1e-10


def test_a_network_that_computes_with_other_tensors_is_refused() -> None:
    assert "without first and 2 more" in obstacle(two_readers(4, [0]), resolve(LabelSpace())).reason


@pytest.mark.parametrize("groups", [2, 3])
def test_new_groups_behind_shuffles_that_order_each_group_anew_are_refused(groups: int) -> None:
    shuffles = (nn.ChannelShuffle(groups), nn.ChannelShuffle(groups))
    grouped = nn.Conv2d(6, 4, 1, groups=2)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), *shuffles, grouped, nn.Conv2d(4, 2, 1))
    with pytest.raises(PlanError):
        widen(net, "2x", torch.randn(2, 3, 5, 5), grouped="count")
