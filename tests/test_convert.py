"""From one architecture to a larger one: same function, the larger one's names and shapes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck
from typer.testing import CliRunner

import fxgrow
from fxgrow.api.convert import list_targets, plan_for_target
from fxgrow.apply.module import apply_to_state_dict
from fxgrow.cli.app import app
from fxgrow.modules.architectures import Architecture

IMAGES = torch.randn(8, 3, 32, 32)


def stirred(model: nn.Module) -> nn.Module:
    """Give norms weights and statistics that are not those of the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


def resnet(block, layers, width=8, **more):
    return torchvision.models.ResNet(block, layers, num_classes=5, width_per_group=width, **more)


def regnet(widths, group_widths, depths=(1, 2), se_ratio=None):
    ones, twos = [1.0] * len(depths), [2] * len(depths)
    blocks = BlockParams(
        list(depths), list(widths), list(group_widths), ones, twos, se_ratio=se_ratio
    )
    return RegNet(blocks, num_classes=5, stem_width=8)


def densenet(growth, layers, init):
    return torchvision.models.DenseNet(growth, layers, init, bn_size=2, num_classes=5)


def filters(width, groups):
    middle = nn.Conv2d(width, width, 3, groups=groups)
    return nn.Sequential(nn.Conv2d(3, width, 1), middle, nn.ReLU(), nn.Conv2d(width, 3, 1))


def vit(layers, heads, hidden, mlp):
    return torchvision.models.VisionTransformer(32, 16, layers, heads, hidden, mlp, num_classes=5)


def swin(depths, embed=8):
    return torchvision.models.SwinTransformer(
        [2, 2], embed, depths, [2, 4], [4, 4], num_classes=5, stochastic_depth_prob=0.0
    )


def vgg(counts, norm):
    cells = [cell for width, count in counts for cell in [*([width] * count), "M"]]
    features = torchvision.models.vgg.make_layers(cells, batch_norm=norm)
    head = nn.Linear(counts[-1][0], 5)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def convnext(depths, width=8):
    stages = [
        torchvision.models.convnext.CNBlockConfig(w, after, count)
        for w, after, count in ((width, 2 * width, depths[0]), (2 * width, None, depths[1]))
    ]
    return torchvision.models.ConvNeXt(stages, 0.0, 0.5, num_classes=5)


PAIRS = {
    "deeper, basic": (partial(resnet, BasicBlock, [1, 2, 1, 1], 64),
                      partial(resnet, BasicBlock, [2, 3, 1, 4], 64)),
    "deeper and wider, bottleneck": (partial(resnet, Bottleneck, [1, 2, 1, 1], 16),
                                     partial(resnet, Bottleneck, [2, 3, 1, 2], 24)),
    "grouped, wider in each group": (partial(resnet, Bottleneck, [1, 1, 1, 1], 4, groups=4),
                                     partial(resnet, Bottleneck, [2, 1, 1, 1], 8, groups=4)),
    "grouped, fewer and wider groups": (partial(resnet, Bottleneck, [1, 1, 1, 1], 4, groups=4),
                                        partial(resnet, Bottleneck, [2, 1, 1, 1], 12, groups=2)),
    "grouped, fewer groups alone": (partial(regnet, (16, 32), (4, 8)),
                                    partial(regnet, (16, 32), (8, 16))),
    "grouped, no multiple as many": (partial(regnet, (16, 32), (4, 8)),
                                     partial(regnet, (24, 80), (8, 16), (1, 3))),
    "grouped, one group there": (partial(regnet, (16, 32), (4, 8)),
                                 partial(regnet, (24, 40), (24, 20), (2, 2))),
    "grouped, with excitation": (partial(regnet, (16, 32), (4, 8), se_ratio=0.25),
                                 partial(regnet, (24, 48), (12, 24), (2, 3), se_ratio=0.25)),
    "concatenated": (partial(densenet, 4, (2, 2), 8), partial(densenet, 6, (2, 4), 12)),
    "shuffled": (partial(torchvision.models.shufflenet_v2_x0_5, num_classes=5),
                 partial(torchvision.models.shufflenet_v2_x1_0, num_classes=5)),
    "attention": (partial(vit, 1, 2, 16, 24), partial(vit, 3, 3, 24, 40)),
    "windows, deeper": (partial(swin, [2, 2]), partial(swin, [2, 4])),
    "layer scale, deeper": (partial(convnext, [1, 2]), partial(convnext, [2, 3])),
    "layer scale, twice as wide": (partial(convnext, [1, 2]), partial(convnext, [2, 3], 16)),
    "chain": (partial(vgg, [(4, 1), (8, 1)], False), partial(vgg, [(4, 2), (8, 3)], False)),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_a_larger_sibling_computes_the_same(pair):
    small, large = (build() for build in PAIRS[pair])
    model = stirred(small)
    grown = fxgrow.convert(model, large, IMAGES)
    found = grown.report.verification
    assert found.verdict == "preserved"
    for mode in (found.eval, found.train):
        assert mode is not None
        assert mode.float64.max_rel <= 1e-10
    large.load_state_dict(grown.model.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(large.eval()(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_resnet18_becomes_torchvisions_resnet34_by_name():
    model = stirred(torchvision.models.resnet18(num_classes=7))
    grown = fxgrow.convert(model, "resnet34", IMAGES)
    expected = torchvision.models.resnet34(num_classes=7)
    assert list(grown.model.state_dict()) == list(expected.state_dict())
    expected.load_state_dict(grown.model.state_dict(), strict=True)
    assert [block.name for block in grown.plan.blocks][:2] == ["layer1.2", "layer2.2"]


def test_the_plan_is_data_and_makes_the_same_weights():
    small, large = (build() for build in PAIRS["deeper and wider, bottleneck"])
    grown = fxgrow.convert(stirred(small), large, IMAGES)
    plan = fxgrow.Plan.from_json(grown.plan.to_json())
    weights = apply_to_state_dict(plan, small.state_dict())
    assert all(torch.equal(weights[name], t) for name, t in grown.model.state_dict().items())


def test_every_new_tensor_gets_a_gradient_and_training_goes_on():
    small, large = (build() for build in PAIRS["deeper, basic"])
    model = stirred(small)
    grown = fxgrow.convert(model, large, IMAGES)
    assert not grown.report.verification.without_gradient
    network = grown.model.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(IMAGES), torch.arange(8) % 5)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@given(
    st.tuples(*[st.integers(1, 2)] * 4), st.tuples(*[st.integers(0, 1)] * 4), st.integers(4, 9),
    st.integers(0, 5), st.sampled_from([BasicBlock, Bottleneck]),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_random_residual_networks(depths, more, width, wider, block):
    width, wider = (64, 0) if block is BasicBlock else (width, wider)
    small = stirred(resnet(block, list(depths), width))
    large = resnet(block, [a + b for a, b in zip(depths, more, strict=True)], width + wider)
    assert fxgrow.convert(small, large, IMAGES).report.verification.verdict == "preserved"


def test_between_merged_groups_are_zeros_that_learn():
    small, large = regnet((16, 32), (4, 8)).eval(), regnet((16, 32), (8, 16))
    grown = fxgrow.convert(small, large, IMAGES)
    name = "trunk_output.block1.block1-0.f.b.0.weight"
    edit = grown.plan.tensors[name]
    assert (edit.groups, edit.shape, edit.new_shape) == ((4, 2), (16, 4, 3, 3), (16, 8, 3, 3))
    old, new = small.state_dict()[name], grown.model.state_dict()[name]
    for row in range(16):
        place = row // 4 % 2 * 4  # each two groups of four rows become one
        assert torch.equal(new[row, place : place + 4], old[row])
        assert not new[row, 4 - place : 8 - place].any()
    assert grown.report.verification.without_gradient == ()
    grown.model(IMAGES).sum().backward()
    assert grown.model.get_parameter(name).grad[0, 4:].any()


def test_places_for_groups_that_do_not_exist_are_new():
    small, large = filters(12, 3).eval(), filters(18, 2)
    grown = fxgrow.convert(small, large, IMAGES)
    assert grown.plan.tensors["1.weight"].groups == (3, 2)
    old, new = small[1].weight, grown.model[1].weight
    first, second = grown.model[1].weight.chunk(2)  # nine rows that read nine channels each
    assert torch.equal(first[:4, :4], old[:4])
    assert torch.equal(first[4:8, 4:8], old[4:8])
    assert torch.equal(second[:4, :4], old[8:])
    assert not first[:4, 4:8].any()
    assert new[9 + 4 :].any()


@pytest.mark.parametrize(
    ("before", "after"), [((4, 1), (12, 2)), ((4, 1), (8, 2)), ((8, 4), (24, 6))]
)
def test_more_groups_and_wider_ones(before, after):
    grown = fxgrow.convert(filters(*before).eval(), filters(*after), IMAGES)
    found = grown.report.verification
    assert found.verdict == "preserved"
    assert found.without_gradient == ()


def test_an_optimizer_goes_on_with_merged_groups():
    small, large = filters(12, 6), filters(16, 2)
    optimizer = torch.optim.Adam(small.parameters())
    small(IMAGES).square().sum().backward()
    optimizer.step()
    old = {k: v.clone() for k, v in optimizer.state[small[1].weight].items()}
    grown = fxgrow.convert(small.eval(), large, IMAGES)
    fxgrow.grow_optimizer_(optimizer, small, grown)
    kept = optimizer.state[grown.model[1].weight]
    for name, fresh in (("exp_avg", torch.zeros(())), ("exp_avg_sq", old["exp_avg_sq"].mean())):
        assert torch.equal(kept[name][:2, :2], old[name][:2])
        assert torch.equal(kept[name][2:4, 2:4], old[name][2:4])
        torch.testing.assert_close(kept[name][:2, 2:6], fresh.expand(2, 4, 3, 3))
    optimizer.zero_grad()
    grown.model(IMAGES).square().sum().backward()
    optimizer.step()


def test_groups_of_a_transposed_convolution_are_merged():
    def net(groups):
        return nn.Sequential(nn.Conv2d(3, 12, 1), nn.ConvTranspose2d(12, 24, 3, groups=groups))

    found = fxgrow.convert(net(6).eval(), net(3), IMAGES).report.verification
    assert found.eval is not None
    assert found.eval.float64.max_rel <= 1e-10


def test_the_sizes_before_are_those_of_the_source():
    small, large = regnet((16, 32), (4, 8)), regnet((24, 48), (12, 24))
    plan = plan_for_target(small.eval(), large, IMAGES)
    assert plan.parameters == tuple(sum(p.numel() for p in n.parameters()) for n in (small, large))
    alone = fxgrow.widen(small, "2x", IMAGES, verify=False).plan
    assert plan.flops[0] == alone.flops[0]


REFUSED = {
    "smaller": (partial(resnet, Bottleneck, [1, 1, 1, 1], 16),
                partial(resnet, Bottleneck, [1, 1, 1, 1], 8), "would shrink"),
    "shallower": (partial(resnet, BasicBlock, [2, 1, 1, 1], 64),
                  partial(resnet, BasicBlock, [1, 1, 1, 1], 64), r"layer1\.1 could become"),
    "another family": (partial(resnet, BasicBlock, [1, 1, 1, 1], 64),
                       partial(densenet, 4, (2, 2), 8), "is a ResNet in the source"),
    "another block": (partial(resnet, BasicBlock, [1, 1, 1, 1], 64),
                      partial(resnet, Bottleneck, [1, 1, 1, 1], 64), "BasicBlock"),
    "kernel without a middle": (partial(nn.Sequential, nn.Conv2d(3, 4, 3)),
                                partial(nn.Sequential, nn.Conv2d(3, 4, 4)),
                                r"dim 2 of 0\.weight has size 3, which cannot become 4"),
    "groups torn apart": (partial(resnet, Bottleneck, [1, 1, 1, 1], 4, groups=3),
                          partial(resnet, Bottleneck, [1, 1, 1, 1], 6, groups=2),
                          r"layer1\.0\.conv2 has 3 groups of 4 in the source and 2 of 6 there: "
                          "one there would have to hold 2"),
    "depthwise no more": (partial(filters, 8, 8), partial(filters, 16, 4),
                          r"1 has 8 groups of 1 in .* 4 of 4 there: a depthwise"),
    "part of a normalised stream": (partial(convnext, [1, 1]), partial(convnext, [1, 1], 12),
                                    "features.0.0 cannot get width 12"),
    "more classes": (partial(torchvision.models.resnet18, num_classes=5),
                     partial(torchvision.models.resnet18, num_classes=6), "output of the network"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_stands_in_the_way_is_named(case):
    small, large, reason = REFUSED[case]
    with pytest.raises(fxgrow.PlanError, match=reason):
        fxgrow.convert(small().eval(), large().eval(), IMAGES)


def test_another_eps_is_refused():
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    large = resnet(BasicBlock, [1, 1, 1, 1], 64, norm_layer=norm)
    with pytest.raises(fxgrow.PlanError, match=r"bn1\.eps is 0\.001, and 1e-05 in the source"):
        fxgrow.convert(resnet(BasicBlock, [1, 1, 1, 1], 64), large, IMAGES)


def test_other_input_channels_are_refused():
    small = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    large = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with pytest.raises(fxgrow.FxgrowError, match="takes inputs of 3x"):
        fxgrow.convert(small, large)


def test_what_no_weight_holds_is_found_by_measuring():
    class Curved(nn.Sequential):
        def __init__(self, width, function):
            super().__init__(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
            self.function = function

        def forward(self, x):
            return self.function(super().forward(x))

    with pytest.raises(fxgrow.VerificationError, match="no weight holds"):
        fxgrow.convert(Curved(4, torch.sin), Curved(6, torch.tanh), torch.randn(2, 4))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A training checkpoint of a ResNet-18 with its optimizer, on disk."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    nn.functional.cross_entropy(model(IMAGES), torch.arange(8) % 4).backward()
    optimizer.step()
    path = tmp_path_factory.mktemp("convert") / "run.pt"
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(saved, path)
    return path


def test_a_training_checkpoint_becomes_one_of_the_larger_architecture(checkpoint):
    out = checkpoint.with_name("run-resnet34.pt")
    arguments = ["convert", str(checkpoint), "--to", "resnet34", "--input-shape", "2x3x64x64"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    saved = torch.load(out, weights_only=True)
    assert saved["epoch"] == 3
    larger = torchvision.models.resnet34(num_classes=4)
    larger.load_state_dict(saved["model"], strict=True)
    optimizer = torch.optim.AdamW(larger.named_parameters(), lr=1e-3)
    optimizer.load_state_dict(saved["optimizer"])
    before = torch.load(checkpoint, weights_only=True)
    moment = optimizer.state[larger.layer1[1].conv1.weight]["exp_avg"]
    assert torch.equal(moment, before["optimizer"]["state"][9]["exp_avg"])
    smaller = torchvision.models.resnet18(num_classes=4)
    smaller.load_state_dict(before["model"])
    with torch.no_grad():
        outputs = [network.eval()(IMAGES) for network in (larger, smaller)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert isinstance(fxgrow.load(out), torchvision.models.ResNet)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 2, "a conversion needs a target"),
        (["--to", "resnet34", "--list"], 2, "a conversion needs a target"),
        (["--to", "resnet50"], 1, "layer1.0 is a BasicBlock in the source, a Bottleneck there"),
        (["--to", "resnet50"], 1, "`fxgrow convert SOURCE --list`"),
        (["--to", "resnet43"], 1, "resnet34"),
        (["--to", "missing/config.json"], 1, "missing/config.json cannot be read"),
    ],
)
def test_a_conversion_that_cannot_be_done_exits_with_the_reason(checkpoint, arguments, code, told):
    before = set(checkpoint.parent.iterdir())
    result = CliRunner().invoke(app, ["convert", str(checkpoint), *arguments])
    assert result.exit_code == code
    assert told in " ".join(result.stderr.split())
    assert set(checkpoint.parent.iterdir()) == before


def test_what_a_network_can_become_is_listed_smallest_first():
    tiny = Architecture("torchvision:shufflenet_v2_x1_5", {"num_classes": 5})
    found = list_targets(tiny.build(), tiny)
    assert [(target.name, target.reason) for target in found] == [("shufflenet_v2_x2_0", "")]


def test_a_conversion_is_saved_as_the_architecture_it_ends_in(tmp_path):
    model = stirred(torchvision.models.shufflenet_v2_x0_5(num_classes=5))
    grown = fxgrow.convert(model, "shufflenet_v2_x1_0", IMAGES)
    fxgrow.save(grown, tmp_path / "larger.pt")
    loaded = fxgrow.load(tmp_path / "larger.pt")
    assert all(torch.equal(t, grown.model.state_dict()[n]) for n, t in loaded.state_dict().items())
    with pytest.raises(fxgrow.PlanError, match="makes the tensors of shufflenet_v2_x1_0"):
        grown.plan.apply(model)


def test_a_deeper_chain_is_saved_and_loaded(tmp_path):
    model = torchvision.models.vgg11(num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    grown = fxgrow.deepen(model, {"features.3": "+1"}, images, "net2deeper", verify=False)
    fxgrow.save(grown, tmp_path / "deeper.pt")
    with torch.no_grad():
        assert torch.equal(fxgrow.load(tmp_path / "deeper.pt")(images), grown.model(images))


def test_larger_kernels_of_a_target_are_told():
    small, large = (
        nn.Sequential(
            nn.Conv2d(3, width, size, padding=tuple(n // 2 for n in size)), nn.ReLU(),
            nn.Conv2d(width, 2, 3, padding="same"),
        ).eval()
        for width, size in ((4, (3, 1)), (6, (5, 3)))
    )  # fmt: skip
    grown = fxgrow.convert(small, large, torch.randn(2, 3, 9, 9))
    assert grown.report.verification.verdict == "preserved"
    (kernel,) = grown.plan.kernels
    assert (kernel.name, kernel.before, kernel.after) == ("0", (3, 1), (5, 3))
    assert kernel.padding == ((1, 0), (2, 1))
    assert "3x1 → 5x3" in str(grown.report)


class _Optional(nn.Module):
    """A residual block with a layer that is used on request alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 12), nn.Linear(12, width)
        self.extra = nn.Linear(width, width)

    def forward(self, x: Tensor, more: bool) -> Tensor:
        x = x + self.out(self.into(x).relu())
        return x + self.extra(x) if more else x


class _Network(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(_Optional(width) for _ in range(depth))

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, more)
        return self.last(x)


def test_new_layers_that_no_run_used_are_named():
    net, x = _Network().double().eval(), torch.randn(5, 4, dtype=torch.float64)
    grown = fxgrow.convert(net, _Network(depth=3).double().eval(), (x, True))
    assert not [text for text in grown.plan.warnings if "no part" in text]
    torch.testing.assert_close(grown.model(x, True), net(x, True))
    with pytest.warns(fxgrow.FxgrowWarning, match=r"blocks\.2\.extra takes no part .* it is new"):
        fxgrow.convert(net, _Network(depth=3).double().eval(), x)
    with pytest.warns(fxgrow.FxgrowWarning, match=r"blocks\.2\.extra takes no part .* it is new"):
        fxgrow.deepen(net, {"blocks": "+1"}, x)
    with pytest.raises(
        fxgrow.PlanError, match=r"blocks\.0\.extra.* no part .* Give example inputs"
    ):
        fxgrow.convert(net, _Network(16).double().eval(), x)


class _Apart(nn.Module):
    """A residual network whose blocks are lists of layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        pairs = ([nn.Linear(8, 12), nn.Linear(12, 8)] for _ in range(depth))
        self.blocks = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for into, out in self.blocks:
            x = x + out(into(x).relu())
        return self.last(x)


def test_new_blocks_that_are_not_called_as_wholes_are_named():
    with pytest.raises(fxgrow.PlanError, match=r"blocks\.2 is not called as a whole"):
        fxgrow.convert(_Apart(2), _Apart(3), torch.randn(2, 4))


class _Block(nn.Module):
    """A block that adds to the network's input, which cannot grow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("ends", [False, True])
def test_blocks_between_an_input_and_an_output_add_nothing_at_first(ends):
    def blocks(count):
        return nn.Sequential(
            *(_Block(6) for _ in range(count)), *([nn.Linear(6, 3)] if ends else [])
        )

    torch.manual_seed(0)
    small, x = blocks(2), torch.randn(4, 6)
    if ends:  # by name, the end of the small one would be a block
        small, large = (nn.Sequential(b[:-1], b[-1]) for b in (small, blocks(4)))
    else:
        large = blocks(4)
    grown = fxgrow.convert(small, large, x)
    assert [block.method for block in grown.plan.blocks] == ["r2deeper", "r2deeper"]
    assert torch.allclose(grown.model(x), small(x), rtol=1e-5, atol=1e-6)
