"""What a plan tells of groups, blocks and kernels is what it does, or it is refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guards import refusal
from honest import HONEST, honest, text_of
from torch import nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.cli.app import app

Data = dict[str, Any]
Change = Callable[[Data], object]


@pytest.mark.parametrize("kind", HONEST)
def test_plans_that_planners_make_tell_what_they_do(kind: str) -> None:
    honest(kind)[1].check_told()


def put(*where: str | int, to: object) -> Change:
    """Return what puts a value somewhere."""

    def change(data: Data) -> None:
        *path, last = where
        holder: Any = data
        for key in path:
            holder = holder[key]
        holder[last] = to

    return change


@functools.cache
def mlp() -> tuple[nn.Module, fxgrow.Plan]:
    """Return a network of two hidden groups, with a norm, and a plan for it."""
    net = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    ).eval()
    return net, fxgrow.widen(net, "1.5x", torch.randn(3, 4), verify=False).plan


LIES: dict[str, tuple[str, Change, str]] = {
    "nothing is done": ("replicate", put("tensors", to={}), "groups.0"),
    "less is done": (
        "replicate",
        lambda d: [d["tensors"].pop(name) for name in ("0.weight", "0.bias")],
        "groups.0.writers",
    ),
    "nothing is told": ("replicate", lambda d: d["groups"].pop(0), "none of them tells of 0"),
    "another width": ("replicate", put("groups", 0, "width", to=[4, 7]), "groups.0.width"),
    "a width without end": ("replicate", put("groups", 0, "width", to=[4, 10**9]), "groups.0"),
    "no growth": ("replicate", put("groups", 0, "width", to=[5, 5]), "no growth"),
    "another name": ("replicate", put("groups", 0, "name", to="lm_head"), "groups.0.name"),
    "other writers": ("replicate", put("groups", 0, "writers", to=["lm_head"]), "groups.0"),
    "other readers": ("replicate", put("groups", 0, "readers", to=["lm_head"]), "'lm_head'"),
    "a factor below zero": ("widen", put("groups", 0, "factors", "0", to=-3.0), "factors.0"),
    "a factor of nothing": ("replicate", put("groups", 0, "factors", "x", to=3.0), "factors.x"),
    "alpha": ("widen", put("groups", 0, "alpha", to=-1.0), "groups.0.alpha"),
    "beta": ("widen", put("groups", 0, "beta", to=9.0), "groups.0.beta"),
    "a gain that nothing undoes": ("replicate", put("groups", 0, "gain", to=4.0), "groups.0.gain"),
    "what takes nothing up": ("replicate", put("groups", 0, "absorbed_by", to=["x"]), "takes noth"),
    "no reason": ("replicate", put("groups", 0, "preserves", to="no"), "groups.0.preserves"),
    "what does not cancel": ("replicate", put("groups", 0, "pairing", to="none"), "not cancel"),
    "readers that are writers": (
        "plain",
        put("groups", 0, "readers", to=["0"]),
        "a reader that gr",
    ),
    "fewer readers": ("plain", put("groups", 0, "readers", to=[]), "groups.0.beta"),
    "readers that only write": ("plain", put("groups", 1, "readers", to=["0"]), "readers"),
    "the name of its tensor": ("plain", put("groups", 1, "name", to="3.weight"), "groups.1.name"),
    "readers left out": (
        "plain",
        lambda d: (
            d["groups"][0].update(readers=["5"], beta=None),
            d["groups"][1].update(readers=["5"]),
        ),
        "none of them tells of 3.weight",
    ),
    "one name twice": ("plain", lambda d: d["groups"].append(d["groups"][1]), "two groups"),
    "a block elsewhere": ("plain", put("groups", 0, "block", to="layer.0"), "groups.0.block"),
    "a block of no module": ("plain", put("groups", 0, "block", to="x"), "groups.0.block"),
    "what is pinned": ("plain", put("groups", 0, "kind", to="pinned"), "groups.0.kind"),
    "no alpha": ("widen", put("groups", 0, "alpha", to=None), "groups.0.alpha"),
    "no width": ("plain", put("request", "width", to="0"), "request.width"),
    "a width that is none": ("plain", put("request", "width", to="none"), "width 'none'"),
    "no number of operations": ("plain", put("flops", to=[-5, 3]), "flops"),
    "fewer operations": ("plain", put("flops", 1, to=1), "flops"),
    "no parameters": ("plain", put("parameters", 0, to=-1), "parameters"),
    "no pairing": ("replicate", put("groups", 0, "pairing", to="nope"), "nope"),
    "no pairing asked for": ("replicate", put("request", "pairing", to={"*": "nope"}), "nope"),
    "no rescaling": ("replicate", put("request", "rescaling", to="nope"), "nope"),
    "a gain below zero": ("replicate", put("request", "gain", to={"0": -1.0}), "positive"),
    "a gain of nothing": ("replicate", put("request", "gain", to=2.0), "gain says nothing"),
    "a block that is not made": ("deeper", put("blocks", 0, "name", to="head"), "blocks.0.name"),
    "a larger block": ("deeper", put("blocks", 0, "parameters", to=10**6), "blocks.0.parameters"),
    "another kernel": ("kernels", put("kernels", 0, "after", to=[9, 9]), "kernels.0.after"),
    "a step before": ("twice", put("after", 0, "blocks", 0, "name", to="x"), "after.0.blocks.0"),
}


@pytest.mark.parametrize(("kind", "change", "why"), LIES.values(), ids=LIES)
def test_a_plan_that_tells_other_than_it_does_is_refused(
    kind: str, change: Change, why: str
) -> None:
    data = mlp()[1].to_dict() if kind == "plain" else json.loads(text_of(kind))
    change(data)
    assert why in refusal(lambda: fxgrow.Plan.from_json(json.dumps(data)))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("request", "rescaling"), "x"), (("request", "rescaling"), 5), (("request", "init"), 5),
        (("request", "init"), "../x"), (("request", "pairing"), "x"), (("request", "width"), {}),
        (("request", "width", "*"), 5), (("request", "gain"), 3.0), (("groups", 0, "pairing"), "x"),
        (("request", "noise"), -1.0), (("request", "where"), "x"), (("request", "wher"), "x"),
        (("groups", 0, "readers"), ["x"]), (("groups", 0, "writers"), ["0", "x"]),
        (("tensors", "0.weight", "axes", 0, "role"), "x"), (("modules", 0, "after"), None),
    ],
)  # fmt: skip
def test_the_field_that_is_wrong_is_the_one_that_is_named(
    where: tuple[str | int, ...], value: object
) -> None:
    data = mlp()[1].to_dict()
    if where[-1] == "*":
        data["request"]["width"] = {}
    put(*where, to=value)(data)
    named = ".".join(map(str, where[:2] if where[-1] == "*" else where))
    said = refusal(lambda: fxgrow.Plan.from_json(json.dumps(data)))
    assert f"the plan's {named} is wrong" in said or f"the plan's {named}.* is wrong" in said


UNFIT: dict[str, Change] = {
    "below zero": put("modules", 0, "after", to=-1),
    "another size": put("modules", 0, "after", to=13),
    "another module": put("modules", 2, "module", to="0"),
    "of an input": put("modules", 3, "after", to=11),
    "left as it was": lambda d: d["modules"].pop(1),
    "of what does not grow": lambda d: d["modules"].append(
        {"module": "5", "attribute": "out_features", "before": 2, "after": 4}
    ),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_attributes_that_do_not_fit_the_tensors_are_refused(change: Change) -> None:
    net, plan = mlp()
    plan.apply(net)
    data = plan.to_dict()
    change(data)
    assert "the plan" in refusal(lambda: fxgrow.Plan.from_json(json.dumps(data)).apply(net))


def test_attributes_that_did_not_fit_before_say_nothing_of_the_plan() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net[2].in_features = 80
    assert fxgrow.widen(net, "2x").model[0].out_features == 16


def files(folder: Path, change: Change) -> list[str]:
    """Write a network and a changed plan for it; return the arguments that carry it out."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = fxgrow.widen(net, "2x", verify=False).plan.to_dict()
    change(data)
    torch.save(net, folder / "net.pt")
    (folder / "plan.json").write_text(json.dumps(data))
    paths = [str(folder / name) for name in ("plan.json", "net.pt", "out.pt")]
    return ["apply", *paths[:2], "-o", paths[2], "--verify", "quick"]


def test_the_command_line_refuses_what_is_told_and_not_done(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, files(tmp_path, put("tensors", to={})))
    assert done.exit_code == 1
    assert "plan.json" in done.stderr
    assert "groups.0" in done.stderr
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    "change",
    [
        put("tensors", "0.weight", "scale", to=2.0),
        put("tensors", "2.weight", "axes", 0, "runs", 2, "start", to=1),
        put("modules", 0, "after", to=17),
    ],
)
def test_a_plan_that_fails_on_the_command_line_is_named_and_no_option_that_is_not_there(
    change: Change, tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, files(tmp_path, change))
    assert done.exit_code in (1, 3)
    said = "".join(done.stderr.split())
    assert str(tmp_path / "plan.json") in said
    assert str(tmp_path / "net.pt") in said
    assert "wasedited" in said
    assert "--exclude" not in said
    assert not (tmp_path / "out.pt").exists()


def test_parameters_are_counted_and_not_believed(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [*files(tmp_path, put("parameters", to=[1, 10**9])), "--report", str(report)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(report.read_text())["parameters"] == [4 * 8 + 8 + 16 + 2, 64 + 16 + 32 + 2]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"schema": 1, "request": {}, "groups": [], "verification": {}}, "is a report, not a plan"),
        ({"schema": 1, "stages": []}, "is a schedule of growth, not a plan"),
        ({"model_type": "bert"}, "is the configuration of a model, not a plan"),
        ({"metadata": {}, "weight_map": {}}, "is an index of weights, not a plan"),
        ({"colour": "red"}, "it is a JSON object of colour"),
        ({}, "it is a JSON object of nothing"),
    ],
)
def test_what_is_no_plan_is_called_what_it_is(data: Data, what: str, tmp_path: Path) -> None:
    command = files(tmp_path, lambda _: None)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert what in " ".join(done.stderr.split())
    assert "--plan PLAN.json" in " ".join(done.stderr.split())
