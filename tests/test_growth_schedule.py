"""When a network grows in training: the numbers of the paper, JSON both ways, the clock."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from fxgrow.errors import FxgrowError, PlanError, SourceError, UsageError
from fxgrow.training import GrowthClock, GrowthSchedule, GrowthStage, Plateau, enter_stage_
from fxgrow.training.due import growths_of
from fxgrow.training.geometric import lengths


def mlp(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


class Deep(nn.Module):
    """Residual blocks in a list."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_the_papers_numbers():
    """ResNet-20's three widths, p = 0.2, T_0 = 8, 160 epochs: nine stages (Yuan et al. 2023)."""
    schedule = GrowthSchedule.geometric({"a": 16, "b": 32, "c": 64}, epochs=160)
    assert [stage.epochs for stage in schedule.stages] == [8, 10, 11, 14, 17, 19, 24, 29, 28]
    assert schedule == GrowthSchedule.geometric({"a": 16, "b": 32, "c": 64}, epochs=160, first=8)
    assert [schedule.widths_at(t)["c"] for t in range(9)] == [16, 20, 24, 28, 34, 40, 48, 58, 64]
    assert [schedule.widths_at(t)["b"] for t in range(9)] == [8, 10, 12, 14, 16, 20, 24, 28, 32]
    assert [schedule.widths_at(t)["a"] for t in range(9)] == [4, 6, 8, 10, 12, 14, 16, 16, 16]


@pytest.mark.parametrize("full", [1, 2, 3, 5, 7, 10, 27, 96, 1000])
@pytest.mark.parametrize(("initial", "rate"), [(0.25, 0.2), (0.5, 1.0), (0.1, 0.5), (1.0, 0.2)])
def test_widths_only_grow_and_end_at_the_final_ones(full, initial, rate):
    schedule = GrowthSchedule.geometric({"a": full}, initial=initial, rate=rate, epochs=500)
    widths = [schedule.widths_at(t)["a"] for t in range(len(schedule.stages))]
    assert widths == sorted(set(widths))
    assert widths[-1] == full
    assert all(width % 2 == 0 for width in widths[:-1])
    assert schedule.epochs == 500
    assert min(stage.epochs for stage in schedule.stages) >= 1


@pytest.mark.parametrize("first", [None, 1, 3])
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("epochs", [9, 16, 40, 97, 160, 5000])
def test_stages_become_longer_by_the_rate(first, rate, count, epochs):
    """Sums of lengths stay within half an epoch of the rule's, so that nothing drifts."""
    shares = [(1 + rate) ** t for t in range(count)]
    if first is not None and first * sum(shares[:-1]) >= epochs - 0.5:
        return
    found = lengths(epochs, count, rate, first)
    assert sum(found) == epochs
    assert min(found) >= 1
    assert found[:-1] == sorted(found[:-1])
    exact = epochs / sum(shares)
    starts = [exact, float(math.floor(exact + 0.5))] if first is None else [first]
    if starts[0] >= 1:  # else each has one epoch first
        apart = [
            max([abs(sum(found[:t]) - s * sum(shares[:t])) for t in range(count)]) for s in starts
        ]
        assert min(apart) <= 1.5  # half, and one where a shorter one went before
    if first is None and exact >= 1:
        assert abs(found[-1] - exact * shares[-1]) <= exact * shares[-1] / 4 + 1.5


def test_fewer_stages_end_at_the_final_widths_too():
    schedule = GrowthSchedule.geometric({"a": 64}, epochs=30, stages=3)
    assert [schedule.widths_at(t)["a"] for t in range(3)] == [16, 20, 64]
    with pytest.raises(UsageError, match="not enough for 9 stages"):
        GrowthSchedule.geometric({"a": 64}, epochs=8)
    with pytest.raises(UsageError, match="take 64 of 60"):
        GrowthSchedule.geometric({"a": 64}, epochs=60, stages=3, first=29)


def test_stage_at_agrees_with_the_lengths_and_the_clock():
    schedule = GrowthSchedule.geometric({"a": 64}, epochs=100)
    stages = [schedule.stage_at(epoch) for epoch in range(100)]
    assert [stages.count(t) for t in range(9)] == [stage.epochs for stage in schedule.stages]
    assert schedule.stage_at(10_000) == 8
    clock = GrowthClock(schedule)
    told = [clock.step() for _ in range(100)]
    assert {epoch + 1: t for epoch, t in enumerate(told) if t} == {
        stages.index(t): t for t in range(1, 9)
    }


def test_the_clock_resumes_where_it_was():
    schedule = GrowthSchedule.of(
        [{"epochs": 7}, {"epochs": None, "width": "2x"}, {"epochs": None}],
        plateau=Plateau(patience=2, mode="max"),
    )
    values = [0.1, 0.5, 0.4, math.nan, 0.1, 0.2, 0.1, 0.05, 0.3]
    whole = GrowthClock(schedule)
    told = [whole.step(value) for value in values]
    resumed, again = GrowthClock(schedule), []
    for value in values:
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = GrowthClock(schedule)
        resumed.load_state_dict(state)
        again.append(resumed.step(value))
    assert again == told == [None, None, None, 1, None, None, None, 2, None]


@pytest.mark.parametrize(
    "state",
    [{}, {"stage": 9, "epochs": 0, "stale": 0, "best": None},
     {"stage": -1, "epochs": 0, "stale": 0, "best": None},
     {"stage": 0, "epochs": 0, "stale": 0, "best": "1"}],
)  # fmt: skip
def test_a_clock_refuses_another_state(state):
    clock = GrowthClock(GrowthSchedule.geometric({"a": 64}, epochs=100))
    with pytest.raises(SourceError):
        clock.load_state_dict(state)
    assert clock.stage == 0


@pytest.mark.parametrize(
    "schedule",
    [
        GrowthSchedule.geometric({"a": 64, "b": 10}, epochs=100, blocks={"layers": (1, 3)}),
        GrowthSchedule.of([{"epochs": 3}, {"epochs": 4, "width": {"a.*": "+3"}}], where="hidden"),
        GrowthSchedule.of([{"epochs": None}, {"epochs": None}], plateau=Plateau(3, 0.1, "max")),
    ],
)
def test_json_both_ways(schedule):
    assert GrowthSchedule.from_json(schedule.to_json()) == schedule
    assert GrowthSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def _with(**changes):
    data = GrowthSchedule.of([{"epochs": 3}, {"epochs": 4, "width": "2x"}]).to_dict()
    return data | changes


@pytest.mark.parametrize(
    "data",
    [
        None, [], "x", 3, {}, _with(schema=2), _with(schema=True), _with(other=1),
        _with(stages=None), _with(stages=[]), _with(stages=[{"epochs": 1}] * 65),
        _with(stages=[{"epochs": 0}]), _with(stages=[{"epochs": 1.5}]),
        _with(stages=[{"epochs": True}]), _with(stages=[{"epochs": 1 << 50}]),
        _with(stages=[{"width": {}}]), _with(stages=[{"epochs": 1, "width": {"a": 2}}]),
        _with(stages=[{"epochs": 1, "width": {"a": "two"}}]),
        _with(stages=[{"epochs": 1, "width": {"a": "9" * 10000}}]),
        _with(stages=[{"epochs": 1, "width": {"a" * 10000: "2"}}]),
        _with(stages=[{"epochs": 1, "width": ["a"]}]),
        _with(stages=[{"epochs": 1, "blocks": {"a": "x"}}]),
        _with(stages=[{"epochs": 1, "blocks": None}]),
        _with(stages=[{"epochs": 1, "run": "x"}]), _with(stages=[3]),
        _with(stages=[{"epochs": None}, {"epochs": 1}]), _with(where="everywhere"),
        _with(where=["all"]), _with(plateau=3), _with(plateau={"patience": 0}),
        _with(plateau={"patience": "3"}), _with(plateau={"mode": "up"}),
        _with(plateau={"threshold": math.nan}), _with(plateau={"patience": 2, "cause": 1}),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_by_its_field(data):
    with pytest.raises(FxgrowError) as caught:
        GrowthSchedule.from_dict(data)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", "NaN", '"a"'])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(FxgrowError):
        GrowthSchedule.from_json(text)


def test_relative_widths_have_no_widths_by_stage():
    schedule = GrowthSchedule.of([GrowthStage(1, {"a": "8"}), {"epochs": 1, "width": {"b": "2x"}}])
    assert schedule.widths_at(0) == {"a": 8}
    with pytest.raises(UsageError, match="depends on what there is"):
        schedule.widths_at(1)
    with pytest.raises(UsageError, match="depends on a metric"):
        GrowthSchedule.of([{"epochs": 1}], plateau=Plateau()).stage_at(0)


def test_a_stage_grows_depth_and_width_in_place_without_a_jump():
    torch.manual_seed(0)
    net, x = Deep(8, 1), torch.randn(5, 4)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = GrowthSchedule.of(
        [{"epochs": 1}, {"epochs": 1, "width": "2x", "blocks": {"blocks": "+1"}}, {"epochs": 1}]
    )
    before = net(x)
    assert enter_stage_(net, schedule, 0, x) == ()
    grown = enter_stage_(net, schedule, 1, x, optimizer=optimizer, verify="quick")
    assert [each.model for each in grown] == [net, net]
    assert (net.head.in_features, len(net.blocks)) == (16, 2)
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-6)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    assert enter_stage_(net, schedule, 2, x) == ()
    with pytest.raises(UsageError, match="no stage 3"):
        enter_stage_(net, schedule, 3, x)


def test_groups_are_those_of_the_network_and_globs_choose():
    schedule = GrowthSchedule.geometric(mlp, epochs=100)
    assert schedule.widths_at(0) == {"0": 8}
    x = torch.randn(2, 4)
    hidden = GrowthSchedule.geometric(Deep(16, 2), epochs=100, example_inputs=x, where="hidden")
    assert hidden.widths_at(0) == {"blocks.0.up": 8, "blocks.1.up": 8}
    first = GrowthSchedule.geometric(
        Deep(16, 2), epochs=100, example_inputs=x, exclude=["blocks.1.*", "stem"]
    )
    assert first.widths_at(0) == {"blocks.0.up": 8}
    with pytest.raises(PlanError, match="matches no channel group"):
        GrowthSchedule.geometric(mlp, epochs=100, include=["nothing"])
    with pytest.raises(PlanError, match="can be narrower"):
        GrowthSchedule.geometric(nn.Linear(2, 3), epochs=100)


@pytest.mark.parametrize(
    "wrong",
    [{"initial": 0}, {"initial": 1.5}, {"rate": 0}, {"rate": -1}, {"multiple_of": 0},
     {"stages": 0}, {"stages": 65}, {"first": 0}, {"blocks": {"a": (3, 1)}},
     {"blocks": {"a": (0, 1)}}],
)  # fmt: skip
def test_numbers_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UsageError):
        GrowthSchedule.geometric({"a": 64}, epochs=100, **wrong)
    with pytest.raises(UsageError):
        GrowthSchedule.geometric({"a": 0}, epochs=100)


def test_callbacks_grow_by_a_schedule():
    schedule = GrowthSchedule.of(
        [
            {"epochs": 2},
            {"epochs": 3, "width": {"stem": "+4"}, "blocks": {"blocks": "+1"}},
            {"epochs": 1},
            {"epochs": 4, "width": "2x"},
        ],
        where="hidden",
    )
    due = growths_of(schedule, {"lr": "none"})
    assert [(one.at, one.deepens) for one in due] == [(2, True), (2, False), (6, False)]
    assert due[0].options == {"blocks": {"blocks": "+1"}, "lr": "none"}
    assert due[1].options == {"width": {"stem": "+4"}, "where": "hidden", "lr": "none"}
    waiting = GrowthSchedule.of([{"epochs": 3}, {"epochs": 4, "width": "2x"}], plateau=Plateau())
    assert [one.at for one in growths_of(waiting, {})] == [1]  # by stages: a metric decides when


def test_names_of_groups_are_not_taken_for_globs():
    schedule = GrowthSchedule.geometric({"wte.weight[1]": 64}, epochs=100)
    assert list(schedule.stages[1].width) == ["wte.weight[[]1]"]
    assert schedule.widths_at(1) == {"wte.weight[1]": 20}


def test_geometric_widths_may_wait_for_a_plateau():
    fixed = GrowthSchedule.geometric({"a": 64}, epochs=160)
    waits = GrowthSchedule.geometric({"a": 64}, plateau=Plateau(patience=2))
    assert [stage.width for stage in waits.stages] == [stage.width for stage in fixed.stages]
    assert {stage.epochs for stage in waits.stages} == {None}
    clock = GrowthClock(waits)
    assert [clock.step(1.0) for _ in range(3)] == [None, None, 1]
    most = GrowthSchedule.geometric({"a": 64}, epochs=160, plateau=Plateau())
    assert most == dataclasses.replace(fixed, plateau=Plateau())
    assert GrowthSchedule.from_json(waits.to_json()) == waits
    for wrong in ({}, {"first": 3, "plateau": Plateau()}):
        with pytest.raises(UsageError, match="how many epochs"):
            GrowthSchedule.geometric({"a": 64}, **wrong)
