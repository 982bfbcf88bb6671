"""The search for widths: what stands in the way is a value, sizes are exact, and runs are few."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

from fxgrow import widen
from fxgrow.api.widen import plan
from fxgrow.channels.analysis import Analysis, analyse
from fxgrow.errors import PlanError
from fxgrow.grow.obstacle import Obstacle
from fxgrow.grow.sizes.growth import growth_of
from fxgrow.grow.widen.feasible import Feasible
from fxgrow.grow.widen.planner import attempts_for
from fxgrow.labels.propagate import Labeller
from fxgrow.labels.trace import trace
from fxgrow.plan.requests import Widen


class Fixed(nn.Module):
    """A hidden layer whose width its code fixes or makes a number of."""

    def __init__(self, *, told: bool, helper: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.hidden = 6 if told else None
        self.helper = helper

    def forward(self, x: Tensor) -> Tensor:
        """Run the hidden layer in the shape that the code says."""
        h = self.first(x)
        h = _shaped(h, x) if self.helper else h.view(h.shape[0], self.hidden or 6)
        return self.second(torch.relu(h))


@torch.fx.wrap
def _shaped(h: Tensor, x: Tensor) -> Tensor:
    """Fix one size for channels and for what holds none, in one line of code."""
    shaped, _ = (part.view(-1, 6) for part in (h, x.repeat(1, 3)))
    return shaped


def chain(*blocks: nn.Module) -> nn.Sequential:
    """Return blocks after one another."""
    return nn.Sequential(*blocks)


def analysed(model: nn.Module) -> Analysis:
    """Return what is found in a network on two vectors of four."""
    return analyse(trace(model, torch.randn(2, 4)))


def runs(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how often a network is run to be followed and planned."""
    count = 0
    begin = Labeller.__init__

    def counted(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1
        begin(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Labeller, "__init__", counted)
    plan(model, "2x", torch.randn(2, 4))
    return count


def test_positions_are_counted_in_exact_fractions():
    analysis = analysed(chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 9), nn.Linear(9, 4)))
    first, second, _ = analysis.groups
    growth = growth_of(analysis.channels, analysis.groups, {first.name: 7, second.name: 11})
    assert growth.positions(first.channels[:1]) == Fraction(7, 6)
    assert growth.positions(second.channels) == 11
    some = np.concatenate([first.channels[:3], second.channels[:3], [-1]])
    assert growth.positions(some) == Fraction(7, 2) + Fraction(11, 3) + 1


def test_counting_is_exact_at_any_widths():
    widths = [2**13 - 1, 8209, 8219, 8221, 8231]  # their common denominator is beyond int64
    sizes = zip([4, *widths], [*widths, 4], strict=True)
    with torch.device("meta"):
        model = chain(*(nn.Linear(a, b) for a, b in sizes))
    analysis = analysed(model)
    wanted = {group.name: group.width + 1 for group in analysis.groups}
    growth = growth_of(analysis.channels, analysis.groups, wanted)
    for group in analysis.groups:
        assert growth.positions(group.channels) == group.width + 1


def test_one_run_is_enough_where_no_code_fixes_a_size(monkeypatch):
    assert runs(chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), monkeypatch) == 2


def test_a_literal_costs_no_run_for_each_time_it_is_met(monkeypatch):
    few = runs(chain(*(Fixed(told=True) for _ in range(2))), monkeypatch)
    assert runs(chain(*(Fixed(told=True) for _ in range(8))), monkeypatch) == few <= 4


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")
@pytest.mark.parametrize("told", [False, True])
def test_a_repaired_network_computes_the_same(told: bool) -> None:
    model, x = chain(Fixed(told=told), Fixed(told=told)).double(), torch.randn(2, 4).double()
    grown = widen(model, "1.5x", x).model
    assert grown.state_dict()["0.first.weight"].shape == (9, 4)
    assert max_rel(model(x), grown(x)) < 1e-10


def test_what_code_fixes_names_the_group_that_it_comes_from():
    model = chain(*(Fixed(told=False, helper=index != 1) for index in range(3)))
    found = plan(model, "2x", torch.randn(2, 4), include=["*.first"])
    assert [group.name for group in found.groups] == ["1.first"]
    assert [refusal.name for refusal in found.refused] == ["0.first", "2.first"]
    for refusal in found.refused:
        assert "fixes sizes [-1, 6] in view, where [-1, 12] are needed" in refusal.reason


def test_the_search_raises_nothing():
    model = chain(Fixed(told=False, helper=True), nn.Linear(4, 5), nn.Linear(5, 4))
    attempts = attempts_for(analysed(model), Widen(width="2x"))
    made = attempts.make({"0.first": 12, "1": 10})
    assert isinstance(made, Obstacle)
    assert (made.name, [*made.groups], made.certain) == ("0", ["0.first"], True)
    assert isinstance(attempts.make({"1": 10}), Feasible)


def test_a_request_of_which_nothing_can_grow_tells_the_first_reason():
    with pytest.raises(PlanError, match=r"^0.first cannot be widened: the code of 0 fixes sizes"):
        plan(chain(Fixed(told=False, helper=True)), "2x", torch.randn(2, 4))
