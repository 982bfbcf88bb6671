"""Directions from data: selected, then rescaled, then paired; what they gain and cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
import torchvision
from networks import max_rel
from test_datadriven import Batches, batches_for, chain, mean_loss, perceptron
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import fxgrow
from fxgrow.api import widen as api
from fxgrow.cli.app import app
from fxgrow.errors import PlanError, SourceError, UsageError
from fxgrow.files.batches import read_batches
from fxgrow.grow.data.costs import Costs
from fxgrow.grow.data.losses import LOSSES
from fxgrow.plan.budget import budgeted

GENTLE = nn.LeakyReLU()  # homogeneous, and with a slope at 0


def network(seed: int = 0) -> tuple[nn.Module, Batches]:
    model = chain(nn.Linear(6, 5), GENTLE, nn.Linear(5, 4), GENTLE, nn.Linear(4, 7), seed=seed)
    return model, batches_for(model, 6, sizes=(20, 12))


def drawn(grown: fxgrow.Grown, name: str) -> tuple[Tensor, Tensor]:
    """Return the new rows and the new columns of a group, one row each for a channel."""
    group = next(group for group in grown.plan.groups if group.name == name)
    old = group.width[0]
    rows = grown.model.get_parameter(f"{group.writers[0]}.weight").detach()[old:]
    columns = grown.model.get_parameter(f"{group.readers[0]}.weight").detach()[:, old:]
    return rows, columns.T


@pytest.mark.parametrize("method", [fxgrow.Tiny, fxgrow.GradMax])
@pytest.mark.parametrize("rescaling", ["none", "default_vt", "vt_constraint_new_shape"])
def test_twins_lay_out_what_was_selected(method: Callable[..., object], rescaling: str) -> None:
    """The first two directions: V, V and Z, −Z; keep counts directions, the width channels."""
    model, batches = network()
    init = method(F.mse_loss, batches, keep=2)
    only = {"include": ["0"], "rescaling": rescaling, "compensate": rescaling != "none"}
    grown = fxgrow.widen(model, "+5", init=init, pairing="vv_z_negz", **only)
    (group,) = grown.plan.groups
    assert group.width == (5, 9)
    assert group.pairing == "vv_z_negz"
    assert group.reason.endswith("4 of 5 new channels: each direction makes two")
    assert group.preserves == "exact"
    assert grown.report.verification.verdict == "preserved"
    x = batches[0][0]
    assert max_rel(model(x), grown.model.eval()(x)) <= 1e-10
    rows, columns = drawn(grown, "0")
    assert torch.equal(rows[:2], rows[2:])
    assert torch.equal(columns[:2], -columns[2:])
    # What was selected depends neither on the rescaling nor on the pairing.
    alone = fxgrow.widen(model, "+2", init=method(F.mse_loss, batches), include=["0"])
    assert grown.init.strengths == alone.init.strengths
    for found, selected in zip((rows, columns), drawn(alone, "0"), strict=True):
        for one, other in zip(found[:2], selected, strict=True):
            if method is fxgrow.Tiny or bool(other.any()):
                assert F.cosine_similarity(one, other, 0).item() == pytest.approx(1)


def test_tiny_without_a_move_keeps_its_amplitude() -> None:
    """The line search is for what moves the function alone."""
    model, batches = network()
    paired, moved = (
        fxgrow.widen(model, "+2", init=fxgrow.Tiny(F.mse_loss, batches), include=["0"], pairing=p)
        for p in ("v_zero", "none")
    )
    assert paired.init.amplitude == 1.0 != moved.init.amplitude
    assert not paired.init.notes
    rows, columns = drawn(paired, "0")
    assert not columns.any()
    root = moved.init.amplitude**0.5
    assert torch.allclose(rows * root, drawn(moved, "0")[0])
    assert paired.report.verification.verdict == "preserved"
    assert moved.report.verification.verdict == "changed"


def test_zero_rows_take_the_selected_columns() -> None:
    model, batches = network()
    init = fxgrow.Tiny(F.mse_loss, batches)
    grown = fxgrow.widen(model, "+2", init=init, include=["0"], pairing="zero_z")
    rows, columns = drawn(grown, "0")
    assert not rows.any()
    assert bool(columns.any(1).all())
    assert grown.report.verification.verdict == "preserved"
    relu = perceptron(nn.ReLU())
    asleep = fxgrow.Tiny(F.mse_loss, batches_for(relu, 6))
    with pytest.raises(PlanError, match=r"0 would stay zero: relu .* another pairing or init"):
        fxgrow.widen(relu, "+2", init=asleep, pairing="zero_z")


def test_an_explicit_default_is_no_default() -> None:
    model, batches = network()
    for method, own in ((fxgrow.Tiny, "none"), (fxgrow.GradMax, "zero_z")):
        for arguments, pairing in (
            ({}, own),
            ({"pairing": "vv_z_negz"}, "vv_z_negz"),
            ({"preset": "r2wider"}, "vv_z_negz"),
        ):
            plan = api.plan(model, "+2", init=method(F.mse_loss, batches), **arguments)
            assert {group.pairing for group in plan.groups} == {pairing}


def test_zero_rows_that_are_asked_for_are_no_twins() -> None:
    model = perceptron(nn.ReLU())
    batches = batches_for(model, 6)
    own = api.plan(model, "+2", init=fxgrow.GradMax(F.mse_loss, batches))
    assert {group.pairing for group in own.groups} == {"vv_z_negz"}
    with pytest.raises(PlanError, match=r"0 would stay zero: relu .* another pairing or init"):
        api.plan(model, "+2", init=fxgrow.GradMax(F.mse_loss, batches), pairing="zero_z")


def test_tiny_steps_down_from_rescaled_weights() -> None:
    model, batches = network()
    init = fxgrow.Tiny(F.mse_loss, batches)
    grown = fxgrow.widen(model, "+2", init=init, rescaling="default_vt", include=["2"])
    empty = fxgrow.Plan.from_json(grown.plan.to_json())
    still = empty_of(empty, model, grown)
    assert mean_loss(grown.model.eval(), batches) < mean_loss(still, batches)


def empty_of(plan: fxgrow.Plan, model: nn.Module, grown: fxgrow.Grown) -> nn.Module:
    """Return the rescaled network whose new channels are zeros."""
    from fxgrow.apply.module import apply_to_module

    return apply_to_module(plan, model, grown.init.scaled(0.0)).eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: perceptron(nn.Tanh()), (2, 6)),
    "convolutions": (
        lambda: chain(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3),
                      nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
        (2, 2, 6, 6),
    ),
    "depthwise": (
        lambda: chain(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1)),
        (2, 2, 5, 5),
    ),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10).double(), (2, 3, 32, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_the_parameters_that_a_plan_counts(name: str) -> None:
    make, shape = NETWORKS[name]
    model, x = make().eval(), torch.randn(shape, dtype=torch.float64)
    plan = api.plan(model, "+2", x)
    costs, new, total = Costs(fxgrow.inspect(model, x).parts), {}, 0
    for group in plan.groups:
        total += costs.of(group.name, 2, new)
        new[group.name] = 2
    assert len(plan.groups) > 0
    assert total == plan.parameters[1] - plan.parameters[0]


@pytest.mark.filterwarnings("ignore:.* the batches give no more")
@pytest.mark.parametrize("method", [fxgrow.Tiny, fxgrow.GradMax])
@pytest.mark.parametrize("pairing", [None, "vv_z_negz"])
@pytest.mark.parametrize("budget", ["+40%", "+60", "+1000000"])
def test_a_budget_goes_where_channels_gain_most(
    method: Callable[..., object], pairing: str | None, budget: str
) -> None:
    model, batches = network(seed=1)
    free = fxgrow.widen(
        model, "3x", init=method(F.mse_loss, batches), pairing=pairing, verify=False
    )
    init = method(F.mse_loss, batches)
    grown = fxgrow.widen(model, "3x", init=init, pairing=pairing, budget=budget)
    before, after = grown.plan.parameters
    allowed = budgeted(budget, before)
    assert 0 < after - before <= allowed
    assert fxgrow.Plan.from_json(grown.plan.to_json()).request.budget == budget
    counts = {name: len(gains) for name, gains in grown.init.gains.items()}
    everything = {name: sorted(gains, reverse=True) for name, gains in free.init.gains.items()}
    for name, gains in grown.init.gains.items():
        assert list(gains) == pytest.approx(everything[name][: counts[name]])
    # Any single channel that was left out gains less per parameter, or does not fit any more.
    costs = Costs(fxgrow.inspect(model).parts)
    each = 1 if pairing is None else 2
    new = {name: count * each for name, count in counts.items()}
    for name, gains in everything.items():
        count = counts.get(name, 0)
        if count < len(gains):
            assert costs.of(name, each, new) > allowed - (after - before)
    if budget == "+1000000":
        assert counts == {name: len(gains) for name, gains in everything.items()}
    else:
        assert sum(counts.values()) < sum(map(len, everything.values()))


TWINS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)),
    "batch norm": lambda: chain(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)),
    "layer norm": lambda: chain(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4)),
    "asked for": lambda: chain(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
}


@pytest.mark.filterwarnings("ignore:.* the batches give no more")
@pytest.mark.parametrize("name", TWINS)
def test_both_twins_gain_what_a_direction_is_told_to(name: str) -> None:
    """GradMax tells the squared norm of the gradient of all new rows, per learning rate.

    Behind a norm over all channels that is what parts the twins: all rows move its mean besides.
    """
    model = TWINS[name]()
    batches = batches_for(model, 6)
    pairing = "vv_z_negz" if name == "asked for" else None
    init = fxgrow.GradMax(F.mse_loss, batches)
    grown = fxgrow.widen(model, "+4", init=init, pairing=pairing, verify=False)
    (group,) = grown.plan.groups
    assert group.pairing == "vv_z_negz"
    mean_loss(grown.model.eval(), batches).backward()
    weight = grown.model.get_parameter("0.weight")
    assert weight.grad is not None
    one, other = weight.grad[group.width[0] :].chunk(2)
    parting = (one - other).square().sum().item() / 2
    assert sum(grown.init.gains["0"]) == pytest.approx(parting, rel=1e-5)
    if name != "layer norm":
        assert torch.allclose(one, -other)
    if pairing is None:
        (row,) = fxgrow.inspect(model, growth=fxgrow.GradMax(F.mse_loss, batches)).growth.groups
        assert row.gains[: len(grown.init.gains["0"])] == pytest.approx(grown.init.gains["0"])


def test_a_budget_prefers_the_gain_per_parameter() -> None:
    """Of two groups alike but for what they gain, the one that gains more is paid first."""
    model, batches = network()
    rows = fxgrow.inspect(model, growth=fxgrow.Tiny(F.mse_loss, batches, keep=1)).growth.groups
    best = max(rows, key=lambda row: row.gain_per_thousand)
    budget = f"+{max(row.parameters for row in rows)}"
    init = fxgrow.Tiny(F.mse_loss, batches, keep=1)
    plan = api.plan(model, "2x", init=init, budget=budget)
    assert [group.name for group in plan.groups] == [best.name]
    assert "more per parameter" in plan.refused[-1].reason


def test_a_budget_that_pays_for_all_there_is_is_not_the_reason() -> None:
    """The layers around a group of a network with two outputs give two directions."""
    model = chain(nn.Linear(6, 5), GENTLE, nn.Linear(5, 2), seed=0)
    init = fxgrow.GradMax(F.mse_loss, batches_for(model, 6, sizes=(20,)))
    plan = api.plan(model, "4x", init=init, budget="+1000%")
    assert plan.groups[0].reason.endswith("new channels: the batches give no more")
    assert "the batches give no more" in plan.warnings[-1]
    plan = api.plan(model, "4x", init=init, budget="+10")
    assert plan.groups[0].reason.endswith("1 of 15 new channels: the budget is +10")
    assert not plan.warnings


def test_budgets_keep_multiples() -> None:
    model, batches = network()
    init = fxgrow.GradMax(F.mse_loss, batches)
    plan = api.plan(model, "4x", init=init, budget="+100%", multiple_of=4)
    assert all(group.width[1] % 4 == 0 for group in plan.groups)


@pytest.mark.parametrize("budget", ["10%", "+0", "+0%", "+x", "+1.5", "-5", "+10 %", 0, -5, True])
def test_what_is_no_budget_is_refused(budget: object) -> None:
    model, batches = network()
    with pytest.raises(UsageError, match=r"budget .* cannot be read"):
        api.plan(model, "2x", init=fxgrow.Tiny(F.mse_loss, batches), budget=budget)


def test_a_budget_is_not_spent_on_what_cannot_grow() -> None:
    """Zeros before a batch norm are refused before anything is paid for."""
    norm = nn.BatchNorm1d(5)
    model = chain(nn.Linear(6, 5), norm, nn.SiLU(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 7))
    batches = batches_for(model, 6)
    for budget in ("+2", "+1000"):
        init = fxgrow.Tiny(F.mse_loss, batches)
        with pytest.raises(PlanError, match=r"by 316\..* another pairing or init"):
            api.plan(model, "+2", init=init, pairing="zero_z", budget=budget, include=["0"])
    plan = api.plan(
        model, "+2", init=fxgrow.Tiny(F.mse_loss, batches), pairing="zero_z", budget="+26"
    )
    assert [(group.name, group.width) for group in plan.groups] == [("3", (4, 6))]
    assert "by 316" in plan.refused[0].reason


def test_a_budget_needs_data_and_pays_for_a_channel() -> None:
    model, batches = network()
    with pytest.raises(UsageError, match=r"only an init from data.*fxgrow\.Tiny"):
        fxgrow.widen(model, "2x", budget="+10%")
    with pytest.raises(PlanError, match=r"\(2 parameters\) pays for no new channel: the least is"):
        fxgrow.widen(model, "2x", budget="+2", init=fxgrow.Tiny(F.mse_loss, batches))
    data = api.plan(model, "2x", init=fxgrow.Tiny(F.mse_loss, batches), budget="+50%").to_dict()
    data["request"]["budget"] = "+1e9%"
    with pytest.raises(PlanError, match=r"request\.budget"):
        fxgrow.Plan.from_dict(data)


@pytest.mark.filterwarnings("ignore:.* the batches give no more")
@pytest.mark.parametrize("method", [fxgrow.Tiny, fxgrow.GradMax])
def test_the_table_of_gains_is_what_growing_finds(method: Callable[..., object]) -> None:
    model, batches = network()
    found = fxgrow.inspect(model, growth=method(F.mse_loss, batches))
    grown = fxgrow.widen(model, "9x", init=method(F.mse_loss, batches), verify=False)
    rows = {row["name"]: row for row in json.loads(json.dumps(found.to_dict()))["growth"]["groups"]}
    assert list(rows) == ["0", "2"]
    for name, row in rows.items():
        assert row["gains"] == pytest.approx(list(grown.init.gains[name]))
        assert row["gain"] == pytest.approx(sum(row["gains"]))
        assert row["channels"] == len(row["gains"])
        assert row["parameters"] == {"0": 6 + 1 + 4, "2": 5 + 1 + 7}[name]
        thousands = row["channels"] * row["parameters"] / 1000
        assert row["gain_per_thousand"] == pytest.approx(row["gain"] / thousands)
        assert row["reason"] == ""
    text = str(found.growth)
    first = max(rows, key=lambda name: rows[name]["gain_per_thousand"])
    lines = [line.split() for line in text.splitlines()]
    assert next(line[0] for line in lines if line[0] in rows) == first
    assert text in str(found)


def test_a_group_without_new_channels_tells_why() -> None:
    model = chain(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 5), nn.Identity(), nn.Linear(5, 3))
    found = fxgrow.inspect(model, growth=fxgrow.Tiny(F.mse_loss, batches_for(model, 3))).growth
    reasons = {row.name: row.reason for row in found.groups}
    assert "makes 0.5 of zero" in reasons["0"]
    assert "old weights can do what the loss asks for" in reasons["2"]
    assert all(row.gain == row.gain_per_thousand == 0 for row in found.groups)
    assert "none, because" in str(found)
    with pytest.raises(UsageError, match="no init from data"):
        fxgrow.inspect(model, growth="tiny")


def test_losses_take_what_networks_return() -> None:
    loss, words = LOSSES["cross_entropy"], torch.randint(5, (2, 3))
    logits = torch.randn(2, 3, 5)
    expected = F.cross_entropy(logits.flatten(0, 1), words.flatten())
    assert torch.equal(loss(logits, words), expected)
    assert torch.equal(loss({"hidden": words, "logits": logits}, words), expected)
    assert torch.equal(loss(logits.mT, words), F.cross_entropy(logits.mT, words))
    with pytest.raises(PlanError, match="without any tensor"):
        loss(None, words)
    with pytest.raises(PlanError, match="and the targets"):
        LOSSES["mse_loss"](logits, logits[0])


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('it ran')",))


X, Y = torch.ones(4, 6), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("saved", "count"),
    [([(X, Y), (X, Y)], 2), ((X, Y), 1), ([X, Y], 1), ([({"x": X, "flag": True}, Y)], 1),
     ([((X, X), Y)], 1)],
)  # fmt: skip
def test_batches_are_read(tmp_path: Path, saved: object, count: int) -> None:
    torch.save(saved, tmp_path / "batches.pt")
    found = read_batches(tmp_path / "batches.pt")
    assert len(found) == count
    assert all(torch.equal(targets, Y) for _, targets in found)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (Code(), "exec"),
        ([(X, Code())], "exec"),
        ([(nn.Linear(2, 2), Y)], "batch 0"),
        ({"weight": X}, "holds a dict"),
        ([], "holds nothing"),
        ([(X, Y), (X, Y), X], "batch 2"),
        ([(X, 3)], "batch 0"),
        ([({}, Y)], "batch 0"),
        ([(X.to("meta"), Y)], "batch 0"),
    ],
)
def test_what_is_no_batches_is_refused(tmp_path: Path, saved: object, message: str) -> None:
    path = tmp_path / "batches.pt"
    torch.save(saved, path)
    with pytest.raises(SourceError, match=message) as caught:
        read_batches(path)
    assert str(path) in str(caught.value)
    assert "torch.save([(inputs, targets), …], PATH)" in str(caught.value)
    for content in (b"", b"no batches"):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"batches\.pt"):
            read_batches(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that is a module of torch's classes, and batches of classes for it."""
    found = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
    torch.save(model, found / "model.pt")
    batches = [(torch.randn(9, 6).double(), torch.randint(3, (9,))) for _ in range(2)]
    torch.save(batches, found / "batches.pt")
    return found


def run(folder: Path, *arguments: object) -> Result:
    texts = [str(folder / a) if str(a).endswith(".pt") else str(a) for a in arguments]
    return CliRunner().invoke(app, texts)


def test_inspect_tells_where_to_grow(folder: Path) -> None:
    result = run(folder, "inspect", "model.pt", "--growth", "--data", "batches.pt")
    assert result.exit_code == 0
    assert "gain per 1000 parameters" in result.stdout
    assert "loss: cross_entropy, since the targets are whole numbers" in result.stderr
    told = run(
        folder, "inspect", "model.pt", "--growth", "--data", "batches.pt", "--method", "gradmax",
        "--loss", "cross_entropy", "--json",
    )  # fmt: skip
    assert json.loads(told.stdout)["growth"]["method"] == "GradMax"
    assert "loss:" not in told.stderr


def test_widen_spends_a_budget_from_the_command_line(folder: Path) -> None:
    result = run(
        folder, "widen", "model.pt", "--budget", "+50%", "--init", "tiny", "--data", "batches.pt"
    )
    assert result.exit_code == 0, result.output
    grown = fxgrow.load(folder / "model-+50.pt")
    before, after = (
        sum(p.numel() for p in m.parameters())
        for m in (torch.load(folder / "model.pt", weights_only=False), grown)
    )
    assert before < after <= 1.5 * before
    twins = run(
        folder, "widen", "model.pt", "--width", "2x", "--init", "gradmax", "--data", "batches.pt",
        "--keep", "1", "--pairing", "vv_z_negz", "--strict", "-o", "twins.pt",
    )  # fmt: skip
    assert twins.exit_code == 0, twins.output
    assert fxgrow.load(folder / "twins.pt")[0].out_features == 7


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "model.pt", "--growth"], 2, "--data batches.pt"),
        (["inspect", "model.pt", "--loss", "mse_loss"], 2, "are for --growth"),
        (["inspect", "model.pt", "--growth", "--data", "batches.pt", "--why", "0"], 2, "two quest"),
        (["inspect", "model.pt", "--growth", "--data", "batches.pt", "--method", "x"], 2, "'x'"),
        (["inspect", "model.pt", "--growth", "--data", "model.pt"], 1, "holds a Sequential"),
        (["widen", "model.pt"], 2, "or a --budget"),
        (["widen", "model.pt", "--budget", "+10%"], 2, "--init tiny"),
        (["widen", "model.pt", "--width", "2x", "--data", "batches.pt"], 2, "--init tiny"),
        (["widen", "model.pt", "--width", "2x", "--init", "tiny"], 2, "--data batches.pt"),
        (["widen", "model.pt", "--width", "2x", "--init", "gradmax", "--data", "batches.pt",
          "--pairing", "replicate"], 1, "copies old channels"),
    ],
)  # fmt: skip
def test_wrong_usage_is_told_in_one_line(
    folder: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run(folder, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
