"""New channels from data in real blocks: norms, pooling, flattening and several readers between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

import fxgrow
from fxgrow.apply.module import apply_to_module
from fxgrow.errors import PlanError

Batches = list[tuple[Tensor, Tensor]]


def norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm that has seen data."""
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.weight.normal_(1, 0.2)
        layer.bias.normal_(0, 0.2)
    return layer


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 3, 3, padding=1, bias=False), norm(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 2, 1, bias=False), norm(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3, stride=2, padding=1, bias=False), norm(2)
        self.conv3, self.bn3 = nn.Conv2d(2, 5, 1, bias=False), norm(5)
        self.skip = nn.Conv2d(3, 5, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)), inplace=True)))
        return torch.relu(self.skip(x) + y)


class Read(nn.Module):
    """A hidden layer that is read twice: by convolutions of different strides and kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(3, 4, 3, padding=1), norm(4)
        self.a, self.b = nn.Conv2d(4, 3, 3, stride=2, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.norm(self.up(x)))
        return torch.cat([self.a(y).flatten(1), self.b(F.avg_pool2d(y, 2)).flatten(1)], 1)


class LastDim(nn.Module):
    """Channels that are the last dim where they are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))


class Hidden(nn.Module):
    """A residual multilayer perceptron, with its norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Inverted(nn.Module):
    """A MobileNet's block: wider inside, with a convolution of each channel by itself."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.up, self.norm1 = nn.Conv2d(3, 4, 1, bias=False), norm(4)
        self.alone = nn.Conv2d(4, 4, 3, stride=stride, padding=1, groups=4, bias=False)
        self.norm2, self.down, self.norm3 = norm(4), nn.Conv2d(4, 3, 1, bias=False), norm(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm1(self.up(x)))
        y = self.norm3(self.down(F.relu6(self.norm2(self.alone(y)))))
        return x + y if y.shape == x.shape else y


def networks() -> dict[str, nn.Module]:
    """Return networks on (N, 3, 8, 8), by what lies between the layers."""
    torch.manual_seed(0)
    conv, act = nn.Conv2d, nn.ReLU
    found = {
        "norm": nn.Sequential(conv(3, 4, 3, bias=False), norm(4), act(), conv(4, 3, 3, stride=2)),
        "norm and bias": nn.Sequential(
            conv(3, 4, 3), norm(4), act(inplace=True), conv(4, 2, 3, dilation=2)
        ),
        "norm after": nn.Sequential(conv(3, 4, 3), act(), norm(4), conv(4, 3, 1)),
        "norm and slopes": nn.Sequential(conv(3, 4, 3), norm(4), nn.PReLU(4), conv(4, 3, 1)),
        "norm and dropout": nn.Sequential(
            conv(3, 4, 3), norm(4), nn.SiLU(), nn.Dropout(), conv(4, 3, 1)
        ),
        "relu": nn.Sequential(conv(3, 4, 3), act(), conv(4, 3, 3)),
        "average": nn.Sequential(conv(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2), conv(4, 3, 3)),
        "maximum": nn.Sequential(conv(3, 4, 3), norm(4), act(), nn.MaxPool2d(2), conv(4, 3, 3)),
        "overlapping": nn.Sequential(conv(3, 4, 3), act(), nn.MaxPool2d(3, 1), conv(4, 3, 2)),
        "flatten": nn.Sequential(conv(3, 4, 3), act(), nn.Flatten(), nn.Linear(144, 3)),
        "pooled and flattened": nn.Sequential(
            conv(3, 4, 3), act(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(36, 3)
        ),
        "global": nn.Sequential(
            conv(3, 4, 3), norm(4), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ),
        "block": Block(),
        "bottleneck": Bottleneck(),
        "read twice": Read(),
        "last dim": LastDim(),
        "norm before": Hidden(),
        "depthwise": nn.Sequential(
            conv(3, 4, 3), conv(4, 4, 4, padding=2, groups=4), nn.GELU(), conv(4, 3, 3)
        ),
        "inverted": Inverted(1),
        "inverted, strided": Inverted(2),
    }
    return {name: network.double().eval() for name, network in found.items()}


def batches_for(model: nn.Module, sizes: tuple[int, ...] = (30, 20)) -> Batches:
    """Return random batches of unequal sizes."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in sizes:
        x = torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            out = model(x)
        found.append((x, torch.randn(out.shape, dtype=out.dtype, generator=generator)))
    return found


def mean_loss(model: nn.Module, batches: Batches) -> Tensor:
    total = sum(F.mse_loss(model(x), y) * len(x) for x, y in batches)
    return total / sum(len(x) for x, _ in batches)


def widened(model: nn.Module, init: object, group: str = "*") -> fxgrow.Grown:
    return fxgrow.widen(model, {group: "+4"}, init.batches[0][0], init=init)


@pytest.mark.filterwarnings("ignore:.* the batches give no more")
@pytest.mark.parametrize("name", networks())
def test_gradmax_preserves_and_its_strengths_are_the_gradients(name: str) -> None:
    model = networks()[name]
    batches = batches_for(model)
    names = [g.name for g in widened(model, fxgrow.GradMax(F.mse_loss, batches)).plan.groups]
    for group in names:  # one by one: a new row may read the new channels of another group
        grown = widened(model, fxgrow.GradMax(F.mse_loss, batches), group)
        assert grown.report.verification.verdict == "preserved"
        assert {g.preserves for g in grown.plan.groups} == {"exact"}
        assert grown.report.verification.eval.float64.max_rel <= 1e-10
        assert grown.report.verification.train.float64.max_rel <= 1e-10
        mean_loss(grown.model.eval(), batches).backward()
        rows = grown.model.get_parameter(f"{group}.weight").grad[grown.plan.groups[0].width[0] :]
        strengths = grown.init.strengths[group]
        each = len(rows) // len(strengths)  # twins get the same gradient, with opposite signs
        assert rows.flatten(1).norm(dim=1).tolist() == pytest.approx(strengths * each, rel=1e-9)


@pytest.mark.filterwarnings("ignore:.* the batches give no more")
@pytest.mark.parametrize("name", sorted({*networks()} - {"flatten", "last dim"}))
def test_tiny_lowers_the_loss_by_the_gains_it_foresees(name: str) -> None:
    model = networks()[name]
    batches = batches_for(model)
    grown = widened(model, fxgrow.Tiny(F.mse_loss, batches))
    before = mean_loss(model, batches).item()
    assert mean_loss(grown.model.eval(), batches).item() < before
    gain = sum(sum(gains) for gains in grown.init.gains.values())
    step = 1e-6 * before / gain
    small = apply_to_module(grown.plan, model, grown.init.scaled(step)).eval()
    assert before - mean_loss(small, batches).item() == pytest.approx(step * gain, rel=0.02)


def test_tiny_leaves_to_old_weights_what_they_can_do() -> None:
    for name in ("flatten", "last dim"):  # 144 columns for 50 samples
        model = networks()[name]
        with pytest.raises(PlanError, match="old weights can do what the loss asks for"):
            widened(model, fxgrow.Tiny(F.mse_loss, batches_for(model)))
        assert widened(model, fxgrow.Tiny(F.mse_loss, batches_for(model, (150, 80))))


def plain(*, bias: bool = False) -> nn.Module:
    """Return a convolution, a batch norm, a ReLU and a convolution."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, bias=bias), norm(4), nn.ReLU(), nn.Conv2d(4, 3, 3)
    return nn.Sequential(*layers).double().eval()


def test_tinys_channels_are_those_of_a_dense_computation() -> None:
    model = plain()
    ((x, y),) = batches = batches_for(model, (40,))
    grown = widened(model, fxgrow.Tiny(F.mse_loss, batches))
    with torch.no_grad():
        h = model[:3](x)
        z = model(x)
        wanted = -2 * (z - y).flatten(2) / y.numel() * len(x)  # (N, 3, 16): −∂L/∂z of each sample
        read = F.unfold(h, 3)  # (N, 4 · 9, 16)
        known = torch.cat([read, torch.ones_like(read[:, :1])], 1).transpose(1, 2).flatten(0, 1)
        left = wanted.transpose(1, 2).flatten(0, 1)  # (positions, 3)
        left = left - known @ torch.linalg.lstsq(known, left).solution
        # What entries of a patch are where the reader takes them: half, by the slopes of a ReLU.
        patches = F.unfold(x, 3).reshape(len(x), 27, 6, 6) / 2
        taken = F.unfold(patches, 3).reshape(len(x), 27, 9, 16)
        moments = torch.einsum("nikp,njkp->ij", taken, taken) / len(x)
        values, vectors = torch.linalg.eigh(moments)
        root = vectors / values.sqrt() @ vectors.T
        rows = taken.permute(0, 3, 1, 2).flatten(0, 1)  # (positions, 27, 9)
        matrix = root @ torch.einsum("pik,po->iok", rows, left).flatten(1) / len(x)
        u, strengths, v = torch.linalg.svd(matrix)
    found = grown.init.strengths["0"]
    places = [int((strengths - s).abs().argmin()) for s in found]
    assert found == pytest.approx(strengths[places].tolist(), rel=1e-8)
    new = grown.model[0].weight.detach()[4:].flatten(1)
    assert F.cosine_similarity(new, (root @ u[:, places]).T).abs().tolist() == pytest.approx(
        [1.0] * len(found), rel=1e-8
    )
    columns = grown.model[3].weight.detach()[:, 4:].transpose(0, 1).flatten(1)
    assert F.cosine_similarity(columns, v[places]).abs().tolist() == pytest.approx(
        [1.0] * len(found), rel=1e-8
    )


@pytest.mark.parametrize("bias", [False, True])
def test_under_tiny_a_norm_is_the_identity_on_new_channels_by_their_statistics(bias: bool) -> None:
    model = plain(bias=bias)
    batches = batches_for(model)
    grown = widened(model, fxgrow.Tiny(F.mse_loss, batches)).model
    with torch.no_grad():
        written = grown[0](torch.cat([x for x, _ in batches]))
        evaluated = grown[1].eval()(written)[:, 4:]
        trained = copy.deepcopy(grown[1]).train()(written)[:, 4:]  # all data are one batch
    assert torch.allclose(evaluated, written[:, 4:])
    assert torch.allclose(trained, evaluated)
    assert grown[1].running_mean[4:].tolist() == pytest.approx(
        written[:, 4:].mean((0, 2, 3)).tolist()
    )


@pytest.mark.parametrize("method", [fxgrow.GradMax, fxgrow.Tiny])
def test_what_data_made_of_norms_is_saved_and_loaded(
    method: Callable[..., object], tmp_path: Path
) -> None:
    model = plain()
    batches = batches_for(model)
    grown = widened(model, method(F.mse_loss, batches))
    fxgrow.save(grown, tmp_path / "grown.pt")
    loaded = fxgrow.load(tmp_path / "grown.pt").eval()
    assert torch.equal(loaded(batches[0][0]), grown.model.eval()(batches[0][0]))
    again = apply_to_module(grown.plan, model, grown.init)
    assert torch.equal(again.eval()(batches[0][0]), loaded(batches[0][0]))


def test_a_pairing_that_is_asked_for_keeps_the_function_through_a_norm() -> None:
    model = plain()
    batches = batches_for(model)
    init = fxgrow.Tiny(F.mse_loss, batches)
    grown = fxgrow.widen(model, "+4", batches[0][0], init=init, pairing="vv_z_negz")
    assert grown.report.verification.verdict == "preserved"
    assert len(grown.init.strengths["0"]) == 2


def test_a_norm_in_a_network_of_lower_precision() -> None:
    model = plain().float()
    batches = [(x.float(), y.float()) for x, y in batches_for(plain())]
    grown = widened(model, fxgrow.GradMax(F.mse_loss, batches))
    assert grown.report.verification.verdict == "preserved"
    step = widened(model, fxgrow.Tiny(F.mse_loss, batches))
    assert mean_loss(step.model.eval(), batches) < mean_loss(model, batches)
