"""What cannot be meant is refused in plain words, before anything is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import FxgrowError
from fxgrow.training import (
    FlopLedger,
    GrowthClock,
    GrowthSchedule,
    certify,
    forecast,
    grow_,
    probe,
    state_dict,
)

SGD = functools.partial(torch.optim.SGD, lr=0.1)
X = torch.ones(4, 4)


def build() -> nn.Sequential:
    """Return a small network."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss(net: nn.Module, batch: Tensor) -> Tensor:
    """Return a loss."""
    return (net(batch) - 1).square().mean()


def twice(net: nn.Module) -> dict[str, Any]:
    """Return an optimizer, two times."""
    return {"optimizer": [SGD(net.parameters())] * 2}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (twice, "twice"),
        (lambda net: {"averages": 3}, "int"),
        (lambda net: {"averages": [net]}, "own weights"),
        (lambda net: {"averages": [build()] * 2}, "twice"),
    ],
)
def test_what_cannot_follow_is_told(
    options: Callable[[nn.Module], dict[str, Any]], word: str
) -> None:
    """The network stays as it was."""
    net = build()
    with pytest.raises(FxgrowError, match=word):
        grow_(net, "2x", **options(net))
    assert net[0].out_features == 8
    assert not state_dict(net)["stages"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"grown_at": -3}, "grown_at=-3"),
        ({"optimizer": "adam"}, "'adam'"),
        ({"grown": build()}, "Sequential"),
    ],
)
def test_a_certificate_of_nothing_is_refused(options: dict[str, Any], word: str) -> None:
    """Without a step nothing has been shown."""
    net = build()
    grown = fxgrow.widen(net, "2x", X, pairing="replicate", split_noise=0.0)
    given = {"grown": grown, "optimizer": SGD, "steps": 1, **options}
    batches = [(X, torch.ones(4, 2))]
    with pytest.raises(FxgrowError, match=word):
        certify(net, loss_fn=nn.functional.mse_loss, batches=batches, **given)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"candidates": {"a": {"typo": 1}}}, "typo"),
        ({"candidates": {"a": {"width": "2x", "optimizer": None}}}, "optimizer"),
        ({"candidates": {"a": "2x"}}, "mapping"),
        ({"candidates": ["2x"]}, "mapping"),
        ({"optimizer": SGD(build().parameters())}, "no parameter of the network"),
        ({"optimizer": "adam"}, "'adam'"),
        ({"steps": 1.5}, "at least one"),
        ({"loss_fn": lambda net, batch: loss(net, batch) * float("nan")}, "finite"),
    ],
)
def test_a_probe_that_tells_nothing_is_refused(options: dict[str, Any], word: str) -> None:
    """Nothing is ranked that did not train."""
    given = {"candidates": {"stay": {}}, "optimizer": SGD, "loss_fn": loss, "steps": 1, **options}
    with pytest.raises(FxgrowError, match=word):
        probe(build(), batches=[X], repeats=1, **given)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GrowthSchedule.of([{"epochs": None}, {"epochs": 1}], plateau=3),  # type: ignore[arg-type]
        lambda: GrowthSchedule.of(None),  # type: ignore[arg-type]
        lambda: GrowthSchedule.of([{"epochs": 1}]).stage_at("a"),  # type: ignore[arg-type]
        lambda: GrowthSchedule.of([{"epochs": 1}]).stage_at(-1),
        lambda: GrowthSchedule.geometric({"a": 8}, rate="a", epochs=9),  # type: ignore[arg-type]
        lambda: GrowthSchedule.geometric({"a": 8}, initial=True, epochs=9),
        lambda: GrowthSchedule.geometric({"a": 8}, epochs=9, blocks={"l": 3}),  # type: ignore[dict-item]
        lambda: GrowthSchedule.geometric({"a": 8}, epochs=9, blocks=3),  # type: ignore[arg-type]
        lambda: GrowthClock(GrowthSchedule.of([{"epochs": 1}])).step("a"),  # type: ignore[arg-type]
    ],
)
def test_a_schedule_of_other_kinds_of_things_is_refused(make: Callable[[], object]) -> None:
    """Each with a word on what is meant."""
    with pytest.raises(FxgrowError):
        make()


@pytest.mark.parametrize("samples", [-3, 1.5, True])
def test_a_ledger_counts_whole_samples(samples: Any) -> None:
    """What it has counted can be loaded again."""
    ledger, net = FlopLedger(), build()
    ledger.begin(net, X)
    with pytest.raises(FxgrowError, match="number of samples"):
        ledger.add(samples)
    with pytest.raises(FxgrowError, match="number of samples"):
        forecast(net, GrowthSchedule.geometric(net, epochs=9), X, samples=samples)
    FlopLedger().load_state_dict(ledger.state_dict())
