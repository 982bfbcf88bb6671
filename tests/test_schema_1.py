"""Plans of schema 1, which files of earlier versions hold, say and make what they did.

``data/plans_of_schema_1.json`` was written by the last version before schema 2: plans for the
networks of :mod:`honest`, and the record in the file of a widened torchvision network.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torchvision
from guards import refusal
from honest import honest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_hostile_plans import disturb, put
from test_scope import Detector
from torch import nn

import fxgrow
from fxgrow.api import widen as api
from fxgrow.apply.module import apply_to_state_dict
from fxgrow.plan.step import PlanStep

Data = dict[str, Any]
OLD: Data = json.loads((Path(__file__).parent / "data" / "plans_of_schema_1.json").read_text())
RECORD = OLD.pop("record")
VERBS = {
    "widen": "widen", "odd": "widen", "compensated": "widen", "parts": "widen",
    "kernels": "morph_kernel", "deeper": "deepen", "twice": "widen", "regrouped": "convert",
}  # fmt: skip
# What is told in other places, or once instead of twice.
MOVED = {"request", "groups", "schema", "after", "inputs", "inputs_inferred", "tracer",
         "submodules", "norms"}  # fmt: skip


@functools.cache
def made_now(kind: str) -> tuple[nn.Module, fxgrow.Plan]:
    """Return a network, and the plan that is made for it today."""
    if kind != "parts":
        return honest(kind)
    net = Detector().double().eval()
    return net, api.plan(net, "2x")


def steps_of(data: Data) -> list[Data]:
    """Return the data of each step."""
    return [*data["after"], data]


@pytest.mark.parametrize("kind", VERBS)
def test_a_plan_of_schema_1_says_what_it_said(kind: str) -> None:
    plan = fxgrow.Plan.from_dict(OLD[kind])
    assert plan.request.verb == VERBS[kind]
    assert fxgrow.Plan.from_json(plan.to_json()) == plan
    for old, new, step in zip(
        steps_of(OLD[kind]), steps_of(plan.to_dict()), plan.steps, strict=True
    ):
        for edit in new["tensors"].values():
            assert (edit.pop("offset"), edit.pop("normed")) == (0, None)  # schema 1 had none
        for edit in new["sizes"]:
            assert not edit.pop("at")
        assert {name: new[name] for name in old.keys() - MOVED} == {
            name: old[name] for name in old.keys() - MOVED
        }
        assert (old["schema"], new["schema"]) == (1, 2)
        request = {**new["request"]}
        assert request.pop("verb") == step.request.verb
        for later in ("untie", "output_init", "input_init", "budget", "keep", "threshold"):
            assert not request.pop(later, None)
        assert request == {name: old["request"][name] for name in request}
        whole = {"module": ""} | {n: old[n] for n in ("inputs", "inputs_inferred", "tracer")}
        assert new["scopes"] == (old["submodules"] or [whole])
        assert [group.alpha_beta for group in step.groups] == [
            group["alpha_beta"] for group in old["groups"]
        ]
        norms = [{"module": norm.module, "gain": norm.gain} for norm in step.norms]
        assert sorted(map(str, norms)) == sorted(map(str, old["norms"]))


@pytest.mark.parametrize("kind", VERBS)
def test_a_plan_of_schema_1_makes_what_the_same_plan_makes_today(kind: str) -> None:
    net, today = made_now(kind)
    data = today.to_dict()
    for step in steps_of(data):  # the default is another by now
        if "init" in step["request"]:
            step["request"]["init"] = "copy_uniform"
    today, plan = fxgrow.Plan.from_dict(data), fxgrow.Plan.from_dict(OLD[kind])
    for step, other in zip(plan.steps, today.steps, strict=True):
        for entry in fields(PlanStep):
            if entry.name not in ("groups", "refused", "warnings", "fxgrow", "flops"):
                assert getattr(step, entry.name) == getattr(other, entry.name), entry.name
    one, other = (apply_to_state_dict(p, net.state_dict()) for p in (plan, today))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["widen", "twice", "deeper", "regrouped"])
@pytest.mark.parametrize("schema", [1, 2])
def test_a_plan_that_tells_no_init_draws_as_plans_did(kind: str, schema: int) -> None:
    data = copy.deepcopy(OLD[kind])
    told = fxgrow.Plan.from_dict(data)
    data = data if schema == 1 else told.to_dict()
    for step in steps_of(data):
        step["request"].pop("init", None)
    untold = fxgrow.Plan.from_dict(data)
    assert untold == told
    assert untold.request.drawing.init == "copy_uniform"
    assert fxgrow.Plan.from_json(untold.to_json()) == told


def test_a_file_with_a_record_of_schema_1_is_loaded(tmp_path: Path) -> None:
    architecture = RECORD["architecture"]
    net = torchvision.models.mobilenet_v2(**architecture["arguments"]).eval()
    (plan,) = RECORD["plans"]
    assert plan["schema"] == 1
    wider = fxgrow.Plan.from_dict(plan).apply(net)
    path = tmp_path / "wider.safetensors"
    save_file(wider.state_dict(), path, {"format": "pt", "_fxgrow": json.dumps(RECORD)})
    loaded = fxgrow.load(path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), wider(images))
        assert torch.allclose(loaded(images), net(images), atol=1e-5)
    old, new = (sum(p.numel() for p in model.parameters()) for model in (net, loaded))
    assert new > old


@pytest.mark.parametrize(
    ("kind", "where", "value", "told"),
    [
        ("widen", ("norms", 0, "gain"), 2.0, "norms"),
        ("widen", ("norms",), [], "norms"),
        ("widen", ("norms",), None, "norms"),
        ("widen", ("groups", 0, "alpha_beta"), 2.0, "groups.0.alpha_beta"),
        ("widen", ("groups",), None, "groups"),
        ("widen", ("scopes",), [], "scopes"),
        ("widen", ("request", "verb"), "widen", "request.verb"),
        ("widen", ("request", "more"), 1, "request.more"),
        ("widen", ("request", "method"), "r2deeper", "request.method"),
        ("widen", ("request",), None, "request"),
        ("widen", ("inputs",), "text", "inputs"),
        ("widen", ("submodules",), None, "scopes"),
        ("parts", ("inputs",), [], "inputs"),
        ("parts", ("submodules", 0, "inputs"), 3, "inputs"),
        ("parts", ("submodules", 0, "tracer"), "other", "inputs"),
        ("kernels", ("request", "noise"), 0.5, "request.noise"),
        ("deeper", ("request", "width"), "2x", "request.width"),
        ("regrouped", ("request", "rescaling"), "default_vt", "request.rescaling"),
        ("twice", ("after", 0, "norms"), [{"module": "", "gain": 2.0}], "after.0.norms"),
        ("twice", ("after", 0, "schema"), 2, "after.0"),
    ],
)
def test_what_schema_2_has_no_place_for_must_say_what_planners_said(
    kind: str, where: tuple[str | int, ...], value: object, told: str
) -> None:
    data = copy.deepcopy(OLD[kind])
    put(*where, to=value)(data)
    assert told in refusal(lambda: fxgrow.Plan.from_dict(data))


@settings(max_examples=100, deadline=None, database=None)
@given(kind=st.sampled_from(list(VERBS)), times=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_any_change_to_a_plan_of_schema_1_is_refused_or_does_no_harm(
    kind: str, times: int, seed: int
) -> None:
    data, chance = copy.deepcopy(OLD[kind]), Random(seed)
    for _ in range(times):
        disturb(data, chance)
    net = made_now(kind)[0]
    refusal(lambda: apply_to_state_dict(fxgrow.Plan.from_dict(data), net.state_dict()))
