"""What goes with growth besides weights, at its edges: optimizers, globs, twins, batches, parts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import nn

import fxgrow
from fxgrow.errors import PlanError, UsageError
from fxgrow.plan.inits_by_side import init_for
from fxgrow.plan.requests import Drawing

OPTIMIZERS = ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Rprop"]


def pair(hidden: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_optimizer_goes_on_from_an_empty_layer(name: str) -> None:
    net, x = pair(0), torch.randn(8, 4)
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=1e-2)
    net(x).square().sum().backward()
    optimizer.step()
    grown = fxgrow.widen(net, "+5", x)
    fxgrow.grow_optimizer_(optimizer, net, grown)
    optimizer.zero_grad()
    (grown.model(x) - 1).square().sum().backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in grown.model.parameters())


def test_globs_of_pairings_match_single_channels() -> None:
    grown = fxgrow.widen(pair(1), "+3", pairing={"0": "v_zero", "*": "vv_z_negz"})
    assert grown.plan.groups[0].pairing == "v_zero"


@pytest.mark.parametrize("options", [{"input_init": "zeros"}, {"init": {"2": "zeros"}}])
def test_twins_that_are_read_by_zeros_are_told_of(options: dict[str, object]) -> None:
    with pytest.warns(fxgrow.FxgrowWarning, match="never part"):
        fxgrow.widen(pair(8), "2x", **options)  # type: ignore[arg-type]
    fxgrow.widen(pair(8), "2x", pairing="v_zero", **options)  # type: ignore[arg-type]


def mine(tensor: torch.Tensor, reference: torch.Tensor | None, fan_in: int) -> None:
    tensor.fill_(0.25)


def test_an_init_that_a_plan_names_for_one_side_is_for_that_side() -> None:
    drawing = Drawing(output_init=f"{__name__}:mine")
    plan = fxgrow.widen(pair(8), "2x", output_init=mine).plan
    assert plan.request.drawing.output_init == drawing.output_init
    by_side = init_for(drawing, mine)
    assert (by_side.rows, by_side.columns) == (mine, init_for(Drawing()))  # type: ignore[attr-defined]
    by_layer = init_for(Drawing(init={"0": f"{__name__}:mine", "*": "zeros"}), mine)
    assert by_layer.inits == {"0": mine, "*": init_for(Drawing(init="zeros"))}  # type: ignore[attr-defined]


BAD_PARTS: dict[str, tuple[Callable[[], object], str]] = {
    "no inputs": (
        lambda: fxgrow.apply_rescaling(torch.ones(2, 4), "default_vt", new_fan_in=0),
        "new_fan_in must be",
    ),
    "less than none": (
        lambda: fxgrow.apply_rescaling(torch.ones(2, 4), "default_vt", new_fan_in=4, fan_in=-1),
        "fan_in must be",
    ),
    "no batch norm": (lambda: fxgrow.NormTensors.of(nn.LayerNorm(4)), "is no batch norm"),
    "noise": (
        lambda: fxgrow.apply_pairing(
            torch.ones(2, 4), torch.ones(3, 2), torch.ones(1, 4), torch.ones(3, 1), "vv_z_negz",
            noise=math.nan,
        ),
        "the noise must be",
    ),
    "gain": (lambda: fxgrow.widen(pair(8), gain=1e30), "the gain must be from"),
    "width": (lambda: fxgrow.widen(pair(8), "9" * 30), "more than any layer"),
    "increment": (lambda: fxgrow.widen(pair(8), "+100000000"), "more than any layer"),
    "sides by layer": (lambda: fxgrow.widen(pair(8), output_init="0=lecun"), "is by layer"),
    "keep": (lambda: fxgrow.Tiny(F.mse_loss, [(torch.ones(2), torch.ones(2))], keep=0), "keep"),
    "threshold": (
        lambda: fxgrow.Tiny(F.mse_loss, [(torch.ones(2), torch.ones(2))], threshold=5),
        "threshold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_PARTS)
def test_what_cannot_be_meant_is_refused(what: str) -> None:
    call, told = BAD_PARTS[what]
    with pytest.raises(PlanError, match=told) as caught:
        call()
    assert what == "no batch norm" or isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([(torch.ones(3, 7), torch.ones(3, 3))], "does not run on the first batch"),
        ([(torch.ones(3, 4).double(), torch.ones(3, 3))], "does not run on the first batch"),
        ([(torch.ones(3, 4), torch.ones(3, 3)), (torch.ones(0, 4), torch.ones(0, 3))], "batch 1"),
        (None, "no batches"),
    ],
)
def test_batches_that_do_not_fit_are_told_of(batches: object, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        fxgrow.widen(pair(8), init=fxgrow.Tiny(F.mse_loss, batches))  # type: ignore[arg-type]


def test_classes_may_be_any_whole_numbers_in_range() -> None:
    from fxgrow.grow.data.losses import cross_entropy

    logits = torch.randn(4, 3)
    wanted = F.cross_entropy(logits, torch.tensor([0, 2, -100, 1]))
    assert cross_entropy(logits, torch.tensor([0, 2, -100, 1], dtype=torch.int32)) == wanted
    with pytest.raises(PlanError, match="no class from 0 to 2"):
        cross_entropy(logits, torch.tensor([0, 3, 1, 1]))


def test_parts_take_a_norm_as_a_module() -> None:
    norm = nn.BatchNorm1d(2)
    scaled = fxgrow.apply_rescaling(torch.ones(2, 4), "default_vt", new_fan_in=16, norm=norm)  # type: ignore[call-overload]
    assert scaled.norm.running_mean.tolist() == [0.0, 0.0]
