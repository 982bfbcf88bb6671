"""What the command line says before it works, of dry runs, and of plans that hold no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import fxgrow
from fxgrow.apply.module import apply_to_module
from fxgrow.cli.app import app
from fxgrow.errors import NotPreservedError, PlanError, UsageError
from fxgrow.files.checkpoint.reading import about


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("usage")
    torch.manual_seed(0)
    torch.save(net(), found / "model.pt")
    torch.save([(torch.randn(16, 6), torch.randint(3, (16,)))], found / "batches.pt")
    return found


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))


def run(folder: Path, *arguments: str) -> Result:
    names = (".pt", ".json", ".html")
    return CliRunner().invoke(app, [str(folder / a) if a.endswith(names) else a for a in arguments])


DATA = ("--init", "tiny", "--data", "batches.pt", "--keep", "1")


def test_a_plan_from_data_is_carried_out_with_the_data(folder: Path) -> None:
    widened = ("widen", "model.pt", "--width", "2x", *DATA)
    made = run(folder, *widened, "--dry-run", "--plan", "data.json")
    assert made.exit_code == 0, made.output
    assert "holds no new weights" in made.stderr
    assert "--data" in made.stderr
    apply = ("apply", "data.json", "model.pt", "-o", "applied.pt")
    applied = run(folder, *apply)
    assert applied.exit_code == 1
    assert "come from data (Tiny)" in applied.stderr
    assert "--data batches.pt" in applied.stderr
    assert not (folder / "applied.pt").exists()
    applied = run(folder, *apply, "--data", "batches.pt")
    assert applied.exit_code == 0, applied.output
    assert run(folder, *widened, "-o", "widened.pt").exit_code == 0
    one, other = (fxgrow.load(folder / name).state_dict() for name in ("applied.pt", "widened.pt"))
    assert all(torch.equal(one[name], other[name]) for name in {*one, *other})


def test_a_plan_without_data_says_nothing_of_it(folder: Path) -> None:
    made = run(folder, "widen", "model.pt", "--width", "2x", "--dry-run", "--plan", "plain.json")
    assert "data" not in made.stderr
    apply = ("apply", "plain.json", "model.pt", "-o", "plain.pt")
    asked = run(folder, *apply, "--data", "batches.pt")
    assert asked.exit_code == 2
    assert "do not come from data" in asked.stderr
    assert run(folder, *apply).exit_code == 0


@pytest.mark.parametrize("more", [(), ("--plan", "beside.json")])
def test_a_dry_run_writes_reports(folder: Path, more: tuple[str, ...]) -> None:
    reports = ("--report", "dry.json", "--report", "dry.html", "--force")
    result = run(folder, "widen", "model.pt", "--width", "2x", "--dry-run", *reports, *more)
    assert result.exit_code == 0, result.output
    told = json.loads((folder / "dry.json").read_text())
    assert told["verification"]["verdict"] == "skipped"
    assert [group["width"] for group in told["groups"]] == [[5, 10], [4, 8]]
    assert "(the report)" in result.stdout
    assert "<" in (folder / "dry.html").read_text()
    assert not (folder / "model-2x.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "lots", *DATA), "the budget 'lots' cannot be read"),
        (("--budget", "+10%"), "--init tiny"),
        (("--width", "2x", "--init", "zz"), "'zz'"),
        (("--width", "2x", "--init", "0=zz"), "'zz'"),
        (("--width", "2x", "--output-init", "zz"), "'zz'"),
        (("--width", "2x", "--rescaling", "zz"), "'zz'"),
        (("--width", "2x", "--pairing", "zz"), "'zz'"),
        (("--width", "2x", "--gain", "2"), "a gain says nothing under the rescaling none"),
        (("--width", "2x", "--gain", "zz"), "zz"),
        (("--width", "2x", "--where", "zz"), "hidden, stream, all"),
        (("--width", "2x", "--grouped", "zz"), "width, count"),
    ],
)
def test_wrong_usage_is_told_before_the_source_is_read(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(folder, "widen", "missing.pt", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "missing.pt" not in result.stderr


@pytest.mark.parametrize("rescaling", ["none", "default_vt", {"0": "vt_output"}])
@pytest.mark.parametrize("gain", [2.0, "relu", {"0": 2.0}])
def test_a_gain_that_nothing_takes_is_an_error(rescaling: object, gain: object) -> None:
    with pytest.raises(UsageError, match=r"a gain says nothing.*vt_constraint_old_shape"):
        fxgrow.widen(net(), "2x", rescaling=rescaling, gain=gain)
    by_layer = {"0": "vt_constraint_old_shape", "*": "none"}
    fxgrow.widen(net(), "2x", rescaling=by_layer, gain=gain, verify=False)


def ones(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    tensor.fill_(1.0)


def test_an_init_fills_what_the_plan_names_it_for() -> None:
    old = net()
    made = fxgrow.widen(old, "2x", init={"0": ones, "*": "kaiming"}, pairing="none", verify=False)
    grown = apply_to_module(made.plan, old, init=ones)
    assert grown[0].weight[5:].eq(1).all()
    assert not grown[2].weight[:, 5:].eq(1).any()
    sides = fxgrow.widen(old, "2x", output_init=ones, pairing="none", verify=False)
    grown = apply_to_module(sides.plan, old, init=ones)
    assert grown[0].weight[5:].eq(1).all()
    assert not grown[2].weight[:4, 5:].eq(1).any()


def test_the_reasons_of_all_groups_are_told() -> None:
    model = nn.Sequential(
        nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.ReLU(),
        nn.Linear(4, 3),
    )  # fmt: skip
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    init = fxgrow.GradMax(lambda out, y: (out * 0 * y).sum(), [(x, y)])
    with pytest.raises(PlanError, match=r"(?=.*\b0: GradMax)(?=.*\b3: GradMax)"):
        fxgrow.widen(model, "2x", init=init)


def test_the_table_of_growth_counts_directions(folder: Path) -> None:
    result = run(folder, "inspect", "model.pt", "--growth", "--data", "batches.pt")
    assert "directions" in result.stdout
    assert "one new channel, or two twins" in result.stdout


def test_growth_tells_the_one_reason_and_every_name() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.Tanh())]
    model, x = nn.Sequential(*layers, nn.Linear(6, 2)).double(), torch.randn(4, 6).double()
    reached = [(x, model(x).detach() + 1)]  # the last layer's bias can do that
    found = fxgrow.inspect(model, growth=fxgrow.Tiny(nn.functional.mse_loss, reached)).growth
    reasons = {group.name: group.reason for group in found.groups}
    assert reasons["8"] == "Tiny: old weights can do what the loss asks for"
    assert all(" or " not in reason for reason in reasons.values())
    text = str(found)
    assert all(name in text for name in reasons)
    assert "more" not in text.partition("none, because:")[2]


class Gated(nn.Module):
    """A softmax behind a choice of Python's: what is scaled before it cannot be predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.score, self.out = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            x = -x
        x = torch.relu(self.into(x))
        return self.out(x) * self.score(x).softmax(-1)


def test_strict_refuses_what_cannot_be_predicted_as_it_refuses_what_can() -> None:
    wide = {"width": "2x", "example_inputs": torch.randn(2, 6), "rescaling": "default_vt"}
    with pytest.raises(NotPreservedError) as caught:
        fxgrow.widen(Gated(), **wide, include=["into"], strict=True)  # type: ignore[arg-type]
    assert caught.value.exit_code == 4
    assert "LAYER" not in str(caught.value)
    assert 'rescaling={"score": "none"' in str(caught.value)
    with pytest.raises(PlanError, match="cannot be predicted"):
        fxgrow.widen(Gated(), **wide, include=["into"])  # type: ignore[arg-type]


def test_a_file_that_is_called_like_a_layer_is_named_all_the_same() -> None:
    for message, named in (
        ("a gain reaches softmax at bert.encoder.", False),
        ("bert: what is in it.", True),
        ("the file bert/config.json is empty.", True),
        ("to grow bert-large.", False),
    ):
        with pytest.raises(PlanError) as caught, about(Path("bert")):
            raise PlanError(message)
        assert caught.value.message == (message if named else f"bert: {message}")


def ways_in() -> dict[str, Callable[[Any], object]]:
    """Return public functions that take a network."""
    x, made = torch.randn(2, 6), fxgrow.widen(net(), "2x", verify=False).plan
    return {
        "widen": lambda given: fxgrow.widen(given, "2x"),
        "inspect": fxgrow.inspect,
        "deepen": lambda given: fxgrow.deepen(given, {"0": "+1"}),
        "morph_kernel": lambda given: fxgrow.morph_kernel(given, "5"),
        "convert": lambda given: fxgrow.convert(given, "resnet34"),
        "verify": lambda given: fxgrow.verify(given, net(), x),
        "the other of verify": lambda given: fxgrow.verify(net(), given, x),
        "apply": made.apply,
    }


@pytest.mark.parametrize("way", ways_in())
def test_what_is_no_network_is_called_what_it_is_with_the_way_out(way: str) -> None:
    for given, told in (
        ("net.pt", "is a str, no torch.nn.Module. Read the file first: fxgrow.load('net.pt')."),
        (Path("net.pt"), "fxgrow.load('net.pt')"),
        (net().state_dict(), "load_state_dict"),
        (nn.ReLU, "is the class ReLU"),
        (None, "is a NoneType"),
    ):
        with pytest.raises(UsageError) as caught:
            ways_in()[way](given)
        assert told in str(caught.value)


def test_where_nothing_larger_is_known_a_way_on_is_told(tmp_path: Path) -> None:
    torch.save(torchvision.models.alexnet(num_classes=2).state_dict(), tmp_path / "alexnet.pt")
    done = run(tmp_path, "convert", "alexnet.pt", "--list")
    assert done.exit_code == 0
    assert "--to timm:NAME" in done.output
