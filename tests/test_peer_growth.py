"""What gromo's tests assert of first-order growth, asserted of fxgrow.

Source of the situations: test_tools.py, test_growing_block.py, test_linear_growing_module.py,
test_conv2d_growing_module.py and test_natural_gradient_invariance.py of gromo
(https://github.com/growingnet/gromo); each test names those that it stands for. They differ by
design in this: fxgrow never moves old weights (gromo's optimal delta), which is the optimizer's
work; it whitens by what the writer reads alone (no Fisher matrix of the outputs); nothing is kept
where nothing gains; and several readers of one layer are no reason to stop.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.apply.module import apply_to_module
from fxgrow.errors import FxgrowError, PlanError

METHODS = [fxgrow.Tiny, fxgrow.GradMax]
KINDS = ["linear", "conv"]
Batches = list[tuple[Tensor, Tensor]]


class Shortcut(nn.Sequential):
    """Layers with a shortcut around them."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return half the squared distance, the mean over samples: its gradient is the difference."""
    return (outputs - targets).square().sum() / (2 * len(outputs))


def layer(kind: str, inputs: int, outputs: int, *, bias: bool = True) -> nn.Module:
    if kind == "linear":
        return nn.Linear(inputs, outputs, bias=bias)
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def chain(
    kind: str, *between: nn.Module, biases: tuple[bool, bool] = (True, True), whole: type = Shortcut
) -> nn.Module:
    """Return layers of 5, 3 and 5 channels."""
    torch.manual_seed(0)
    first, last = (
        layer(kind, *sizes, bias=b) for sizes, b in zip([(5, 3), (3, 5)], biases, strict=True)
    )
    return whole(first, *between, last).double().eval()


def batches_for(kind: str, counts: tuple[int, ...] = (16, 8)) -> Batches:
    shape = (5,) if kind == "linear" else (5, 4, 4)
    generator = torch.Generator().manual_seed(1)

    def drawn(count: int) -> Tensor:
        return torch.randn(count, *shape, dtype=torch.float64, generator=generator)

    return [(drawn(count), drawn(count)) for count in counts]


def loss_of(model: nn.Module, batches: Batches) -> float:
    with torch.no_grad():
        total = sum(float(half_square(model(x), y)) * len(x) for x, y in batches)
    return total / sum(len(x) for x, _ in batches)


def grow(
    model: nn.Module,
    method: Callable[..., object],
    batches: Batches,
    width: str = "+2",
    **more: object,
) -> fxgrow.Grown:
    limits = {name: more.pop(name) for name in ("keep", "threshold") if name in more}
    init = method(half_square, batches, **limits)
    return fxgrow.widen(model, width, batches[0][0], init=init, verify=False, **more)


def new_parts(grown: fxgrow.Grown) -> tuple[Tensor, Tensor]:
    """Return the new rows of the first layer and the new columns of the last."""
    old = grown.plan.groups[0].width[0]
    return grown.model[0].weight.detach()[old:], grown.model[-1].weight.detach()[:, old:]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_new_parameters_have_the_shapes_and_strengths(
    method: Callable[..., object], kind: str, bias: bool
) -> None:
    """compute_optimal_added_parameters: linear and conv, maximum_added_neurons; apply_change."""
    model = chain(kind, nn.Tanh(), biases=(bias, bias))
    grown = grow(model, method, batches_for(kind))
    rows, columns = new_parts(grown)
    assert rows.shape == (2, *model[0].weight.shape[1:])
    assert columns.shape == (5, 2, *model[-1].weight.shape[2:])
    assert (grown.model[0].bias is not None) == bias
    assert rows.isfinite().all()
    assert columns.isfinite().all()
    (strengths,) = grown.init.strengths.values()
    assert len(strengths) == 2
    assert min(strengths) >= 0
    if method is fxgrow.GradMax:
        assert rows.eq(0).all()  # alpha_zero


@pytest.mark.parametrize("biases", [(a, b) for a in (True, False) for b in (True, False)])
def test_either_layer_may_have_a_bias(biases: tuple[bool, bool]) -> None:
    """compute_optimal_added_parameters_different_bias."""
    batches = batches_for("linear")
    model = chain("linear", nn.Tanh(), biases=biases)
    grown = grow(model, fxgrow.Tiny, batches)
    assert [layer.bias is not None for layer in grown.model if hasattr(layer, "bias")] == [*biases]
    assert loss_of(grown.model, batches) < loss_of(model, batches)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_directions_are_the_first_of_more(method: Callable[..., object], kind: str) -> None:
    """sub_select_optimal_added_parameters by number: output and input side."""
    model, batches = chain(kind, nn.Tanh()), batches_for(kind)
    few, more = (grow(model, method, batches, keep=keep).init for keep in (1, 2))
    (one,), (two,) = few.strengths.values(), more.strengths.values()
    assert one == pytest.approx(two[:1])
    (less,), (all_gains,) = few.gains.values(), more.gains.values()
    assert sum(less) <= sum(all_gains)
    for name in few.rows:
        first = few.rows[name] / few.amplitude**0.5
        assert torch.allclose(first, more.rows[name][:1] / more.amplitude**0.5)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.99])
def test_weak_directions_are_left_out(threshold: float) -> None:
    """sub_select_optimal_added_parameters by threshold."""
    model, batches = chain("linear", nn.Tanh()), batches_for("linear")
    (every,), (kept,) = (
        grow(model, fxgrow.GradMax, batches, "+5", **limit).init.strengths.values()
        for limit in ({}, {"threshold": threshold})
    )
    assert kept == pytest.approx([s for s in every if s >= threshold * every[0]])


def test_no_direction_is_no_growth() -> None:
    """sub_select_zero: gromo keeps none; fxgrow refuses to be asked for none."""
    with pytest.raises(FxgrowError, match="at least 1"):
        grow(chain("linear", nn.Tanh()), fxgrow.Tiny, batches_for("linear"), keep=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pairing", "zero"), [("zero_z", 0), ("v_zero", 1)])
def test_one_side_may_be_zeros(kind: str, pairing: str, zero: int) -> None:
    """sub_select_…_zeroing and omega_zero: rows or columns of zeros, which keep the function."""
    model, batches = chain(kind, nn.Tanh()), batches_for(kind)
    grown = grow(model, fxgrow.Tiny, batches, pairing=pairing)
    parts = new_parts(grown)
    assert parts[zero].eq(0).all()
    assert parts[1 - zero].ne(0).any()
    x = batches[0][0]
    assert torch.allclose(grown.model(x), model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["one batch of twice the samples", "the batch twice"])
def test_the_number_of_samples_does_not_matter(
    method: Callable[..., object], kind: str, how: str
) -> None:
    """sample_number_invariant."""
    model, ((x, y),) = chain(kind, nn.Tanh()), batches_for(kind, (16,))
    joined = [(torch.cat([x, x]), torch.cat([y, y]))]
    twice = joined if how.startswith("one") else [(x, y), (x, y)]
    once, again = (grow(model, method, batches).init for batches in ([(x, y)], twice))
    for name in once.strengths:
        assert once.strengths[name] == pytest.approx(again.strengths[name], rel=1e-8)
        assert once.gains[name] == pytest.approx(again.gains[name], rel=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gain_is_that_of_the_selected_singular_values(
    method: Callable[..., object], kind: str
) -> None:
    """new_neurons_fo_improvement, first_order_uses_squared_singular_values_flag."""
    model, batches = chain(kind, nn.Identity(), biases=(False, False)), batches_for(kind)
    if method is fxgrow.Tiny:
        with torch.no_grad():
            model[0].weight.zero_()  # so that old weights have no part in it
    init = method(half_square, batches, keep=2)
    grown = fxgrow.widen(model, "+2", batches[0][0], init=init, verify=False).init
    (strengths,), (gains,) = grown.strengths.values(), grown.gains.values()
    assert gains == pytest.approx([s**2 for s in strengths], rel=1e-6)
    table = fxgrow.inspect(model, batches[0][0], growth=method(half_square, batches, keep=2)).growth
    assert [group.gain for group in table.groups] == pytest.approx([sum(gains)])


def test_what_old_weights_can_do_asks_for_nothing() -> None:
    """zero_bottleneck: two layers that can already reach whatever the loss asks for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)).double()
    x = torch.eye(4, dtype=torch.float64)
    with pytest.raises(PlanError, match="old weights can do what the loss asks for"):
        grow(model, fxgrow.Tiny, [(x, x[:, :3] * 0)])


@pytest.mark.parametrize("bias", [True, False])
def test_an_identity_that_is_read_by_zeros_asks_for_nothing(bias: bool) -> None:
    """full_addition_loop_with_features_identity_initialization."""
    model = Shortcut(nn.Linear(5, 5, bias=bias), nn.Linear(5, 5, bias=bias)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].weight.copy_(torch.eye(5))
    x = torch.eye(5, dtype=torch.float64)
    with pytest.raises(PlanError, match="old weights can do what the loss asks for"):
        grow(model, fxgrow.Tiny, [(x, 0 * x)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["the identity", "a diagonal"])
def test_layers_of_zeros_learn_a_linear_target_in_one_step(kind: str, target: str) -> None:
    """compute_optimal_added_parameters_with_no_projection, …_empirical, s_xtx_…_reconstruction."""
    model = chain(kind, biases=(False, False), whole=nn.Sequential)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    scale = torch.ones(5) if target == "the identity" else torch.arange(1.0, 6.0)
    x = torch.eye(5 if kind == "linear" else 5 * 4 * 5, dtype=torch.float64)
    x = x if kind == "linear" else x.reshape(-1, 5, 4, 5)  # one pixel of one channel each
    y = x * scale.reshape(5, *[1] * (x.ndim - 2))
    grown = grow(model, fxgrow.Tiny, [(x, y)], "+5" if kind == "linear" else "+45")
    if kind == "linear":
        assert torch.allclose(grown.model(x), y, atol=1e-10)
        assert grown.init.amplitude == pytest.approx(1)
    else:  # TINY weighs positions at the border as the reader does, where the moves are smaller
        assert loss_of(grown.model, [(x, y)]) < 0.1 * loss_of(model, [(x, y)])


def test_few_channels_take_the_largest_entries_of_a_diagonal() -> None:
    """s_none_max_neurons_2_structure and …_ignore_sv_…, and the same with S."""
    for method in METHODS:
        model = chain("linear", biases=(False, False), whole=nn.Sequential)
        with torch.no_grad():
            model[0].weight.zero_()
            model[1].weight.fill_(0.0 if method is fxgrow.Tiny else 1.0)
        x = torch.eye(5, dtype=torch.float64)
        grown = grow(model, method, [(x, x.diag().mul(torch.arange(1.0, 6.0)).diag())])
        _, columns = new_parts(grown)
        assert columns[:3].abs().max() < 1e-10  # channels that gain less
        assert columns[3:].abs().amax(0).min() > 0.1
        (strengths,) = grown.init.strengths.values()
        assert strengths[0] / strengths[1] == pytest.approx(5 / 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:.*the batches give no more")
def test_an_empty_layer_gets_channels(method: Callable[..., object], bias: bool) -> None:
    """full_addition_loop_with_indicator_batch, empty_block_gradmax, empty_block_no_projection."""
    with pytest.warns(UserWarning, match="zero-element"):
        model = Shortcut(nn.Linear(5, 0), nn.Linear(0, 5, bias=bias)).double()
    x = torch.eye(5, dtype=torch.float64)
    grown = grow(model, method, [(x, 0 * x)], "5")
    takes_mean = bias and method is fxgrow.Tiny  # the reader's bias can do that part itself
    assert grown.model[0].weight.shape == (4 if takes_mean else 5, 5)
    if method is fxgrow.GradMax:
        assert torch.equal(grown.model(x), model(x))
        assert min(min(gains) for gains in grown.init.gains.values()) > 0
    else:  # the layers learn to take away what the shortcut adds
        left = loss_of(grown.model, [(x, 0 * x)]) / loss_of(model, [(x, 0 * x)])
        assert left < (1 if bias else 1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_with_a_relu_gets_channels(method: Callable[..., object], kind: str) -> None:
    """compute_optimal_updates_with_methods: of TINY and of GradMax, whose rows are zeros."""
    model, batches = chain(kind, nn.ReLU()), batches_for(kind)
    grown = grow(model, method, batches)
    rows, columns = new_parts(grown)
    assert columns.ne(0).any()
    if method is fxgrow.GradMax:
        assert rows.eq(0).all()
        assert loss_of(grown.model, batches) == pytest.approx(loss_of(model, batches), rel=1e-12)
    else:
        assert loss_of(grown.model, batches) < loss_of(model, batches)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_old_weights_stay_what_they_are(kind: str, bias: bool) -> None:
    """compute_optimal_delta: gromo moves them along, fxgrow leaves that to the optimizer."""
    model = chain(kind, nn.Tanh(), biases=(bias, bias))
    grown = grow(model, fxgrow.Tiny, batches_for(kind)).model
    assert torch.equal(grown[0].weight[:3], model[0].weight)
    assert torch.equal(grown[-1].weight[:, :3], model[-1].weight)
    if bias:
        assert torch.equal(grown[-1].bias, model[-1].bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "power"), [(fxgrow.Tiny, 0), (fxgrow.GradMax, 2)])
def test_gains_under_another_scale_of_what_the_writer_reads(
    kind: str, method: Callable[..., object], power: int
) -> None:
    """eigenvalues_extension_natural_gradient_invariance: TINY's are invariant, gradients scale."""
    batches = batches_for(kind)
    gains = []
    for c in (1.0, 3.0):
        model = chain(kind, nn.Tanh(), biases=(False, True), whole=nn.Sequential)
        before = layer(kind, 5, 5, bias=False).double()
        with torch.no_grad():
            before.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(c)
            model[0].weight.div_(c)
        whole = nn.Sequential(before, *model)
        x = batches[0][0]
        init = method(half_square, batches)
        found = fxgrow.widen(whole, {"1": "+2"}, x, init=init, verify=False).init.gains["1"]
        gains.append(found)
    assert gains[1] == pytest.approx([3.0**power * g for g in gains[0]], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_inputs_give_finite_weights(kind: str) -> None:
    """compute_optimal_added_parameters with a matrix of 1e-8."""
    batches = [(1e-4 * x, y) for x, y in batches_for(kind)]
    grown = grow(chain(kind, nn.Tanh()), fxgrow.Tiny, batches)
    assert all(part.isfinite().all() for part in new_parts(grown))


@pytest.mark.parametrize("between", ["tanh", "relu", "norm and relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_amplitude_of_the_search_lowers_the_loss_more(kind: str, between: str) -> None:
    """scaling factors of apply_change, searched on a line."""
    norm = nn.BatchNorm1d(3) if kind == "linear" else nn.BatchNorm2d(3)
    layers = {"tanh": [nn.Tanh()], "relu": [nn.ReLU()], "norm and relu": [norm, nn.ReLU()]}
    model, batches = chain(kind, *layers[between]), batches_for(kind)
    grown = grow(model, fxgrow.Tiny, batches)
    best = loss_of(grown.model.eval(), batches)
    assert best < loss_of(model, batches)
    if between != "norm and relu":  # whose statistics belong to one amplitude
        for factor in (0.5, 2.0):
            other = grown.init.scaled(factor * grown.init.amplitude)
            assert best <= loss_of(apply_to_module(grown.plan, model, other), batches)


class Branches(nn.Module):
    """One layer that two read, and a stream that two write."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(5, 3), nn.Linear(3, 4), nn.Linear(3, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.left(h) + self.right(h)))


@pytest.mark.parametrize("method", METHODS)
def test_several_readers_grow_and_several_writers_are_refused(
    method: Callable[..., object],
) -> None:
    """multiple_successors_warning, …_merge_previous_module_error."""
    torch.manual_seed(0)
    model, x = Branches().double(), torch.randn(12, 5, dtype=torch.float64)
    batches = [(x, torch.randn(12, 2, dtype=torch.float64))]
    grown = grow(model, method, batches, where="all")
    assert grown.plan.groups[0].name == "first"
    assert grown.model.left.in_features == grown.model.right.in_features == 5
    assert "left" in [refused.name for refused in grown.plan.refused]


@pytest.mark.parametrize(("kind", "hidden"), [("linear", 64), ("conv", 64), ("linear", 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element", "ignore:.*empty")
def test_new_weights_may_have_the_deviation_of_old_ones(kind: str, hidden: int) -> None:
    """normalize_optimal_updates: that of old weights, or of a fresh layer where there are none."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(kind, 5, hidden), layer(kind, hidden, 5)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    init = "copy_normal" if hidden else "lecun_normal"
    grown = fxgrow.widen(model, "+64", batches_for(kind)[0][0], init=init, verify=False)
    rows, columns = new_parts(grown)
    wanted = [layer.weight.detach().std() for layer in model] if hidden else [5**-0.5, 64**-0.5]
    for part, std in zip((rows, columns), wanted, strict=True):
        assert part.std().item() == pytest.approx(float(std), rel=0.15)
