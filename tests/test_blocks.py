"""Channel groups, residual blocks and conv→norm→act→conv pairs are found, with their reasons."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision
from networks import PlainResNet, PreactivationNet, quick, small_resnet
from torch import Tensor, nn

import fxgrow
from fxgrow.channels.analysis import analyse
from fxgrow.channels.blocks import Pair
from fxgrow.labels.trace import trace


def test_basic_blocks_of_resnet18() -> None:
    found = analyse(trace(quick("resnet18")))
    assert [(block.name, block.skip) for block in found.blocks] == [
        ("layer1.0", "identity"),
        ("layer1.1", "identity"),
        ("layer2.0", "projection"),
        ("layer2.1", "identity"),
        ("layer3.0", "projection"),
        ("layer3.1", "identity"),
        ("layer4.0", "projection"),
        ("layer4.1", "identity"),
    ]
    assert not any(block.preactivation for block in found.blocks)
    assert found.blocks[2].pairs == (
        Pair(
            group="layer2.0.conv1",
            writers=("layer2.0.conv1",),
            norms=("layer2.0.bn1",),
            activations=("relu",),
            readers=("layer2.0.conv2",),
        ),
    )


def test_groups_of_resnet18() -> None:
    groups = {group.name: group for group in analyse(trace(quick("resnet18"))).groups}
    stream = groups["conv1"]
    assert stream.kind == "stream"
    assert stream.writers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert stream.carriers == ("bn1", "layer1.0.bn2", "layer1.1.bn2")
    assert stream.readers == (
        "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0",
    )  # fmt: skip
    assert groups["fc"].kind == "pinned"
    assert groups["fc"].reason == "an output of the network"
    hidden = [group.name for group in groups.values() if group.kind == "hidden"]
    assert hidden == [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3, 4) for block in (0, 1)]


def test_bottlenecks_hold_two_pairs_that_share_a_layer() -> None:
    found = analyse(trace(quick("resnet50")))
    block = found.blocks[1]
    assert [(pair.writers, pair.readers) for pair in block.pairs] == [
        (("layer1.1.conv1",), ("layer1.1.conv2",)),
        (("layer1.1.conv2",), ("layer1.1.conv3",)),
    ]
    assert len(found.blocks) == 16
    stem = found.groups[0]
    assert (stem.name, stem.kind, found.block_of(stem)) == ("conv1", "hidden", None)


@pytest.mark.parametrize("skip", ["identity", "projection", "slice/pad"])
def test_preactivation_blocks_with_every_skip_path(skip: str) -> None:
    model = PreactivationNet(skip).double()
    (block,) = analyse(trace(model)).blocks
    assert (block.name, block.skip, block.preactivation) == ("block", skip, True)
    (pair,) = block.pairs
    assert (pair.writers, pair.norms, pair.readers) == (
        ("block.conv1",), ("block.norm2",), ("block.conv2",),
    )  # fmt: skip
    grown = fxgrow.widen(model, "2x", rescaling="default_vt", include=["block.conv1"])
    # nothing norms the branch before the addition, so its scale is announced
    assert grown.plan.groups[0].preserves == "scaled"
    assert grown.report.verification.verdict == "as predicted"
    assert fxgrow.widen(model, "2x").report.verification.verdict == "preserved"


def test_padding_leaves_the_stream_free() -> None:
    groups = analyse(trace(PreactivationNet("slice/pad"))).groups
    assert [group.name for group in groups if group.kind == "stream"] == ["stem"]
    assert [group.reason for group in groups if group.kind == "pinned"] == [
        "an output of the network"
    ]


class Lifted(PreactivationNet):
    """The same with ones instead of zeros, joined on, and doubled before the addition."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block.conv2(self.block.conv1(x))
        wide = torch.cat([x, torch.ones(len(x), 2, *x.shape[2:])], 1)
        return self.head((y + 2 * wide).mean((2, 3)))


def test_other_constants_pin_the_stream_with_the_reason() -> None:
    groups = analyse(trace(Lifted("slice/pad"))).groups
    pinned = [group for group in groups if group.kind == "pinned"]
    assert any("constants in part of its channels" in group.reason for group in pinned)


def test_option_a_shortcuts_with_slice_and_pad() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
            return torch.relu(y + shortcut)

    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Block()).double()
    (block,) = analyse(trace(model)).blocks
    assert (block.name, block.skip) == ("1", "slice/pad")
    grown = fxgrow.widen(model, "2x", rescaling="default_vt")
    assert [group.name for group in grown.plan.groups] == ["1.conv1"]
    assert grown.report.verification.verdict == "preserved"


def test_additions_that_are_no_residuals_are_not_blocks() -> None:
    class TwoStems(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
            self.conv = nn.Conv2d(3, 4, 1)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x) + self.scale
            return self.head(y + y)

    found = analyse(trace(TwoStems()))
    assert found.blocks == ()
    assert [group.kind for group in found.groups] == ["hidden", "pinned"]
    assert found.groups[0].carriers == ("scale",)


class Recurrent(nn.Module):
    """A recurrent layer or cell, and a head that reads its outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        return self.head(output[0] if isinstance(output, tuple) else output)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_gates_of_a_recurrent_layer_are_a_stream_and_no_blocks(layer: type[nn.Module]) -> None:
    x = torch.randn(3, 5, 6)
    found = fxgrow.inspect(Recurrent(layer(6, 12, num_layers=2)), x)
    (part,) = found.parts
    assert part.blocks == ()
    assert "0 residual blocks" in str(found)
    streams = [group for group in part.groups if group.kind == "stream"]
    assert streams
    assert all(part.block_of(group) is None for group in part.groups)
    assert "the residual addition aten.add at layer" in str(found.why("head").sides[-1].cause)


def test_a_projection_and_a_branch_of_one_module_of_bare_parameters_are_a_block() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skip, self.first, self.second = (nn.Parameter(torch.randn(6, 6)) for _ in "abc")

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.skip + torch.relu(x @ self.first) @ self.second

    (block,) = analyse(trace(nn.Sequential(nn.Linear(4, 6), Bare(), nn.Linear(6, 2)))).blocks
    assert (block.name, block.skip) == ("1", "projection")


class Heads(nn.ModuleList):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self]


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (Recurrent(nn.LSTM(6, 12)), 'layer is a stream: where="all"; head: an output of the net'),
        (
            nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1), nn.Linear(6, 2)),
            "0: _softmax over the channels mixes all of them (aten._softmax at 1); 2: an output",
        ),
        (
            Heads(nn.Linear(6, 2) for _ in range(5)),
            "; 2: an output of the network; and 2 more. See",
        ),
    ],
    ids=["stream", "pinned", "many"],
)
def test_where_nothing_can_be_widened_the_reasons_are_named(net: nn.Module, told: str) -> None:
    with pytest.raises(fxgrow.PlanError, match=re.escape(told)):
        fxgrow.widen(net, "2x", torch.randn(3, 5, 6))


def test_absorption_and_factors_are_reported_as_in_the_contract() -> None:
    grown = fxgrow.widen(
        small_resnet().double().eval(), "2x", rescaling="default_vt", include=["layer1.0.conv1"]
    )
    (group,) = grown.report.to_dict()["groups"]
    assert group == {
        "name": "layer1.0.conv1",
        "width": [64, 128],
        "kind": "hidden",
        "block": "layer1.0",
        "writers": ["layer1.0.conv1"],
        "readers": ["layer1.0.conv2"],
        "factors": {"layer1.0.conv1": 1.0, "layer1.0.conv2": pytest.approx(0.5**0.5)},
        "alpha": 1.0,
        "beta": pytest.approx(0.5**0.5),
        "alpha_beta": pytest.approx(0.5**0.5),
        "absorbed_by": ["layer1.0.bn2"],
        "gain": 1.0,
        "preserves": "exact",
        "reason": "",
        "pairing": "vv_z_negz",
    }


def test_inspection_is_json_and_says_what_was_inferred() -> None:
    found = fxgrow.inspect(PlainResNet()).to_dict()
    assert found["inputs"] == ["2x3x224x224"]
    assert found["inputs_inferred"] is True
    assert found["tracer"] == "torch.fx"
    assert [block["name"] for block in found["blocks"]] == ["blocks.0", "blocks.1"]


def test_unknown_operations_pin_what_they_touch() -> None:
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.second = nn.Linear(8, 8)
            self.third = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x, lengths = self.first(x), torch.full((1,), len(x))
            x = torch.segment_reduce(x, "sum", lengths=lengths, axis=0)
            return self.third(torch.relu(self.second(x)))

    groups = {group.name: group for group in analyse(trace(Segments())).groups}
    assert groups["first"].kind == "pinned"
    assert "no rule for aten.segment_reduce" in groups["first"].reason
    assert groups["second"].kind == "hidden"
    grown = fxgrow.widen(Segments(), "2x")
    assert [group.name for group in grown.plan.groups] == ["second"]
    assert [(r.name, r.reason) for r in grown.plan.refused] == [("first", groups["first"].reason)]
    with pytest.raises(
        fxgrow.UnsupportedOperationError,
        match=r"first: no rule for aten\.segment_reduce.* register a rule for the operation",
    ):
        fxgrow.widen(Segments(), "2x", exclude=["second"])
    with pytest.raises(
        fxgrow.UnsupportedOperationError, match=r"first: no rule for aten\.segment_reduce"
    ):
        fxgrow.widen(Segments(), "2x", include=["first"])


def test_control_flow_on_values_is_followed_at_dispatch_level() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.second = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 1000:
                x = x * 2
            return self.second(torch.relu(self.first(x)))

    grown = fxgrow.widen(Branching(), "2x")
    assert grown.report.verification.verdict == "preserved"
    assert grown.model.first.out_features == 16


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "vgg11", "squeezenet1_0"])
def test_other_architectures_fall_out_of_the_same_rules(name: str) -> None:
    """Depthwise, concatenation, flattening: structure alone, planned on shapes."""
    from fxgrow.api import widen as api

    plan = api.plan(quick(name), "2x")
    assert plan.preserves == "exact"
    assert plan.refused == ()
    assert len(plan.groups) >= 10


def test_heads_that_only_train_mode_uses_grow_too() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.aux = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> object:
            x = torch.relu(self.body(x))
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    grown = fxgrow.widen(Auxiliary(), "2x")
    assert grown.plan.groups[0].readers == ("head", "aux")
    assert grown.model.aux.in_features == 16
    assert grown.report.verification.verdict == "preserved"


def test_an_inferred_input_is_large_enough_for_the_heads_of_train_mode() -> None:
    found = fxgrow.inspect(quick("inception_v3"))
    assert found.to_dict()["inputs"] == ["2x3x299x299"]
    heads = [group for group in found.parts[0].groups if "AuxLogits" in group.name]
    assert [group.kind for group in heads] == ["hidden", "hidden", "pinned"]


def test_inputs_too_small_for_the_heads_of_train_mode_are_refused() -> None:
    model = torchvision.models.inception_v3(init_weights=False, num_classes=3)
    with pytest.raises(fxgrow.TraceError, match=r"^in train mode.* Give larger inputs"):
        fxgrow.inspect(model, torch.randn(1, 3, 224, 224))


def test_models_without_inputs_to_infer_ask_for_them() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3, 3))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.view(5, 7) @ y.view(7, 11)

    with pytest.raises(fxgrow.TraceError, match="example_inputs"):
        fxgrow.inspect(Raw())


def test_tracing_leaves_models_with_constants_alone() -> None:
    """Symbolic tracing adds constants as attributes to the root it traces."""

    class WithConstant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.second = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * torch.tensor([2.0]))

    model = WithConstant()
    before = set(vars(model))
    fxgrow.widen(model, "2x")
    assert set(vars(model)) == before


def test_torchvision_classes_are_what_the_tests_think() -> None:
    assert isinstance(quick("resnet18"), torchvision.models.ResNet)


@pytest.mark.parametrize("how", ["copied", "set"])
def test_what_is_written_into_a_new_tensor_is_data(how: str) -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
            self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            batch = x.new_full((len(x), 3, 12, 12), 0)
            if how == "set":
                batch[:, :, :8, :8] = x
            else:
                for one, image in zip(batch, x, strict=True):
                    one[:, :8, :8].copy_(image)
            x = self.first(batch)
            return self.last(x + self.b(self.a(x).relu()))

    found = fxgrow.inspect(Batched(), torch.randn(2, 3, 8, 8))
    kinds = {group["name"]: group["kind"] for group in found.to_dict()["groups"]}
    assert kinds == {"first": "stream", "a": "hidden", "last": "pinned"}
