"""Growth from data that tells little, or nothing: few samples, constant inputs, odd losses."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import PlanError

METHODS = [fxgrow.Tiny, fxgrow.GradMax]
Method = Callable[..., fxgrow.Tiny | fxgrow.GradMax]


def chain(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return nn.Sequential(*layers).double().eval()


def batches_for(model: nn.Module, *shape: int, samples: int = 16) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    inputs = [torch.randn(samples, *shape, dtype=torch.float64) for _ in range(2)]
    return [(x, torch.randn_like(model(x))) for x in inputs]


@pytest.mark.parametrize("method", METHODS)
def test_few_samples_before_a_flattening_leave_no_channel_to_fit(method: Method) -> None:
    model = chain(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )
    batches = batches_for(model, 3, 6, 6, samples=3)
    (row,) = fxgrow.inspect(model, batches[0][0], growth=method(F.mse_loss, batches)).growth.groups
    if method is fxgrow.Tiny:  # 36 old columns reach whatever 6 samples ask for
        assert row.reason == f"Tiny: {fxgrow.Tiny.nothing}"
        with pytest.raises(PlanError, match=fxgrow.Tiny.nothing):
            fxgrow.widen(model, "+2", batches[0][0], init=method(F.mse_loss, batches))
    else:
        assert row.gain > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("width", [2, 3, 6])
def test_the_table_of_a_norm_over_channels_offers_what_can_be_made(
    method: Method, norm: Callable[[int], nn.Module], width: int
) -> None:
    model = chain(nn.Linear(6, width), norm(width), nn.GELU(), nn.Linear(width, 4))
    batches = batches_for(model, 6)
    (row,) = fxgrow.inspect(model, batches[0][0], growth=method(F.mse_loss, batches)).growth.groups
    assert len(row.gains) <= (width - 1) // 2  # twins, fewer than there are
    if not row.gains:
        assert "each direction makes 2 channels" in row.reason
        with pytest.raises(PlanError, match="each direction makes 2 channels"):
            fxgrow.widen(model, "+8", init=method(F.mse_loss, batches))
        return
    init = method(F.mse_loss, batches)
    plan = fxgrow.widen(model, f"+{2 * len(row.gains)}", init=init).plan
    assert plan.groups[0].width == (width, width + 2 * len(row.gains))
    brought = plan.parameters[1] - plan.parameters[0]
    assert len(row.gains) * row.parameters == brought
    assert row.gain_per_thousand == pytest.approx(1000 * row.gain / brought)


def test_twins_of_a_relu_are_paid_for_twice_in_the_table() -> None:
    model = chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    init = fxgrow.GradMax(F.mse_loss, batches_for(model, 6))
    (row,) = json.loads(json.dumps(fxgrow.inspect(model, growth=init).growth.to_dict()))["groups"]
    assert row["parameters"] == 2 * (6 + 1 + 4)
