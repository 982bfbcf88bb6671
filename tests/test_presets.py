"""Presets and pairings on real architectures: preserved, as predicted, or refused for a reason."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torchvision
from networks import max_rel, mild
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torchvision.models import convnext, mobilenetv3, resnet, swin_transformer, vgg

import fxgrow
from fxgrow.api.widen import Grown
from fxgrow.plan.edits import AxisEdit, TensorEdit
from fxgrow.plan.presets import PRESETS

METHODS: dict[str, dict[str, str]] = {
    **{name: {"preset": name} for name in PRESETS},
    "replicate_random": {"pairing": "replicate_random"},
    "zero_z": {"pairing": "zero_z"},
    "copy_pair": {"pairing": "copy_pair"},
}
MODELS = (
    "resnet18", "resnet50", "densenet121", "vgg11_bn", "mobilenet_v3_small", "convnext_tiny",
    "vit_b_16", "swin_t",
)  # fmt: skip
# Widths that need little memory: 120 million weights of a VGG are those of its classifier.
WIDTHS = {"vgg11_bn": "+8", "vit_b_16": "1.25x"}
ARGUMENTS = {"vit_b_16": {"image_size": 32}}
# Batch statistics of few values make a deep network so steep that it amplifies all rounding.
SHAPES = {"vit_b_16": (2, 3, 32, 32), "densenet121": (4, 3, 64, 64)}


def small_vgg() -> nn.Module:
    """Return a VGG with BatchNorm on (n, 3, 16, 16), flattened before its classifier."""
    features = vgg.make_layers([4, "M", 6, "M", 6, "M"], batch_norm=True)
    head = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 10))
    return nn.Sequential(features, nn.Flatten(), head)


def small_mobilenet() -> nn.Module:
    """Return a MobileNetV3 with one block of each kind."""
    config = partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=0.5)
    blocks = [
        config(16, 3, 16, 16, True, "RE", 2), config(16, 3, 40, 24, False, "RE", 1),
        config(24, 5, 48, 24, True, "HS", 1),
    ]  # fmt: skip
    return mobilenetv3.MobileNetV3(blocks, last_channel=16, num_classes=10)


# The classes of the real networks, with few channels; all on (n, 3, 16, 16).
SMALL: dict[str, Callable[[], nn.Module]] = {
    "basic resnet": lambda: narrow_resnet(resnet.BasicBlock),
    "bottleneck resnet": lambda: narrow_resnet(resnet.Bottleneck),
    "densenet": lambda: torchvision.models.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=10),
    "vgg": small_vgg,
    "mobilenet": small_mobilenet,
    "convnext": lambda: convnext.ConvNeXt(
        [convnext.CNBlockConfig(6, 8, 1), convnext.CNBlockConfig(8, None, 1)],
        layer_scale=0.3, num_classes=10,
    ),
    "vit": lambda: torchvision.models.VisionTransformer(16, 8, 1, 2, 8, 12, num_classes=10),
    "swin": lambda: swin_transformer.SwinTransformer(
        [4, 4], 8, [1, 1], [2, 4], [2, 2], num_classes=10
    ),
}  # fmt: skip


def narrow_resnet(block: type[resnet.BasicBlock | resnet.Bottleneck]) -> nn.Module:
    """Return a ResNet of three blocks, the middle one with a downsampling shortcut."""
    width = 8
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for planes, stride in ((8, 1), (10, 2), (10, 1)):
        wide = planes * block.expansion
        project = [nn.Conv2d(width, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)]
        shortcut = nn.Sequential(*project) if (wide, stride) != (width, 1) else None
        layers.append(block(width, planes, stride, shortcut))
        width = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@dataclass(frozen=True)
class Outcome:
    """What became of one network under one method.

    Attributes:
        widened: number of groups that grew.
        refused: reasons and how many groups each kept from growing.
        preserves: what the plan says; "refused" if nothing can grow.
        verdict: of the verification.
        changed: max_rel in eval mode, in float64, between the old and the new network.
        residual: the larger one of both modes, between the new network and the prediction.
        reason: why it is not exact.
    """

    widened: int
    refused: dict[str, int]
    preserves: str
    verdict: str = ""
    changed: float = 0.0
    residual: float = 0.0
    reason: str = ""


def real(name: str) -> nn.Module:
    """Return a network of torchvision's, in float64."""
    torch.manual_seed(0)
    return mild(torchvision.models.get_model(name, **ARGUMENTS.get(name, {})))


def kind_of(reason: str) -> str:
    """Return a reason without the names of layers, and each part of it once."""
    parts = re.sub(r"\b[\w.]*\d[\w.]*", "…", reason).split("; ")
    return "; ".join(dict.fromkeys(parts))


def quiet(model: nn.Module, width: str, image: Tensor, where: str, **method: str) -> Grown:
    """Widen a network; its warnings are not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxgrow.FxgrowWarning)
        return fxgrow.widen(model, width, image, where=where, **method)  # type: ignore[arg-type]


def outcome(
    model: nn.Module, width: str, where: str, shape: tuple[int, ...], **method: str
) -> Outcome:
    """Widen a network in float64 and return what was measured."""
    try:
        grown = quiet(model, width, torch.randn(shape, dtype=torch.float64), where, **method)
    except fxgrow.PlanError as error:
        return Outcome(0, {kind_of(error.message): 1}, "refused")
    refused: dict[str, int] = {}
    for refusal in grown.plan.refused:
        refused[kind_of(refusal.reason)] = refused.get(kind_of(refusal.reason), 0) + 1
    verification = grown.report.verification
    return Outcome(
        len(grown.plan.groups),
        refused,
        grown.plan.preserves,
        verification.verdict,
        verification.eval.float64.max_rel,
        max(verification.eval.residual.max_rel, verification.train.residual.max_rel),
        next((kind_of(g.reason) for g in grown.plan.groups if g.preserves != "exact"), ""),
    )


def check(found: Outcome, method: str) -> None:
    """Assert that a network is preserved, as predicted, or refused for a reason we know."""
    assert found.widened or found.refused
    for reason in found.refused:
        assert any(known in reason for known in REASONS), reason
    if found.preserves == "refused":
        return
    if method == "random":
        assert found.preserves == "no"
        return
    assert found.residual <= 1e-10
    if method != "vt":  # which rescales: what no norm absorbs is predicted
        assert found.preserves == "exact"
        assert found.changed <= 1e-10


# What stands in the way; each is tested by itself where it comes from.
REASONS = (
    "an output of the network",
    "has no slope at zero",
    "divides its channels by their standard deviation",
    "multiplies channels of zeros by one another",
    "of a channel of zeros",
    "fixes sizes",
    "so they grow by whole copies",
    "cannot be predicted",
    "does not divide among",
    "is not a whole number of its channels",
    "is no whole number of channels",
)


@pytest.mark.sweep
@pytest.mark.parametrize("where", ["hidden", "all"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_sweep_of_real_networks(name: str, method: str, where: str) -> None:
    model = real(name)
    shape = SHAPES.get(name, (2, 3, 40, 40))
    check(outcome(model, WIDTHS.get(name, "2x"), where, shape, **METHODS[method]), method)


def small(name: str) -> nn.Module:
    """Return a small network of a real architecture, in float64."""
    torch.manual_seed(0)
    return mild(SMALL[name]())


def grow_repeatedly(name: str, preset: str) -> None:
    """Widen everything 2x, then 1.5x, then by 6, and assert the prediction each time."""
    torch.manual_seed(1)
    image = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    first = model = small(name)
    exact = True
    for width in ("2x", "1.5x", "+6"):
        try:
            grown = quiet(model, width, image, "all", preset=preset)
        except fxgrow.PlanError as error:  # what a rescaling does where there is no graph
            if preset == "vt" and "cannot be predicted" in error.message:
                return
            raise
        verification = grown.report.verification
        kinds = {group.kind for group in grown.plan.groups if group.width[1] > group.width[0]}
        assert kinds, (width, grown.plan.refused)
        for refusal in grown.plan.refused:
            assert any(known in refusal.reason for known in REASONS), refusal
        exact = exact and grown.plan.preserves == "exact"
        if preset != "random":
            assert verification.verdict in ("preserved", "as predicted")
            assert verification.eval.residual.max_rel <= 1e-10
            assert verification.train.residual.max_rel <= 1e-10
        model = grown.model
    assert preset == "vt" or exact == (preset != "random")  # by vt, the classifier is scaled
    if exact:
        with torch.no_grad():
            assert max_rel(first.eval()(image), model.eval()(image)) <= 1e-10


@pytest.mark.parametrize(
    ("name", "preset"),
    [("bottleneck resnet", preset) for preset in PRESETS]
    + [
        ("vit", "r2wider"),
        ("densenet", "net2wider"),
        ("convnext", "netmorph"),
        ("swin", "r2wider"),
    ],
)
def test_repeated_growth_is_what_was_predicted_each_time(name: str, preset: str) -> None:
    grow_repeatedly(name, preset)


@pytest.mark.sweep
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SMALL)
def test_sweep_of_repeated_growth(name: str, preset: str) -> None:
    grow_repeatedly(name, preset)


@pytest.mark.parametrize("method", ["vt", "r2wider", "netmorph", "zero_z", "copy_pair"])
@pytest.mark.parametrize("name", ["vgg", "mobilenet", "convnext"])
def test_small_networks_of_real_classes(name: str, method: str) -> None:
    check(outcome(small(name), "2x", "all", (4, 3, 16, 16), **METHODS[method]), method)


class Padded(nn.Module):
    """A block whose shortcut takes every second position and pads the missing channels."""

    def __init__(self, width: int, out: int, ends: tuple[int, int]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, out, 3, 2, 1), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out)
        self.ends = ends

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.ends)))


def padded_resnet(ends: tuple[int, int]) -> nn.Module:
    """Return a ResNet on (n, 3, 16, 16) whose second block has twice the channels of the first."""
    torch.manual_seed(0)
    return mild(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Padded(8, 8, (0, 0)),
            Padded(8, 16, ends), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 10),
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ends", "preset"), [((4, 4), "r2wider"), ((0, 8), "net2wider"), ((6, 2), "netmorph")]
)
def test_streams_grow_through_padded_shortcuts(ends: tuple[int, int], preset: str) -> None:
    torch.manual_seed(1)
    image = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    first = model = padded_resnet(ends)
    for width, wide in (("2x", 16), ("1.5x", 24), ("+8", 32)):
        grown = quiet(model, width, image, "stream", preset=preset)
        (group,) = grown.plan.groups
        assert (group.width[1], grown.plan.preserves) == (wide, "exact")
        assert grown.report.verification.verdict == "preserved"
        model = grown.model
    assert model.get_parameter("7.weight").shape == (10, 64)
    with torch.no_grad():
        assert max_rel(first(image), model.eval()(image)) <= 1e-10


def test_padding_need_not_grow_evenly() -> None:
    image = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    grown = quiet(padded_resnet((7, 1)), "+1", image, "stream")
    assert grown.model.get_parameter("7.weight").shape == (10, 18)
    assert grown.report.verification.verdict == "preserved"


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Return images (count, 3, 16, 16) of handwritten digits, and which they are."""
    data = load_digits()
    images = torch.tensor(data.images[:count]).unsqueeze(1) / 8 - 1  # (count, 1, 8, 8)
    images = F.interpolate(images, size=16).expand(-1, 3, -1, -1)
    return images.contiguous(), torch.tensor(data.target[:count])


def repeated(axis: AxisEdit) -> Iterator[tuple[int, int]]:
    """Yield pairs of positions along an axis that hold the same drawn or old rows."""
    seen: dict[tuple[str, int], int] = {}
    position = 0
    for run in axis.runs:
        for offset in range(run.length):
            if run.kind in ("new", "old", "borrowed"):
                first = seen.setdefault((run.kind, run.start + offset), position)
                if first < position:
                    yield first, position
            position += 1


def new_entries(tensor: Tensor, edit: TensorEdit) -> Tensor:
    """Return a mask of the entries that are new along some axis; further copies are new."""
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    for axis in edit.axes:
        if axis.groups > 1:
            continue  # positions of a grouped convolution's input are not those of the tensor
        old = {}
        position = 0
        for run in axis.runs:
            for offset in range(run.length):
                if run.kind in ("old", "share"):
                    old.setdefault(run.start + offset, position)
                position += 1
        fresh = [at for at in range(tensor.shape[axis.dim]) if at not in old.values()]
        mask.index_fill_(axis.dim, torch.tensor(fresh, dtype=torch.long), True)
    return mask


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_training_parts_twins_and_reaches_everything_new(method: str) -> None:
    torch.manual_seed(0)
    images, labels = digits(64)
    name, where = ("convnext", "hidden") if method == "zero_z" else ("basic resnet", "all")
    model = small(name)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    grown = quiet(model, "2x", images[:4], where, **METHODS[method])
    wide = grown.model.train()
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    optimizer = torch.optim.SGD(wide.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(wide(images), labels)
        losses.append(loss.item())
        loss.backward()
        if len(losses) == 1:
            optimizer.step()
    assert losses[1] < losses[0]
    parameters = dict(wide.named_parameters())
    grew = {name: edit for name, edit in grown.plan.tensors.items() if edit.axes}
    assert grew
    for name in grew.keys() & parameters.keys():
        fresh = new_entries(parameters[name], grew[name])
        assert parameters[name].grad[fresh].any(), f"no gradient for what is new in {name}"
    apart = 0
    for name in grew.keys() & parameters.keys():
        weight, old = parameters[name], before[name]
        writers = [axis for axis in grew[name].axes if axis.role == "writer"]
        for one, other in (pair for axis in writers for pair in repeated(axis)):
            alive = weight.ndim > 1 and weight.grad[one].any()  # behind a ReLU, some are not
            if alive and torch.equal(old[one], old[other]):
                assert not torch.equal(weight[one], weight[other]), (name, one, other)
                apart += 1
    assert bool(apart) == (method not in ("netmorph", "zero_z", "random"))
