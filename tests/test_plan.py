"""Plans are data: JSON both ways, bound to their source, the same in every place."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PlainResNet, max_rel, quick, small_images, small_resnet
from torch import nn

import fxgrow
from fxgrow.api import widen as api
from fxgrow.apply.module import apply_to_state_dict
from fxgrow.errors import PlanError, UsageError
from fxgrow.grow.identity.stages import new_blocks
from fxgrow.grow.sizes.widths import nearest_widths, new_width


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return small_resnet().double().eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rescaling": "default_vt", "where": "all"},
        {"width": {"layer1.*": "+3", "*": "2x"}, "pairing": "v_zero", "seed": 5},
        {"rescaling": "vt_constraint_new_shape", "gain": "relu", "exclude": ["layer2.*"]},
    ],
)
def test_plan_survives_json(resnet: nn.Module, settings: dict[str, object]) -> None:
    plan = api.plan(resnet, **({"width": "2x"} | settings))  # type: ignore[arg-type]
    assert fxgrow.Plan.from_json(plan.to_json()) == plan


def test_plan_holds_no_tensors_and_stays_small() -> None:
    plan = api.plan(quick("resnet50"), "2x")
    assert len(json.dumps(plan.to_dict())) < 250_000


def test_plan_from_json_gives_the_same_network(resnet: nn.Module) -> None:
    grown = fxgrow.widen(resnet, "2x", small_images(), rescaling="default_vt")
    again = fxgrow.Plan.from_json(grown.plan.to_json()).apply(resnet)
    one, other = grown.model.state_dict(), again.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_plan_of_one_network_serves_another_of_the_same_architecture(resnet: nn.Module) -> None:
    plan = api.plan(resnet, "2x")
    other = copy.deepcopy(resnet)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    grown = plan.apply(other)
    with torch.no_grad():
        assert max_rel(other(small_images()), grown(small_images())) <= 1e-10


def test_state_dict_and_module_grow_alike(resnet: nn.Module) -> None:
    plan = api.plan(resnet, "2x", rescaling="default_vt")
    from_module = plan.apply(resnet).state_dict()
    from_state_dict = apply_to_state_dict(plan, resnet.state_dict())
    assert list(from_module) == list(from_state_dict)
    assert all(torch.equal(from_module[name], from_state_dict[name]) for name in from_module)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda m: m.float(), r"float32\[.*float64\["),
        (lambda m: setattr(m, "fc", nn.Linear(512, 6).double()), "fc.bias is"),
        (lambda m: delattr(m, "fc"), r"has no fc\.bias"),
        (lambda m: setattr(m, "extra", nn.Linear(1, 1).double()), r"unexpected extra\.bias"),
    ],
)
def test_plan_is_refused_on_another_network(resnet: nn.Module, other: object, message: str) -> None:
    plan = api.plan(resnet, "2x")
    model = copy.deepcopy(resnet)
    other(model)  # type: ignore[operator]
    with pytest.raises(PlanError, match=message):
        plan.apply(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "schema"),
        ('{"schema": 3}', "schema is 3"),
        ('{"schema": 2}', "request is wrong"),
        ('{"schema": 1}', "wrong"),
    ],
)
def test_text_that_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fxgrow.Plan.from_json(text)


def test_a_field_of_the_wrong_type_is_named() -> None:
    data = api.plan(PlainResNet(), "2x").to_dict()
    data["tensors"]["blocks.0.conv1.weight"]["scale"] = "much"
    with pytest.raises(PlanError, match=r"tensors\.blocks\.0\.conv1\.weight\.scale"):
        fxgrow.Plan.from_dict(data)


@given(old=st.integers(1, 4096), extra=st.integers(0, 4096), multiple=st.integers(1, 64))
def test_widths_never_shrink_and_round_up(old: int, extra: int, multiple: int) -> None:
    width = new_width(f"+{extra}", old, multiple_of=multiple)
    assert old + extra <= width
    assert width == old + extra or (width % multiple == 0 and width < old + extra + multiple)
    assert new_width(str(old + extra), old) == old + extra
    assert new_width("2x", old) == 2 * old
    assert abs(new_width("1.5x", old) - 1.5 * old) <= 0.5


@given(old=st.integers(1, 64), more=st.integers(1, 64), tenths=st.integers(11, 40))
def test_blocks_and_widths_are_asked_for_in_one_language(old: int, more: int, tenths: int) -> None:
    for text in (f"+{more}", str(old + more), f" {tenths / 10}x "):
        width = new_width(text, old)
        assert width == old or new_blocks(text, old) == width - old
    for text in ("", "x", "-1", "+2x", "1.5", "+1.5", "2 x", "1e3", "٢y"):
        for read in (new_blocks, new_width):
            with pytest.raises(UsageError, match=r"cannot be read|not a whole number"):
                read(text, old)


@given(st.integers(1, 64), st.integers(1, 4096), st.integers(1, 4096))
def test_nearest_widths_are_possible_and_larger(granule: int, wanted: int, present: int) -> None:
    for text in nearest_widths(granule, wanted, present).split(" or "):
        assert not text or (int(text) % granule == 0 and int(text) > present)


@settings(deadline=None, max_examples=20)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    new=st.integers(0, 11),
    pairing=st.sampled_from(["vv_z_negz", "v_zero", "replicate"]),
    rescaling=st.sampled_from(["none", "default_vt", "vt_constraint_new_shape"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    data=st.data(),
)
def test_random_chains_are_preserved_or_predicted(
    widths: list[int],
    new: int,
    pairing: str,
    rescaling: str,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        groups = data.draw(st.sampled_from([1, width if channels == width else 1]))
        layers.append(nn.Conv2d(channels, width, 3, padding=1, groups=groups))
        if data.draw(st.booleans()):
            layers.append(nn.BatchNorm2d(width))
        layers.append(data.draw(st.sampled_from([nn.ReLU(), nn.GELU(), nn.PReLU(width)])))
        channels = width
    model = nn.Sequential(*layers, nn.Conv2d(channels, 2, 1)).to(dtype)
    example = torch.randn(2, 3, 6, 5, dtype=dtype)
    try:
        grown = fxgrow.widen(model, f"+{new}", example, pairing=pairing, rescaling=rescaling)
    except PlanError:
        return  # every width is one, or a depthwise layer ties everything to the input
    verification = grown.report.verification
    exact = all(group.preserves == "exact" for group in grown.plan.groups)
    assert verification.verdict == ("preserved" if exact else verification.verdict)
    assert verification.eval.residual.max_rel <= 1e-10
