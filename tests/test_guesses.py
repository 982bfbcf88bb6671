"""Which attribute a size comes from is guessed, and a guess that does not help is taken back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.grow.sizes.guesses import Guesses
from fxgrow.grow.sizes.literals import Repair


class Sized(nn.Module):
    """A module with sizes of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = self.third = 8


def wrong(*calls: int) -> list[Repair]:
    """Return repairs of calls, each of which is given 8 and should be given 16."""
    return [Repair(call, "node", "", "view", (8,), (16,)) for call in calls]


@pytest.fixture
def guesses() -> Guesses:
    """Return guesses of which the first is made: two calls are wrong."""
    made = Guesses(Sized())
    assert made.revise(wrong(0, 1))
    assert is_set(made) == {"first": 16}
    return made


def is_set(guesses: Guesses) -> dict[str, object]:
    """Return the attributes that are set, and to what."""
    return {edit.attribute: edit.after for edit in guesses.edits}


def test_what_mends_none_of_its_calls_is_left_as_it_was(guesses: Guesses) -> None:
    assert guesses.revise(wrong(0, 1))
    assert is_set(guesses) == {"second": 16}


def test_what_mends_one_of_its_calls_stays_while_another_is_tried(guesses: Guesses) -> None:
    assert guesses.revise(wrong(1))
    assert is_set(guesses) == {"first": 16, "second": 16}


def test_what_mends_nothing_and_spoils_is_alone_to_blame(guesses: Guesses) -> None:
    assert guesses.revise(wrong(1))
    assert guesses.revise(wrong(1, 2, 3))  # of "second"; what it spoiled is not asked about
    assert is_set(guesses) == {"first": 16, "third": 16}
    assert {call for guess in guesses.chosen.values() for call in guess.calls} == {0, 1}


def test_what_stops_the_run_is_taken_back_and_another_is_tried_for_the_same_calls(
    guesses: Guesses,
) -> None:
    for name in ("second", "third"):
        assert guesses.take_back()
        assert is_set(guesses) == {name: 16}
    assert not guesses.take_back()
    assert not guesses.take_back()
    assert is_set(guesses) == {}


def test_after_what_spoiled_it_is_the_earlier_calls_that_are_asked_about(guesses: Guesses) -> None:
    assert guesses.revise(wrong(0, 1, 2))
    assert is_set(guesses) == {"second": 16}
    assert guesses.take_back()
    assert is_set(guesses) == {"third": 16}
    assert guesses.chosen[("Sized", "third")].calls == {0, 1}


def test_a_call_is_given_up_when_nothing_is_left_that_could_explain_it(guesses: Guesses) -> None:
    (repair,) = wrong(1)
    assert guesses.revise([repair])
    assert not guesses.is_exhausted(repair)
    guesses.useless.add(("Sized", "third"))
    assert guesses.is_exhausted(repair)


def test_layers_of_torchs_own_say_which_side_grew() -> None:
    """The weight of a transposed convolution has its inputs first."""
    net = nn.Sequential(nn.ConvTranspose2d(8, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 2, 3))
    grown = fxgrow.widen(net, "2x", torch.randn(2, 8, 5, 5)).model
    assert [(one.in_channels, one.out_channels) for one in grown[::2]] == [(8, 16), (16, 2)]
