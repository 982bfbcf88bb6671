"""Widening preserves the function: on real ResNets, in float64, in eval and in train mode."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torchvision
from networks import (
    PlainResNet,
    max_rel,
    small_images,
    small_resnet,
    torchvision_model,
    trained_looking,
)
from torch import nn

import fxgrow
from fxgrow.errors import FxgrowWarning, NotPreservedError, PlanError, VerificationError
from fxgrow.plan.pairing import PAIRINGS, Layout

RESNETS = [
    "resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d",
]  # fmt: skip
RESCALINGS = ["none", "default_vt", "vt_constraint_old_shape", "vt_constraint_new_shape"]
IMAGE = small_images()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return small_resnet().double().eval()


@pytest.mark.parametrize("rescaling", RESCALINGS)
@pytest.mark.parametrize("pairing", ["vv_z_negz", "v_zero", "replicate"])
@pytest.mark.parametrize("width", ["2x", "+7"])
def test_every_rescaling_and_pairing_preserves_a_resnet(
    resnet: nn.Module, rescaling: str, pairing: str, width: str
) -> None:
    grown = fxgrow.widen(resnet, width, IMAGE, rescaling=rescaling, pairing=pairing)
    verification = grown.report.verification
    assert verification.verdict == "preserved"
    assert verification.eval.float64.max_rel <= 1e-10
    assert verification.train.residual.max_rel <= 1e-10
    if rescaling == "none":
        assert verification.train.float64.max_rel <= 1e-10
    else:  # eps meets batch statistics: reported with its predicted size
        assert verification.train.predicted.max_rel == pytest.approx(
            verification.train.float64.max_rel, rel=1e-6
        )
    with torch.no_grad():
        assert max_rel(resnet(IMAGE), grown.model(IMAGE)) <= 1e-10


@pytest.mark.sweep
@pytest.mark.parametrize("name", RESNETS)
def test_sweep_of_resnets_widths_rescalings_pairings(name: str) -> None:
    model = torchvision_model(name)
    settings = itertools.product(["2x", "1.5x", "+6"], RESCALINGS, ["vv_z_negz", "v_zero"])
    for width, rescaling, pairing in settings:
        grown = fxgrow.widen(model, width, rescaling=rescaling, pairing=pairing)
        verification = grown.report.verification
        assert verification.eval.float64.max_rel <= 1e-10, (width, rescaling, pairing)
        assert verification.train.residual.max_rel <= 1e-10, (width, rescaling, pairing)
        assert verification.verdict == "preserved"


def test_pairing_none_is_announced_and_measured(resnet: nn.Module) -> None:
    grown = fxgrow.widen(resnet, "2x", IMAGE, pairing="none")
    assert {group.preserves for group in grown.plan.groups} == {"no"}
    assert "do not cancel" in grown.plan.groups[0].reason
    assert grown.report.verification.verdict == "changed"
    assert grown.report.verification.eval.float64.max_rel > 1e-3


def test_noise_is_announced_and_measured(resnet: nn.Module) -> None:
    grown = fxgrow.widen(resnet, "2x", IMAGE, noise=0.1)
    assert {group.preserves for group in grown.plan.groups} == {"no"}
    assert grown.report.verification.eval.float64.max_rel > 1e-6


def test_streams_grow_too(resnet: nn.Module) -> None:
    grown = fxgrow.widen(resnet, "1.5x", IMAGE, where="all")
    assert grown.report.verification.verdict == "preserved"
    assert {group.kind for group in grown.plan.groups} == {"hidden", "stream"}
    assert grown.model.fc.in_features == 768
    assert [refused.name for refused in grown.plan.refused] == ["fc"]


def test_result_is_of_the_same_class_with_true_attributes(resnet: nn.Module) -> None:
    grown = fxgrow.widen(resnet, "2x", IMAGE)
    block = grown.model.layer1[0]
    assert type(grown.model) is type(resnet)
    assert (block.conv1.out_channels, block.bn1.num_features, block.conv2.in_channels) == (
        128, 128, 128,
    )  # fmt: skip
    assert block.conv2.weight.shape == (64, 128, 3, 3)


def test_input_model_is_bit_for_bit_untouched() -> None:
    model = small_resnet()
    model.layer1[0].bn1.eval()
    model.conv1.weight.requires_grad_(False)
    handle = model.fc.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    flags = {name: module.training for name, module in model.named_modules()}
    random_state = torch.random.get_rng_state()

    grown = fxgrow.widen(model, "2x", IMAGE.float(), rescaling="default_vt")

    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert model.layer1[0].conv1.out_channels == 64
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert not model.conv1.weight.requires_grad
    assert not grown.model.conv1.weight.requires_grad
    assert flags == {name: module.training for name, module in grown.model.named_modules()}
    assert len(grown.model.fc._forward_hooks) == 1
    assert all(p.grad is None for p in model.parameters())
    handle.remove()


def test_widening_by_nothing_is_the_identity(resnet: nn.Module) -> None:
    grown = fxgrow.widen(resnet, "1x", IMAGE, rescaling="default_vt")
    before, after = resnet.state_dict(), grown.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_disjoint_groups_widen_in_any_order(resnet: nn.Module) -> None:
    a, b = {"layer1.0.conv1": "2x"}, {"layer2.0.conv1": "1.5x"}
    together = fxgrow.widen(resnet, a | b, IMAGE).model.state_dict()
    one_by_one = fxgrow.widen(fxgrow.widen(resnet, a, IMAGE).model, b, IMAGE).model.state_dict()
    assert all(torch.equal(together[name], one_by_one[name]) for name in together)


def test_repeated_growth_preserves(resnet: nn.Module) -> None:
    model = resnet
    for width in ("2x", "1.5x", "+6"):
        model = fxgrow.widen(model, width, IMAGE, rescaling="default_vt").model
    assert model.layer1[0].conv1.out_channels == 64 * 3 + 6
    with torch.no_grad():
        assert max_rel(resnet(IMAGE), model(IMAGE)) <= 1e-10


@pytest.mark.parametrize("grouped", ["width", "count"])
def test_grouped_convolutions_grow_both_ways(grouped: str) -> None:
    model = _small_resnext()
    grown = fxgrow.widen(model, "2x", IMAGE, grouped=grouped)
    conv = grown.model.layer1[0].conv2
    assert conv.groups == (4 if grouped == "width" else 8)
    assert conv.weight.shape == ((32, 8, 3, 3) if grouped == "width" else (32, 4, 3, 3))
    assert grown.report.verification.verdict == "preserved"


def test_odd_number_of_new_convolution_groups_preserves() -> None:
    grown = fxgrow.widen(_small_resnext(), "1.75x", IMAGE, grouped="count")
    assert grown.model.layer1[0].conv2.groups == 7
    assert grown.report.verification.verdict == "preserved"


def test_impossible_width_is_refused_with_the_nearest() -> None:
    grown = fxgrow.widen(_small_resnext(), "+6", IMAGE)
    reasons = {refused.name: refused.reason for refused in grown.plan.refused}
    assert "layer1.0.conv1" in reasons
    assert "possible: 20 or 24" in reasons["layer1.0.conv1"]
    assert grown.model.layer1[0].conv1.out_channels == 16
    with pytest.raises(PlanError, match=r"layer1\.0\.conv1 cannot be widened.*20 or 24"):
        fxgrow.widen(_small_resnext(), "+6", IMAGE, include=["layer1.0.conv1"])


def _small_resnext() -> nn.Module:
    torch.manual_seed(0)
    block = torchvision.models.resnet.Bottleneck
    model = torchvision.models.ResNet(
        block, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=4
    )
    return trained_looking(model).double().eval()


@pytest.mark.parametrize("blocks", [1, 3])
def test_without_norms_default_vt_scales_each_branch_by_the_root_of_the_ratio(blocks: int) -> None:
    torch.manual_seed(0)
    model = PlainResNet(blocks=blocks).double()
    grown = fxgrow.widen(model, "2x", rescaling="default_vt")
    for group in grown.plan.groups:
        assert group.preserves == "scaled"
        assert group.gain == pytest.approx(0.5**0.5)
        assert (group.alpha, group.beta) == (1.0, pytest.approx(0.5**0.5))
    verification = grown.report.verification
    assert verification.verdict == "as predicted"
    assert verification.eval.residual.max_rel <= 1e-10
    # the prediction, written out by hand: every branch of the old network scaled
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    stream = model.stem(x)
    for block in model.blocks:
        stream = stream + 0.5**0.5 * block.conv2(torch.relu(block.conv1(stream)))
    expected = model.head(stream.mean((2, 3)))
    assert max_rel(expected, grown.model(x)) <= 1e-10


def test_strict_refuses_what_is_not_exact() -> None:
    model = PlainResNet().double()
    with pytest.raises(NotPreservedError, match=r"blocks\.0\.conv1.*scaled by 0\.70") as caught:
        fxgrow.widen(model, "2x", rescaling="default_vt", strict=True)
    assert caught.value.exit_code == 4
    assert caught.value.name == "blocks.0.conv1"
    assert fxgrow.widen(model, "2x", strict=True).report.verification.verdict == "preserved"


@pytest.mark.parametrize("rescaling", RESCALINGS[1:])
@pytest.mark.parametrize("activation", [torch.relu, nn.functional.gelu])
def test_compensation_restores_the_function_and_keeps_the_weights(
    rescaling: str, activation: object
) -> None:
    torch.manual_seed(0)
    model = PlainResNet(activation=activation).double()  # type: ignore[arg-type]
    plain = fxgrow.widen(model, "2x", rescaling=rescaling)
    grown = fxgrow.widen(model, "2x", rescaling=rescaling, compensate=True)
    assert isinstance(grown.model, torch.fx.GraphModule)
    assert grown.report.verification.verdict == "preserved"
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert max_rel(model(x), grown.model(x)) <= 1e-10
    assert max_rel(model(x), plain.model(x)) > 1e-3
    one, other = plain.model.state_dict(), grown.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Thrice(nn.Module):
    """The same channels three times side by side, once behind a norm that takes the gain up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.parts = nn.ModuleList([nn.BatchNorm2d(4), nn.Identity(), nn.Identity()])
        self.last = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        x = torch.cat([part(x) for part in self.parts], 1)
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("compensate", [False, True])
def test_a_gain_that_reaches_a_concatenation_twice_is_taken_twice(compensate: bool) -> None:
    torch.manual_seed(0)
    grown = fxgrow.widen(
        Thrice().double(),
        "2x",
        torch.randn(2, 3, 8, 8, dtype=torch.float64),
        rescaling="default_vt",
        compensate=compensate,
    )
    verdict = "preserved" if compensate else "as predicted"
    assert grown.report.verification.verdict == verdict


def test_gain_before_a_function_that_is_not_homogeneous_is_announced() -> None:
    model = PlainResNet(activation=nn.functional.gelu).double()
    grown = fxgrow.widen(model, "2x", rescaling="vt_constraint_new_shape")
    group = grown.plan.groups[0]
    assert group.preserves == "no"
    assert "gelu" in group.reason
    assert "not homogeneous" in group.reason
    assert grown.report.verification.verdict == "as predicted"
    assert grown.report.verification.eval.residual.max_rel <= 1e-10


def test_nan_weights_are_named_and_widened_all_the_same(resnet: nn.Module) -> None:
    model = copy.deepcopy(resnet)
    with torch.no_grad():
        model.layer1[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.warns(FxgrowWarning, match=r"layer1\.0\.conv1\.weight has NaN"):
        grown = fxgrow.widen(model, "2x", IMAGE, include=["layer1.*"])
    assert grown.model.layer1[0].conv1.out_channels == 128
    assert grown.report.verification.verdict == "preserved"
    assert "NaN" in grown.report.verification.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_networks_are_preserved_within_their_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    ).to(dtype)
    grown = fxgrow.widen(model, "2x", rescaling="default_vt")
    assert {p.dtype for p in grown.model.parameters()} == {dtype}
    assert grown.report.verification.verdict == "preserved"
    assert grown.report.verification.eval.float64.max_rel <= 1e-10
    assert grown.report.verification.eval.native.max_rel <= 100 * torch.finfo(dtype).eps


def test_new_entries_receive_gradients(resnet: nn.Module) -> None:
    for pairing in ("vv_z_negz", "v_zero"):
        grown = fxgrow.widen(resnet, "2x", IMAGE, pairing=pairing)
        assert grown.report.verification.without_gradient == ()
    dead = fxgrow.widen(resnet, "2x", IMAGE, pairing="v_zero", init="zeros")
    assert "layer1.0.conv1.weight" in dead.report.verification.without_gradient


def test_twins_part_at_the_first_step() -> None:
    torch.manual_seed(0)
    model = PlainResNet()
    grown = fxgrow.widen(model, "2x").model
    first = grown.blocks[0].conv1.weight
    assert torch.equal(first[6:9], first[9:12])
    grown(torch.randn(2, 3, 8, 8)).square().sum().backward()
    with torch.no_grad():
        first -= 0.1 * first.grad
    assert not torch.allclose(first[6:9], first[9:12])


def test_wrong_surgery_fails_verification_and_names_the_group(
    resnet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxgrow.apply import module as apply

    honest = apply.grow_tensor

    def corrupted(plan: object, name: str, *rest: object) -> torch.Tensor:
        tensor = honest(plan, name, *rest)  # type: ignore[arg-type]
        if name == "layer3.0.conv2.weight":
            tensor[0, 0, 0, 0] += 1.0
        return tensor

    monkeypatch.setattr(apply, "grow_tensor", corrupted)
    with pytest.raises(VerificationError, match=r"first part that breaks is layer3\.0\.conv1"):
        fxgrow.widen(resnet, "2x", IMAGE)


def test_a_pairing_is_judged_by_its_layout_not_by_its_name(
    resnet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lopsided(count: int, old: int, seed: str) -> Layout:
        del old, seed
        return Layout(draws=tuple(i // 2 for i in range(count)), column_signs=(1,) * count)

    monkeypatch.setitem(PAIRINGS._entries, "lopsided", lopsided)
    plan = fxgrow.widen(resnet, "+4", pairing="lopsided", verify=False).plan
    assert {group.preserves for group in plan.groups} == {"no"}
    with pytest.raises(NotPreservedError, match="do not cancel"):
        fxgrow.widen(resnet, "+4", pairing="lopsided", strict=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": "0x"}, "only widens"),
        ({"width": "-3x"}, "cannot be read"),
        ({"width": "abc"}, "cannot be read"),
        ({"width": "1.5"}, "not a whole number"),
        ({"width": "32"}, "has 64 already"),
        ({"include": ["nothing.*"]}, "matches no channel group"),
        ({"width": {"layer9.*": "2x"}}, "matches no channel group"),
        ({"exclude": ["*"]}, "nothing to widen"),
        ({"rescaling": "vt"}, "no rescaling 'vt'"),
        ({"pairing": "twins"}, "no pairing 'twins'"),
        ({"init": "xavier"}, "no init 'xavier'"),
        ({"where": "everywhere"}, "where is 'everywhere'"),
        ({"grouped": "depth"}, "grouped is 'depth'"),
        ({"preset": "net3net"}, "no preset"),
        ({"gain": -1.0}, "gain must be positive"),
        ({"gain": "ReLu6"}, "no gain"),
        ({"noise": -0.1}, "noise must not be negative"),
        ({"multiple_of": 0}, "multiple_of must be"),
        ({"include": ["fc"]}, "output of the network"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(
    resnet: nn.Module, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        fxgrow.widen(resnet, **({"width": "2x"} | arguments))  # type: ignore[arg-type]


def test_widths_per_glob_multiples_and_exclusion(resnet: nn.Module) -> None:
    grown = fxgrow.widen(
        resnet, {"layer1.*": "+5", "layer2.*": "300", "*": "1.5x"}, IMAGE, exclude=["layer4.*"],
        multiple_of=8,
    )  # fmt: skip
    widths = {group.name: group.width for group in grown.plan.groups}
    assert widths == {
        "layer1.0.conv1": (64, 72),
        "layer2.0.conv1": (128, 304),
        "layer3.0.conv1": (256, 384),
    }
