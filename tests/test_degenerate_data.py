"""Growth from data that tells little, or nothing: few samples, constant inputs, odd losses."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

import fxgrow
from fxgrow.apply.trial import apply_to_module
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


def mean_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(F.mse_loss(model(x), y)) for x, y in batches) / len(batches)


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


@pytest.mark.parametrize("method", METHODS)
def test_a_writer_that_reads_nothing_but_zeros_gets_no_channel(method: Method) -> None:
    model = chain(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4))
    batches = [(torch.zeros_like(x), y) for x, y in batches_for(model, 6)]
    (row,) = fxgrow.inspect(model, growth=method(F.mse_loss, batches)).growth.groups
    assert row.reason == f"{method.__name__}: {method.nothing}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("norm", "held", "told"),
    [(nn.LayerNorm, 1.0, "the same in all channels"), (nn.RMSNorm, 0.0, "zero")],
)
def test_a_norm_with_nothing_to_divide_is_told(
    method: Method, norm: Callable[[int], nn.Module], held: float, told: str
) -> None:
    model = chain(nn.Linear(6, 8), norm(8), nn.GELU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(held)
    with pytest.raises(PlanError, match=f"0: .*: what 1 is given is {told}"):
        fxgrow.widen(model, "+4", init=method(F.mse_loss, batches_for(model, 6)))


@pytest.mark.filterwarnings("ignore:.* the batches give no more")
@pytest.mark.parametrize("norm", [nn.LayerNorm, lambda width: nn.RMSNorm(width, eps=1e-12)])
def test_slopes_behind_a_norm_are_told_however_little_it_is_given(
    norm: Callable[[int], nn.Module],
) -> None:
    model = chain(nn.Linear(6, 8), norm(8), nn.GELU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight *= 1e-4
        model[0].bias *= 1e-4
    batches = batches_for(model, 6)
    assert fxgrow.widen(model, "+4", init=fxgrow.GradMax(F.mse_loss, batches)).plan.groups
    grown = fxgrow.widen(model, "+7", init=fxgrow.Tiny(F.mse_loss, batches))
    before, gain = mean_loss(model, batches), sum(grown.init.gains["0"])
    step = 1e-11 * before / gain
    small = apply_to_module(grown.plan, model, grown.init.scaled(step)).eval()
    assert before - mean_loss(small, batches) == pytest.approx(step * gain, rel=0.02)


def raising(outputs: Tensor, targets: Tensor) -> Tensor:
    raise KeyError("no such class")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("loss_fn", "spoil", "message"),
    [
        (F.cross_entropy, lambda x, y: (x, torch.zeros(5).long()), r"loss of batch 1 cannot be"),
        (F.mse_loss, lambda x, y: (x, None), r"loss of batch 1 .*targets NoneType"),
        (F.mse_loss, lambda x, y: (x[:, :3], y), "does not run on batch 1"),
        (F.mse_loss, lambda x, y: (x * torch.nan, y), "loss of batch 1 is nan.* its inputs"),
        (F.mse_loss, lambda x, y: (x, y / 0), "loss of batch 1 is (inf|nan).* its targets"),
    ],
)
def test_a_spoilt_batch_is_told_by_its_number(
    method: Method,
    loss_fn: Callable[..., Tensor],
    spoil: Callable[[Tensor, Tensor], object],
    message: str,
) -> None:
    model = chain(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    batches = batches_for(model, 6)
    if loss_fn is F.cross_entropy:
        batches = [(x, y.argmax(1)) for x, y in batches]
    with pytest.raises(PlanError, match=message) as caught:
        fxgrow.widen(model, "+2", init=method(loss_fn, [batches[0], spoil(*batches[1])]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (raising, "loss of batch 0 cannot be computed: .*no such class"),
        (lambda z, y: z.sum() + 1j, r"no scalar.*loss\.real"),
        (lambda z, y: F.cross_entropy(z, torch.full((len(z),), -100)), "weights are finite.*-100"),
    ],
)
def test_a_loss_that_is_none_is_told(loss_fn: Callable[..., Tensor], message: str) -> None:
    model = chain(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with pytest.raises(PlanError, match=message):
        fxgrow.widen(model, "+2", init=fxgrow.Tiny(loss_fn, batches_for(model, 6)))


def test_weights_that_are_not_finite_are_named() -> None:
    model = chain(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with torch.no_grad():
        model[2].bias[0] = torch.nan
    with pytest.raises(PlanError, match=r"numbers in 2\.bias"):
        fxgrow.inspect(model, growth=fxgrow.Tiny(F.mse_loss, batches_for(model, 6, samples=4)))


def test_inputs_that_are_not_dense_are_told() -> None:
    batches = [(torch.ones(3, 4).to_sparse(), torch.ones(3, 2))]
    with pytest.raises(PlanError, match=r"batch 0 .*to_dense"):
        fxgrow.Tiny(F.mse_loss, batches)


def test_a_bias_that_does_not_help_is_not_asked_for() -> None:
    model = chain(nn.Linear(6, 5), nn.Hardshrink(), nn.Linear(5, 4))
    with pytest.raises(PlanError, match=r"slope 0 at 0 and, by biases, at 0\.001 too"):
        fxgrow.widen(model, "+2", init=fxgrow.GradMax(F.mse_loss, batches_for(model, 6)))


@pytest.mark.parametrize("method", METHODS)
def test_a_class_is_no_init(method: Method) -> None:
    model = chain(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with pytest.raises(PlanError, match=rf"class {method.__name__}.*init={method.__name__}\("):
        fxgrow.widen(model, "+2", init=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_width_that_is_there_is_told(method: Method) -> None:
    model = chain(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    init = method(F.mse_loss, batches_for(model, 6))
    for width in ("+0", "5", "1x"):
        with pytest.raises(PlanError, match="0: it has the 5 channels asked for"):
            fxgrow.widen(model, width, init=init)
