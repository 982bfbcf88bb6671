"""Larger kernels: the algebra of taps against torch, real networks, sharing, refusals, training."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import torchvision_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxgrow
from fxgrow.api import kernels
from fxgrow.grow.kernels.taps import Convolution, Enlarged, enlarged, new_kernel

LAYERS = {
    (dims, transposed): getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    for dims in (1, 2, 3)
    for transposed in (False, True)
}
# torch warns that padding by 'same' may copy the input of an even kernel; so does the report.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def built(convolution: Convolution, channels: tuple[int, int, int] = (4, 4, 2)) -> nn.Module:
    """Return a float64 layer with these settings, made by torch's own constructor."""
    ins, outs, groups = channels
    more = {"output_padding": convolution.output_padding} if convolution.transposed else {}
    layer = LAYERS[len(convolution.kernel), convolution.transposed]
    return layer(
        ins, outs, convolution.kernel, convolution.stride, convolution.padding,
        dilation=convolution.dilation, groups=groups, dtype=torch.float64,
        padding_mode=convolution.padding_mode, **more,
    )  # fmt: skip


@st.composite
def convolutions(draw: st.DrawFn, most: int = 3) -> Convolution:
    dims = draw(st.integers(1, most))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    transposed = draw(st.booleans())
    stride, dilation, kernel = each(1, 3), each(1, 3), each(1, 4)
    output_padding = (0,) * dims
    padding: tuple[int, ...] | str = each(0, 3)
    mode = "zeros"
    if transposed:
        output_padding = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if draw(st.integers(0, 3)) == 0:
            padding = draw(st.sampled_from(["same", "valid"]))
            stride = (1,) * dims if padding == "same" else stride
    return Convolution(kernel, stride, dilation, padding, output_padding, transposed, mode)


def input_for(*convolutions: Convolution, extra: int = 0) -> tuple[int, ...]:
    """Return sizes that all of these convolutions take and give at least an output for."""
    return tuple(
        extra
        + max(
            max(c.least_input[i], 1 + c.dilation[i] * (c.kernel[i] - 1), 1 + sum(c.sides[i]))
            for c in convolutions
        )
        for i in range(len(convolutions[0].kernel))
    )


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_an_enlarged_convolution_computes_the_same(data: st.DataObject) -> None:
    old = data.draw(convolutions())
    more = [data.draw(st.integers(0, 4)) for _ in old.kernel]
    kernel = tuple(k + m for k, m in zip(old.kernel, more, strict=True))
    found = enlarged(old, kernel)
    if isinstance(found, str):
        assert any(m % 2 for m in more)  # an even difference can always be had
        assert "Sizes that work: " in found
        return
    before, after = built(old), built(found.convolution)
    with torch.no_grad():
        after.bias.copy_(before.bias)
        after.weight.zero_()
        where = tuple(slice(b, b + k) for b, k in zip(found.before, old.kernel, strict=True))
        after.weight[(..., *where)] = before.weight
        for extra in (0, 1, 2):
            x = torch.randn(2, 4, *input_for(old, found.convolution, extra=extra)).double()
            torch.testing.assert_close(after(x), before(x), rtol=1e-12, atol=1e-12)


def _fits(old: Convolution, new: Convolution, before: int) -> bool:
    """Return whether a layer computes the same at each of several sizes, tap for tap."""
    try:
        one, other = built(old, (1, 1, 1)), built(new, (1, 1, 1))
    except ValueError:
        return False
    with torch.no_grad():
        other.bias.copy_(one.bias)
        other.weight.zero_()
        other.weight[..., before : before + old.kernel[0]] = one.weight
        for size in range(12, 18):
            x = torch.randn(1, 1, size).double()
            try:
                y, z = one(x), other(x)
            except RuntimeError:
                return False
            if y.shape != z.shape or not torch.allclose(y, z, rtol=1e-9, atol=1e-12):
                return False
    return True


@settings(deadline=None, max_examples=25)
@given(convolutions(most=1), st.sampled_from([1, 3]))
def test_what_is_refused_cannot_be_had_by_any_settings(old: Convolution, more: int) -> None:
    kernel = (old.kernel[0] + more,)
    if isinstance(enlarged(old, kernel), Enlarged):
        return
    paddings: list[tuple[int, ...] | str] = [(p,) for p in range(14)]
    paddings += ["same"] if old.stride == (1,) and not old.transposed else []
    outputs = range(max(old.stride[0], old.dilation[0])) if old.transposed else (0,)
    for padding, output_padding in itertools.product(paddings, outputs):
        new = replace(old, kernel=kernel, padding=padding, output_padding=(output_padding,))
        assert not [before for before in range(more + 1) if _fits(old, new, before)], new


@pytest.mark.parametrize(
    ("size", "old", "new"),
    [("5", (3, 3), (5, 5)), ("5x3", (3, 3), (5, 3)), ("+2", (1, 7), (3, 9)),
     ("+2x+0", (3, 3), (5, 3)), ("3", (3,), (3,))],
)  # fmt: skip
def test_a_size_is_read(size, old, new):
    assert new_kernel(size, old) == new


@pytest.mark.parametrize(
    ("size", "message"),
    [("5x5x5", "has 3 numbers"), ("3x1", "would shrink to 3x1")],
)
def test_a_size_that_cannot_be_is_refused(size, message):
    assert message in new_kernel(size, (3, 3))


@pytest.mark.parametrize("size", ["2x", "big", "-2", ""])
def test_a_malformed_size_is_refused(size):
    with pytest.raises(fxgrow.PlanError, match="cannot be read"):
        new_kernel(size, (3, 3))


def vgg() -> nn.Module:
    model = torchvision_model("vgg11_bn", num_classes=5)
    model.classifier = nn.Linear(512 * 7 * 7, 5).double()  # its own takes a gigabyte
    return model.eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # which is zero at first
    return model.double().eval()


def convnext() -> nn.Module:
    model = torchvision_model("convnext_tiny", num_classes=5)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):  # which hides the branches at first
            nn.init.ones_(parameter)
    return model


# What is asked for, the number of layers that grow, and what refusals say.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, str], int, str]] = {
    "resnet18": (
        lambda: torchvision_model("resnet18", num_classes=5),
        {"conv1": "9", "*.conv1": "5", "*.conv2": "4", "*downsample*": "+2"}, 20, "",
    ),
    "resnet50": (
        lambda: torchvision_model("resnet50", num_classes=5),
        {"conv1": "3", "layer[12]*.conv2": "+2", "layer3.*.conv2": "+1"}, 12,
        "would shrink|from 3x3 to 4x4",
    ),
    "densenet121": (
        lambda: torchvision_model("densenet121", num_classes=5),
        {"*.conv2": "5x3", "features.transition*": "3"}, 61, "",
    ),
    "vgg11_bn": (vgg, {"*": "+2"}, 8, ""),
    "mobilenet_v3_small": (
        lambda: torchvision_model("mobilenet_v3_small", num_classes=5), {"*": "+2"}, 52, "",
    ),
    "convnext_tiny": (
        convnext,
        {"features.0.0": "+2", "*.block.0": "9", "features.[246].1": "3"}, 19, "from 2x2 to 3x3",
    ),
    "vit": (vit, {"conv_proj": "10"}, 1, ""),
    "swin_t": (lambda: torchvision_model("swin_t", num_classes=5), {"*": "+2"}, 1, ""),
}  # fmt: skip


QUICK = ("resnet18", "mobilenet_v3_small", "vit")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.sweep) for n in NETWORKS]
)
def test_a_network_is_preserved_or_its_refusals_are_told(name):
    build, sizes, count, refusals = NETWORKS[name]
    model = build()
    side = 32 if name in ("vit", "resnet18") else 64
    grown = fxgrow.morph_kernel(model, sizes, torch.randn(2, 3, side, side).double())
    found = grown.report.verification
    assert found.verdict == "preserved"
    assert found.eval is not None
    assert found.train is not None
    assert grown.model(torch.randn(2, 3, side, side).double()).abs().max() > 1e-3
    assert max(found.eval.float64.max_rel, found.train.float64.max_rel) <= 1e-10
    assert type(grown.model) is type(model)
    assert len(grown.plan.kernels) == count
    assert all(re.search(refusals, refusal.reason) for refusal in grown.plan.refused)
    assert bool(refusals) == bool(grown.plan.refused)


class Net(nn.Module):
    """Convolutions of which some share their weights, in a forward that can be changed."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 1)
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self._forward(self, x) if self._forward else self.two(self.one(x).relu())


INPUT = torch.randn(2, 3, 12, 12)


def morphed(net: nn.Module, size: str | dict[str, str], *include: str) -> fxgrow.Grown:
    """Return the network with larger kernels, which it keeps its function with."""
    grown = fxgrow.morph_kernel(net, size, INPUT, include=include)
    found = grown.report.verification
    assert found.verdict == "preserved"
    assert found.without_gradient == ()
    return grown


def reason_of(net: nn.Module, size: str, layer: str) -> str:
    """Return why a layer's kernel cannot grow."""
    with pytest.raises(fxgrow.PlanError) as caught:
        fxgrow.morph_kernel(net, size, INPUT, include=[layer])
    assert caught.value.name == layer
    return caught.value.message


def test_a_tied_weight_grows_in_both_layers_and_stays_tied():
    net = Net()
    net.two.weight = net.one.weight
    grown = morphed(net, "5", "two").model
    assert grown.one.weight is grown.two.weight
    assert (grown.one.kernel_size, grown.one.padding) == ((5, 5), (2, 2))
    assert (grown.two.kernel_size, grown.two.padding) == ((5, 5), (4, 4))
    assert grown.stem.kernel_size == (1, 1)


def test_a_tied_weight_with_taps_at_different_places_is_refused():
    net = Net()
    net.one = nn.Conv2d(4, 4, 3, padding=1, stride=1)
    net.two = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
    net.one.weight = net.two.weight
    assert "at different places" in reason_of(net, "4", "one")


def test_a_layer_that_is_called_twice_grows_once():
    grown = morphed(Net(lambda net, x: net.one(net.one(x).relu())), "5", "one")
    assert [kernel.name for kernel in grown.plan.kernels] == ["one"]


def test_a_weight_that_something_else_uses_is_refused():
    functional = Net(lambda net, x: net.one(x) + F.conv2d(x, net.one.weight, padding=1))
    assert "also used in the model's own forward (convolution)" in reason_of(functional, "5", "one")
    penalty = Net(lambda net, x: net.one(x) + net.one.weight.square().mean())
    assert "also used in the model's own forward" in reason_of(penalty, "5", "one")
    raw = Net()
    raw.kept = raw.one.weight
    assert "its weight is also kept: it is a parameter of the whole" in reason_of(raw, "5", "one")


def test_a_convolution_in_a_forward_is_refused():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, padding=1)

    net = Net()
    net.one = Functional()
    assert "the forward of Functional convolves by itself" in reason_of(net, "5", "one")


def test_a_forward_of_its_own_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), True), self.bias)

    net = Net()
    net.one = Standardised(4, 4, 3, padding=1)
    assert "Standardised has a forward of its own" in reason_of(net, "5", "one")
    net = Net()
    net.one.forward = lambda x: x
    assert "Conv2d has a forward of its own" in reason_of(net, "5", "one")


@pytest.mark.parametrize("rule", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_computed_weight_is_refused(rule):
    net = Net()
    rule(net.one)
    assert "computed from other parameters" in reason_of(net, "5", "one")


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("size", ["5", "6"])
def test_a_padding_mode_is_kept(mode, size):
    net = Net()
    net.one = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
    layer = morphed(net, size, "one").model.one
    again = nn.Conv2d(4, 4, int(size), padding=layer.padding, padding_mode=mode)
    state = {k: v for k, v in vars(layer).items() if not k.startswith("_par")}
    same = "_reversed_padding_repeated_twice"
    assert tuple(getattr(layer, same)) == tuple(getattr(again, same))
    assert state["padding"] == ((2, 2) if size == "5" else "same")


@pytest.mark.parametrize(("mode", "fits"), [("reflect", 23), ("circular", 25)])
def test_a_padding_that_the_input_is_too_short_for_is_refused(mode, fits):
    net = Net()
    net.one = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
    size = str(fits + 2)
    least = "13x13"
    reason = reason_of(net, size, "one")
    assert f"its {mode} padding would take inputs of at least {least}, and it gets 12x12" in reason
    (kernel,) = morphed(net, str(fits), "one").plan.kernels
    assert kernel.reason == f"its {mode} padding takes inputs of at least 12x12"


def test_a_transposed_convolution_trades_output_padding_for_a_tap():
    net = Net()
    net.one = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)
    grown = morphed(net, "4", "one")
    assert (grown.model.one.padding, grown.model.one.output_padding) == ((1, 1), (0, 0))
    assert grown.plan.kernels[0].reason == "its output_padding of 1x1 becomes 0x0"


def test_a_request_that_selects_nothing_is_refused():
    with pytest.raises(fxgrow.PlanError, match="matches no layer") as caught:
        fxgrow.morph_kernel(Net(), "5", INPUT, include=["onee"])
    assert caught.value.way_out == "Near it: one."
    with pytest.raises(fxgrow.PlanError, match="none of the 2"):
        fxgrow.morph_kernel(Net(), "3", INPUT, include=["one", "two"])
    with pytest.raises(fxgrow.PlanError, match="'huge' cannot be read"):
        fxgrow.morph_kernel(Net(), {"one": "5", "two": "huge"}, INPUT)
    with pytest.raises(fxgrow.PlanError, match="no layer is left"):
        fxgrow.morph_kernel(Net(), "3", INPUT, exclude=["*"])


def test_code_that_reads_the_padding_is_noticed():
    net = Net(lambda net, x: net.two(net.one(x)[..., : -net.one.padding[0]]))
    with pytest.raises(fxgrow.PlanError, match="two gives outputs of 2x4x12x10 instead of"):
        fxgrow.morph_kernel(net, "5", INPUT, include=["one"])


@pytest.mark.parametrize("guilty", ["stem", "one", "two"])
def test_a_wrong_plan_fails_its_verification_by_name(guilty):
    net = Net()
    made = kernels.plan(net, "5", INPUT)
    edit = made.tensors[f"{guilty}.weight"]
    axes = tuple(replace(axis, runs=axis.runs[1:2] + axis.runs[::2]) for axis in edit.axes)
    wrong = {**made.tensors, f"{guilty}.weight": replace(edit, axes=axes)}
    with pytest.raises(fxgrow.VerificationError, match=f"first part that breaks is {guilty}"):
        fxgrow.api.widen.carry_out(replace(made, tensors=wrong), net, INPUT)


def test_new_taps_train_from_the_first_step():
    net = morphed(Net(), "5").model
    target = torch.randn(2, 4, 12, 12)
    losses = []
    for _ in range(2):
        loss = F.mse_loss(net(INPUT), target)
        losses.append(loss.item())
        loss.backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    assert losses[1] < losses[0]
    for layer in (net.one, net.two, net.stem):
        assert bool((layer.weight.abs().sum((0, 1)) > 0).all())


def test_a_plan_is_data_and_the_input_is_untouched():
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    made = kernels.plan(net, {"one": "4", "*": "+2"}, INPUT)
    again = fxgrow.Plan.from_json(made.to_json())
    assert again == made
    grown = again.apply(net)
    assert grown.one.padding == "same"
    torch.testing.assert_close(grown(INPUT), net(INPUT))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert net.one.padding == (1, 1)


def test_the_whole_need_not_be_followed():
    net = nn.ModuleDict({"body": Net(), "rest": nn.Linear(2, 2)})
    grown = fxgrow.morph_kernel(net, "5", INPUT, include=["*.one"], module="body")
    assert grown.model["body"].one.kernel_size == (5, 5)
    assert grown.plan.scopes[0].module == "body"
    assert grown.report.verification.verdict == "preserved"


def test_a_lone_convolution_is_no_layer_of_a_network():
    assert "a parameter of the whole (Conv2d)" in reason_of(nn.Conv2d(3, 4, 3), "5", "weight")


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_what_is_measured_is_large_enough_for_the_new_taps(mode):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 2, 1, stride=32), nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode)
    )
    found = fxgrow.morph_kernel(net, {"1": "7"}).report.verification
    assert found.inputs[0] == "2x3x224x224"  # 7x7 inside, where 64x64 would be 2x2
    assert (found.verdict, found.without_gradient) == ("preserved", ())


def test_the_report_tells_of_kernels_and_refusals():
    net = Net()
    net.two = nn.Conv2d(4, 4, 3, padding=1, stride=2)
    report = fxgrow.morph_kernel(net, {"*": "4"}, INPUT).report
    text = str(report)
    for part in (
        "kernel size *=4", "1x1 → 4x4  0x0 → same  exact", "3x3 → 4x4  1x1 → same  exact",
        "not grown:\n  two  from 3x3 to 4x4", "Sizes that work: 5x5", "once more on the right",
    ):  # fmt: skip
        assert part in text
    data = report.to_dict()
    assert data["kernels"][1] == {
        "name": "one", "before": [3, 3], "after": [4, 4], "padding": [[1, 1], "same"],
        "preserves": "exact", "reason": "padded once more on the right, which may copy the input",
    }  # fmt: skip
    assert data["request"]["size"] == {"*": "4"}
    assert data["flops"][0] < data["flops"][1]
