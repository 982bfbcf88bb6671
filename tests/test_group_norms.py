"""Group norms: whole new groups of the size that they have, or copies inside each group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
import torchvision
from networks import max_rel
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fxgrow
from fxgrow.channels.analysis import analyse
from fxgrow.errors import PlanError
from fxgrow.grow.match.assignment import Assignment, part_twins
from fxgrow.grow.match.tied import tied_channels
from fxgrow.labels.trace import trace

IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
told = pytest.mark.filterwarnings("ignore:group norms get new groups")


class Block(nn.Module):
    """A residual block with norms on the stream and inside."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module], groups: int = 1) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.norm3, self.conv3 = norm(width), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv3(F.gelu(self.norm3(self.conv2(F.relu(self.norm2(y))))))


def network(norm: Callable[[int], nn.Module], width: int = 16, groups: int = 1) -> nn.Sequential:
    return stirred(nn.Sequential(
        nn.Conv2d(3, width, 3), Block(width, norm, groups), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 5),
    ))  # fmt: skip


def stirred(model: nn.Module) -> nn.Module:
    """Return a network in float64 with values as they occur in trained ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.double().eval()


def preserved(model: nn.Module, width: str, inputs: Tensor = IMAGE, **options: str) -> fxgrow.Grown:
    """Return what a network grows to, which is to compute the same and to learn everywhere."""
    grown = fxgrow.widen(model, width, inputs, **options)
    assert grown.plan.preserves == "exact"
    assert grown.report.verification.verdict == "preserved"
    assert grown.report.verification.without_gradient == ()
    with torch.no_grad():
        assert max_rel(model(inputs), grown.model(inputs)) <= 1e-12
    return grown


@told
@pytest.mark.parametrize(
    "pairing", ["vv_z_negz", "v_zero", "copy_pair", "replicate", "replicate_random"]
)
@pytest.mark.parametrize("where", ["hidden", "all"])
@pytest.mark.parametrize(("width", "count"), [("1.5x", 6), ("2x", 8), ("+4", 5)])
def test_group_norms_grow_by_whole_groups(width: str, count: int, where: str, pairing: str) -> None:
    model = network(partial(nn.GroupNorm, 4))
    grown = preserved(model, width, where=where, pairing=pairing)
    block = grown.model[1]
    copies = width == "2x" and pairing.startswith("replicate")  # inside each group
    assert block.norm2.num_groups == (4 if copies else count)
    assert block.norm2.num_channels == 4 * count
    assert block.norm1.num_groups == (4 if copies or where == "hidden" else count)
    assert all(group.width == (16, 4 * count) for group in grown.plan.groups)


@told
def test_old_groups_stay_as_they_are_and_new_ones_are_twins() -> None:
    model = network(partial(nn.GroupNorm, 4))
    block = preserved(model, "1.5x").model[1]
    rows, columns = block.conv1.weight, block.conv2.weight
    assert torch.equal(rows[:16], model[1].conv1.weight)
    assert torch.equal(rows[16:20], rows[20:])  # groups 4 and 5
    assert len(rows[16:20].flatten(1).unique(dim=0)) == 4
    assert torch.equal(columns[:16, 16:20], -columns[:16, 20:])
    assert block.norm2.weight[16:].eq(1).all()
    assert block.norm2.bias[16:].eq(0).all()


@told
def test_new_groups_are_twins_that_are_copies_of_old_ones() -> None:
    model = network(partial(nn.GroupNorm, 4))
    block, old = preserved(model, "+12", pairing="copy_pair").model[1], model[1]
    rows, columns = block.conv1.weight, block.conv2.weight
    assert torch.equal(rows[16:20], old.conv1.weight[:4])
    assert torch.equal(rows[20:24], rows[16:20])
    assert torch.equal(block.norm2.weight[16:24], old.norm2.weight[[*range(4)] * 2])
    assert torch.equal(columns[:16, 16:20], -columns[:16, 20:24])
    # Of the last group, which has no twin, rows are drawn for twins inside it.
    assert torch.equal(rows[24:26], rows[26:])
    assert not (rows[24:26, None] == old.conv1.weight).flatten(2).all(2).any()


@told
def test_channels_of_a_group_without_a_twin_are_twins_themselves() -> None:
    block = preserved(network(partial(nn.GroupNorm, 4)), "+4").model[1]
    assert torch.equal(block.conv1.weight[16:18], block.conv1.weight[18:])
    assert torch.equal(block.conv2.weight[:16, 16:18], -block.conv2.weight[:16, 18:])
    # Two equal ones would have no variance where there is no space, so they are read by zeros.
    pair = preserved(network(partial(nn.GroupNorm, 8)), "+2").model[1]
    assert not torch.equal(pair.conv1.weight[16], pair.conv1.weight[17])
    assert pair.conv2.weight[:16, 16:].eq(0).all()


@told
def test_copies_are_whole_groups_or_stay_inside_of_them() -> None:
    model = network(partial(nn.GroupNorm, 4))
    whole = preserved(model, "1.5x", pairing="replicate").model[1].conv1.weight
    assert torch.equal(whole, model[1].conv1.weight[[*range(16), *range(8)]])
    inside = preserved(model, "2x", pairing="replicate").model[1].conv1.weight
    origin = [4 * group + i for group in range(4) for _ in range(2) for i in range(4)]
    assert torch.equal(inside, model[1].conv1.weight[origin])


@pytest.mark.parametrize("width", ["+1", "1.3x", "+6"])
def test_widths_that_are_no_whole_groups_are_refused_with_those_that_are(width: str) -> None:
    text = (
        r"norm2 normalises 4 groups of 4 channels, and \d+ are no whole .* possible: 20( or 24)?\."
    )
    with pytest.raises(PlanError, match=text):
        fxgrow.widen(network(partial(nn.GroupNorm, 4)), width, IMAGE)


@told
def test_norms_with_groups_of_several_sizes_take_whole_groups_of_all() -> None:
    model = network(partial(nn.GroupNorm, 4), 48)
    block = model[1]
    block.norm1, block.norm2 = nn.GroupNorm(6, 48), nn.GroupNorm(4, 48)  # of 8 and of 12 channels
    block.conv1 = nn.Identity()
    stirred(model)
    norms = preserved(model, "1.5x", where="all").model[1]
    assert (norms.norm1.num_groups, norms.norm2.num_groups) == (9, 6)
    with pytest.raises(PlanError, match=r"56 are no whole number .*; possible: 72"):
        fxgrow.widen(model, "+8", IMAGE, where="all", include=["0"])


@told
@pytest.mark.parametrize("grouped", ["width", "count"])
@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("width", ["2x", "1.5x"])
def test_groups_of_convolutions_and_of_norms_fit_into_each_other(
    width: str, groups: int, grouped: str
) -> None:
    model = network(partial(nn.GroupNorm, 4), 16, groups)
    if (width, groups, grouped) == ("1.5x", 8, "width"):
        text = (
            r"groups of 1.norm\d would be made of other channels .*conv2 has 8 groups, and 8 then"
        )
        with pytest.raises(PlanError, match=text):
            fxgrow.widen(model, width, IMAGE, grouped=grouped)
        return
    block = preserved(model, width, where="all", grouped=grouped).model[1]
    count = 8 if width == "2x" else 6
    inside = groups == 8 and grouped == "width"  # a new group would be of two of the convolution's
    assert (block.norm2.num_groups, block.norm2.num_channels) == (4 if inside else count, 4 * count)
    assert block.conv2.groups == (groups if grouped == "width" else groups * count // 4)


@told
def test_twins_that_read_other_channels_are_read_by_zeros() -> None:
    model = stirred(nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.GroupNorm(1, 2), nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 3, 1)
    ))  # fmt: skip
    grown = preserved(model, "2x", grouped="count").model  # a lone new group, read by two
    assert grown[1].num_groups == 2
    assert grown[3].weight[:, 4:].eq(0).all()


@pytest.mark.parametrize("tied", [False, True])
def test_twins_part_where_what_they_depend_on_does(tied: bool) -> None:
    layers = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 3, 1)
    channels = analyse(trace(nn.Sequential(*layers))).channels
    grown = [i for i, axis in enumerate(channels.axes) if axis.tensor == "1.weight"]
    read, written = (
        channels.of_axis(i) for i in sorted(grown, key=lambda i: -channels.axes[i].groups)
    )
    continued = np.arange(channels.count)
    continued[[*read[4:], *written[4:]]] = -1  # two new groups, each of two channels
    assignment = Assignment.empty(
        tied_channels(channels, {}, np.zeros(channels.count, dtype=np.uint64))
    )
    if tied:
        assignment.tied.first[read[[5, 7]]] = read[[4, 6]]
    assignment.draw[read[4:]], assignment.sign[read[4:]] = [0, 1, 0, 2], [1, 0, -1, 0]
    assignment.draw[written[4:]], assignment.sign[written[4:]] = [3, 4, 3, 4], [1, 1, -1, -1]
    assignment.drawn = 5
    part_twins(channels, grown, continued, assignment)
    assert assignment.sign[written].tolist() == [0] * 8
    assert assignment.sign[read[4:]].tolist() == ([0] * 4 if tied else [1, 0, -1, 0])


def test_one_group_stays_one_and_groups_of_one_channel_stay_so() -> None:
    whole = preserved(network(partial(nn.GroupNorm, 1)), "2x").model[1].norm2
    assert (whole.num_groups, whole.num_channels) == (1, 32)
    with pytest.raises(PlanError, match=r"is no LayerNorm or RMSNorm.*copies; possible: 32"):
        fxgrow.widen(network(partial(nn.GroupNorm, 1)), "1.5x", IMAGE)
    with pytest.warns(fxgrow.FxgrowWarning, match=r"norm2: 16 → 17 and 1 more\); a state_dict"):
        single = preserved(network(partial(nn.GroupNorm, 16)), "+1", pairing="replicate")
    assert single.model[1].norm2.num_groups == 17


@told
def test_count_gives_one_group_another() -> None:
    norm = preserved(network(partial(nn.GroupNorm, 1)), "2x", grouped="count").model[1].norm2
    assert (norm.num_groups, norm.num_channels) == (2, 32)


def test_zeros_are_not_normalised() -> None:
    model = network(partial(nn.GroupNorm, 4))
    with pytest.raises(PlanError, match="gradients would be multiplied by 316"):
        fxgrow.widen(model, "1.5x", IMAGE, pairing="zero_z")
    model = stirred(nn.Sequential(nn.Conv2d(3, 6, 1), nn.GELU(), nn.Conv2d(6, 3, 1), model))
    norm = preserved(model, "2x", pairing="zero_z").model[3][1].norm2  # copies, beside zeros
    assert (norm.num_groups, norm.num_channels) == (4, 32)


@told
def test_groups_across_a_concatenation_are_found_where_they_are() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 10, 1), nn.Conv2d(3, 6, 1)
            self.norm, self.last = nn.GroupNorm(4, 16), nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu())

    model = stirred(Joined())
    grown = preserved(model, {"a": "+8"})  # two of a's channels and two of b's are one group
    assert grown.model.norm.num_groups == 6
    rows = grown.model.a.weight
    assert torch.equal(rows[[*range(8), 16, 17]], model.a.weight)
    with pytest.raises(PlanError, match="groups of norm would be made of other channels"):
        fxgrow.widen(model, {"a": "+6", "b": "+2"}, IMAGE)


class Functional(nn.Module):
    """A group norm in a forward of its own."""

    def __init__(self, groups: int | None) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 1)
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        if groups is not None:
            self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        count = self.groups if hasattr(self, "groups") else 4
        return self.last(F.group_norm(self.conv(x), count, self.weight, self.bias).relu())


@told
@pytest.mark.parametrize("width", ["1.5x", "2x"])
def test_the_number_of_groups_in_a_forward_follows(width: str) -> None:
    grown = preserved(stirred(Functional(4)), width).model
    assert (type(grown), grown.groups) == (Functional, {"1.5x": 6, "2x": 8}[width])


@told
@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")
def test_a_number_of_groups_in_the_code_is_rewritten() -> None:
    grown = preserved(stirred(Functional(None)), "1.5x")
    assert [(edit.function, edit.before, edit.after) for edit in grown.plan.sizes] == [
        ("group_norm", (4,), (6,))
    ]
    assert isinstance(grown.model, torch.fx.GraphModule)
    kept = preserved(stirred(Functional(None)), "2x", pairing="replicate")
    assert (kept.plan.sizes, type(kept.model)) == ((), Functional)


@told
@pytest.mark.parametrize("where", ["hidden", "all"])
def test_a_resnet18_with_group_norms_grows(where: str) -> None:
    model = stirred(torchvision.models.resnet18(
        norm_layer=lambda width: nn.GroupNorm(width // 16, width), num_classes=5
    ))  # fmt: skip
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    grown = preserved(model, "1.25x", image, where=where)
    assert grown.model.layer4[1].bn1.num_groups == 40
    assert {r.name for r in grown.plan.refused} == ({"fc"} if where == "all" else set())


@told
def test_a_resnet_of_timm_with_group_norms_grows() -> None:
    block = timm.models.resnet.Bottleneck
    model = stirred(timm.models.resnet.ResNet(
        block, (1, 1, 1, 1), num_classes=5, stem_width=32, base_width=32, norm_layer="groupnorm"
    ))  # fmt: skip
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    grown = preserved(model, "1.5x", image, where="all").model
    assert (grown.layer1[0].bn1.num_groups, grown.layer1[0].bn1.num_channels) == (48, 48)


def residual(layers: list[int], base: int, norm: Callable[[int], nn.Module]) -> ResNet:
    return ResNet(Bottleneck, layers, 5, width_per_group=base, norm_layer=norm)


@pytest.mark.parametrize(
    "norm",
    [lambda width: nn.GroupNorm(4, width), lambda width: nn.GroupNorm(width // 4, width)],
    ids=["as many groups", "groups as large"],
)
def test_a_sibling_with_group_norms_computes_the_same(norm: Callable[[int], nn.Module]) -> None:
    small, large = residual([1, 1, 1, 1], 8, norm), residual([1, 2, 1, 1], 16, norm)
    image = torch.randn(2, 3, 32, 32)
    grown = fxgrow.convert(stirred(small).float(), large, image)
    assert grown.report.verification.verdict == "preserved"
    large.load_state_dict(grown.model.state_dict(), strict=True)


def test_a_sibling_with_other_groups_is_refused() -> None:
    small, large = (
        ResNet(BasicBlock, [1, 1, 1, 1], 5, norm_layer=partial(nn.GroupNorm, count))
        for count in (8, 16)
    )
    with pytest.raises(PlanError, match=r"normalises 8 groups of 8 channels in .* 16 of 4 there"):
        fxgrow.convert(small, large, torch.randn(2, 3, 32, 32))


@told
def test_a_grown_state_dict_is_loaded_with_its_groups(tmp_path) -> None:
    model = network(partial(nn.GroupNorm, 4)).float()
    grown = fxgrow.widen(model, "1.5x", IMAGE.float())
    fxgrow.save(grown, tmp_path / "grown.pt")
    loaded = fxgrow.load(tmp_path / "grown.pt", trust_pickle=True)
    assert loaded[1].norm2.num_groups == 6
    torch.testing.assert_close(loaded(IMAGE.float()), model(IMAGE.float()))
