"""Several surgeries in one plan."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from networks import torchvision_model
from torch import Tensor, nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.api import kernels
from fxgrow.api import widen as api
from fxgrow.api.deepen import plan_deepening
from fxgrow.apply.module import apply_to_state_dict
from fxgrow.apply.rearrange import rearranged
from fxgrow.cli.app import app
from fxgrow.plan.edits import Child, Rearrangement
from fxgrow.plan.names import new_names

INPUTS = torch.randn(2, 3, 32, 32)

# Every kind of surgery, as a plan after another; tests run them in every order.
Step = Callable[[nn.Module, Tensor, "fxgrow.Plan | None"], fxgrow.Plan]
STEPS: dict[str, Step] = {
    "widen": lambda model, inputs, after: api.plan(model, "1.5x", inputs, after=after),
    "kernels": lambda model, inputs, after: kernels.plan(model, "+2", inputs, after=after),
}
ORDERS = tuple(itertools.permutations(STEPS))
# The commands that make the same plans, without the files.
COMMANDS = {"widen": ["widen", "--width", "1.5x"], "kernels": ["morph-kernel", "--size", "+2"]}
# What of a report tells of each.
TOLD = {"widen": "groups", "kernels": "kernels"}


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5).eval()


@pytest.mark.parametrize("rescaling", ["none", "default_vt"])
def test_two_widenings_in_one_plan_keep_the_function(resnet, rescaling):
    first = api.plan(resnet, {"layer1.*": "2x"}, INPUTS)
    both = fxgrow.Plan.from_json(
        api.plan(resnet, {"layer[12].*": "+8"}, INPUTS, rescaling=rescaling, after=first).to_json()
    )
    grown = api.carry_out(both, resnet, INPUTS)
    assert grown.model.layer1[0].conv1.out_channels == 2 * 64 + 8
    assert grown.model.layer2[0].conv1.out_channels == 128 + 8
    assert grown.report.verification.verdict == "preserved"
    eval_mode = grown.report.verification.eval
    assert eval_mode is not None
    assert eval_mode.float64.max_rel <= 1e-10
    weights = apply_to_state_dict(both, resnet.state_dict())
    assert all(torch.equal(weights[n], t) for n, t in grown.model.state_dict().items())
    report = grown.report.to_dict()
    assert len(report["groups"]) == 2 + 4
    assert report["parameters"] == [
        sum(p.numel() for p in net.parameters()) for net in (resnet, grown.model)
    ]


def test_a_plan_for_the_second_step_alone_is_refused(resnet):
    first = api.plan(resnet, {"layer1.*": "2x"}, INPUTS)
    both = api.plan(resnet, {"layer1.*": "+8"}, INPUTS, after=first)
    with pytest.raises(fxgrow.PlanError, match="another network"):
        both.steps[-1].apply(resnet)


def test_what_changes_the_function_must_come_last(resnet):
    with pytest.raises(fxgrow.PlanError, match="rescales last"):
        api.plan(resnet, "2x", INPUTS, after=api.plan(resnet, "2x", INPUTS, rescaling="default_vt"))


def test_a_first_step_that_breaks_the_function_is_found(resnet):
    first = api.plan(resnet, {"layer1.0*": "2x"}, INPUTS)
    name = next(iter(first.tensors))
    broken = {**first.tensors, name: _scaled(first.tensors[name])}
    both = api.plan(resnet, {"layer2.0*": "2x"}, INPUTS, after=_with(first, broken))
    with pytest.raises(fxgrow.VerificationError, match=r"layer1\.0\.conv1"):
        api.carry_out(both, resnet, INPUTS)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v3_small",
        *(pytest.param(n, marks=pytest.mark.sweep) for n in ("resnet18", "convnext_tiny")),
    ],
)
def test_surgeries_of_all_kinds_compose_in_every_order(name, order):
    model = torchvision_model(name, num_classes=5)
    inputs = torch.randn(2, 3, 64, 64).double()
    made = None
    for step in order:
        made = STEPS[step](model, inputs, made)
    made = fxgrow.Plan.from_json(made.to_json())
    assert len(made.steps) == len(order)
    grown = api.carry_out(made, model, inputs, strict=True)
    found = grown.report.verification
    assert found.verdict == "preserved"
    assert max(found.eval.float64.max_rel, found.train.float64.max_rel) <= 1e-10
    assert type(grown.model) is type(model)
    report = grown.report.to_dict()
    assert all(report[TOLD[step]] for step in order)
    counts = [sum(p.numel() for p in net.parameters()) for net in (model, grown.model)]
    assert report["parameters"] == counts


def test_kernels_of_what_a_widening_made(resnet):
    first = api.plan(resnet, {"layer1.0.conv1": "+8"}, INPUTS)
    made = kernels.plan(resnet, {"layer1.0.conv*": "5"}, INPUTS, after=first)
    grown = api.carry_out(made, resnet, INPUTS).model
    layer = resnet.layer1[0].conv1
    assert grown.layer1[0].conv1.weight.shape == (72, 64, 5, 5)
    assert torch.equal(grown.layer1[0].conv1.weight[:64, :, 1:4, 1:4], layer.weight)
    assert grown.layer1[0].conv2.weight.shape == (64, 72, 5, 5)


def test_a_broken_kernel_after_a_good_widening_is_found(resnet):
    first = api.plan(resnet, {"layer1.0*": "2x"}, INPUTS)
    made = kernels.plan(resnet, {"layer2.0.conv1": "5"}, INPUTS, after=first)
    name = next(iter(made.tensors))
    broken = _with(made, {name: _scaled(made.tensors[name])})
    with pytest.raises(fxgrow.VerificationError, match=r"breaks is layer2\.0\.conv1"):
        api.carry_out(broken, resnet, INPUTS)


def _threes(tensor: Tensor, reference: Tensor, fan_in: int) -> None:
    del reference, fan_in
    tensor.fill_(3)


def test_an_init_of_ones_own_is_for_the_step_that_names_it(resnet):
    first = api.plan(resnet, {"layer1.0.conv1": "+2"}, INPUTS, init=_threes)
    made = kernels.plan(resnet, {"layer1.0.conv1": "5"}, INPUTS, after=first)
    with pytest.raises(fxgrow.PlanError, match="not run unasked"):
        api.carry_out(made, resnet, INPUTS)
    grown = api.carry_out(made, resnet, INPUTS, init=_threes).model
    rows = grown.layer1[0].conv1.weight[64:]
    assert torch.equal(rows[..., 1:4, 1:4], torch.full((2, 64, 3, 3), 3.0))
    assert rows.sum() == 3 * 2 * 64 * 9


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_commands_compose_into_one_plan_and_one_file(tmp_path, monkeypatch, resnet, order):
    monkeypatch.chdir(tmp_path)
    torch.save(resnet.state_dict(), "model.pt")
    shape = ["--input-shape", "2x3x32x32"]
    after: list[str] = []
    for index, step in enumerate(order):
        plan = f"{index}.json"
        _run(*COMMANDS[step], "--include", "layer1.*", "model.pt", *after, *shape,
             "--dry-run", "--plan", plan)  # fmt: skip
        after = ["--after", plan]
    _run("apply", plan, "model.pt", *shape, "-o", "grown.pt", "--report", "report.json")
    grown = fxgrow.load("grown.pt")
    assert grown.layer1[0].conv1.weight.shape == (96, 64, 5, 5)
    torch.testing.assert_close(grown(INPUTS), resnet(INPUTS), rtol=1e-4, atol=1e-5)
    record = torch.load("grown.pt")._metadata["_fxgrow"]
    assert len(record["plans"]) == len(order)
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert all(report[TOLD[step]] for step in order)
    assert len(report["before"]) == len(order) - 1
    # What was grown can be grown again, and a page shows every step.
    _run("apply", plan, "model.pt", *shape, "--report", "report.html", "--no-verify")
    page = Path("report.html").read_text(encoding="utf-8")
    assert "width 1.5x" in page
    assert "kernel size +2" in page
    _run("morph-kernel", "grown.pt", "--size", "layer4.*.conv2=5", *shape, "-o", "again.pt")
    assert fxgrow.load("again.pt").layer4[1].conv2.kernel_size == (5, 5)


def _run(*arguments: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def test_new_modules_among_the_old(resnet):
    edit = Rearrangement("layer1", (Child("0", "0"), Child("1", "0", new=True), Child("2", "1")))
    view, _ = rearranged(resnet, [edit])
    assert view.layer1[2] is resnet.layer1[1]
    assert len(resnet.layer1) == 2
    assert view.layer1[1].conv1.weight.is_meta
    assert view.layer2 is resnet.layer2
    names = new_names(resnet.state_dict(), [edit])
    assert [name for name, _, _ in names] == list(view.state_dict())
    assert ("layer1.2.conv1.weight", "layer1.1.conv1.weight", False) in names
    assert ("layer1.1.conv1.weight", "layer1.0.conv1.weight", True) in names


def test_a_rearrangement_of_another_network_is_refused(resnet):
    edit = Rearrangement("layer1", (Child("0", "0"), Child("1", "7")))
    with pytest.raises(fxgrow.PlanError, match="called 7"):
        rearranged(resnet, [edit])
    with pytest.raises(fxgrow.PlanError, match="no module features"):
        rearranged(nn.Sequential(nn.Linear(2, 2)), [Rearrangement("features", ())])


def _scaled(edit):
    return replace(edit, scale=3.0)


def _with(plan, tensors):
    return replace(plan, tensors=tensors)


@pytest.mark.parametrize("order", [("deepen", "widen", "kernels"), ("kernels", "widen", "deepen")])
def test_wider_deeper_and_larger_kernels_in_one_plan(resnet, order):
    steps = {
        **STEPS,
        "deepen": lambda model, inputs, after: plan_deepening(
            model, {"layer1": "+1", "layer3": "+2"}, inputs, after=after
        ),
    }
    made = None
    for step in order:
        made = steps[step](resnet, INPUTS, made)
    made = fxgrow.Plan.from_json(made.to_json())
    grown = api.carry_out(made, resnet, INPUTS, strict=True)
    found = grown.report.verification
    assert found.verdict == "preserved"
    assert max(found.eval.float64.max_rel, found.train.float64.max_rel) <= 1e-10
    assert [len(stage) for stage in (grown.model.layer1, grown.model.layer3)] == [3, 4]
    report = grown.report.to_dict()
    assert [block["name"] for block in report["blocks"]] == ["layer1.2", "layer3.2", "layer3.3"]
    assert report["groups"]
    assert report["kernels"]
    weights = apply_to_state_dict(made, resnet.state_dict())
    assert all(torch.equal(weights[n], t) for n, t in grown.model.state_dict().items())


def test_a_plan_goes_on_from_copies() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(4, 5)
    first = fxgrow.widen(net, "2x", inputs, pairing="replicate")
    second = fxgrow.widen(net, "2x", inputs, after=first.plan)
    assert second.model[0].out_features == 32
    assert second.report.verification.verdict == "preserved"
