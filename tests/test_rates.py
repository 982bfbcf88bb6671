"""Learning rates after growth: what each rule makes of an optimizer's steps."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
import fxgrow.training
from fxgrow.errors import PlanError, SourceError, UsageError
from fxgrow.training import stepping
from fxgrow.training.rates import WARM_UP, rate_of

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
COPIES: dict[str, Any] = {"pairing": "replicate", "split_noise": 0.0}


def network() -> nn.Sequential:
    """Return a network of two widths that can grow, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever, the same each time."""
    torch.manual_seed(1)
    fixed = [(torch.randn(16, 5), torch.randn(16, 3)) for _ in range(4)]
    while True:
        yield from fixed


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, steps: int) -> None:
    """Make some steps."""
    for _ in range(steps):
        inputs, targets = next(data)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": SGD,
    "plain": functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.01),
    "nesterov": functools.partial(SGD, nesterov=True),
    "maximize": functools.partial(SGD, maximize=True, lr=0.001),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, weight_decay=0.01),
    "adamw": ADAMW,
    "foreach": functools.partial(ADAMW, foreach=True, amsgrad=True),
    "fused": functools.partial(ADAMW, fused=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "radam": functools.partial(torch.optim.RAdam, lr=0.01, weight_decay=0.01),
    "adadelta": functools.partial(torch.optim.Adadelta, lr=1.0),
    "tensor lr": functools.partial(torch.optim.AdamW, lr=torch.tensor(0.01), weight_decay=0.1),
    "fused, tensor lr": functools.partial(
        torch.optim.AdamW, lr=torch.tensor(0.01), weight_decay=0.1, fused=True
    ),
}


@pytest.mark.parametrize("width", ["2x", "1.5x"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_width_goes_on_as_the_narrow_network(name: str, width: str) -> None:
    narrow = network()
    optimizer, data = OPTIMIZERS[name](narrow.parameters()), batches()
    train(narrow, optimizer, data, 5)
    wide, other = copy.deepcopy((narrow, optimizer))
    fxgrow.training.grow_(wide, width, optimizer=other, lr="width", where="all", **COPIES)
    train(narrow, optimizer, batches(), 20)
    train(wide, other, batches(), 20)
    inputs, _ = next(data)
    assert torch.allclose(wide(inputs), narrow(inputs), rtol=1e-11, atol=1e-11)


def test_factors_of_several_growths_multiply() -> None:
    narrow = network()
    optimizer = ADAMW(narrow.parameters())
    wide, other = copy.deepcopy((narrow, optimizer))
    for width in ("2x", "3x"):
        train(narrow, optimizer, batches(), 5)
        train(wide, other, batches(), 5)
        fxgrow.training.grow_(wide, width, optimizer=other, lr="width", **COPIES)
    train(narrow, optimizer, batches(), 20)
    train(wide, other, batches(), 20)
    rate = rate_of(wide[2].weight)
    assert (rate.gradient, rate.update) == (6.0, pytest.approx(1 / 6))
    inputs, _ = next(batches())
    assert torch.allclose(wide(inputs), narrow(inputs), rtol=1e-11, atol=1e-11)


def test_a_closure_computes_with_the_true_weights() -> None:
    with_it, without = network(), network()
    for model in (with_it, without):
        fxgrow.training.grow_(model, "2x", lr="width", **COPIES)
    optimizer = SGD(with_it.parameters())
    data = batches()
    for _ in range(5):
        inputs, targets = next(data)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(with_it(inputs), targets)
            torch.autograd.backward(loss)
            return loss

        optimizer.step(closure)
    train(without, SGD(without.parameters()), batches(), 5)
    assert torch.equal(with_it[2].weight, without[2].weight)


def test_gradients_are_given_back() -> None:
    model = network()
    optimizer = SGD(model.parameters())
    fxgrow.training.grow_(model, "2x", optimizer=optimizer, lr="width", **COPIES)
    model(torch.ones(1, 5)).sum().backward()
    gradient = model[0].weight.grad
    before = gradient.clone()
    optimizer.step()
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, before)


def test_schedulers_and_groups_stay_as_they_are() -> None:
    model = network()
    optimizer = ADAMW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    fxgrow.training.grow_(
        model, "2x", optimizer=optimizer, scheduler=scheduler, lr="width", **COPIES
    )
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert after == groups
    train(model, optimizer, batches(), 1)
    scheduler.step()


def by_parts(make: Any) -> tuple[Tensor, Tensor]:
    """Return a weight that was trained under variance transfer, and what it should be.

    The second is trained as parts in groups of their own, at rates that are set before each step.
    """
    model = network()
    grown = fxgrow.training.grow_(model, "2x", lr="variance_transfer", rescaling="default_vt")
    weight = model[2].weight
    parts = [part for part in grown.parts if part.name == "2.weight"]
    assert [part.stage for part in parts] == [0, 1]
    masks = [part.mask(weight) for part in parts]
    pieces = [nn.Parameter(weight.detach()[mask]) for mask in masks]
    optimizer = make(model.parameters())
    reference = make([{"params": [piece]} for piece in pieces])
    base = {k: optimizer.param_groups[0][k] for k in ("lr", "weight_decay")}
    data = batches()
    for _ in range(6):
        inputs, targets = next(data)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        ratio = float(pieces[1].detach().norm() / pieces[0].detach().norm())
        for piece, mask in zip(pieces, masks, strict=True):
            piece.grad = weight.grad[mask].clone()
        reference.param_groups[1]["lr"] = base["lr"] * ratio
        reference.param_groups[1]["weight_decay"] = base["weight_decay"] / ratio
        optimizer.step()
        reference.step()
        # so that both see the same gradients, but for rounding
        assert torch.allclose(weight.detach()[masks[1]], pieces[1].detach(), rtol=1e-9)
    found = torch.cat([weight.detach()[mask] for mask in masks])
    return found, torch.cat([piece.detach() for piece in pieces])


BY_PARTS = OPTIMIZERS | {
    "dampened": functools.partial(SGD, dampening=0.3),
    "maximize plainly": functools.partial(OPTIMIZERS["plain"], maximize=True, lr=0.001),
    "maximize adam": functools.partial(ADAMW, maximize=True, lr=0.001),
    "amsgrad": functools.partial(OPTIMIZERS["adam"], amsgrad=True),
}


@pytest.mark.parametrize(
    "name",
    [
        "sgd", "plain", "nesterov", "dampened", "maximize", "maximize plainly", "adam", "adamw",
        "foreach", "amsgrad", "maximize adam", "fused", "rmsprop",
    ],
)  # fmt: skip
def test_variance_transfer_is_a_rate_for_each_part(name: str) -> None:
    found, expected = by_parts(BY_PARTS[name])
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["plain", "adam", "amsgrad", "nesterov", "dampened"])
def test_a_step_by_parts_leaves_gradients_alone(name: str) -> None:
    model = network()
    optimizer = BY_PARTS[name](model.parameters())
    fxgrow.training.grow_(
        model, "2x", optimizer=optimizer, lr="variance_transfer", rescaling="default_vt"
    )
    train(model, optimizer, batches(), 2)  # the first one makes the averages
    gradient = model[2].weight.grad
    before, weight = gradient.clone(), model[2].weight.detach().clone()
    optimizer.step()
    assert model[2].weight.grad is gradient
    assert torch.equal(gradient, before)
    assert not torch.equal(model[2].weight, weight)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_parts_of_other_growths_take_whole_steps(name: str) -> None:
    model = network()
    optimizer = BY_PARTS[name](model.parameters())
    fxgrow.training.grow_(
        model, "2x", optimizer=optimizer, lr="variance_transfer", rescaling="default_vt"
    )
    grown = fxgrow.training.grow_(model, "1.5x", optimizer=optimizer)
    weight = model[2].weight
    (last,) = (part for part in grown.parts if part.name == "2.weight" and part.stage == 2)
    train(model, optimizer, batches(), 2)
    same, other = copy.deepcopy((model, optimizer))
    forget_rates(same)
    for one, steps in ((model, optimizer), (same, other)):
        train(one, steps, batches(), 1)
    mask = last.mask(weight)
    assert torch.allclose(weight[mask], same[2].weight[mask], rtol=1e-12, atol=1e-15)
    assert not torch.allclose(weight, same[2].weight, rtol=1e-6)


def forget_rates(model: nn.Module) -> None:
    """Let all parameters of a network take whole steps."""
    for parameter in model.parameters():
        stepping.RATES.pop(parameter, None)


def test_a_weight_that_begins_at_zero_is_refused_under_variance_transfer() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="stay zero"):
        fxgrow.training.grow_(model, "2x", lr="variance_transfer", pairing="v_zero")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "register",
    [
        nn.utils.parametrizations.weight_norm,
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())),
    ],
)
@pytest.mark.parametrize("lr", ["width", "variance_transfer"])
def test_what_takes_the_place_of_a_parameter_with_rates_is_not_trained_unsaid(
    lr: Any, register: Callable[[nn.Module], object]
) -> None:
    model = network()
    given = COPIES if lr == "width" else {"rescaling": "default_vt"}
    fxgrow.training.grow_(model, "2x", lr=lr, **given)
    register(model[2])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="taken its place"):
        train(model, SGD(model.parameters()), batches(), 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    others = [*model[0].parameters(), *model[4].parameters(), model[2].bias]
    train(model, SGD(others), batches(), 1)  # does not train it


def test_a_parametrization_before_the_growth_has_rates_where_it_reads_no_copies() -> None:
    model = network()
    weight_norm = nn.utils.parametrizations.weight_norm
    weight_norm(model[0])
    fxgrow.training.grow_(model, "2x", lr="width", **COPIES)
    train(model, SGD(model.parameters()), batches(), 1)
    weight_norm(model[4])
    with pytest.raises(PlanError, match=r"lr=.width. refuses for layers that read copies"):
        train(model, SGD(model.parameters()), batches(), 1)
    model = network()
    weight_norm(model[4])
    with pytest.raises(PlanError, match=r"no rate for 4\.parametrizations"):
        fxgrow.training.grow_(model, "2x", lr="width", **COPIES)


def test_a_parametrization_that_computes_with_the_same_parameter_keeps_its_rates() -> None:
    model = network()
    fxgrow.training.grow_(model, "2x", lr="width", **COPIES)
    rate = rate_of(model[2].weight)
    nn.utils.parametrizations.spectral_norm(model[2])
    assert rate_of(model[2].parametrizations.weight.original) is rate
    train(model, SGD(model.parameters()), batches(), 2)


def test_a_warm_up_ends() -> None:
    warm, cold = network(), network()
    fxgrow.training.grow_(warm, "2x", lr="warm_up")
    fxgrow.training.grow_(cold, "2x")
    start = warm[0].weight.detach().clone()
    optimizer, other = SGD(warm.parameters()), SGD(cold.parameters())
    train(warm, optimizer, batches(), 1)
    train(cold, other, batches(), 1)
    step, whole = warm[0].weight.detach() - start, cold[0].weight.detach() - start
    assert torch.allclose(step * WARM_UP, whole, rtol=1e-9, atol=1e-12)
    train(warm, optimizer, batches(), WARM_UP - 1)
    assert fxgrow.training.state_dict(warm)["warming"] == 0


@pytest.mark.parametrize("lr", ["width", "variance_transfer", "warm_up"])
def test_a_killed_run_resumes_to_the_same_numbers(lr: Any) -> None:
    model = network()
    optimizer, data = ADAMW(model.parameters()), batches()
    train(model, optimizer, data, 4)
    fxgrow.training.grow_(model, "2x", optimizer=optimizer, lr=lr, **COPIES)
    train(model, optimizer, data, 4)
    file = io.BytesIO()
    state = (model.state_dict(), optimizer.state_dict(), fxgrow.training.state_dict(model))
    torch.save(state, file)
    train(model, optimizer, data, 4)
    file.seek(0)
    weights, averages, growth = torch.load(file, weights_only=True)
    again = fxgrow.training.regrow_(network(), growth)
    again.load_state_dict(weights)
    other = ADAMW(again.parameters())
    other.load_state_dict(averages)
    train(again, other, batches(), 4)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("lr", ["width", "variance_transfer", "warm_up"])
def test_copies_of_a_network_keep_their_rates(lr: Any) -> None:
    model = network()
    optimizer = ADAMW(model.parameters())
    fxgrow.training.grow_(model, "2x", optimizer=optimizer, lr=lr, **COPIES)
    same, other = copy.deepcopy((model, optimizer))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    train(model, optimizer, batches(), 5)
    train(same, other, batches(), 5)
    train(loaded, ADAMW(loaded.parameters()), batches(), 5)
    assert torch.equal(model[2].weight, same[2].weight)
    assert torch.equal(model[2].weight, loaded[2].weight)


def test_a_copy_that_grows_apart_has_whole_steps() -> None:
    model = network()
    fxgrow.training.grow_(model, "1.5x", lr="width", **COPIES)
    apart = fxgrow.widen(model, "2x").model
    train(apart, SGD(apart.parameters()), batches(), 1)
    assert rate_of(apart.get_parameter("0.weight")).is_whole
    assert not rate_of(model[0].weight).is_whole


def test_a_part_of_a_network_with_rates_is_not_grown_alone() -> None:
    model = nn.Sequential(network(), nn.Tanh(), nn.Linear(3, 2))
    fxgrow.training.grow_(model, "2x", lr="width", **COPIES)
    with pytest.raises(PlanError, match="a part of"):
        fxgrow.training.grow_(model[0], "2x")
    assert model[0][0].out_features == 16


def test_rates_of_a_part_resume() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(network(), nn.Tanh(), nn.Linear(3, 2))

    model = build()
    fxgrow.training.grow_(model[0], "2x", lr="variance_transfer", rescaling="default_vt")
    again = fxgrow.training.regrow_(build(), fxgrow.training.state_dict(model))
    mine, theirs = rate_of(model[0][2].weight), rate_of(again[0][2].weight)
    assert (mine.first, mine.later) != ((), ())
    assert (mine.first, mine.later) == (_named(theirs.first), tuple(map(_named, theirs.later)))


def _named(parts: Any) -> tuple[Any, ...]:
    """Return parts as the module that has grown names them."""
    return tuple(replace(part, name=part.name.removeprefix("0.")) for part in parts)


def test_what_cannot_be_kept_is_refused_by_name() -> None:
    model = network()
    with pytest.raises(UsageError, match="no rule 'mup'"):
        fxgrow.training.grow_(model, "2x", lr="mup")
    with pytest.raises(PlanError, match="makes none"):
        fxgrow.training.grow_(model, "2x", lr="width")
    optimizer = torch.optim.Adafactor(model.parameters())
    with pytest.raises(PlanError, match="Adafactor"):
        fxgrow.training.grow_(model, "2x", optimizer=optimizer, lr="width", **COPIES)
    assert model[0].out_features == 8
    fxgrow.training.grow_(model, "2x", lr="width", **COPIES)
    other = torch.optim.Adafactor(model.parameters())
    with pytest.raises(PlanError, match="Adafactor"):  # one that was not given
        train(model, other, batches(), 1)


@pytest.mark.parametrize("left", [-1, 101, True, 1.5, "3"])
def test_a_hostile_warm_up_is_refused(left: Any) -> None:
    state = fxgrow.training.state_dict(network()) | {"warming": left}
    with pytest.raises(SourceError, match="warm-up"):
        fxgrow.training.regrow_(network(), state)


def test_parts_tell_stages_and_copies() -> None:
    model = network()
    fxgrow.training.grow_(model, "1.5x", include=["0"], **COPIES)
    grown = fxgrow.training.grow_(model, {"2": "2x"})
    assert grown.parts == fxgrow.training.parts_of(model)
    tensors = dict(model.named_parameters())
    for name in {part.name for part in grown.parts}:
        own = [part for part in grown.parts if part.name == name]
        covered = sum(part.mask(tensors[name]).long() for part in own)
        assert torch.equal(torch.as_tensor(covered), torch.ones_like(tensors[name]).long())
    columns = [(p.stage, p.rows, p.columns) for p in grown.parts if p.name == "2.weight"]
    assert columns == [(0, 1, 1), (0, 1, 2), (1, 1, 2), (2, 1, 1), (2, 1, 2)]
    assert {(p.stage, p.rows, p.columns) for p in grown.parts if p.name == "0.weight"} == {
        (0, 1, 1), (0, 2, 1), (1, 2, 1),
    }  # fmt: skip


def test_clipping_counts_copies_once() -> None:
    narrow = network()
    wide = copy.deepcopy(narrow)
    fxgrow.training.grow_(wide, "1.5x", lr="width", where="all", **COPIES)
    inputs, targets = next(batches())
    for model in (narrow, wide):
        nn.functional.mse_loss(model(inputs), targets).backward()
    expected = nn.utils.clip_grad_norm_(narrow.parameters(), 0.1)
    assert torch.allclose(fxgrow.training.clip_grad_norm_(wide, 0.1), expected)
    assert torch.allclose(fxgrow.training.clip_grad_norm_(wide, 1.0), torch.tensor(0.1))
    wide[0].weight.grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="finite"):
        fxgrow.training.clip_grad_norm_(wide, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing(fused: bool) -> None:
    plain, scaled = network(), network()
    optimizers = []
    for model in (plain, scaled):
        fxgrow.training.grow_(model, "2x", lr="width", **COPIES)
        optimizers.append(
            torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
        )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = batches()
    for step in range(4):
        inputs, targets = next(data)
        optimizers[1].zero_grad()
        loss = nn.functional.mse_loss(scaled(inputs), targets)
        if step == 2:  # one that overflows, and makes no step
            loss = loss * float("inf")
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizers[1])
        scaler.update()
    data = batches()
    train(plain, optimizers[0], data, 2)
    next(data)
    train(plain, optimizers[0], data, 1)
    assert torch.allclose(plain[2].weight, scaled[2].weight, rtol=1e-10)
