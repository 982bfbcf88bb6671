"""What gromo's tests assert of variance transfer, pairing and inits, asserted of fxgrow.

Source of the situations and formulas: tests/test_variance_transfer.py of gromo
(https://github.com/growingnet/gromo). Two differ by design: a reader's bias is scaled with what it
is added to, and an odd number of twins is allowed.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import FxgrowError

STRATEGIES = ["default_vt", "vt_constraint_old_shape", "vt_constraint_new_shape"]
INITS = ["kaiming", "kaiming_normal", "copy_uniform", "copy_normal", "lecun", "zeros"]


class Block(nn.Module):
    """A residual block of two layers, with a layer on its shortcut."""

    def __init__(self, kind: str, hidden: int = 8, *, bias: bool = True) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, kernel: int) -> nn.Module:
            if kind == "linear":
                return nn.Linear(inputs, outputs, bias=bias)
            return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)

        width = 8 if kind == "linear" else 3
        self.first, self.second = layer(width, hidden, 3), layer(hidden, width, 3)
        self.downsample = layer(width, width, 1)

    def path(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.path(x) + self.downsample(x)


def block(kind: str, hidden: int = 8, *, bias: bool = True, scaled: bool = True) -> Block:
    """Return a block whose weights are, if scaled, far from any fresh layer's."""
    torch.manual_seed(0)
    made = Block(kind, hidden, bias=bias).double().eval()
    if scaled:
        with torch.no_grad():
            made.first.weight.mul_(2.0)
            made.second.weight.mul_(0.5)
    return made


def inputs(kind: str, count: int = 2) -> Tensor:
    shape = (8,) if kind == "linear" else (3, 8, 8)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, dtype=torch.float64, generator=generator)


def factors(old: Block, rescaling: str, new: int) -> tuple[float, float]:
    """Return α and β by the formulas of the paper."""
    first, second = old.first.weight, old.second.weight
    fan_in = second[0].numel()
    fan_in_after = fan_in * (second.shape[1] + new) // second.shape[1]
    if rescaling == "default_vt":
        return 1.0, math.sqrt(fan_in / fan_in_after)
    target = fan_in if rescaling == "vt_constraint_old_shape" else fan_in_after
    alpha = 1 / math.sqrt(first[0].numel() * first.var().item())
    return alpha, 1 / math.sqrt(target * second.var().item())


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("output_init", INITS)
@pytest.mark.parametrize("input_init", ["kaiming", "zeros"])
def test_twins_keep_the_output(kind: str, output_init: str, input_init: str) -> None:
    old, x = block(kind), inputs(kind)
    grown = fxgrow.widen(old, "+4", x, output_init=output_init, input_init=input_init)
    assert grown.model.first.weight.shape[0] == grown.model.second.weight.shape[1] == 12
    assert torch.allclose(grown.model(x), old(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rescaling", STRATEGIES)
def test_the_path_is_scaled_by_both_factors(kind: str, bias: bool, rescaling: str) -> None:
    old, x = block(kind, bias=bias), inputs(kind)
    alpha, beta = factors(old, rescaling, 4)
    new = fxgrow.widen(old, "+4", x, rescaling=rescaling, pairing="vv_z_negz").model
    expected = alpha * beta * old.path(x) + old.downsample(x)
    assert torch.allclose(new(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("rescaling", STRATEGIES[1:])
def test_old_weights_get_the_variance_of_a_fresh_layer(kind: str, rescaling: str) -> None:
    old = block(kind, 16)
    new = fxgrow.widen(old, "+4", inputs(kind), rescaling=rescaling).model
    reader = new.second.weight
    fan_in = old.second.weight[0].numel() if "old" in rescaling else reader[0].numel()
    assert new.first.weight[:16].var().item() == pytest.approx(1 / old.first.weight[0].numel())
    assert reader[:, :16].var().item() == pytest.approx(1 / fan_in)


@pytest.mark.parametrize(("rescaling", "expected"), [(STRATEGIES[1], 1.0), (STRATEGIES[2], 6 / 7)])
def test_the_path_has_the_variance_that_the_strategy_aims_at(
    rescaling: str, expected: float
) -> None:
    old, x = block("linear", 96, bias=False), inputs("linear", 512)
    new = fxgrow.widen(old, "+16", x, rescaling=rescaling, init="lecun").model
    assert new.path(x).var().item() == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_rows_and_biases_are_written_twice_and_read_with_both_signs(kind: str) -> None:
    new = fxgrow.widen(block(kind), "+4", inputs(kind), init="kaiming").model
    assert torch.equal(new.first.weight[8:10], new.first.weight[10:])
    assert torch.equal(new.first.bias[8:10], new.first.bias[10:])
    assert torch.equal(new.second.weight[:, 8:10], -new.second.weight[:, 10:])
    assert new.second.weight[:, 8:].abs().min() > 0


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_an_odd_new_channel_is_read_by_zeros(kind: str) -> None:
    old, x = block(kind), inputs(kind)
    new = fxgrow.widen(old, "+3", x).model
    assert new.second.weight[:, 10].eq(0).all()
    assert torch.allclose(new(x), old(x), rtol=0, atol=1e-10)


def test_noise_on_twins_changes_the_output_a_little() -> None:
    old, x = block("linear", scaled=False), inputs("linear", 256)
    new = fxgrow.widen(old, "+4", x, noise=0.1, init="kaiming").model
    assert 1e-6 < ((new(x) - old(x)).norm() / old(x).norm()).item() < 0.2


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("rescaling", ["none", *STRATEGIES])
def test_a_single_hidden_channel_grows(kind: str, rescaling: str) -> None:
    new = fxgrow.widen(block(kind, 1), "+2", inputs(kind), rescaling=rescaling).model
    assert new.second.weight.shape[1] == 3
    assert new(inputs(kind)).isfinite().all()


@pytest.mark.parametrize("rescaling", ["none", *STRATEGIES])
@pytest.mark.filterwarnings(
    "ignore:Initializing zero-element", "ignore:.*not rescaled", "ignore:.*nothing to rescale"
)
def test_an_empty_hidden_layer_grows(rescaling: str) -> None:
    old, x = block("linear", 0, scaled=False), inputs("linear")
    new = fxgrow.widen(old, "+4", x, rescaling=rescaling).model
    assert new.second.weight.shape[1] == 4
    assert torch.allclose(new(x), old(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rescaling", STRATEGIES[1:])
def test_weights_of_no_variance_are_left_alone(rescaling: str) -> None:
    weight = torch.full((8, 4), 0.5)
    assert torch.equal(fxgrow.apply_rescaling(weight, rescaling, new_fan_in=8), weight)


@pytest.mark.parametrize("rescaling", STRATEGIES[1:])
def test_a_rescaling_done_twice_is_done_once(rescaling: str) -> None:
    once = fxgrow.apply_rescaling(block("conv").second.weight, rescaling, new_fan_in=108)
    assert torch.allclose(fxgrow.apply_rescaling(once, rescaling, new_fan_in=108), once)


@pytest.mark.parametrize("norm_type", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_a_norms_statistics_follow_the_factor(norm_type: type[nn.Module]) -> None:
    weight, norm = block("conv").first.weight, norm_type(8).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 1.1)
    c = 1 / math.sqrt(27 * weight.var().item())
    scaled = fxgrow.apply_rescaling(
        weight, STRATEGIES[1], new_fan_in=27, norm=fxgrow.NormTensors.of(norm)
    ).norm
    assert scaled is not None
    assert torch.allclose(scaled.running_mean, c * norm.running_mean)
    assert torch.allclose(scaled.running_var, c**2 * (norm.running_var + 1e-5) - 1e-5)


@pytest.mark.parametrize("option", ["rescaling", "pairing", "init", "output_init", "input_init"])
def test_an_unknown_name_is_named_in_the_error(option: str) -> None:
    with pytest.raises(FxgrowError, match="unheard_of"):
        fxgrow.widen(block("linear"), "+4", inputs("linear"), **{option: "unheard_of"})


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_rescaled_tensors_are_paired_by_themselves(kind: str) -> None:
    old = block(kind)
    first, second = old.first.weight, old.second.weight
    paired = fxgrow.apply_pairing(
        first, second, first[:4], second[:, :4], "vv_z_negz", bias=old.first.bias,
        new_bias=old.first.bias[:4],
    )  # fmt: skip
    assert torch.equal(paired.writer[8:12], paired.writer[12:])
    assert torch.equal(paired.bias[8:12], paired.bias[12:])
    assert torch.equal(paired.reader[:, 8:12], -paired.reader[:, 12:])
