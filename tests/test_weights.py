"""What is in the new weights: twins, signs, factors and variances, in every dtype."""

from __future__ import annotations

import math

import pytest
import torch
from networks import PlainResNet, max_rel
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import PlanError
from fxgrow.plan.deviations import Place
from fxgrow.plan.drawing import draw
from fxgrow.plan.init import INITS, find_init
from fxgrow.plan.pairing import PAIRINGS
from fxgrow.plan.rescaling import LayerStatistics, gain_value, rescaling_factor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pair(hidden: int = 64, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, hidden, 3, padding=1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, 16, 3, padding=1),
        nn.BatchNorm2d(16),
    ).to(dtype)


def widened(model: nn.Module, width: str = "2x", **settings: object) -> nn.Module:
    return fxgrow.widen(model, width, verify=False, **settings).model  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_twins_are_equal_and_their_columns_opposite_bit_for_bit(dtype: torch.dtype) -> None:
    grown = widened(pair(dtype=dtype), rescaling="default_vt")
    writer, norm, reader = grown[0], grown[1], grown[3]
    assert writer.weight.dtype == dtype
    for tensor in (writer.weight, writer.bias, norm.weight, norm.bias, norm.running_var):
        assert torch.equal(tensor[64:96], tensor[96:128])
    assert torch.equal(reader.weight[:, 64:96], -reader.weight[:, 96:128])
    assert reader.weight[:, 64:96].abs().sum() > 0
    assert len(torch.unique(writer.weight[64:96].flatten(1), dim=0)) == 32


@pytest.mark.parametrize("groups", [1, 2])
def test_new_rows_read_twins_with_opposite_signs_too(groups: int) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=groups), nn.Conv2d(8, 3, 1)
    )
    weight = widened(chain)[2].weight.detach().unflatten(0, (groups, 16 // groups))
    old = 8 // groups  # of each group; then twins, plus before minus
    plus, minus = weight[:, :, old : old * 3 // 2], weight[:, :, old * 3 // 2 :]
    assert torch.equal(plus, -minus)
    assert plus.abs().min() > 0
    assert torch.equal(weight[:, old : old * 3 // 2], weight[:, old * 3 // 2 :])


class Stack(nn.Module):
    """Blocks on one stream; their norms add little to it, as fresh entries of a norm do not."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.constant_(norm.weight, 0.1)

    def stream(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + norm(layer(x.relu()))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stream(x))


def test_twins_do_not_outgrow_old_channels_in_a_deep_stream() -> None:
    torch.manual_seed(0)
    model = Stack(16, 60).double().eval()
    x = torch.randn(32, 5, dtype=torch.float64)
    grown = widened(model, where="all")
    old, new = grown.stream(x).split(16, 1)
    assert new.shape == old.shape
    assert new.abs().max() < 100 * old.abs().max()
    assert max_rel(model(x), grown(x)) <= 1e-13


def test_new_norm_entries_are_those_of_a_fresh_norm() -> None:
    norm = widened(pair())[1]
    new = slice(64, 128)
    assert torch.equal(norm.weight[new], torch.ones(64, dtype=torch.float64))
    assert torch.equal(norm.bias[new], torch.zeros(64, dtype=torch.float64))
    assert torch.equal(norm.running_mean[new], torch.zeros(64, dtype=torch.float64))
    assert torch.equal(norm.running_var[new], torch.ones(64, dtype=torch.float64))


def test_odd_increment_leaves_one_channel_that_nothing_reads() -> None:
    grown = widened(pair(), "+5")
    assert torch.equal(grown[3].weight[:, 68], torch.zeros(16, 3, 3, dtype=torch.float64))
    assert grown[0].weight[68].abs().sum() > 0
    assert torch.equal(grown[3].weight[:, 64:66], -grown[3].weight[:, 66:68])


def test_v_zero_reads_new_channels_by_zeros_and_none_by_free_columns() -> None:
    assert not widened(pair(), pairing="v_zero")[3].weight[:, 64:].any()
    free = widened(pair(), pairing="none")[3].weight[:, 64:]
    assert not torch.allclose(free[:, :32], -free[:, 32:])


def test_old_weights_stay_bit_for_bit_without_rescaling() -> None:
    model = pair(dtype=torch.float32)
    grown = widened(model)
    assert torch.equal(grown[0].weight[:64], model[0].weight)
    assert torch.equal(grown[3].weight[:, :64], model[3].weight)
    assert torch.equal(grown[1].running_var[:64], model[1].running_var)


@pytest.mark.parametrize(
    ("rescaling", "alpha", "beta"),
    [
        ("none", lambda f, v: 1.0, lambda f, g, v: 1.0),
        ("default_vt", lambda f, v: 1.0, lambda f, g, v: math.sqrt(f / g)),
        (
            "vt_constraint_old_shape",
            lambda f, v: 1 / math.sqrt(f * v),
            lambda f, g, v: 1 / math.sqrt(f * v),
        ),
        (
            "vt_constraint_new_shape",
            lambda f, v: 1 / math.sqrt(f * v),
            lambda f, g, v: 1 / math.sqrt(g * v),
        ),
    ],
)
def test_factors_follow_the_table(rescaling: str, alpha: object, beta: object) -> None:
    model = pair()
    first, second = model[0].weight, model[3].weight
    grown = fxgrow.widen(model, "1.5x", rescaling=rescaling, verify=False)
    group = grown.plan.groups[0]
    expected_alpha = alpha(16 * 9, first.var().item())  # type: ignore[operator]
    expected_beta = beta(64 * 9, 96 * 9, second.var().item())  # type: ignore[operator]
    assert group.alpha == pytest.approx(expected_alpha, abs=1e-6)
    assert group.beta == pytest.approx(expected_beta, abs=1e-6)
    assert group.alpha_beta == pytest.approx(expected_alpha * expected_beta, abs=1e-6)
    assert torch.allclose(grown.model[0].weight[:64], first * expected_alpha, rtol=1e-6)
    assert torch.allclose(grown.model[3].weight[:, :64], second * expected_beta, rtol=1e-6)


def test_a_layer_between_two_pairs_is_scaled_once() -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)
    ).double()
    grown = fxgrow.widen(chain, "2x", rescaling="default_vt")
    first, second = grown.plan.groups
    assert first.beta == second.alpha == pytest.approx(0.5**0.5)
    assert torch.allclose(grown.model[2].weight[:32, :16], chain[2].weight * 0.5**0.5)
    # two factors of 1/sqrt(2) reach the output; the biases keep in step
    assert torch.allclose(grown.model[4].bias, chain[4].bias * 0.5)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.allclose(grown.model(x), 0.5 * chain(x))


@pytest.mark.parametrize("init", ["kaiming", "kaiming_normal"])
def test_variances_of_merged_weights_with_kaiming(init: str) -> None:
    """With gain "relu" old and new weights have variance 2/fan_in: of the new or old shape."""
    model = pair(256)
    settings = {"init": init, "gain": "relu", "pairing": "none"}
    f1, f2, new_f2 = 16 * 9, 256 * 9, 512 * 9
    new = widened(model, rescaling="vt_constraint_new_shape", **settings)
    assert new[0].weight.var().item() == pytest.approx(2 / f1, rel=0.02)
    assert new[3].weight.var().item() == pytest.approx(2 / new_f2, rel=0.02)
    assert new[0].weight[:256].var().item() == pytest.approx(2 / f1, rel=1e-9)
    assert new[3].weight[:, :256].var().item() == pytest.approx(2 / new_f2, rel=1e-9)
    old = widened(model, rescaling="vt_constraint_old_shape", **settings)
    assert old[0].weight.var().item() == pytest.approx(2 / f1, rel=0.02)
    assert old[3].weight[:, :256].var().item() == pytest.approx(2 / f2, rel=1e-9)
    assert old[3].weight[:, 256:].var().item() == pytest.approx(2 / new_f2, rel=0.02)


@pytest.mark.parametrize("init", ["copy_uniform", "copy_normal"])
@pytest.mark.parametrize("rescaling", ["none", "default_vt", "vt_constraint_new_shape"])
def test_copy_inits_follow_the_rescaled_weights(init: str, rescaling: str) -> None:
    grown = widened(pair(256), rescaling=rescaling, init=init)
    for weight, old in ((grown[0].weight, grown[0].weight[:256]), (grown[3].weight, None)):
        reference = grown[3].weight[:, :256] if old is None else old
        fresh = weight[:, 256:384] if old is None else weight[256:384]
        assert fresh.std().item() == pytest.approx(reference.std().item(), rel=0.02)
    if init == "copy_uniform":
        bound = math.sqrt(3) * grown[0].weight[:256].std().item()
        assert grown[0].weight[256:].abs().max().item() <= bound * (1 + 1e-6)


def test_copy_falls_back_to_kaiming_where_old_weights_tell_nothing() -> None:
    model = pair(256)
    nn.init.zeros_(model[0].weight)
    fresh = widened(model, init="copy_normal")[0].weight[256:384]
    assert fresh.var().item() == pytest.approx(2 / (16 * 9), rel=0.05)


def constant(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """Fill with a number that tells what was passed."""
    tensor.fill_(fan_in / 4096 if reference is not None else -1)


def test_user_inits_by_callable_and_by_name() -> None:
    by_callable = widened(pair(), init=constant)
    by_name = widened(pair(), init="test_weights:constant")
    for grown in (by_callable, by_name):
        assert (grown[0].weight[64:] == 16 * 9 / 4096).all()
        assert (grown[3].weight[:, 64:96] == 128 * 9 / 4096).all()
        assert (grown[3].weight[:, 96:] == -128 * 9 / 4096).all()


def test_a_plan_does_not_import_code_it_names() -> None:
    plan = fxgrow.widen(pair(), "2x", init="test_weights:constant").plan
    with pytest.raises(PlanError, match="not run unasked"):
        plan.apply(pair())
    for name in ("no_such_module:x", "test_weights:missing", "test_weights:DTYPES"):
        with pytest.raises(PlanError, match="init"):
            find_init(name)


def test_noise_is_relative_to_the_readers_weights() -> None:
    model = pair(256)
    quiet, loud = widened(model)[3].weight, widened(model, noise=0.25)[3].weight
    gap = (loud - quiet)[:, 256:]
    assert gap.std().item() == pytest.approx(0.25 * model[3].weight.std().item(), rel=0.05)
    assert torch.equal(loud[:, :256], quiet[:, :256])


def test_random_numbers_depend_on_seed_and_name_alone() -> None:
    model = PlainResNet(blocks=3)
    everything = widened(model).state_dict()
    torch.manual_seed(99)
    one = widened(model, include=["blocks.1.*"]).state_dict()
    assert torch.equal(one["blocks.1.conv1.weight"], everything["blocks.1.conv1.weight"])
    other = widened(model, seed=1).state_dict()
    assert not torch.equal(other["blocks.1.conv1.weight"], everything["blocks.1.conv1.weight"])
    assert not torch.equal(
        everything["blocks.0.conv1.weight"][6:], everything["blocks.1.conv1.weight"][6:]
    )


def test_draw_is_the_same_in_every_dtype_up_to_rounding() -> None:
    reference = torch.linspace(-1, 1, 12)
    drawn = [
        draw(
            (40,), reference.to(t), INITS["kaiming"], 3, seed=0, place=Place("w", "writer0")
        ).double()
        for t in (torch.float32, torch.bfloat16, torch.float16)
    ]
    assert torch.allclose(drawn[0], drawn[1], atol=1e-2)
    assert torch.allclose(drawn[0], drawn[2], atol=1e-3)


@pytest.mark.parametrize(("variance", "word"), [(0.0, "0"), (float("nan"), "nan")])
def test_variance_that_tells_nothing_leaves_the_weights_alone(variance: float, word: str) -> None:
    factor, warning = rescaling_factor(
        "vt_constraint_new_shape", LayerStatistics(9, 18, variance, 1.0)
    )
    assert factor == 1.0
    assert f"variance {word}" in warning


def test_zero_weights_are_not_rescaled_and_that_is_said() -> None:
    model = pair()
    nn.init.zeros_(model[3].weight)
    with pytest.warns(fxgrow.FxgrowWarning, match="3: its weights have variance 0"):
        grown = fxgrow.widen(model, "2x", rescaling="vt_constraint_old_shape")
    assert grown.plan.groups[0].beta == 1.0


def test_gain_by_name_and_by_number() -> None:
    assert gain_value("relu") == pytest.approx(math.sqrt(2))
    assert gain_value("1.5") == 1.5
    plain = widened(pair(), rescaling="vt_constraint_new_shape")
    gained = widened(pair(), rescaling="vt_constraint_new_shape", gain="relu")
    assert torch.allclose(gained[0].weight[:64], plain[0].weight[:64] * math.sqrt(2))


def test_apply_rescaling_on_a_tensor() -> None:
    weight = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    scaled = fxgrow.apply_rescaling(weight, "vt_constraint_new_shape", new_fan_in=72, gain="relu")
    assert scaled.var().item() == pytest.approx(2 / 72)
    assert torch.equal(
        fxgrow.apply_rescaling(weight, "default_vt", new_fan_in=144), weight * math.sqrt(36 / 144)
    )
    with pytest.raises(PlanError, match="no rescaling"):
        fxgrow.apply_rescaling(weight, "vt", new_fan_in=72)


def test_copies_share_the_old_column_unequally_and_exactly() -> None:
    model = pair()
    grown = widened(model, "2.5x", pairing="replicate")  # 96 new: 32 channels in three, 32 in two
    writer, norm, reader = grown[0], grown[1], grown[3]
    old = torch.arange(160) % 64
    assert torch.equal(writer.weight, model[0].weight[old])
    assert torch.equal(norm.running_var, model[1].running_var[old])
    total = torch.zeros_like(model[3].weight).index_add_(1, old, reader.weight)
    assert torch.allclose(total, model[3].weight, atol=1e-14)
    assert not torch.allclose(reader.weight[:, :32], reader.weight[:, 64:96], atol=1e-4)
    equal = widened(model, "2x", pairing="replicate", split_noise=0.0)[3].weight
    assert torch.equal(equal[:, :64], equal[:, 64:])
    spread = reader.weight[:, 32:64] - reader.weight[:, 96:128]
    assert spread.std().item() == pytest.approx(
        0.1 * 2**0.5 * model[3].weight.std().item(), rel=0.2
    )


@pytest.mark.parametrize("pairing", [p for p in PAIRINGS if "replicate" not in p])
def test_apply_pairing_on_tensors(pairing: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    writer, reader = random(5, 4), random(3, 5)
    new_columns, x = random(3, 2), random(7, 4)
    new_rows = None if pairing == "copy_pair" else random(2, 4)
    w, r = fxgrow.apply_pairing(writer, reader, new_rows, new_columns, pairing)
    if pairing == "zero_z":
        assert not w[5:].any()
    same = torch.allclose(torch.relu(x @ w.T) @ r.T, torch.relu(x @ writer.T) @ reader.T)
    assert same == (pairing != "none")
    assert w.shape == ((9, 4) if pairing in ("vv_z_negz", "copy_pair") else (7, 4))
    none = None if pairing == "copy_pair" else random(0, 4)
    assert fxgrow.apply_pairing(writer, reader, none, random(3, 0), pairing)[0].equal(writer)
    with pytest.raises(PlanError, match=r"needs new rows V.* Give new_rows"):
        fxgrow.apply_pairing(writer[:0], reader[:, :0], None, new_columns, pairing)
    rows = random(2, 4)
    with pytest.raises(PlanError, match="do not fit"):
        fxgrow.apply_pairing(writer, reader, rows, new_columns[:, :1], pairing)
    with pytest.raises(PlanError, match="takes no V and Z"):
        fxgrow.apply_pairing(writer, reader, rows, new_columns, "replicate")
