"""New channels from data where a norm over all channels lies between the layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

import fxgrow
from fxgrow.apply.module import apply_to_module
from fxgrow.errors import PlanError

Batches = list[tuple[Tensor, Tensor]]


class ChannelsFirst(nn.LayerNorm):
    """A LayerNorm over the channels of images, as ConvNeXt has it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class RMSNormInParts(nn.Module):
    """An RMSNorm as language models write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Softened(RMSNormInParts):
    """A norm that divides by more than the deviation of all channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(x)


def trained(norm: nn.Module) -> nn.Module:
    """Return a norm with weights, and a bias, as training leaves them."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return norm


def networks() -> dict[str, nn.Module]:
    """Return networks on (N, 6) or (N, 3, 7, 7), by what lies between the layers."""
    torch.manual_seed(0)
    line, conv = nn.Linear, nn.Conv2d
    found = {
        "LayerNorm": [line(6, 8), trained(nn.LayerNorm(8)), nn.GELU(), line(8, 3)],
        "without bias": [
            line(6, 8, bias=False), trained(nn.LayerNorm(8, bias=False)), nn.GELU(), line(8, 3)
        ],
        "ReLU": [line(6, 8), trained(nn.LayerNorm(8)), nn.ReLU(), line(8, 3)],
        "RMSNorm": [line(6, 8), trained(nn.RMSNorm(8, eps=1e-6)), nn.GELU(), line(8, 3)],
        "in parts": [line(6, 8), trained(RMSNormInParts(8)), nn.SiLU(), line(8, 3)],
        "images": [conv(3, 8, 3), trained(ChannelsFirst(8)), nn.GELU(), conv(8, 3, 3)],
        "two": [
            line(6, 8), trained(nn.LayerNorm(8)), nn.GELU(),
            line(8, 7), trained(nn.LayerNorm(7)), nn.Tanh(), line(7, 3),
        ],
    }  # fmt: skip
    return {name: nn.Sequential(*layers).double().eval() for name, layers in found.items()}


def batches_for(model: nn.Module, sizes: tuple[int, ...] = (30, 20)) -> Batches:
    """Return random batches of unequal sizes, in the dtype of the model."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, 7, 7) if isinstance(model[0], nn.Conv2d) else (6,)
    dtype, found = model[0].weight.dtype, []
    for size in sizes:
        x = torch.randn(size, *shape, dtype=dtype, generator=generator)
        with torch.no_grad():
            out = model(x)
        found.append((x, torch.randn(out.shape, dtype=dtype, generator=generator)))
    return found


def mean_loss(model: nn.Module, batches: Batches) -> Tensor:
    total = sum(F.mse_loss(model(x), y) * len(x) for x, y in batches)
    return total / sum(len(x) for x, _ in batches)


@pytest.mark.filterwarnings("ignore:.* the batches give no more")
@pytest.mark.parametrize("name", networks())
def test_gradmax_preserves_and_its_strengths_are_what_parts_the_twins(name: str) -> None:
    model = networks()[name]
    batches = batches_for(model)
    init = fxgrow.GradMax(F.mse_loss, batches)
    for group in [g.name for g in fxgrow.widen(model, "+4", init=init).plan.groups]:
        init = fxgrow.GradMax(F.mse_loss, batches)
        grown = fxgrow.widen(model, {group: "+4"}, init=init)
        assert grown.report.verification.verdict == "preserved"
        assert grown.report.verification.eval.float64.max_rel <= 1e-10
        mean_loss(grown.model.eval(), batches).backward()
        rows = grown.model.get_parameter(f"{group}.weight").grad[grown.plan.groups[0].width[0] :]
        one, other = rows.flatten(1).chunk(2)
        strengths = [*grown.init.strengths[group]]
        assert len(strengths) == 2
        assert ((one - other) / 2).norm(dim=1).tolist() == pytest.approx(strengths, rel=1e-9)


def test_gradmaxs_columns_are_those_of_a_dense_computation() -> None:
    model = networks()["LayerNorm"]
    ((x, y),) = batches = batches_for(model, (40,))
    init = fxgrow.GradMax(F.mse_loss, batches)
    grown = fxgrow.widen(model, "+6", init=init)
    with torch.no_grad():
        wanted = -2 * (model(x) - y) / y.numel()  # −∂L/∂z
        written = model[0](x)
        inverse = (written.var(1, correction=0) + model[1].eps).rsqrt()  # 1/σ of each sample
        read = torch.cat([x, torch.ones_like(x[:, :1])], 1) * inverse[:, None] / 2  # GELU'(0) = 1/2
        scale = model[3].weight.norm(dim=0).mean()
        _, strengths, columns = torch.linalg.svd(read[:, :-1].T @ wanted)
    assert grown.init.strengths["0"] == pytest.approx((strengths * scale).tolist(), rel=1e-9)
    new = grown.model[3].weight.detach()[:, 8:11]
    alike = F.cosine_similarity(new.T, columns).abs().tolist()
    assert alike == pytest.approx([1.0] * 3, rel=1e-9)


@pytest.mark.filterwarnings("ignore:.* the batches give no more")
@pytest.mark.parametrize("name", networks())
def test_tiny_lowers_the_loss_by_the_gains_it_foresees(name: str) -> None:
    model = networks()[name]
    batches = batches_for(model)
    grown = fxgrow.widen(model, "+4", init=fxgrow.Tiny(F.mse_loss, batches))
    assert {group.preserves for group in grown.plan.groups} == {"no"}
    assert grown.report.verification.verdict == "changed"
    before = mean_loss(model, batches).item()
    assert mean_loss(grown.model.eval(), batches).item() < before
    gain = sum(sum(gains) for gains in grown.init.gains.values())
    step = 1e-7 * before / gain
    small = apply_to_module(grown.plan, model, grown.init.scaled(step)).eval()
    assert before - mean_loss(small, batches).item() == pytest.approx(step * gain, rel=0.02)
    same = apply_to_module(grown.plan, model, grown.init.scaled(0.0)).eval()
    assert torch.allclose(same(batches[0][0]), model(batches[0][0]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("pairing", ["vv_z_negz", "zero_z"])
def test_a_pairing_that_is_asked_for_keeps_the_function(pairing: str) -> None:
    model = networks()["LayerNorm"]
    init = fxgrow.Tiny(F.mse_loss, batches_for(model))
    grown = fxgrow.widen(model, "+4", init=init, pairing=pairing)
    assert grown.report.verification.verdict == "preserved"
    for told, other in (("v_zero", model), (pairing, networks()["ReLU"])):
        init = fxgrow.Tiny(F.mse_loss, batches_for(other))
        with pytest.raises(PlanError, match="never learn"):
            fxgrow.widen(other, "+4", init=init, pairing=told)


@pytest.mark.filterwarnings("ignore:1.eps becomes")
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "images"])
def test_what_a_norm_takes_up_of_old_rows_new_ones_take_too(name: str) -> None:
    model = networks()[name]
    batches = batches_for(model)
    rescaling = {"0": "vt_constraint_old_shape", "*": "none"}
    init = fxgrow.Tiny(F.mse_loss, batches)
    grown = fxgrow.widen(model, "+4", init=init, rescaling=rescaling)
    still = apply_to_module(grown.plan, model, grown.init.scaled(0.0)).eval()
    before = mean_loss(model, batches).item()
    assert mean_loss(still, batches).item() == pytest.approx(before, rel=1e-10)
    step = 1e-7 * before / sum(grown.init.gains["0"])
    small = apply_to_module(grown.plan, model, grown.init.scaled(step)).eval()
    assert before - mean_loss(small, batches).item() == pytest.approx(1e-7 * before, rel=0.02)


def test_no_old_channel_is_copied_and_that_is_told() -> None:
    model = networks()["LayerNorm"]
    batches = batches_for(model, (60, 60))
    grown = fxgrow.widen(model, "3x", init=fxgrow.GradMax(F.mse_loss, batches))
    assert grown.plan.groups[0].width[1] < 16
    assert "of 16 new channels: " in grown.plan.groups[0].reason
    with pytest.raises(PlanError, match="1 is asked for"):
        fxgrow.widen(model, "+1", init=fxgrow.GradMax(F.mse_loss, batches))


def test_it_is_saved_and_loaded_in_its_own_precision(tmp_path: Path) -> None:
    model = networks()["images"].float()
    batches = batches_for(model)
    kept = fxgrow.widen(model, "+4", init=fxgrow.GradMax(F.mse_loss, batches))
    assert kept.report.verification.verdict == "preserved"
    grown = fxgrow.widen(model, "+4", init=fxgrow.Tiny(F.mse_loss, batches))
    assert mean_loss(grown.model.eval(), batches) < mean_loss(model, batches)
    fxgrow.save(grown, tmp_path / "grown.pt")
    loaded = fxgrow.load(tmp_path / "grown.pt", trust_pickle=True).eval()
    assert torch.equal(loaded(batches[0][0]), grown.model.eval()(batches[0][0]))


class ReadEarly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.a(self.norm(x)) + self.b(x)


@pytest.mark.parametrize(
    ("model", "shape", "told"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)), (6,), "gelu"),
        (nn.Sequential(nn.Linear(6, 8), RMSNormInParts(8), nn.ReLU(), nn.Linear(8, 3)), (6,),
         "no bias holds new channels above it"),
        (nn.Sequential(nn.Linear(6, 8), Softened(8), nn.Linear(8, 3)), (6,), "1 is over all"),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False),
                       nn.Linear(8, 3)), (6,), "native_layer_norm at 1 lies between"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3)), (3, 7, 7),
         "also over positions"),
        (ReadEarly(), (6,), "b reads them before norm"),
    ],
)  # fmt: skip
def test_what_new_channels_would_change_is_refused_with_the_reason(
    model: nn.Module, shape: tuple[int, ...], told: str
) -> None:
    x = torch.randn(20, *shape)
    with torch.no_grad():
        batches = [(x, torch.randn_like(model(x)))]
    with pytest.raises(PlanError, match=told):
        fxgrow.widen(model, "+4", x, init=fxgrow.GradMax(F.mse_loss, batches))
