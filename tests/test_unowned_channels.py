"""What owns no tensor beside what grows: norms without weights, and an input joined to it."""

from __future__ import annotations

import warnings

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow


@pytest.mark.parametrize(
    ("norm", "attribute"),
    [
        (nn.InstanceNorm2d(8), "num_features"),
        (nn.BatchNorm2d(8, affine=False, track_running_stats=False), "num_features"),
        (nn.GroupNorm(1, 8, affine=False), "num_channels"),
    ],
)
def test_norms_without_tensors_say_over_how_many_channels_they_are(
    norm: nn.Module, attribute: str
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 3, 8, 8)
    grown = fxgrow.widen(model, "2x", x).model
    assert getattr(grown[1], attribute) == grown[0].out_channels == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert max_rel(grown.eval()(x), model.eval()(x)) < 1e-5


class BesideInput(nn.Module):
    """Channels that grow, and the input after them, read by one grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.both = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1, groups=4)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.both(torch.cat([torch.tanh(self.inner(x)), x], 1))))


def test_an_input_that_would_move_to_another_convolution_group_is_in_the_way() -> None:
    model, x = BesideInput(), torch.randn(2, 8, 4, 4)
    found = fxgrow.widen(model, "2x", x)
    assert max_rel(found.model.eval()(x), model.eval()(x)) < 1e-5
    assert found.model.both.out_channels == 16
    assert found.model.inner.out_channels == 8
    (refusal,) = found.report.refused
    assert refusal.name == "inner"
    assert "what both reads beside these channels, and no layer writes" in refusal.reason
