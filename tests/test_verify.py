"""The judge can say no: corrupted networks fail, and what is measured is what is there."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PlainResNet, PreactivationNet, small_images, small_resnet
from torch import Tensor, nn

import fxgrow
from fxgrow.api import widen as api


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return small_resnet().eval()


def test_a_network_equals_its_copy(resnet: nn.Module) -> None:
    found = fxgrow.verify(resnet, copy.deepcopy(resnet), small_images().float())
    assert found.verdict == "preserved"
    assert found.eval.float64.max_rel == found.train.float64.max_rel == 0.0
    assert found.inputs == ("3x3x40x33", "3x3x40x33")


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_corrupted_weight_is_found(data: st.DataObject) -> None:
    torch.manual_seed(0)
    before = PlainResNet()
    after = fxgrow.widen(before, "2x", verify=False).model
    names = [name for name, _ in after.named_parameters()]
    name = data.draw(st.sampled_from(names))
    parameter = after.get_parameter(name)
    index = data.draw(st.integers(0, parameter.numel() - 1))
    with torch.no_grad():
        parameter.view(-1)[index] += 0.5
    assert fxgrow.verify(before, after, torch.randn(2, 3, 8, 8)).verdict == "failed"


def test_corrupted_running_statistics_are_found_in_eval_mode() -> None:
    before = PreactivationNet("identity")
    after = copy.deepcopy(before)
    after.norm.running_mean += 1.0
    found = fxgrow.verify(before, after)
    assert found.verdict == "failed"
    assert found.eval.float64.max_rel > 1e-3
    assert found.train.float64.max_rel == 0.0


def test_a_difference_in_train_mode_alone_is_found() -> None:
    before = PreactivationNet("identity")
    after = copy.deepcopy(before)
    after.norm.eps = 0.5
    after.norm.running_var += 1e-5 - 0.5
    found = fxgrow.verify(before, after)
    assert found.verdict == "failed"
    assert found.eval.float64.max_rel < 1e-6
    assert found.train.float64.max_rel > 1e-2


def test_networks_with_other_outputs_fail_and_are_measured_as_infinite() -> None:
    found = fxgrow.verify(nn.Linear(3, 4), nn.Linear(3, 5))
    assert found.verdict == "failed"
    assert found.eval.float64.max_rel == float("inf")


def test_a_network_that_does_not_run_where_the_other_does_is_another() -> None:
    found = fxgrow.verify(nn.Linear(3, 4), nn.Linear(5, 4))
    assert found.verdict == "failed"
    assert "does not run where the first does: " in found.notes[0]
    assert "mat1 and mat2" in found.notes[0]


def test_nan_in_the_grown_network_fails() -> None:
    before = PlainResNet()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.head.weight[0, 0] = float("nan")
    found = fxgrow.verify(before, after, torch.randn(2, 3, 8, 8))
    assert found.verdict == "failed"


def test_judging_touches_neither_network(resnet: nn.Module) -> None:
    model = copy.deepcopy(resnet).train()
    state = copy.deepcopy(model.state_dict())
    grown = fxgrow.widen(model, "2x", small_images().float(), rescaling="default_vt")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert grown.model.training
    assert all(parameter.grad is None for parameter in grown.model.parameters())
    again = grown.plan.apply(model).state_dict()
    assert all(torch.equal(again[name], value) for name, value in grown.model.state_dict().items())


def test_train_mode_prediction_includes_channels_of_vanishing_variance(resnet: nn.Module) -> None:
    """Where s²·(var + eps) < eps the norm's weight takes part of the gain; train mode shows it."""
    model = copy.deepcopy(resnet).double()
    model.layer1[0].bn2.running_var[:8] = 0.0
    grown = fxgrow.widen(
        model, "2x", small_images(), rescaling="default_vt", include=["layer1.0.conv1"]
    )
    bn = grown.model.layer1[0].bn2
    assert (bn.running_var[:8] == 0).all()
    assert torch.allclose(bn.weight[:8].abs(), model.layer1[0].bn2.weight[:8].abs() * 2**0.5)
    verification = grown.report.verification
    assert verification.eval.float64.max_rel <= 1e-10
    assert verification.train.residual.max_rel <= 1e-10
    assert verification.train.predicted.max_rel > 1e-8


def test_two_sizes_are_used_where_the_input_was_inferred(resnet: nn.Module) -> None:
    grown = fxgrow.widen(resnet, "2x", include=["layer1.*"])
    assert grown.report.verification.inputs == ("2x3x64x64", "3x3x96x80")


def test_the_report_of_a_skipped_verification_says_so(resnet: nn.Module) -> None:
    grown = fxgrow.widen(resnet, "2x", verify=False)
    assert grown.report.to_dict()["verification"]["verdict"] == "skipped"


def test_outputs_may_be_nested() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"out": self.body(x), "rest": (x, [x * 2])}

    grown = fxgrow.widen(TwoOutputs(), "2x")
    assert grown.report.verification.verdict == "preserved"
    assert [group.name for group in grown.plan.groups] == ["body.0"]


def test_models_with_several_inputs_take_a_tuple() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(5, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.a(x) + self.b(y)))

    inputs = (torch.randn(3, 4), torch.randn(3, 5))
    plan = api.plan(TwoInputs(), "2x", inputs, where="all")
    assert plan.groups[0].writers == ("a", "b")
    assert fxgrow.widen(TwoInputs(), "2x", inputs, where="all").report.verification.verdict == (
        "preserved"
    )


@pytest.mark.filterwarnings("ignore:.*eps becomes")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("rescaling", ["default_vt", "vt_constraint_new_shape"])
def test_norms_without_weights_and_norms_used_twice_are_foretold(
    affine: bool, twice: bool, rescaling: str
) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 2)
    middle = [norm, nn.ReLU(), norm] if twice else [norm, nn.ReLU()]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), *middle, nn.Conv2d(4, 2, 3)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x, rescaling=rescaling)
    assert grown.report.verification.verdict == "as predicted"
    assert grown.plan.preserves == ("no" if twice and rescaling != "default_vt" else "scaled")


def test_inputs_too_small_for_train_mode_are_told():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(fxgrow.VerificationError, match=r"in train mode: .*larger batch"):
        fxgrow.widen(net, "2x", torch.randn(1, 3, 3, 3))


class Doubled(nn.Module):
    """A network that doubles what is between its layers by an operation of its own."""

    def __init__(self, double: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.double = nn.Linear(4, 8), nn.Linear(8, 2), double

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.double(self.first(x)))


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


_POINTWISE = (torch.Tag.pointwise,)
_custom = torch.library.custom_op("fxgrow_tests::custom", _double, mutates_args=(), tags=_POINTWISE)
_custom.register_fake(torch.empty_like)
_taught = torch.library.custom_op("fxgrow_tests::taught", _double, mutates_args=(), tags=_POINTWISE)
_taught.register_fake(torch.empty_like)
_taught.register_autograd(lambda _, gradient: 2 * gradient)
_LIBRARY = torch.library.Library("fxgrow_tests", "FRAGMENT")
_LIBRARY.define("defined(Tensor x) -> Tensor", tags=_POINTWISE)
_LIBRARY.impl("defined", _double, "CPU")
_LIBRARY.impl("defined", torch.empty_like, "Meta")


@pytest.mark.filterwarnings("default")  # as users run it
@pytest.mark.parametrize("name", ["custom", "defined"])
def test_gradients_through_an_operation_without_autograd_are_not_checked_and_that_is_told(
    name: str,
) -> None:
    grown = fxgrow.widen(Doubled(getattr(torch.ops.fxgrow_tests, name)), "2x", torch.randn(3, 4))
    found = grown.report.verification
    assert (found.verdict, found.without_gradient) == ("preserved", ())
    (note,) = found.notes
    assert note.startswith("gradients of first.weight, first.bias, last.weight were not checked: ")
    assert f"fxgrow_tests.{name}" in note.replace("::", ".")
    assert note in str(grown.report).replace("\n", " ")


def test_gradients_through_an_operation_that_has_a_derivative_are_checked() -> None:
    taught = Doubled(torch.ops.fxgrow_tests.taught)
    assert fxgrow.widen(taught, "2x", torch.randn(3, 4)).report.verification.notes == ()
    dead = Doubled(lambda x: torch.ops.fxgrow_tests.taught(x.detach()))
    found = fxgrow.widen(dead, "2x", torch.randn(3, 4)).report.verification
    assert found.without_gradient == ("first.weight", "first.bias")


def test_gradients_are_checked_with_constants_in_the_precision_of_the_check() -> None:
    faded_in = Doubled(lambda x: torch.lerp(torch.zeros(x.shape), x, 1.0))
    found = fxgrow.widen(faded_in, "2x", torch.randn(3, 4)).report.verification
    assert (found.verdict, found.without_gradient, found.notes) == ("preserved", (), ())


class Emptied(nn.Module):
    """A norm and a softmax in float32; a mask of float64's lowest number leaves some rows empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.value, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        stream = self.first(x)
        normed = stream.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + 1e-6)
        scores = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
        scores = scores.masked_fill(~kept[:, None], torch.finfo(x.dtype).min)
        scores = scores.masked_fill(~kept[:, :, None], torch.finfo(x.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(x.dtype)
        return self.last(stream + weights @ self.value(normed.to(x.dtype)))


def test_rounding_is_measured_where_a_network_gives_numbers() -> None:
    torch.manual_seed(0)
    kept = torch.ones(2, 5, dtype=torch.bool)
    kept[1, :2] = False
    inputs = torch.randn(2, 5, 6, dtype=torch.float64), kept
    old = Emptied().double()
    assert old(*inputs).isnan().sum() == 6
    grown = fxgrow.widen(old, "1.5x", inputs, where="all")
    assert grown.report.verification.verdict == "preserved"
    assert 1e-9 < grown.report.verification.eval.rounding.max_rel < 1e-6
    grown.model.value.weight.data[0] += 1e-3
    assert fxgrow.verify(old, grown.model, inputs).verdict == "failed"


class Weighed(nn.Module):
    """Channels weighed by their mean and largest value, and a flatten of a fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 3)
        self.mlp = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        samples, channels, *sides = x.size()
        mean = nn.functional.avg_pool2d(x, sides).view(samples, channels)
        most = nn.functional.max_pool2d(x, sides).view(samples, -1)
        weight = torch.sigmoid(self.mlp(mean) + self.mlp(most)).view(samples, channels, 1, 1)
        return self.last((x * weight).view(-1, 8 * 4 * 4))


@pytest.mark.filterwarnings("ignore::fxgrow.FxgrowWarning")
def test_images_that_a_flatten_makes_several_samples_of_are_not_judged_on() -> None:
    images = torch.randn(2, 3, 4, 4)
    grown = fxgrow.widen(Weighed(), "2x", images, where="all")
    found = grown.report.verification
    assert found.verdict == "preserved"
    (note,) = (note for note in found.notes if "flatten" in note)
    assert "8x8" in note
    assert "not judged" in note
