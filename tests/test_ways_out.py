"""What messages and the README offer is there, does what is said, and is told in users' words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune
from typer.testing import CliRunner, Result

import fxgrow
from fxgrow.cli.app import app


def pair() -> nn.Sequential:
    """Return two linear layers around an activation that is smooth at 0."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double()


def batches(*shape: int) -> list[tuple[Tensor, Tensor]]:
    """Return two batches of inputs of a shape, and targets of three numbers."""
    drawn = torch.Generator().manual_seed(1)
    kind = {"dtype": torch.float64, "generator": drawn}
    return [(torch.randn(8, *shape, **kind), torch.randn(8, 3, **kind)) for _ in range(2)]


def halves(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """Fill by 0.5."""
    del reference, fan_in
    tensor.fill_(0.5)


@pytest.mark.parametrize("method", [fxgrow.GradMax, fxgrow.Tiny])
def test_a_plan_is_applied_with_the_data_it_was_made_with(method: type) -> None:
    init = method(F.mse_loss, batches(4))
    net = pair()
    grown = fxgrow.widen(net, "+2", init=init)
    again = grown.plan.apply(net, init=init)
    assert all(map(torch.equal, again.parameters(), grown.model.parameters()))
    with pytest.raises(fxgrow.PlanError, match=r"plan\.apply\(model, init=fxgrow\.\w+\(loss"):
        grown.plan.apply(net)
    fxgrow.widen(net, "+1", init=init)  # which leaves it with the weights of another plan
    later = grown.plan.apply(net, init=init)
    assert all(map(torch.equal, later.parameters(), grown.model.parameters()))


def test_a_plan_is_applied_with_the_function_it_was_made_with() -> None:
    net = pair()
    grown = fxgrow.widen(net, "+2", init=halves)
    again = grown.plan.apply(net, init=halves)
    assert all(map(torch.equal, again.parameters(), grown.model.parameters()))
    with pytest.raises(fxgrow.PlanError, match=r"plan\.apply\(model, init=…\)"):
        grown.plan.apply(net)
    own = fxgrow.widen(net, "+2", output_init=halves)
    again = own.plan.apply(net, output_init=halves)
    assert all(map(torch.equal, again.parameters(), own.model.parameters()))


@pytest.mark.parametrize("name", ["Tiny", "GradMax"])
def test_a_method_by_name_says_how_it_is_made(name: str) -> None:
    with pytest.raises(fxgrow.PlanError, match=rf"init=fxgrow\.{name}\(loss_fn, batches\)"):
        fxgrow.widen(pair(), init=name.lower())


def test_a_decorator_without_a_name_says_so() -> None:
    with pytest.raises(fxgrow.PlanError, match=r'@register_init\("halves"\)'):
        fxgrow.register_init(halves)


def unusual() -> nn.Sequential:
    """Return a network of images of six by six pixels with five channels, which nobody guesses."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(5, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten(),
        nn.Linear(72, 3),
    ).double()  # fmt: skip


def test_an_input_that_is_not_found_tells_what_was_tried() -> None:
    with pytest.raises(fxgrow.TraceError) as raised:
        fxgrow.widen(unusual())
    told = str(raised.value)
    assert "from 0 (Conv2d): the model does not run on inputs of 2x5x32x32 at 4: " in told
    assert "others that were tried" in told
    assert "example_inputs=torch.randn(1, 5, 224, 224)" in told
    assert "list" not in told
    assert "one of:" not in told


@pytest.mark.parametrize("method", [fxgrow.GradMax, fxgrow.Tiny])
def test_batches_are_example_inputs(method: type) -> None:
    init = method(F.mse_loss, batches(5, 6, 6))
    found = fxgrow.inspect(unusual(), growth=init)
    assert found.to_dict()["inputs"] == ["2x5x6x6"]
    grown = fxgrow.widen(unusual(), "+2", init=init)
    assert grown.report.verification.inputs[0] == "2x5x6x6"


def test_batches_are_example_inputs_on_the_command_line(tmp_path: Path) -> None:
    torch.save(unusual(), tmp_path / "net.pt")
    torch.save(batches(5, 6, 6), tmp_path / "batches.pt")
    files = [str(tmp_path / "net.pt"), "--data", str(tmp_path / "batches.pt")]
    result = CliRunner().invoke(app, ["inspect", *files, "--growth"])
    assert result.exit_code == 0, result.output
    out = ["-o", str(tmp_path / "grown.pt")]
    result = CliRunner().invoke(app, ["widen", *files, "--budget", "+100", "--init", "tiny", *out])
    assert result.exit_code == 0, result.output


def test_reports_tell_what_was_made_and_of_what() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    init = fxgrow.GradMax(F.mse_loss, batches(4), keep=2, threshold=0.01)
    grown = fxgrow.widen(net, "+4", init=init)
    told = grown.report.to_dict()
    assert told["groups"][0]["pairing"] == "vv_z_negz"
    request = told["request"]
    assert (request["init"], request["keep"], request["threshold"]) == ("gradmax", 2, 0.01)
    text = str(grown.report)
    assert "init gradmax, keep 2, threshold 0.01" in text
    assert "paired otherwise:\n  0  vv_z_negz" in text
    assert fxgrow.Plan.from_json(grown.plan.to_json()) == grown.plan
    plain = fxgrow.widen(net, "+4").report
    assert "otherwise" not in str(plain)
    assert plain.to_dict()["groups"][0]["pairing"] == "vv_z_negz"


def test_a_budget_may_be_a_number() -> None:
    init = fxgrow.Tiny(F.mse_loss, batches(4))
    one, other = (fxgrow.widen(pair(), init=init, budget=b, verify=False) for b in (20, "+20"))
    assert one.plan.parameters == other.plan.parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"writer": None}, "writer is None, no tensor"),
        ({"reader": None}, "reader is None, no tensor"),
        ({"new_columns": None}, "new_columns is None, no tensor"),
        ({"pairing": "copy_pair"}, "copies old rows and biases, and takes no new ones"),
        ({"norm": nn.LayerNorm(5)}, "a LayerNorm is no batch norm: it takes its statistics over"),
        ({"norm": nn.GroupNorm(1, 5)}, "Give an nn.BatchNorm1d"),
        ({"norm": nn.Linear(5, 5)}, "a Linear is no batch norm\\."),
    ],
)
def test_parts_refuse_what_they_cannot_take(changes: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "writer": torch.zeros(5, 4), "reader": torch.zeros(3, 5), "new_rows": torch.zeros(2, 4),
        "new_columns": torch.zeros(3, 2), "pairing": "vv_z_negz",
    }  # fmt: skip
    with pytest.raises(fxgrow.PlanError, match=message):
        fxgrow.apply_pairing(**(given | changes))  # type: ignore[call-overload]


def run(*arguments: object) -> Result:
    """Run the command line."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_missing_data_is_told_before_anything_is_read(tmp_path: Path) -> None:
    missing = tmp_path / "batches.pt"
    for command in (
        ["widen", tmp_path / "net.pt", "--width", "2x", "--init", "tiny", "--data", missing],
        ["inspect", tmp_path / "net.pt", "--growth", "--data", missing],
    ):
        result = run(*command)
        assert result.exit_code == 1
        assert f"{missing} does not exist" in result.stderr.replace("\n", "")
        assert "--data" in result.stderr


@pytest.mark.parametrize("option", ["-o", "--plan", "--report"])
def test_a_file_that_exists_is_told_with_its_option(tmp_path: Path, option: str) -> None:
    torch.save(pair(), tmp_path / "net.pt")
    out = tmp_path / "out.json"
    out.write_text("{}")
    result = run("widen", tmp_path / "net.pt", "--width", "2x", option, out)
    assert result.exit_code == 1
    assert f"or name another ({option})" in " ".join(result.stderr.split())


def test_what_grew_with_the_weights_is_told(tmp_path: Path) -> None:
    net = pair()
    optimizer = torch.optim.Adam(net.parameters())
    F.mse_loss(net(batches(4)[0][0]), batches(4)[0][1]).backward()
    optimizer.step()
    average = {name: 0.9 * tensor for name, tensor in net.state_dict().items()}
    torch.save(
        {"model": net, "ema": average, "optimizer": optimizer.state_dict()}, tmp_path / "net.pt"
    )
    result = run("widen", tmp_path / "net.pt", "--width", "2x")
    assert result.exit_code == 0, result.output
    told = "grown along: the optimizer's state in 'optimizer'; the weights in 'ema'"
    assert told in " ".join(result.stdout.split())
    torch.save(net, tmp_path / "bare.pt")
    assert "grown along" not in run("widen", tmp_path / "bare.pt", "--width", "2x").stdout


def test_a_comparison_tells_of_norms_that_took_factors_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    ).double()  # fmt: skip
    torch.save(net, tmp_path / "net.pt")
    files = tmp_path / "net.pt", tmp_path / "grown.pt"
    shape = ("--input-shape", "2x3x8x8")
    rescaled = ("--width", "2x", "--rescaling", "default_vt", "--compensate")
    grown = run("widen", files[0], *rescaled, *shape, "-o", files[1])
    assert grown.exit_code == 0, grown.output
    assert "the eps of a norm weighs differently" in " ".join(grown.stdout.split())
    told = " ".join(run("verify", *files, *shape).stdout.split())
    assert "the eps of a norm weighs differently" in told
    same = " ".join(run("verify", files[0], files[0], *shape).stdout.split())
    assert "the eps of a norm" not in same


@pytest.mark.parametrize("layer", [0, 2])
def test_pruned_weights_are_named_for_what_they_are(layer: int) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    prune.l1_unstructured(net[layer], "weight", 0.3)
    with pytest.raises(fxgrow.PlanError, match=rf"{layer} are pruned.*prune\.remove"):
        fxgrow.widen(net, "2x", x)
    prune.remove(net[layer], "weight")
    assert fxgrow.widen(net, "2x", x).report.verification.verdict == "preserved"
