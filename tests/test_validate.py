"""The validator: right rules pass, and each kind of wrong one is told from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxgrow.labels.layers import support
from fxgrow.labels.rules import RULES, OpRule, Step
from fxgrow.labels.validate.__main__ import main, spread, validate
from fxgrow.labels.validate.case import Outcome, outcomes_of
from fxgrow.labels.validate.claims import SampleCall, ways_of
from fxgrow.labels.validate.samples import BY_HAND, operators

RANDOM = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=RANDOM)


def outcomes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Outcome]:
    """Return what comes of a call by the way that its operands come in: ``"d0,p"``."""
    found = outcomes_of(SampleCall("tried", function, args, kwargs))
    return {",".join(outcome.way): outcome for outcome in found}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts another rule in the place of an operator's."""

    def put(name: str, rule: Callable[[Step], Any]) -> None:
        monkeypatch.setitem(RULES._entries, name, OpRule(rule))

    return put


@given(st.integers(0, 300))
def test_samples_are_taken_far_apart_and_each_once(count: int) -> None:
    order = spread(count)
    assert sorted(order) == list(range(count))
    if count > 3:
        assert max(order[:2]) >= count // 4


def test_every_dim_with_channels_is_labelled_beside_data_and_weights() -> None:
    ways = set(ways_of([drawn(2, 3), drawn(1, 3)]))
    assert {("d0", "d"), ("d1", "d1"), ("d01", "p"), ("p", "d1"), ("c", "d1"), ("p", "p")} <= ways
    assert not any("0" in way[1] for way in ways)  # one entry is no channel
    assert ("d", "d") not in ways


def test_a_rule_that_says_what_is_so_is_right() -> None:
    found = outcomes(torch.nn.functional.linear, drawn(2, 3), drawn(4, 3), drawn(4))
    assert found["d1,p,p"].kind == "right"
    assert not [outcome for outcome in found.values() if outcome.kind == "wrong"]


def test_a_pin_claims_nothing() -> None:
    found = outcomes(torch.softmax, drawn(2, 3), 1)
    assert (found["d0"].kind, found["d1"].kind) == ("right", "missing")
    assert "mixes all of them" in found["d1"].reason


def test_labels_in_another_order_are_wrong(broken: Callable[..., None]) -> None:
    def read(step: Step) -> Any:
        x, weight = step.args
        columns = step.line(weight, 0)
        if columns is None or step.line(x, 1) is None or step.value(x).is_weight:
            return step.give_up("no reader")
        step.space.mark(columns, "reader")
        step.space.unify(step.line(x, 1).flip(0), columns)
        return ((),)

    broken("aten.mm", read)
    found = outcomes(torch.mm, drawn(4, 5), drawn(5, 3))
    assert "channels in another order" in found["d1,p"].reason


def test_channels_without_a_label_in_the_result_are_wrong(broken: Callable[..., None]) -> None:
    broken("aten.amax", lambda step: ((),))
    assert "one channel changed" in outcomes(torch.amax, drawn(4, 3), (0, 1))["d0"].reason


def test_new_channels_that_change_old_ones_are_wrong(broken: Callable[..., None]) -> None:
    def mixed(step: Step) -> Any:  # as a mean would be; a sum over copies is another one
        for layer in step.layers(step.args[0]):
            step.space.mix(layer.amax([d for d in (0, 1) if d not in support(layer)]), step.place)
        return ((),)

    broken("aten.sum", mixed)
    assert "more channels" in outcomes(torch.sum, drawn(4, 3), 1)["d1"].reason


def test_channels_that_torch_takes_no_more_of_are_wrong(broken: Callable[..., None]) -> None:
    broken("aten.add", lambda step: (step.layers(step.args[0]),))
    found = outcomes(torch.add, drawn(4, 3), torch.ones(4, 3))
    assert "torch refuses them" in found["d1,d"].reason


def test_what_torch_takes_and_we_refuse_is_wrong(broken: Callable[..., None]) -> None:
    def refuse(step: Step) -> Any:
        raise ValueError("no such thing")

    broken("aten.mean", refuse)
    assert outcomes(torch.mean, drawn(4, 3), 1)["d0"].reason == "ValueError: no such thing"


def test_columns_that_do_not_cancel_are_wrong(broken: Callable[..., None]) -> None:
    def read(step: Step) -> Any:
        x, weight = step.args
        columns = step.line(weight, 1)
        if columns is None or step.value(x).is_weight:
            return step.give_up("no reader")
        step.space.mark(columns, "reader")
        step.space.unify(step.line(x, 1), columns)
        return ((),)

    broken("aten._cdist_forward", lambda step: step.give_up("no reader"))
    broken("aten._euclidean_dist", read)
    found = outcomes(torch.ops.aten._euclidean_dist, drawn(5, 3), drawn(4, 3))
    assert "more channels" in found["d1,p"].reason


def test_random_values_are_not_checked() -> None:
    found = outcomes(torch.nn.functional.dropout, drawn(4, 3), 0.5, True)
    assert not [outcome for outcome in found.values() if outcome.kind == "wrong"]


def test_the_wide_call_follows_literal_sizes() -> None:
    assert outcomes(torch.Tensor.expand, drawn(3, 1), 3, 4)["d0"].kind == "right"
    assert outcomes(torch.split, drawn(6, 2), [2, 4])["d0"].kind == "right"


def test_a_failure_is_told_with_what_runs_it_again(
    broken: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    broken("aten.flip", lambda step: (step.layers(step.args[0]),))
    assert main(["--op", "flip", "--seconds", "5"]) == 1
    *_, line, _, last = capsys.readouterr().out.strip().splitlines()
    assert last.endswith(" wrong")
    again = line.partition("  #")[0] if line.startswith("python") else ""
    assert again or line.startswith("…")


@pytest.mark.parametrize("name", BY_HAND)
def test_torchvisions_operators_are_right(name: str) -> None:
    calls = {name: list(operators()[name]())}
    assert not validate(calls, 60.0)[name].wrong


@pytest.mark.filterwarnings("ignore")  # of torch's own samples
def test_the_rules_are_right_on_torchs_own_samples() -> None:
    calls: dict[str, list[SampleCall]] = {name: first(make()) for name, make in operators().items()}
    wrong = [line for tally in validate(calls, 30.0).values() for line in tally.wrong]
    assert not wrong, "\n".join(wrong[:20])


def first(calls: Iterator[SampleCall]) -> list[SampleCall]:
    """Return two calls of an operator."""
    return [call for call, _ in zip(calls, range(2), strict=False)]
