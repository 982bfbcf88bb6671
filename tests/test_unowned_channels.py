"""What owns no tensor, or no row alone: norms without weights, joined inputs, units of rows."""

from __future__ import annotations

import re
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


class Rows(nn.Module):
    """A layer whose weight has another shape than it is used in, as its attributes say."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.inputs)
        y = torch.stack([x, x.sin(), x.cos()], -1)
        assert y.size() == (x.size(0), self.inputs, 3)
        return nn.functional.linear(y.flatten(1), self.weight.view(self.outputs, -1))


def test_an_attribute_that_is_the_size_comes_before_one_that_is_half_of_it() -> None:
    model = nn.Sequential(Rows(3, 6), Rows(6, 4), Rows(4, 2)).double()
    x = torch.randn(5, 3).double()
    grown = fxgrow.widen(model, "2x", x, where="all").model
    assert [(layer.inputs, layer.outputs) for layer in grown] == [(3, 12), (12, 8), (8, 2)]
    assert max_rel(grown(x), model(x)) < 1e-12


class Exits(nn.Module):
    """What is returned is added to zeros that were made in the dtype of what is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 6), nn.LayerNorm(6)
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x.new_zeros(x.size(0), 3) + self.last(self.inner(self.norm(x)))


@pytest.mark.filterwarnings("ignore:norm.eps becomes")
def test_zeros_made_in_the_dtype_of_channels_compute_nothing_over_them() -> None:
    found = fxgrow.widen(Exits(), "1.5x", torch.randn(4, 3), where="all")
    assert found.model.first.out_features == 9


class Positions(nn.Module):
    """A table of positions as wide as what comes in, which a layer reads that does not grow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(5, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        places = torch.zeros(x.size(1), x.size(-1)).to(x)
        places[:, 0::2] = torch.sin(torch.arange(0, x.size(-1), 2).to(x))
        return self.last(torch.relu(x) + self.table(places))


def test_sizes_that_code_takes_from_a_width_are_not_called_fixed() -> None:
    with pytest.raises(fxgrow.PlanError) as told:
        fxgrow.widen(Positions(), {"first": 12}, torch.randn(2, 3, 5), where="all")
    assert "takes sizes [3, 12] of zeros from a width that grows" in str(told.value)
    assert "fixes" not in str(told.value)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)[0])


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 36), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).view(*x.shape[:2], 3, -1, 4).permute(2, 0, 3, 1, 4)
        return self.last((q @ k.mT @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("make", "rows"), [(Recurrent, 4), (Heads, 12)])
@pytest.mark.parametrize("more", [1, 2, 3, 7, 13, 15])
def test_the_widths_that_a_refusal_offers_are_taken(
    make: type[nn.Module], rows: int, more: int
) -> None:
    model, x = make(), torch.randn(2, 5, 4)
    with pytest.raises(fxgrow.PlanError, match=f"each has {rows} rows, and a width counts") as told:
        fxgrow.widen(model, {"inner": f"+{more}"}, x, where="all")
    offered = re.findall(rf"(\d+) \(\d+ × {rows} rows\)", str(told.value))
    assert offered
    for width in offered:
        assert fxgrow.widen(model, {"inner": width}, x, where="all").plan.groups


@pytest.mark.parametrize("make", [Recurrent, Heads])
def test_a_width_below_the_present_one_is_told_in_rows(make: type[nn.Module]) -> None:
    with pytest.raises(fxgrow.PlanError, match=r"8 rows where inner has \d+ \(\d × \d+ rows\)"):
        fxgrow.widen(make(), {"inner": 8}, torch.randn(2, 5, 4), where="all")


class Attended(nn.Module):
    """Two recurrent layers, and an attention that is as wide as the second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(4, 8, 2, batch_first=True)
        self.heads, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)[0]
        return self.last((x + self.heads(x, x, x)[0]).mean(1))


def test_recurrent_layers_name_the_attention_that_has_to_grow_with_them() -> None:
    model, x = Attended(), torch.randn(2, 5, 4)
    with pytest.raises(fxgrow.PlanError, match=r"hidden_size.*embed_dim.*heads was not asked to"):
        fxgrow.widen(model, {"inner*": "2x"}, x, where="all")
    assert (
        len(fxgrow.widen(model, {"inner*": "2x", "heads": "2x"}, x, where="all").plan.groups) == 3
    )


class ByMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(x))
        return self.last(2 * x if x.mean() > 0 else x)


def test_a_mean_that_asks_for_copies_is_not_called_a_norm() -> None:
    (group,) = fxgrow.widen(ByMean(), "2x", torch.randn(3, 4)).plan.groups
    assert group.reason == (
        "whole copies, for aten.mean at the top level, which is over all its channels"
    )


class Scaled(nn.Module):
    """What computes with a field of its configuration."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.config = Fields(size)
        self.inner, self.last = nn.Linear(4, size), nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x) * self.config.size**-0.5)


class Fields:
    """A configuration, as networks of transformers have it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def to_dict(self) -> dict[str, int]:
        return {"size": self.size, "outputs": 2}


def test_a_refused_target_names_the_fields_in_which_it_differs() -> None:
    with pytest.raises(fxgrow.PlanError, match="computes with") as told:
        fxgrow.convert(Scaled(8), Scaled(16))
    assert "differ in size (8 → 16): leave" in told.value.way_out
    assert "`fxgrow.widen`, `fxgrow.deepen`" in str(told.value)
