"""What callbacks of trainers take for a schedule, and whose averages they find."""

from __future__ import annotations

import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fxgrow.errors import FxgrowWarning, PlanError, TraceError, UsageError
from fxgrow.training import GrowthSchedule, Plateau, grow_
from fxgrow.training.due import growths_of
from fxgrow.training.scheduled import Growing, copies_held


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_a_schedule_is_a_mapping_of_widths_options_and_lists_of_these():
    schedule = {9: ["2x", {"deepen": {"layers": "+1"}}], 3: {"width": "1.5x", "where": "all"}}
    found = growths_of(schedule, {"preset": "r2wider", "seed": 4})
    assert [growth.at for growth in found] == [3, 9, 9]
    assert dict(found[0].options) == {
        "width": "1.5x",
        "where": "all",
        "preset": "r2wider",
        "seed": 4,
    }
    assert dict(found[1].options) == {"width": "2x", "preset": "r2wider", "seed": 4}
    assert found[2].deepens
    assert dict(found[2].options) == {"blocks": {"layers": "+1"}, "seed": 4}


def test_a_schedule_of_stages_becomes_deeper_and_wider_as_each_begins():
    stages = [
        {"epochs": 3, "width": {"*": "8"}},
        {"epochs": 4},
        {"epochs": 5, "width": {"a": "16"}, "blocks": {"b": "2"}},
        {"epochs": 9, "width": {"a": "20"}},
    ]
    found = growths_of(GrowthSchedule.of(stages), {})
    assert [(growth.at, growth.deepens) for growth in found] == [(7, True), (7, False), (12, False)]
    assert dict(found[1].options) == {"width": {"a": "16"}, "where": "all"}
    waiting = GrowthSchedule.of(stages, plateau=Plateau())
    found = growths_of(waiting, {})  # by stages
    assert [(growth.at, growth.deepens) for growth in found] == [(2, True), (2, False), (3, False)]


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        "2x",
        {-1: "2x"},
        {True: "2x"},
        {1.5: "2x"},
        {1: 2},
        {1: {}},
        {1: {"width": "2x", "deepen": {}}},
    ],
)
def test_what_is_no_schedule_is_refused_at_once(schedule):
    with pytest.raises(UsageError):
        growths_of(schedule, {})


def growing(schedule: object, part: str = "") -> Growing:
    return Growing(schedule, unit="epochs", part=part, inputs=None, averages=None, options={})


def test_growths_that_were_missed_are_made_up_for_in_order():
    model, plan = net(), growing({1: "2x", 2: "1.5x", 5: "2x"})
    plan.grow_due(0, model, [], [])
    assert model[0].out_features == 8
    plan.grow_due(3, model, [], [])
    plan.grow_due(3, model, [], [])
    assert model[0].out_features == 24
    assert plan.done == 2


def test_optimizers_of_other_things_and_other_schedulers_stay_as_they_are():
    model, other = net(), nn.Linear(3, 3)
    mine, others = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.optim.SGD(other.parameters(), lr=0.1),
    )
    plans = [torch.optim.lr_scheduler.ConstantLR(one) for one in (mine, others)]
    growing({0: "2x"}).grow_due(0, model, [mine, others], [*plans, object()])
    assert mine.param_groups[0]["params"] == list(model.parameters())
    assert others.param_groups[0]["params"] == list(other.parameters())


def test_a_part_grows_with_its_counterpart_in_copies_of_the_whole():
    model = nn.ModuleDict({"a": net(), "b": net()})
    average = torch.optim.swa_utils.AveragedModel(model)
    growing({0: "2x"}, part="b").grow_due(0, model, [], [], [average])
    assert [m["a"][0].out_features for m in (model, average.module)] == [8, 8]
    assert [m["b"][0].out_features for m in (model, average.module)] == [16, 16]
    with pytest.raises(PlanError, match="no module 'c'"):
        growing({0: "2x"}, part="c").grow_due(0, model, [], [])


def test_copies_are_found_in_whatever_holds_them_and_nothing_else_is():
    model = net()
    copy, average = deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
    holder = SimpleNamespace(a=copy, b=[average, 3], c=nn.Linear(4, 8), d=model, e={"x": 1}, f=copy)
    assert copies_held([holder], model) == [copy, average]


def test_who_holds_tensors_by_their_names_is_refused_by_name():
    class Shadow:
        def __init__(self, model: nn.Module) -> None:
            self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    with pytest.raises(PlanError, match="Shadow") as caught:
        copies_held([Shadow(net())], net())
    assert "AveragedModel" in caught.value.way_out


def test_a_network_is_not_taken_back_to_an_earlier_stage():
    model, plan = net(), growing({0: "2x"})
    before = plan.record(model)
    plan.grow_due(0, model, [], [])
    for record in (before, None):
        with pytest.raises(PlanError, match="does not fit Sequential"):
            plan.regrow(model, record)
    plan.regrow(model, plan.record(model))
    assert model[0].out_features == 16


@pytest.mark.parametrize(
    ("schedule", "options", "match"),
    [
        ({1: "2y"}, {}, "2y"),
        ({1: {"width": {"0": 16}}}, {}, "16"),
        ({1: {"width": {}}}, {}, "no widths"),
        ({1: {"deepen": {"layers": "some"}}}, {}, "some"),
        ({1: {"width": "2x", "pairng": "v_zero"}}, {}, "pairng"),
        ({1: {"deepen": {"layers": "+1"}, "pairing": "v_zero"}}, {}, "pairing"),
        ({1: "2x"}, {"optimiser": 3}, "optimiser"),
        ({1: "2x"}, {"lr": "fast"}, "fast"),
        ({1: {"width": "2x", "lr": "fast"}}, {}, "fast"),
    ],
)
def test_what_can_be_read_without_a_network_is_refused_at_once(schedule, options, match):
    with pytest.raises(UsageError, match=match):
        growths_of(schedule, options)


def test_a_resumed_run_keeps_the_growths_that_are_done_and_may_change_others():
    before = growing({1: "2x", 4: "3x"})
    before.grow_due(1, net(), [], [])
    told = before.told()
    for schedule in ({1: "2x", 5: "1.5x"}, {1: "2x"}, {1: {"width": "2x", "verify": "none"}}):
        after = growing(schedule)
        after.take_up(1, told)
        assert after.done == 1
    for schedule in ({1: "3x"}, {0: "2x", 1: "2x"}, {2: "2x"}):
        with pytest.raises(PlanError, match="the network grew wider at 1"):
            growing(schedule).take_up(1, told)
    with pytest.raises(PlanError, match="says nothing more"):
        growing({1: "2x"}).take_up(2, [*told, "wider at 2"])
    with pytest.raises(PlanError, match="says nothing more"):
        growing({1: "2x"}).take_up(2, None)


def test_growths_that_never_come_are_warned_of():
    with pytest.warns(FxgrowWarning, match=r"wider at 7: .*the training has 7 epochs"):
        growing({6: "2x", 7: "3x"}).warn_of_never(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        growing({6: "2x"}).warn_of_never(7)


def test_globs_of_a_part_name_the_part():
    whole = nn.ModuleDict({"net": net()})
    with pytest.raises(PlanError, match="matches no") as refused:
        growing({0: {"width": {"0": "2x"}}}).grow_due(0, nn.Sequential(whole["net"]), [], [])
    assert "part='0'" in refused.value.way_out


def test_warnings_name_the_line_that_called():
    grouped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.warns(FxgrowWarning, match="regrow_") as seen:
        grow_(grouped, "2x", torch.randn(2, 3, 4, 4))
    assert {one.filename for one in seen} == {__file__}


def test_a_stage_without_epochs_is_named():
    with pytest.raises(UsageError, match="stage 1 has no epochs: give a number"):
        GrowthSchedule.of([{"epochs": 2}, {"width": "2x"}])


def test_an_average_is_named_once_however_often_it_is_found():
    net = nn.Linear(2, 2)
    ema, other = deepcopy(net), torch.optim.swa_utils.AveragedModel(net)
    growing = Growing(
        {1: "2x"}, unit="epochs", part="", inputs=None, averages=lambda _: [ema], options={}
    )
    assert growing.averages(net, [ema, other]) == [ema, other.module]


@pytest.mark.parametrize("part", ["", "0"])
def test_inputs_that_cannot_be_inferred_are_asked_of_the_callback(part):
    flat = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 8), nn.Linear(8, 2))
    network = nn.Sequential(flat) if part else flat
    growing = Growing(
        {1: {"width": {"0": "2x"}}}, unit="epochs", part=part, inputs=None, averages=None,
        options={}, takes_inputs="; or a hint",
    )  # fmt: skip
    for act in (growing.begin, lambda root: growing.grow_due(1, root, [], [])):
        with pytest.raises(TraceError, match="Give the callback inputs=") as caught:
            act(network)
        assert "--input-shape" not in str(caught.value)
        assert ("or a hint" in str(caught.value)) is not bool(part)
    growing.inputs = torch.zeros(1, 1, 8, 8)
    growing.begin(network)
