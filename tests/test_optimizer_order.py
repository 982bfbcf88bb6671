"""Which parameter an optimizer's state is for: found where only one answer fits, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models.vgg import make_layers

import fxgrow
from fxgrow.api.widen import plan as make_plan
from fxgrow.errors import PlanError
from fxgrow.files.optimizer import grow_state_dict
from fxgrow.files.optimizer.order import names_by_group
from fxgrow.plan.edits import Child, Rearrangement
from fxgrow.plan.schema import Plan

Groups = list[list[str]]


@pytest.fixture(scope="module")
def plan_of_nothing() -> Plan:
    """A plan that edits no tensor."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    return replace(make_plan(model), tensors={})


class Block(nn.Module):
    """Weights, norms and biases of which some have one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)


PARAMETERS = dict(Block().named_parameters())
SHAPES = {name: tuple(parameter.shape) for name, parameter in PARAMETERS.items()}


def saved(groups: Groups, without: frozenset[str] = frozenset(), **more: Any) -> dict[str, Any]:
    """Return the state_dict of an SGD with momentum over parameters of a block."""
    flat = [name for names in groups for name in names]
    index = {name: position for position, name in enumerate(flat)}
    state = {
        index[name]: {"momentum_buffer": torch.zeros(SHAPES[name])}
        for name in flat
        if name not in without
    }
    param_groups = [{"lr": 0.1, "params": [index[name] for name in names]} for names in groups]
    return {"state": state, "param_groups": param_groups, **more}


def split(*kinds: Callable[[str], bool]) -> Groups:
    return [[name for name in SHAPES if is_kind(name)] for is_kind in kinds]


CLEAR: dict[str, Groups] = {
    "all in one": [list(SHAPES)],
    "decay of matrices": split(lambda n: len(SHAPES[n]) > 1, lambda n: len(SHAPES[n]) == 1),
    "head first": split(lambda n: n.startswith("head"), lambda n: not n.startswith("head")),
    "the head alone": split(lambda n: n.startswith("head")),
    "frozen stem": split(lambda n: n.partition(".")[0] in ("conv2", "norm2", "head")),
    "each stage": split(lambda n: "1" in n, lambda n: "1" not in n),
    "an empty group": [[], list(SHAPES)],
}


@pytest.mark.parametrize("groups", CLEAR.values(), ids=CLEAR)
def test_groups_that_fit_in_one_way_are_found(groups):
    assert names_by_group(saved(groups), SHAPES) == groups


def test_a_parameter_without_a_state_has_its_place():
    groups = CLEAR["all in one"]
    without = frozenset({"norm1.weight", "head.bias"})
    assert names_by_group(saved(groups, without), SHAPES) == groups


@pytest.mark.parametrize(
    "groups",
    [
        split(lambda n: not n.endswith("bias"), lambda n: n.endswith("bias")),
        split(lambda n: n.startswith("norm1")),
    ],
    ids=["no decay of biases", "one of two norms"],
)
def test_groups_that_fit_in_several_ways_are_not_guessed(groups):
    with pytest.raises(PlanError, match="in more than one way"):
        names_by_group(saved(groups), SHAPES)


def test_shapes_that_tell_nothing_are_given_up_early():
    alike = {f"p{index}": (3,) for index in range(60)}
    groups = [{"params": list(range(start, 60, 10))} for start in range(10)]
    state = {index: {"exp_avg": torch.zeros(3)} for index in range(60)}
    with pytest.raises(PlanError, match="in more than one way"):
        names_by_group({"state": state, "param_groups": groups}, alike)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s["state"].update({0: {"exp_avg": torch.zeros(9)}}), "are not those"),
        (lambda s: s["param_groups"][0]["params"].append(99), "are not those"),
        (lambda s: s["param_groups"].append(3), "not in the form"),
        (lambda s: s["state"].update({0: torch.zeros(4)}), "not in the form"),
        (lambda s: s["param_groups"][0].update(param_names=["nowhere"] * 10), "nowhere"),
    ],
)
def test_a_state_that_fits_in_no_way_is_refused_with_the_reason(change, reason):
    broken = saved(CLEAR["all in one"])
    change(broken)
    with pytest.raises(PlanError, match=reason):
        names_by_group(broken, SHAPES)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_names_are_used_where_the_optimizer_has_them(prefix):
    groups = split(lambda n: n.endswith("bias"), lambda n: not n.endswith("bias"))
    groups = [names[::-1] for names in groups]
    named = saved(groups)
    for group, names in zip(named["param_groups"], groups, strict=True):
        group["param_names"] = [prefix + name for name in names]
    assert names_by_group(named, SHAPES) == groups


@given(st.lists(st.integers(-1, 2), min_size=len(SHAPES), max_size=len(SHAPES)))
def test_what_is_found_is_right_or_nothing_is_found(choice):
    groups = [[n for n, c in zip(SHAPES, choice, strict=True) if c == g] for g in range(3)]
    found = groups
    with suppress(PlanError):
        found = names_by_group(saved(groups), SHAPES)
    assert found == groups


# ── parameters that the old network lacks ─────────────────────────────────────────────────────


DEEPENED = Rearrangement("stages", (Child("0", "0"), Child("1", "0", new=True), Child("2", "1")))


def stages(count: int) -> nn.Module:
    """Return convolutions and norms that are all of the same shapes, and a head."""
    model = nn.Module()
    model.stages = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(count))
    )
    model.head = nn.Linear(4, 2)
    return model


@pytest.fixture(scope="module")
def deeper(plan_of_nothing: Plan) -> Plan:
    """A plan that inserts a stage between two others."""
    return replace(plan_of_nothing, rearrangements=(DEEPENED,))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.named_parameters())
    matrices, vectors = ([p for _, p in parameters if (p.ndim > 1) == f] for f in (True, False))
    return torch.optim.SGD(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], 0.1, momentum=0.9
    )


def test_new_parameters_join_the_group_of_those_they_are_like_without_a_state(deeper):
    before, after = stages(2), stages(3)
    optimizer = optimizer_of(before)
    for index, parameter in enumerate(before.parameters()):
        parameter.grad = torch.full_like(parameter, index)
    optimizer.step()
    new, notes = grow_state_dict(deeper, optimizer.state_dict(), before, after)
    assert notes == []
    loaded = optimizer_of(after)
    loaded.load_state_dict(new)
    assert len(loaded.state) == len(optimizer.state)
    for old, name in ((f"stages.{i}", f"stages.{j}") for i, j in ((0, 0), (1, 2))):
        for part in ("0.weight", "0.bias", "1.weight", "1.bias"):
            expected = optimizer.state[before.get_parameter(f"{old}.{part}")]
            found = loaded.state[after.get_parameter(f"{name}.{part}")]
            assert torch.equal(found["momentum_buffer"], expected["momentum_buffer"])


def test_an_optimizer_at_work_takes_new_parameters_up(deeper):
    before, after = stages(2), stages(3)
    optimizer = optimizer_of(before)
    for parameter in before.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    fxgrow.grow_optimizer_(optimizer, before, SimpleNamespace(model=after, plan=deeper))
    expected = [group["params"] for group in optimizer_of(after).param_groups]
    held = [group["params"] for group in optimizer.param_groups]
    assert [list(map(id, group)) for group in held] == [list(map(id, g)) for g in expected]
    for parameter in after.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    momentum = optimizer.state[after.stages[1][0].weight]["momentum_buffer"]
    assert torch.equal(momentum, torch.ones_like(momentum))
    momentum = optimizer.state[after.stages[2][0].weight]["momentum_buffer"]
    assert torch.equal(momentum, torch.full_like(momentum, 1.9))


def test_what_is_like_a_frozen_parameter_is_left_out(deeper):
    before, after = stages(2), stages(3)
    optimizer = torch.optim.SGD(before.head.parameters(), 0.1, momentum=0.9)
    for parameter in before.head.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    new, _ = grow_state_dict(deeper, optimizer.state_dict(), before, after)
    loaded = torch.optim.SGD(after.head.parameters(), 0.2)
    loaded.load_state_dict(new)
    assert loaded.state[after.head.bias]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_names_of_new_and_moved_parameters_get_the_prefix_of_the_others(deeper):
    before, after = stages(2), stages(3)
    named = [(f"module.{name}", parameter) for name, parameter in before.named_parameters()]
    old = torch.optim.SGD(named, 0.1).state_dict()
    new, _ = grow_state_dict(deeper, old, before, after)
    expected = [f"module.{name}" for name, _ in after.named_parameters()]
    assert new["param_groups"][0]["param_names"] == expected


def test_states_under_names_stay_under_names(plan_of_nothing):
    state = {f"module.{n}": {"momentum_buffer": torch.zeros(s)} for n, s in SHAPES.items()}
    old = {"state": state, "param_groups": [{"params": list(state)}]}
    new, _ = grow_state_dict(plan_of_nothing, old, Block(), Block())
    assert new == old


def test_an_unclear_state_is_emptied_and_the_reason_named(plan_of_nothing):
    old = saved(split(lambda n: not n.endswith("bias"), lambda n: n.endswith("bias")))
    new, notes = grow_state_dict(plan_of_nothing, old, Block(), Block())
    assert new == {**old, "state": {}}
    assert len(notes) == 1
    assert "more than one way" in notes[0]
    assert "named_parameters" in notes[0]


def test_without_a_state_there_is_nothing_to_tell(plan_of_nothing):
    groups = split(lambda n: not n.endswith("bias"), lambda n: n.endswith("bias"))
    old = {**saved(groups), "state": {}}
    assert grow_state_dict(plan_of_nothing, old, Block(), Block()) == (old, [])


def test_a_conversion_renames_what_is_kept_and_leaves_new_layers_without_a_state():
    def plain(counts: dict[int, int]) -> nn.Sequential:
        cells = [cell for width, count in counts.items() for cell in (*([width] * count), "M")]
        features = make_layers(cells)
        return nn.Sequential(features, nn.Flatten(), nn.Linear(max(counts) * 4, 5))

    model = plain({6: 1, 8: 1})
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.randn(2, 3, 8, 8)
    model(images).square().sum().backward()
    optimizer.step()
    grown = fxgrow.convert(model, plain({6: 2, 12: 2}), images)
    saved_state, notes = grow_state_dict(grown.plan, optimizer.state_dict(), model, grown.model)
    loaded = torch.optim.Adam(grown.model.parameters())
    loaded.load_state_dict(saved_state)
    assert notes == []
    kept = {n for n, parameter in grown.model.named_parameters() if parameter in loaded.state}
    assert kept == {f"{n}.{part}" for n in ("0.0", "0.5", "2") for part in ("weight", "bias")}
    old = optimizer.state[model[0][3].weight]["exp_avg"]
    assert torch.equal(loaded.state[grown.model[0][5].weight]["exp_avg"][:8], old)
