"""Old channels find their places among the new ones, or the width is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxgrow.channels import Channels, resolve
from fxgrow.errors import PlanError
from fxgrow.labels.space import LabelSpace
from fxgrow.pairing import v_zero
from fxgrow.plan.edits import axis_edits
from fxgrow.plan.match import match


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


def grown(old: Channels, new: Channels, tensor: str, weight: Tensor) -> Tensor:
    """Return a weight (rows or columns along dim 0) after its axis edit; new entries are 0."""
    matching = match(old, new, v_zero, np.zeros(0, dtype=np.int64))
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
    x = torch.randn(4, 7)
    first, second = torch.randn(4, 3), torch.randn(len(before), 3)
    y = grown(old, new, "write", x)
    assert y.shape == (5, 7)
    new_first, new_second = grown(old, new, "first", first), grown(old, new, "second", second)
    assert torch.allclose(new_first.T @ y, first.T @ x)
    assert torch.allclose(new_second.T @ y[after], second.T @ x[before])


def test_channels_keep_a_place_of_their_own_kind_where_there_is_one() -> None:
    old, new = two_readers(4, [2, 3]), two_readers(6, [2, 3, 4, 5])
    found = match(old, new, v_zero, np.zeros(0, dtype=np.int64)).old
    assert found.tolist() == [0, 1, 2, 3, -1, -1]


def test_a_channel_without_a_place_is_refused() -> None:
    old, new = two_readers(4, [1, 2, 3]), two_readers(6, [4, 5])
    with pytest.raises(PlanError, match="channels of write would have no place") as caught:
        match(old, new, v_zero, np.zeros(0, dtype=np.int64))
    assert caught.value.name == "write"


def test_a_network_that_computes_with_other_tensors_is_refused() -> None:
    with pytest.raises(PlanError, match="other tensors"):
        match(two_readers(4, [0]), resolve(LabelSpace()), v_zero, np.zeros(0, dtype=np.int64))
