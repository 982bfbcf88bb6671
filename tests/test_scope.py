"""Parts of a network that are followed by themselves: named ones, and those that are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
import torchvision
from networks import PlainResNet, trained_looking
from torch import Tensor, nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.cli.app import app
from fxgrow.errors import FxgrowWarning, PlanError, TraceError


class Body(nn.Module):
    """Features of two sizes, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.conv2(F.relu(self.norm1(self.conv1(x))))
        return {"fine": fine, "coarse": self.conv3(F.relu(fine))}


class Pyramid(nn.Module):
    """All features at one width."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.lateral = nn.ModuleList([nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(y) for layer, y in zip(self.lateral, self.body(x).values(), strict=True)]


class Head(nn.Module):
    """One head for the features of all sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 7, 3, padding=1)
        self.norm = nn.GroupNorm(1, 7)
        self.score = nn.Conv2d(7, 1, 1)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        found = []
        for x in features:
            count, *_ = x.shape
            found.append(self.score(F.relu(self.norm(self.conv(x)))).view(count, -1))
        return found


class Detector(nn.Module):
    """Keeps as many positions as score above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Pyramid()
        self.heads = nn.ModuleDict({"first": Head()})
        self.scale = nn.Linear(1, 1)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        scores = torch.cat(self.heads["first"](self.backbone(torch.stack(images))), 1)
        return [self.scale(row[row > 0][:, None]) for row in scores]


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    torch.manual_seed(0)
    return trained_looking(Detector()).double().eval()


def same_detections(before: nn.Module, after: nn.Module) -> bool:
    images = [torch.randn(3, 12, 10, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        pairs = list(zip(before(images), after(images), strict=True))
    assert all(old.numel() for old, _ in pairs)
    return all(torch.allclose(old, new, rtol=1e-10, atol=1e-11) for old, new in pairs)


def widths(grown: fxgrow.Grown) -> dict[str, tuple[int, ...]]:
    return {group.name: group.width for group in grown.plan.groups}


def test_the_largest_parts_that_can_be_followed_are_found_and_grow(detector):
    with pytest.warns(FxgrowWarning, match="inferred for it: backbone, heads.first"):
        grown = fxgrow.widen(detector, "2x")
    assert [scope.module for scope in grown.plan.scopes] == ["backbone", "heads.first"]
    # With the pyramid inside the part, what it reads can grow too.
    assert widths(grown) == {
        "backbone.body.conv1": (8, 16),
        "backbone.body.conv2": (6, 12),
        "backbone.body.conv3": (6, 12),
        "heads.first.conv": (7, 14),
    }
    found = grown.report.verification
    assert found.verdict == "preserved"
    assert "comes out of backbone, heads.first, not of the whole" in found.notes[-1]
    assert same_detections(detector, grown.model)


def test_a_named_submodule_grows_inside_the_whole(detector):
    grown = fxgrow.widen(detector, "2x", module="backbone.body")
    assert widths(grown) == {"backbone.body.conv1": (8, 16)}  # its outputs are pinned
    assert grown.report.to_dict()["request"]["module"] == "backbone.body"
    assert type(grown.model) is Detector
    assert same_detections(detector, grown.model)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (detector, grown.model))
    assert grown.plan.parameters == (before, after)


def test_a_named_submodule_takes_example_inputs_of_its_own(detector):
    images = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    grown = fxgrow.widen(detector, "+3", images, module="backbone", where="all")
    assert grown.report.verification.inputs == ("2x3x9x7", "2x3x9x7")
    assert same_detections(detector, grown.model)
    assert fxgrow.verify(detector, grown.model, images, module="backbone").verdict == "preserved"


def test_a_plan_for_parts_survives_json_and_applies_to_the_whole(detector):
    made = fxgrow.api.widen.plan(detector, "2x", rescaling="default_vt")
    again = fxgrow.Plan.from_json(made.to_json())
    assert again == made
    one, other = made.apply(detector).state_dict(), again.apply(detector).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_globs_are_over_the_groups_of_all_parts(detector):
    settings = {"heads.*": "+2", "*": "2x"}
    with pytest.warns(FxgrowWarning):
        grown = fxgrow.widen(detector, settings, include=("heads.*", "*.conv1"), pairing="v_zero")
    assert widths(grown) == {"backbone.body.conv1": (8, 16)}
    assert [refusal.name for refusal in grown.plan.refused] == ["heads.first.conv"]
    with pytest.raises(PlanError, match="'head' matches no channel group"):
        fxgrow.widen(detector, "2x", include=("head",))


def test_an_inspection_shows_the_parts(detector):
    found = fxgrow.inspect(detector)
    assert found.to_dict()["modules"] == ["backbone", "heads.first"]
    assert "backbone.body.conv1" in str(found)
    assert fxgrow.inspect(detector, module="heads.first").to_dict()["groups"][0]["width"] == 7


@pytest.mark.parametrize("compensate", [False, True])
def test_multipliers_go_into_the_graph_of_the_part(compensate):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = PlainResNet()

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.net(torch.stack(list(images)))[torch.arange(len(images)) > 0]

    torch.manual_seed(0)
    model = Wrapped().double()
    grown = fxgrow.widen(model, "2x", module="net", rescaling="default_vt", compensate=compensate)
    assert grown.report.verification.verdict == ("preserved" if compensate else "as predicted")
    assert isinstance(grown.model.net, torch.fx.GraphModule) is compensate
    images = list(torch.randn(3, 3, 8, 8, dtype=torch.float64))
    assert torch.allclose(grown.model(images), model(images), rtol=1e-10) is compensate


def test_what_the_rest_of_the_network_uses_too_stays(detector):
    tied = trained_looking(Detector()).double()
    tied.reused = nn.Conv2d(3, 8, 3)
    tied.reused.weight = tied.backbone.body.conv1.weight
    with pytest.raises(PlanError, match=r"reused\.weight is the same tensor, outside of backbone"):
        fxgrow.widen(tied, "2x", module="backbone.body", include=("backbone.body.conv1",))
    grown = fxgrow.widen(tied, "2x", module="backbone")
    assert set(widths(grown)) == {"backbone.body.conv2", "backbone.body.conv3"}


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("backbone.bdy", "Near it: backbone.body"),
        ("zzz", "Submodules that can be named: backbone, heads.first"),
        ("heads", "a ModuleDict, which is never run itself. Submodules that can be named: heads."),
        ("backbone.body.conv1", "nothing in it can grow. Name a module around it: backbone.body"),
    ],
)
def test_a_module_that_cannot_be_chosen_is_refused_with_a_way_out(detector, module, told):
    for call in (fxgrow.widen, fxgrow.inspect):
        with pytest.raises(TraceError) as caught:
            call(detector, module=module)
        assert told in str(caught.value)
        assert caught.value.name == module


def test_inputs_for_a_whole_that_cannot_be_followed_lead_to_its_submodules(detector):
    images = ([torch.randn(4, 12, 10, dtype=torch.float64)],)
    with pytest.raises(TraceError, match=r"name a submodule .*\(module\): backbone, heads\.first"):
        fxgrow.widen(detector, "2x", images)


def test_a_whole_that_keeps_what_it_finds_is_followed_on_inputs_that_it_takes(detector):
    images = ([torch.randn(3, 12, 10, dtype=torch.float64)],)
    grown = fxgrow.widen(detector, "2x", images)
    assert [scope.module for scope in grown.plan.scopes] == [""]
    assert grown.report.verification.verdict == "preserved"
    assert same_detections(detector, grown.model)


class Pair(nn.Module):
    """Two images in, one flow out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, first: Tensor, second: Tensor, rounds: int = 2) -> Tensor:
        return rounds * self.out(F.relu(torch.cat([self.conv(first), self.conv(second)], 1)))


def test_an_input_is_inferred_for_each_argument_that_must_be_given():
    grown = fxgrow.widen(Pair(), "2x")
    assert len(grown.plan.scopes[0].inputs) == 2
    assert grown.report.verification.verdict == "preserved"
    assert widths(grown) == {"conv": (4, 8)}


@torch.fx.wrap
def _shrunk(x: Tensor, sizes: list[int]) -> Tensor:
    sizes[0] = min(sizes[0], x.shape[2])  # a list in an fx graph does not allow that
    return F.adaptive_avg_pool2d(x, sizes)


class Mutating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(_shrunk(self.conv(x), [1, 1]).flatten(1))


def test_a_network_whose_graph_does_not_run_is_followed_without_it():
    grown = fxgrow.widen(Mutating(), "2x")
    assert grown.plan.scopes[0].tracer == "dispatch"
    assert grown.report.verification.verdict == "preserved"
    assert "immutable_list" in fxgrow.inspect(Mutating()).to_dict()["untraceable"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_detector_of_torchvision_grows_from_file_to_file(tmp_path: Path):
    torch.manual_seed(0)
    build = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    model = build(weights=None, weights_backbone=None, num_classes=3)
    source, out, planned = tmp_path / "model.pt", tmp_path / "wide.pt", tmp_path / "plan.json"
    torch.save(model.state_dict(), source)
    arch = ("--arch", "torchvision:ssdlite320_mobilenet_v3_large", "--arch-arg", "num_classes=3")
    part = ("--module", "backbone.features.0", "--input-shape", "2x3x32x32")
    assert "backbone.features.0.1" in run("inspect", source, *arch, *part)
    run("widen", source, "--width", "2x", "-o", out, "--plan", planned, *arch, *part)
    grown = fxgrow.load(out)
    old, new = model.state_dict(), grown.state_dict()
    changed = {name.rpartition(".")[0] for name in old if old[name].shape != new[name].shape}
    assert changed
    assert all(name.startswith("backbone.features.0.") for name in changed)
    assert "preserved" in run("verify", source, out, *arch[:0], *part)
    run("apply", planned, source, "-o", tmp_path / "again.pt", "--no-verify", *arch)
    again = fxgrow.load(tmp_path / "again.pt").state_dict()
    assert all(torch.equal(again[name], new[name]) for name in new)


class FixedSizes(nn.Module):
    """A part whose code says how wide it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).mean((2, 3)).view(-1, 4))


def test_sizes_are_rewritten_in_the_graph_of_the_part():
    model = nn.Sequential(nn.Identity(), FixedSizes()).double()
    with pytest.warns(FxgrowWarning, match="1 is a torch.fx.GraphModule"):
        grown = fxgrow.widen(model, "2x", module="1")
    assert isinstance(grown.model[1], torch.fx.GraphModule)
    assert type(grown.model) is nn.Sequential
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(grown.model(x), model(x), rtol=1e-10)
