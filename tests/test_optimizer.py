"""Optimizers grow with their network: gradients and averages are those of the grown parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import trained_looking
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.api.widen import plan as make_plan
from fxgrow.apply.tensors import lay_out
from fxgrow.errors import FxgrowWarning, PlanError
from fxgrow.files.optimizer.growth import grow_state_dict
from fxgrow.files.optimizer.state import _layout
from fxgrow.files.optimizer.steps import grow_states
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.init import zeros
from fxgrow.plan.schema import Plan
from fxgrow.training import deepen_

adafactor = pytest.importorskip("transformers.optimization").Adafactor


class Network(nn.Module):
    """A residual block with norms, a depthwise convolution and a factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.factor = nn.Parameter(torch.randn(8, 1, 1))
        self.conv2 = nn.Conv2d(8, 6, 1)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.depthwise(torch.relu(self.norm1(self.conv1(x)))) * self.factor
        return self.head(torch.relu(x + self.norm2(self.conv2(y))).mean((2, 3)))


class Encoder(nn.Module):
    """A transformer's layer whose stream grows by whole copies."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return trained_looking(Network()).double().eval()


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().double().eval()


IMAGES = torch.randn(4, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss in which no output counts as much as another."""
    model.zero_grad()
    outputs = model(inputs)
    (outputs - torch.arange(outputs.numel()).view_as(outputs).cos()).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def is_old(plan: Plan, name: str) -> Tensor:
    """Return 1 where a grown parameter continues an old position, and 0 elsewhere."""
    edit = plan.tensors[name]
    return lay_out(_layout(edit), torch.ones(edit.shape, dtype=torch.float64), zeros)


def grow(plan: Plan, model: nn.Module, name: str, state: dict[str, Any]) -> dict[str, Any]:
    states, notes = grow_states(plan, {name: state}, named_tensors(model))
    assert notes == []
    return dict(states[name])


def worst_gradient(model: nn.Module, inputs: Tensor, **options: Any) -> float:
    """Return by how much gradients of the grown network differ from grown gradients, relatively.

    New weights are left out: they have no past.
    """
    grown = fxgrow.widen(model, example_inputs=inputs, verify=False, **options)
    before, after = gradients(model, inputs), gradients(grown.model, inputs)
    worst = 0.0
    for name in before.keys() & grown.plan.tensors.keys():
        predicted = grow(grown.plan, model, name, {"exp_avg": before[name]})["exp_avg"]
        wrong = (predicted - after[name]) * is_old(grown.plan, name)
        worst = max(worst, (wrong.abs().max() / before[name].abs().max()).item())
    assert after.keys() == before.keys()
    return worst


@pytest.mark.parametrize("pairing", ["vv_z_negz", "v_zero", "replicate"])
@pytest.mark.parametrize("rescaling", ["none", "default_vt", "vt_constraint_new_shape"])
@pytest.mark.parametrize("width", ["2x", "+5"])
def test_gradients_of_old_weights_are_what_the_rules_say(network, pairing, rescaling, width):
    wrong = worst_gradient(
        network, IMAGES, width=width, pairing=pairing, rescaling=rescaling, split_noise=0.0
    )
    assert wrong < 1e-12


@pytest.mark.parametrize("pairing", ["vv_z_negz", "v_zero", "replicate"])
def test_gradients_in_a_wider_stream_too(network, pairing):
    assert worst_gradient(
        network, IMAGES, width="+5", where="all", pairing=pairing, split_noise=0.0
    ) < 1e-12  # fmt: skip


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")
@pytest.mark.parametrize("where", ["hidden", "all"])
def test_gradients_of_copied_heads_and_normed_streams(encoder, where):
    assert worst_gradient(encoder, TOKENS, width="2x", where=where, split_noise=0.0) < 1e-12


def test_shares_of_unequal_copies_sum_to_the_old_gradient(network):
    grown = fxgrow.widen(network, "2x", IMAGES, pairing="replicate", split_noise=0.3, verify=False)
    name = "conv1.weight"
    before = gradients(network, IMAGES)[name]
    after = gradients(grown.model, IMAGES)[name]
    assert not torch.allclose(after[:8], after[8:])
    torch.testing.assert_close(after[:8] + after[8:], before)
    predicted = grow(grown.plan, network, name, {"exp_avg": before})["exp_avg"]
    torch.testing.assert_close(predicted[:8], before / 2)
    torch.testing.assert_close(predicted[8:], before / 2)


def test_new_entries_start_without_direction_and_with_the_mean_size(network):
    plan = make_plan(network, "2x", IMAGES, rescaling="default_vt")
    shape = network.conv1.weight.shape
    state = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.ones(shape),
        "exp_avg_sq": torch.rand(shape),
    }
    scale = plan.tensors["conv1.weight"].scale
    new = grow(plan, network, "conv1.weight", state)
    assert new["step"] is state["step"]
    torch.testing.assert_close(new["exp_avg"][:8], state["exp_avg"] / scale)
    torch.testing.assert_close(new["exp_avg_sq"][:8], state["exp_avg_sq"] / scale**2)
    assert not new["exp_avg"][8:].any()
    mean = state["exp_avg_sq"].mean() / scale**2
    torch.testing.assert_close(new["exp_avg_sq"][8:], mean.expand(8, *shape[1:]))


def test_what_is_not_edited_is_passed_on_whatever_it_holds(network):
    plan = make_plan(network, "2x", IMAGES)
    state = {"anything": [1], "exp_avg": torch.ones(6)}
    assert grow(plan, network, "norm2.weight", state) == state


@pytest.fixture(scope="module")
def copied(network: nn.Module) -> Plan:
    """A plan in which channels are copied and weights rescaled."""
    return make_plan(
        network, "2x", IMAGES, pairing="replicate", rescaling="default_vt", split_noise=0.0
    )


# Optimizers with an eps so small that it shows nowhere.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, eps=1e-40),
    "adamw": lambda p: torch.optim.AdamW(p, eps=1e-40),
    "amsgrad": lambda p: torch.optim.AdamW(p, eps=1e-40, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, eps=1e-40),
    "radam": lambda p: torch.optim.RAdam(p, eps=1e-40),
    "adamax": lambda p: torch.optim.Adamax(p, eps=1e-40),
    "rmsprop": lambda p: torch.optim.RMSprop(p, eps=1e-40, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, eps=1e-40),
    "adadelta": lambda p: torch.optim.Adadelta(p, eps=1e-40),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adafactor": lambda p: torch.optim.Adafactor(p, eps=(1e-40, 1e-3)),
    "adafactor of transformers": lambda p: adafactor(
        p, lr=1e-3, eps=(1e-80, 1e-3), beta1=0.9, scale_parameter=False, relative_step=False
    ),
}


def trained_state(optimizer: str, like: Tensor, steps: list[Tensor]) -> dict[str, Any]:
    """Return an optimizer's state after it was given these gradients."""
    parameter = nn.Parameter(torch.zeros_like(like))
    used = OPTIMIZERS[optimizer]([parameter])
    for gradient in steps:
        parameter.grad = gradient.clone()
        used.step()
    return dict(used.state[parameter])


@pytest.mark.parametrize("name", ["conv1.weight", "conv2.weight", "norm1.weight"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_is_as_if_the_grown_weights_had_been_trained_from_the_start(
    network, copied, optimizer, name
):
    old = network.get_parameter(name)
    generator = torch.Generator().manual_seed(0)
    # One direction throughout, because Adafactor's two factors stand for such squares alone.
    first = torch.randn(old.shape[0], *[1] * (old.ndim - 1), generator=generator)
    direction = (first * torch.randn(old.shape, generator=generator)[:1]).double()
    steps = [direction * (0.3 + math.cos(i)) for i in range(6)]
    new_steps = [grow(copied, network, name, {"exp_avg": g})["exp_avg"] for g in steps]
    state = trained_state(optimizer, old, steps)
    expected = trained_state(optimizer, new_steps[0], new_steps)
    found = grow(copied, network, name, state)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        if key != "RMS":  # of the parameter, computed anew at each step
            torch.testing.assert_close(value, expected[key], msg=lambda m, k=key: f"{k}: {m}")


def test_a_single_buffer_as_lion_keeps_it_is_an_average_of_gradients(network):
    plan = make_plan(network, "2x", IMAGES, rescaling="default_vt")
    scale = plan.tensors["conv2.weight"].scale
    average = torch.randn(6, 8, 1, 1)
    new = grow(plan, network, "conv2.weight", {"exp_avg": average})["exp_avg"]
    torch.testing.assert_close(new[:, :8], average / scale)
    assert scale != 1


# ── in place ──────────────────────────────────────────────────────────────────────────────────


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()


def test_an_optimizer_goes_on_in_its_groups_with_its_scheduler():
    model, loss_scale = small(), nn.Parameter(torch.ones(()))
    weights, biases = ([p for p in model.parameters() if p.ndim == d] for d in (2, 1))
    optimizer = torch.optim.AdamW(
        [{"params": [*biases, loss_scale], "weight_decay": 0.0}, {"params": weights}], lr=0.1
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loss_scale.grad = torch.ones(())
    step(model, optimizer)
    scheduler.step()
    kept = optimizer.state[loss_scale]
    grown = fxgrow.widen(model, "2x", verify=False)
    average = optimizer.state[model[0].weight]["exp_avg"]
    fxgrow.grow_optimizer_(optimizer, model, grown)
    new = grown.model
    held = [list(map(id, group["params"])) for group in optimizer.param_groups]
    assert held == [
        [id(new[0].bias), id(new[2].bias), id(loss_scale)],
        [id(new[0].weight), id(new[2].weight)],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
    torch.testing.assert_close(optimizer.state[new[0].weight]["exp_avg"][:8], average)
    assert optimizer.state[loss_scale] == kept
    assert len(optimizer.state) == 5
    before = [parameter.detach().clone() for parameter in new.parameters()]
    step(new, optimizer)
    scheduler.step()
    assert scheduler.get_last_lr() == [0.025, 0.025]
    assert not any(map(torch.equal, before, new.parameters()))


def test_names_beside_the_parameters_stay_right():
    model = small()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    grown = fxgrow.widen(model, "2x", verify=False)
    fxgrow.grow_optimizer_(optimizer, model, grown)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    step(grown.model, optimizer)


def test_a_buffer_of_no_known_kind_is_named_and_its_parameter_starts_anew():
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    for parameter in (model[0].weight, model[2].weight, model[2].bias):
        optimizer.state[parameter]["curvature"] = torch.ones_like(parameter)
    grown = fxgrow.widen(model, "2x", verify=False)
    with pytest.warns(FxgrowWarning, match=r"0.weight and 1 more was dropped.*curvature is of no"):
        fxgrow.grow_optimizer_(optimizer, model, grown)
    new = grown.model
    assert set(optimizer.state) == {new[0].bias, new[2].bias}
    assert "curvature" in optimizer.state[new[2].bias]  # which does not grow
    step(new, optimizer)
    assert optimizer.state[new[0].weight]["step"] == 1
    assert optimizer.state[new[0].bias]["step"] == 2


def test_an_optimizer_of_another_model_is_refused_and_left_alone():
    model, other = small(), small()
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with pytest.raises(PlanError, match="holds no parameter of the model"):
        fxgrow.grow_optimizer_(optimizer, model, fxgrow.widen(model, "2x", verify=False))
    assert optimizer.param_groups[0]["params"] == list(other.parameters())


def test_tied_parameters_are_one_in_the_optimizer():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.first, self.leave = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(F.relu(self.again(F.relu(self.first(self.enter(x))))))

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    grown = fxgrow.widen(model, "2x", torch.ones(3, 4), verify=False)
    fxgrow.grow_optimizer_(optimizer, model, grown)
    assert len(optimizer.param_groups[0]["params"]) == len(optimizer.state) == 6
    step(grown.model, optimizer)
    assert grown.model.again is grown.model.first


# ── moving averages ───────────────────────────────────────────────────────────────────────────


def test_a_moving_average_gets_the_new_weights_of_the_model_it_follows(network):
    average = torch.optim.swa_utils.AveragedModel(network)
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.mul_(1.5)
    average.eval()
    grown = fxgrow.widen(network, "+5", IMAGES, rescaling="default_vt")
    wide = grown.plan.apply(average.module, like=network)
    for name in ("conv1.weight", "conv1.bias", "depthwise.weight", "conv2.weight"):
        new, expected = wide.get_parameter(name), grown.model.get_parameter(name)
        is_new = is_old(grown.plan, name) == 0
        assert is_new.any()
        assert torch.equal(new[is_new], expected[is_new]), name
    torch.testing.assert_close(wide(IMAGES), average(IMAGES))


# ── training goes on ──────────────────────────────────────────────────────────────────────────


def test_the_loss_goes_on_as_if_nothing_had_happened():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = (
        torch.tensor(data.images[:256]).float() / 8 - 1,
        torch.tensor(data.target[:256]),
    )
    images = images.unsqueeze(1)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 60)
    grown = fxgrow.widen(
        model, {"0": "2x"}, images[:4], rescaling="default_vt", strict=True, verify=False
    )
    copied = copy.deepcopy(grown.model)
    fresh = train(copied, torch.optim.AdamW(copied.parameters(), lr=1e-2), 4)
    old, old_optimizer = copy.deepcopy((model, optimizer))
    fxgrow.grow_optimizer_(optimizer, model, grown)
    wide, narrow = train(grown.model, optimizer, 4), train(old, old_optimizer, 4)
    assert wide[0] == pytest.approx(narrow[0], rel=1e-3)
    assert wide[1] == pytest.approx(narrow[1], rel=2e-2)
    assert wide[0] > wide[1] > wide[2] > wide[3]
    assert fresh[1] > 1.1 * fresh[0]


class _Residual(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.into(x)))


class _Stacked(nn.Module):
    """Blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(_Residual(), _Residual()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def _train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for x in torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("in_place", [True, False])
def test_fused_momentum_goes_on_as_any_other(in_place):
    """It takes no mix of parameters with a momentum and new ones without."""

    def trained(fused: bool) -> nn.Module:
        torch.manual_seed(0)
        net = _Stacked()
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, fused=fused)
        _train(net, optimizer)
        if in_place:
            deepen_(net, {"blocks": "+1"}, torch.randn(5, 8), optimizer=optimizer)
            _train(net, optimizer)
            return net
        grown = fxgrow.deepen(net, {"blocks": "+1"}, torch.randn(5, 8))
        saved, _ = grow_state_dict(grown.plan, optimizer.state_dict(), net, grown.model)
        again = torch.optim.SGD(grown.model.parameters(), 0.01, momentum=0.9, fused=fused)
        again.load_state_dict(saved)
        _train(grown.model, again)
        return grown.model

    plain, fused = trained(False), trained(True)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())
