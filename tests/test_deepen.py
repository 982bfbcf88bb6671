"""Deeper networks that compute what they did."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from types import MethodType

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import torchvision_model
from sklearn.datasets import load_digits
from torch import nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.api import widen as api
from fxgrow.api.deepen import plan_deepening
from fxgrow.cli.app import app
from fxgrow.cli.options import METHOD_NAMES
from fxgrow.grow.identity.concrete_run import record
from fxgrow.grow.identity.filling import METHODS
from fxgrow.labels.trace import trace

RESNET34 = {"layer1": "+1", "layer2": "+2", "layer3": "+4", "layer4": "+1"}
INPUTS = torch.randn(2, 3, 64, 64, dtype=torch.float64)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision_model("resnet18", num_classes=5)


@pytest.mark.parametrize("method", ["r2deeper", "zero_last"])
def test_resnet18_becomes_resnet34(resnet, method):
    grown = fxgrow.deepen(resnet, RESNET34, INPUTS, method)
    assert exact(grown)
    sibling = torchvision.models.resnet34(num_classes=5).double().eval()
    assert list(grown.model.state_dict()) == list(sibling.state_dict())
    sibling.load_state_dict(grown.model.state_dict(), strict=True)
    torch.testing.assert_close(sibling(INPUTS), resnet(INPUTS), rtol=1e-10, atol=1e-10)
    assert len(resnet.layer3) == 2
    assert all(
        torch.equal(tensor, grown.model.state_dict()[name])
        for name, tensor in resnet.state_dict().items()
    )


def exact(grown):
    """Return whether a grown network was measured to be the same to 1e-10, in both modes."""
    found = grown.report.verification
    results = (found.eval, found.train)
    return found.verdict == "preserved" and all(r.float64.max_rel <= 1e-10 for r in results)


def test_every_new_weight_of_r2deeper_is_free(resnet):
    grown = fxgrow.deepen(resnet, {"layer2": "+1"}, INPUTS)
    block = grown.model.layer2[2]
    for conv in (block.conv1, block.conv2):
        assert not (conv.weight == 0).any()
    assert torch.equal(block.conv1.weight[:64], block.conv1.weight[64:])
    assert torch.equal(block.conv2.weight[:, :64], -block.conv2.weight[:, 64:])
    assert grown.report.verification.without_gradient == ()


def test_the_methods_in_the_help_are_the_registered_ones():
    assert set(METHODS) == set(METHOD_NAMES)


def test_a_plan_is_data(resnet):
    plan = plan_deepening(resnet, {"layer1.0": "+1"}, INPUTS)
    again = fxgrow.Plan.from_json(plan.to_json())
    assert again == plan
    deeper = again.apply(resnet)
    assert deeper.layer1[2] is not resnet.layer1[1]
    assert torch.equal(deeper.layer1[2].conv1.weight, resnet.layer1[1].conv1.weight)
    torch.testing.assert_close(deeper(INPUTS), resnet(INPUTS), rtol=1e-10, atol=1e-10)
    assert json.loads(plan.to_json())["blocks"][0]["name"] == "layer1.1"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"layer9": "+1"}, r"no stage 'layer9'.*Near it: layer[1-4].*Stages: layer1, layer2"),
        ({"fc": "+1"}, "fc is a Linear, no list of blocks"),
        ({"layer1": "2"}, "has 2 already"),
        ({"layer1": "two"}, "cannot be read"),
        ({"layer1": "+1.5"}, "not a whole number"),
        ({}, "cannot be read"),
        ({"layer1": "+1", "layer1.0": "+1"}, "in one list of modules"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(resnet, blocks, message):
    with pytest.raises(fxgrow.PlanError, match=message):
        plan_deepening(resnet, blocks, INPUTS)


def test_an_unknown_method_is_refused(resnet):
    with pytest.raises(fxgrow.PlanError, match="r2deeper"):
        plan_deepening(resnet, {"layer1": "+1"}, INPUTS, method="deeper")


def test_a_stage_whose_only_block_projects_is_refused():
    net = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5
    )
    with pytest.raises(fxgrow.PlanError, match=r"shortcut of layer2\.0 projects.*downsample\.0"):
        plan_deepening(net, {"layer2": "+1"}, INPUTS)


def test_a_dense_block_is_refused():
    net = torchvision.models.densenet.DenseNet(8, (2, 2), 16, num_classes=5)
    with pytest.raises(fxgrow.PlanError, match=r"joined to other channels.*have to widen"):
        plan_deepening(net, {"features.denseblock1": "+1"}, INPUTS)


def test_a_list_that_is_no_run_is_refused():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(fxgrow.PlanError, match=r"takes 2x4 and gives 2x8|no shortcut around it"):
        plan_deepening(net, {"2": "+1"}, torch.randn(2, 4))


def test_the_command_writes_a_file_that_loads(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=5)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    arguments = ["deepen", str(tmp_path / "model.pt"), "--stage", "layer3", "--blocks", "+2"]
    arguments += ["--input-shape", "2x3x32x32", "-o", str(tmp_path / "deeper.pt")]
    result = CliRunner().invoke(app, [*arguments, "--report", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    assert "layer3.2, layer3.3" in result.output
    deeper = fxgrow.load(tmp_path / "deeper.pt")
    assert len(deeper.layer3) == 4
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(deeper(images), net.eval()(images), rtol=1e-4, atol=1e-5)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [block["name"] for block in report["blocks"]] == ["layer3.2", "layer3.3"]


def test_the_command_plans_and_applies(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "model.pt")
    source, plan = str(tmp_path / "model.pt"), str(tmp_path / "plan.json")
    arguments = ["deepen", source, "--blocks", "layer1=+1", "--blocks", "layer2=2x"]
    arguments += ["--dry-run", "--plan", plan, "--input-shape", "2x3x32x32"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, ["apply", plan, source, "--no-verify"]).exit_code == 0
    written = next(tmp_path.glob("model-*.pt"))
    assert len(fxgrow.load(written).layer2) == 4


@pytest.mark.parametrize("arguments", [["--blocks", "+2"], ["--blocks", "a=+1", "--blocks", "a=2"]])
def test_the_command_refuses_numbers_without_a_stage_of_their_own(tmp_path, arguments):
    result = CliRunner().invoke(app, ["deepen", str(tmp_path / "none.pt"), *arguments])
    assert result.exit_code == 2
    assert "numbers of blocks" in result.stderr


# ── what a network may be made of ─────────────────────────────────────────────────────────────


class Branch(nn.Module):
    """A residual block of which the test chooses the pieces."""

    def __init__(self, width, hidden, layers, norm, gate, after):
        super().__init__()
        sizes = [width] + [hidden] * (layers - 1) + [width]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(norm(b) for b in sizes[1:])
        self.gate = nn.Conv2d(width, width, 1) if gate else None
        self.after = after

    def forward(self, x):
        y = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(F.relu(y)))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return self.after(x + y)


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(2, 5),
    hidden=st.integers(1, 5),
    layers=st.integers(1, 3),
    norm=st.sampled_from([nn.BatchNorm2d, lambda n: nn.GroupNorm(1, n), lambda n: nn.Identity()]),
    gate=st.booleans(),
    after=st.sampled_from([nn.ReLU(), nn.Identity(), nn.Hardtanh(), nn.GELU(), nn.Tanh()]),
    method=st.sampled_from(["r2deeper", "zero_last"]),
    blocks=st.sampled_from(["+1", "2x"]),
)
def test_random_residual_blocks_are_kept_or_refused(
    width, hidden, layers, norm, gate, after, method, blocks
):
    torch.manual_seed(0)
    made = [Branch(width, hidden, layers, norm, gate, after) for _ in range(2)]
    net = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Sequential(*made)).double()
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    if isinstance(after, (nn.GELU, nn.Tanh)):
        with pytest.raises(fxgrow.PlanError, match="follows the addition and does not keep"):
            fxgrow.deepen(net, {"2": blocks}, images, method)
    else:
        assert exact(fxgrow.deepen(net, {"2": blocks}, images, method))


class Noisy(nn.Module):
    """A residual block that adds noise in train mode."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 1) for _ in range(2))

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))
        return x + y + (0.1 * torch.randn_like(x) if self.training else 0.0)


def test_a_block_that_adds_noise_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Noisy(4), Noisy(4)))
    with pytest.raises(fxgrow.PlanError, match="in train mode"):
        plan_deepening(net, {"1": "+1"}, torch.randn(2, 3, 4, 4))


def test_a_block_that_is_called_twice_is_refused():
    block = Branch(3, 4, 2, nn.BatchNorm2d, gate=False, after=nn.ReLU())
    net = nn.Sequential(nn.Sequential(block, block))
    with pytest.raises(fxgrow.PlanError, match=r"0\.1 runs 2 times in a pass"):
        plan_deepening(net, {"0": "+1"}, torch.randn(2, 3, 5, 5))


# ── plain chains ──────────────────────────────────────────────────────────────────────────────


def chain(activation=nn.ReLU, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2), norm(6), activation(), nn.Dropout(0.5),
        nn.Conv2d(6, 4, 3), norm(4), activation(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * 3 * 3, 5), activation(), nn.Linear(5, 2),
    )  # fmt: skip
    return net.double().eval()


IMAGES = torch.randn(4, 3, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize("key", ["0", "1", "4", "9"])
def test_a_unit_of_a_chain_begins_as_the_identity(key):
    net = chain()
    grown = fxgrow.deepen(net, {key: "+2"}, IMAGES, "net2deeper")
    found = grown.report.verification
    assert found.verdict == "preserved"
    assert found.eval.float64.max_rel <= 1e-10
    assert len(grown.model) == len(net) + (4 if key == "9" else 6)
    if key == "9":
        assert found.train.float64.max_rel <= 1e-10
    else:
        assert found.train.float64.max_rel > 1e-3
        assert f"differ by {found.train.float64.max_rel:.3g}" in found.notes[-1]
    assert all(p.requires_grad for p in grown.model.parameters())


def test_a_new_layer_of_a_chain_takes_what_it_gives():
    grown = fxgrow.deepen(chain(), {"0": "+1"}, IMAGES, "net2deeper")
    layer = grown.model[3]
    assert (layer.in_channels, layer.out_channels, layer.stride) == (6, 6, (1, 1))
    assert [type(m).__name__ for m in grown.model[:7]] == [
        "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Dropout"
    ]  # fmt: skip
    assert layer.weight.sum() == 6


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU])
def test_a_chain_with_another_activation_is_refused(activation):
    with pytest.raises(fxgrow.PlanError, match="not idempotent"):
        plan_deepening(chain(activation), {"0": "+1"}, IMAGES, "net2deeper")


def test_a_chain_with_a_norm_over_the_sample_is_refused():
    net = chain(norm=lambda width: nn.GroupNorm(1, width))
    with pytest.raises(fxgrow.PlanError, match="group_norm at 4 does not keep"):
        plan_deepening(net, {"0": "+1"}, IMAGES, "net2deeper")


def test_a_residual_block_is_no_unit_of_a_chain(resnet):
    with pytest.raises(fxgrow.PlanError, match=r"no layer in a plain chain.*r2deeper"):
        plan_deepening(resnet, {"layer3": "+1"}, INPUTS, "net2deeper")


# ── training, and more than one surgery ───────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["r2deeper", "zero_last"])
def test_a_step_of_sgd_parts_twins_and_lowers_the_loss(method):
    digits = load_digits()
    images = torch.tensor(digits.images[:256, None], dtype=torch.float32) / 16
    labels = torch.tensor(digits.target[:256])
    torch.manual_seed(0)
    made = [Branch(8, 8, 2, nn.BatchNorm2d, gate=False, after=nn.ReLU()) for _ in range(2)]
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(*made),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    model = fxgrow.deepen(net, {"3": "+2"}, images[:8], method).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    touched = set()
    for _ in range(6):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        touched |= {name for name, p in model.named_parameters() if p.grad.any()}
        if method == "r2deeper" and not losses:
            first = touched.copy()
        optimizer.step()
        losses.append(loss.item())
    # A bias before a batch norm never has a gradient: the norm takes the mean away.
    free = {name for name, _ in model.named_parameters() if not name.endswith("bias")}
    assert free <= touched
    # the norm that gets zeros has nothing to weigh in the first step
    if method == "r2deeper":
        assert {n for n in free - first if n.startswith("3")} <= {"3.2.norms.1.weight"} | {
            "3.3.norms.1.weight"
        }
        weight = model[3][3].convs[0].weight
        assert (weight[:4] - weight[4:]).abs().max() > 1e-4
    assert losses == sorted(losses, reverse=True)


def test_deeper_then_wider_and_wider_then_deeper(resnet):
    first = plan_deepening(resnet, {"layer1": "+1"}, INPUTS)
    both = api.plan(resnet, {"layer1.2.conv1": "2x"}, INPUTS, after=first)
    grown = api.carry_out(fxgrow.Plan.from_json(both.to_json()), resnet, INPUTS)
    assert exact(grown)
    assert grown.model.layer1[2].conv1.out_channels == 128
    first = api.plan(resnet, {"layer1.1.conv1": "+6"}, INPUTS)
    both = plan_deepening(resnet, {"layer1": "+1"}, INPUTS, after=first)
    grown = api.carry_out(both, resnet, INPUTS)
    assert exact(grown)
    assert grown.model.layer1[2].conv1.out_channels == 70
    assert "+6" in str(grown.report)
    assert "layer1.2" in str(grown.report)


def test_deepening_can_be_repeated(resnet):
    once = fxgrow.deepen(resnet, {"layer1.0": "+1"}, INPUTS, verify=False).model
    grown = fxgrow.deepen(once, {"layer1.1": "+1", "layer4": "3"}, INPUTS)
    assert exact(grown)
    torch.testing.assert_close(grown.model(INPUTS), resnet(INPUTS), rtol=1e-10, atol=1e-10)


class Block(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.whole, self.norm = [whole], nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.whole[0].scale * self.down(torch.relu(self.up(self.norm(x))))


class Residual(nn.Module):
    """Its blocks look at the network that holds them."""

    def __init__(self):
        super().__init__()
        self.scale, self.blocks = 1.0, nn.Sequential(Block(self), Block(self))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.blocks(x))


def halved(forward):
    def of_halves(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(self, x).float()

    return of_halves


@pytest.mark.parametrize("bind", [MethodType, partial])
@pytest.mark.parametrize("at", ["", "blocks"])
def test_a_forward_that_was_put_on_a_module_runs_the_new_blocks(bind, at):
    net, x = Residual(), torch.randn(4, 8)
    module = net.get_submodule(at)
    module.forward = bind(halved(type(module).forward), module)
    for grown in (net, fxgrow.widen(net, "2x", x).model):
        deeper = fxgrow.deepen(grown, {"blocks": "+1"}, x).model
        torch.testing.assert_close(deeper(x), net(x), rtol=0.02, atol=0.02)
        assert all(block.whole[0] is deeper for block in deeper.blocks)
        before = deeper(x)
        nn.init.normal_(deeper.blocks[2].down.weight)
        assert not torch.equal(deeper(x), before)


def settled_chain(batches):
    """Return a plain chain whose batch norm has the statistics of data, as a trained one has."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None), nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    )  # fmt: skip
    nn.init.uniform_(net[1].weight, 2, 3)
    nn.init.normal_(net[1].bias)
    net.train()(torch.cat(batches))
    return net.eval()


def test_a_calibrated_norm_changes_nothing_in_eval_mode_and_little_in_training():
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    net = settled_chain(batches)
    grown = {
        name: fxgrow.deepen(net, {"0": "+1"}, batches[0], "net2deeper", calibration=data)
        for name, data in (("plain", None), ("calibrated", batches))
    }
    changes = {}
    for name, result in grown.items():
        found = result.report.verification
        assert found.verdict == "preserved"
        assert found.eval.float64.max_rel <= 1e-10
        changes[name] = found.train.float64.max_rel
    assert changes["calibrated"] < 0.2 * changes["plain"]
    norm = grown["calibrated"].model[4]
    with torch.no_grad():
        values = grown["calibrated"].model[:4](torch.cat(batches))
    torch.testing.assert_close(norm.running_mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    variance = values.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "batches", "reason"),
    [
        ("net2deeper", [], "got nothing"),
        ("net2deeper", [torch.randn(2, 5, 8, 8)], "does not run on the batches"),
        ("zero_last", [torch.randn(2, 3, 8, 8)], "no batch norms to calibrate"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(method, batches, reason):
    if method == "zero_last":
        net, blocks = torchvision.models.resnet18(num_classes=3).eval(), {"layer1": "+1"}
    else:
        net, blocks = settled_chain([torch.randn(4, 3, 8, 8)]), {"0": "+1"}
    inputs = torch.randn(2, 3, 64, 64)
    with pytest.raises(fxgrow.PlanError, match=reason):
        fxgrow.deepen(net, blocks, inputs, method, calibration=batches)


def test_an_activation_that_is_not_idempotent_is_named():
    net = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 12, num_classes=3).eval()
    blocks = {"encoder.layers.encoder_layer_0.mlp.0": "+1"}
    with pytest.raises(fxgrow.PlanError, match=r"gelu at .* not idempotent"):
        fxgrow.deepen(net, blocks, torch.randn(2, 3, 32, 32), "net2deeper")


def test_a_product_vanishes_with_a_factor_of_it_and_not_with_a_term():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Conv1d(2, 2, 3, groups=2, bias=False))
    recording = record(trace(net, torch.randn(5, 2, 3)), [])
    product, convolution = (op for op in recording.tape.operations if op.is_product)
    bias, data, weight = product.inputs
    assert recording.vanishes(product, [bias, data])
    assert recording.vanishes(product, [bias, weight])
    assert not recording.vanishes(product, [data, weight])
    assert all(recording.vanishes(convolution, [value]) for value in convolution.inputs)
    activation = next(op for op in recording.tape.operations if op.name == "relu")
    assert not recording.vanishes(activation, activation.inputs)  # is no product


class Rotated(nn.Module):
    """A residual block whose branch is viewed as complex, which no broadcast numbers can be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        pairs = self.last(self.first(x).relu()).unflatten(-1, (4, 2))
        turn = torch.tensor(1j, dtype=torch.complex128)
        return x + torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)


def test_zeros_are_followed_through_what_takes_them_in_one_layout_alone():
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Rotated(), Rotated())).double()
    grown = fxgrow.deepen(net, {"1": "+1"}, torch.randn(2, 8, dtype=torch.float64))
    assert grown.report.verification.verdict == "preserved"


class Listed(nn.Module):
    """Runs a list of blocks on inputs that nothing tells the shape of."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2)]
        self.blocks = nn.ModuleList(layers)

    def forward(self, x, mask):
        if mask.shape[1] != 5:
            raise ValueError("five masks")
        for block in self.blocks:
            x = x + block(x)
        return x * mask[0, 0]


@pytest.mark.filterwarnings("ignore::fxgrow.FxgrowWarning")
def test_a_list_outside_of_what_can_be_followed_asks_for_inputs():
    with pytest.raises(fxgrow.PlanError, match=r"no inputs could be inferred.*example_inputs"):
        fxgrow.deepen(Listed(), {"blocks": "+1"})
