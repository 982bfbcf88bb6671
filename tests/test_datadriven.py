"""New channels from data: GradMax keeps the function and learns fastest, TINY lowers the loss."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from networks import max_rel
from torch import Tensor, nn

import fxgrow
from fxgrow.api import widen as api
from fxgrow.apply.module import apply_to_module
from fxgrow.errors import FxgrowWarning, NotPreservedError, PlanError
from fxgrow.grow.data.statistics import correlation, patches
from fxgrow.plan.deviations import Place

Batches = list[tuple[Tensor, Tensor]]
RELU = nn.Threshold(-1e-30, 0.0)  # a ReLU with slope 1 at zero


def chain(*layers: nn.Module, seed: int = 0) -> nn.Module:
    """Return layers as a network in float64 with weights that depend on the seed alone."""
    model = nn.Sequential(*layers).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = max(parameter[0].numel(), 1) ** -0.5
            parameter.normal_(0, spread, generator=generator)
    return model


def perceptron(activation: nn.Module, seed: int = 0) -> nn.Module:
    return chain(
        nn.Linear(6, 4), activation, nn.Linear(4, 3), activation, nn.Linear(3, 7), seed=seed
    )


def batches_for(model: nn.Module, *shape: int, seed: int = 0, sizes: tuple[int, ...] = (9, 5)):
    """Return random batches of unequal sizes, with targets of the outputs' shape."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        x = torch.randn(size, *shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            out = model(x)
        found.append((x, torch.randn(out.shape, dtype=out.dtype, generator=generator)))
    return found


def mean_loss(model: nn.Module, batches: Batches) -> Tensor:
    """Return the mean squared error over the samples of all batches."""
    total = sum(F.mse_loss(model(x), y) * len(x) for x, y in batches)
    return total / sum(len(x) for x, _ in batches)


CONVOLUTIONS = {
    "stride and padding": (
        chain(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 5, 3, stride=2, padding=(0, 2), bias=False),
        ),
        (3, 9, 11),
    ),
    "dilation and reflection": (
        chain(
            nn.Conv2d(2, 3, (1, 3), padding="same", padding_mode="reflect", bias=False),
            nn.SiLU(),
            nn.Conv2d(3, 4, 2, dilation=2, padding=2),
        ),
        (2, 5, 6),
    ),
    "one dim": (
        chain(nn.Conv1d(3, 4, 5, padding=2), nn.Identity(), nn.Conv1d(4, 3, 3, stride=3)),
        (3, 12),
    ),
    "three dims": (
        chain(nn.Conv3d(2, 3, 2), nn.ELU(), nn.Conv3d(3, 2, (1, 2, 2), padding=(1, 0, 1))),
        (2, 3, 4, 3),
    ),
}  # fmt: skip


class Mlp(nn.Module):
    """A transformer's MLP on a residual stream, with positions besides the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.slope = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x))
        return x + self.down(
            F.dropout(self.slope(y * torch.sigmoid(y)) * 2, training=self.training)
        )


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return CONVOLUTIONS | {
        "tanh": (perceptron(nn.Tanh()), (6,)),
        "gelu in place": (perceptron(nn.Hardswish(inplace=True)), (6,)),
        "positions": (Mlp().double(), (5, 6)),
    }


@pytest.mark.parametrize("name", networks())
def test_gradmax_preserves_and_its_gradients_are_the_singular_values(name: str) -> None:
    model, shape = networks()[name]
    batches = batches_for(model, *shape)
    init = fxgrow.GradMax(F.mse_loss, batches, keep=3)
    grown = fxgrow.widen(model, "2x", batches[0][0], init=init)
    assert {group.preserves for group in grown.plan.groups} == {"exact"}
    assert grown.report.verification.verdict == "preserved"
    assert grown.report.verification.eval.float64.max_rel <= 1e-10
    x = batches[1][0]
    assert max_rel(model.eval()(x), grown.model.eval()(x)) <= 1e-10
    mean_loss(grown.model, batches).backward()
    for group in grown.plan.groups:
        gradient = new_rows(grown.model, group).grad[group.width[0] :]
        assert gradient.square().sum().item() == pytest.approx(
            sum(s**2 for s in grown.init.strengths[group.name]), rel=1e-9
        )
        norms = gradient.flatten(1).norm(dim=1)
        assert norms.tolist() == pytest.approx(grown.init.strengths[group.name], rel=1e-9)
        assert grown.init.gains[group.name] == pytest.approx(norms.square().tolist())


def new_rows(model: nn.Module, group: object) -> nn.Parameter:
    return model.get_parameter(f"{group.writers[0]}.weight")


def columns(model: nn.Module, group: object) -> nn.Parameter:
    return model.get_parameter(f"{group.readers[0]}.weight")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["tanh", "stride and padding"])
def test_no_other_columns_of_that_norm_give_larger_gradients(name: str, seed: int) -> None:
    model, shape = networks()[name]
    batches = batches_for(model, *shape, seed=seed)
    grown = fxgrow.widen(model, "+2", init=fxgrow.GradMax(F.mse_loss, batches), verify=False)
    group = grown.plan.groups[-1]
    weight = columns(grown.model, group)
    best = gradient_norm(grown.model, group, batches)
    old, new = weight.detach().split([group.width[0], 2], dim=1)
    norm = old.transpose(0, 1).flatten(1).norm(dim=1).mean()
    flat = new.transpose(0, 1).flatten(1)
    assert torch.allclose(flat @ flat.T, norm**2 * torch.eye(2).double())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        random = torch.randn(flat.shape, dtype=flat.dtype, generator=generator)
        orthogonal = torch.linalg.qr(random.T).Q.T * norm
        with torch.no_grad():
            weight[:, group.width[0] :] = orthogonal.reshape(2, *new[:, 0].shape).transpose(0, 1)
        assert gradient_norm(grown.model, group, batches) < best


def gradient_norm(model: nn.Module, group: object, batches: Batches) -> float:
    model.zero_grad()
    mean_loss(model, batches).backward()
    return new_rows(model, group).grad[group.width[0] :].norm().item()


def test_gradmax_scales_columns_to_rescaled_ones() -> None:
    model = chain(nn.Linear(4, 6), nn.LeakyReLU(), nn.Linear(6, 5))
    init = fxgrow.GradMax(F.mse_loss, batches_for(model, 4))
    grown = fxgrow.widen(model, "+3", init=init, rescaling="default_vt")
    norms = grown.model[2].weight.detach().norm(dim=0)
    assert norms[6:].tolist() == pytest.approx([norms[:6].mean().item()] * 3)
    assert grown.plan.groups[0].preserves == "scaled"


@pytest.mark.filterwarnings("ignore:.* the batches give no more")
@pytest.mark.parametrize("name", [*networks(), "relu", "relu of images"])
def test_tiny_lowers_the_loss_by_the_gains_it_foresees(name: str) -> None:
    relus = {
        "relu": (perceptron(nn.ReLU()), (6,)),
        "relu of images": (chain(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2)), (2, 6, 6)),
    }
    model, shape = (networks() | relus)[name]
    batches = batches_for(model, *shape)
    init = fxgrow.Tiny(F.mse_loss, batches, keep=2)
    grown = fxgrow.widen(model, "2x", batches[0][0], init=init)
    before, after = (mean_loss(m.eval(), batches).item() for m in (model, grown.model))
    assert after < before
    assert {group.preserves for group in grown.plan.groups} == {"no"}
    assert all("first-order gain" in group.reason for group in grown.plan.groups)
    assert grown.report.verification.verdict == "changed"
    told = re.findall(r"[\d.]+(?:e[+-]\d+)?", grown.report.to_dict()["verification"]["notes"][-1])
    assert [float(number) for number in told[:2]] == pytest.approx([before, after], rel=1e-5)
    assert min(map(min, grown.init.gains.values())) > 0
    gain = sum(map(sum, grown.init.gains.values()))
    slope = (before - loss_at(grown, model, batches, 1e-6)) / 1e-6
    assert slope == pytest.approx(gain, rel=2e-2)


def at_rest(model: nn.Sequential, batches: Batches) -> None:
    """Set the last layer to the least-squares solution, so that its own gradient is zero."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        hidden = model[:-1](x)
        hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
        solution = torch.linalg.lstsq(hidden, y).solution
        model[-1].weight.copy_(solution[:-1].T)
        model[-1].bias.copy_(solution[-1])


def test_tiny_leaves_out_what_would_raise_the_loss() -> None:
    model = chain(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7))
    init = fxgrow.Tiny(F.mse_loss, batches_for(model, 6))
    with pytest.warns(FxgrowWarning, match="the batches give no more"):
        grown = fxgrow.widen(model, "2x", init=init, verify=False)
    assert min(map(min, grown.init.gains.values())) > 0


def test_weaker_channels_stand_in_for_those_that_would_raise_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7)
    ).double()
    batches = batches_for(model.eval(), 6)
    given = {}
    for count in (2, 5):
        init = fxgrow.Tiny(F.mse_loss, batches)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            grown = fxgrow.widen(model, {"2": f"+{count}"}, init=init, verify=False)
        given[count] = grown.init.strengths["2"], [str(warning.message) for warning in told]
    (two, nothing), (most, _) = given[2], given[5]
    assert nothing == []
    assert two == pytest.approx(most[:2])
    assert len(most) < 5


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize("between", [nn.Identity(), Half()])
def test_tinys_gains_are_squared_singular_values_where_old_weights_are_at_rest(
    between: nn.Module,
) -> None:
    model = chain(nn.Linear(8, 2), between, nn.Linear(2, 5))
    batches = batches_for(model, 8, sizes=(20, 10))
    at_rest(model, batches)
    grown = fxgrow.widen(model, "+3", init=fxgrow.Tiny(F.mse_loss, batches))
    strengths, gains = grown.init.strengths["0"], grown.init.gains["0"]
    assert len(gains) == 3
    assert list(gains) == pytest.approx([s**2 for s in strengths], rel=1e-9)
    before = mean_loss(model, batches).item()
    slope = (before - loss_at(grown, model, batches, 1e-6)) / 1e-6
    assert slope == pytest.approx(sum(gains), rel=1e-4)


def loss_at(grown: fxgrow.Grown, model: nn.Module, batches: Batches, amplitude: float) -> float:
    """Return the loss with the new channels at an amplitude."""
    step = apply_to_module(grown.plan, model, grown.init.scaled(amplitude))
    return mean_loss(step.eval(), batches).item()


def test_tiny_is_the_nearest_move_of_its_rank_on_a_linear_network() -> None:
    model = chain(nn.Linear(6, 2), nn.Linear(2, 5))
    ((x, y),) = batches_for(model, 6, sizes=(30,))
    at_rest(model, [(x, y)])
    grown = fxgrow.widen(model, "+2", init=fxgrow.Tiny(F.mse_loss, [(x, y)]))
    with torch.no_grad():
        move = (grown.model(x) - model(x)) / grown.init.amplitude
        wanted = 2 * (y - model(x)) / 5  # minus the gradient of each sample's own loss
        inputs = torch.cat([x, x.new_ones(30, 1)], dim=1)
        reachable = inputs @ torch.linalg.lstsq(inputs, wanted).solution
        left, values, right = torch.linalg.svd(reachable, full_matrices=False)
    nearest = left[:, :2] * values[:2] @ right[:2]
    assert torch.allclose(move, nearest, atol=1e-9)
    found = grown.init.strengths["0"]
    assert list(found) == pytest.approx((values[:2] / 30**0.5).tolist(), rel=1e-9)


def test_tiny_adds_nothing_that_old_weights_can_do() -> None:
    model = chain(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3))
    with pytest.raises(PlanError, match="old weights can do what the loss asks for"):
        fxgrow.widen(model, "2x", init=fxgrow.Tiny(F.mse_loss, batches_for(model, 4)))


def test_turning_signs_makes_a_relu_gain_more() -> None:
    """Of ω·σ(a·x) and −ω·σ(−a·x) the linear part is the same, but not what |x| does."""
    model = chain(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1), seed=1)
    batches = batches_for(model, 3)
    grown = fxgrow.widen(model, "+1", init=fxgrow.Tiny(F.mse_loss, batches))
    rows, columns = (
        {name: -tensor for name, tensor in tensors.items()}
        for tensors in (grown.init.rows, grown.init.columns)
    )
    turned = replace(grown, init=replace(grown.init, rows=rows, columns=columns))
    losses = [loss_at(case, model, batches, 1e-3) for case in (grown, turned)]
    assert losses[0] < mean_loss(model, batches).item()
    assert losses[0] < losses[1] - 1e-6


def test_selection_comes_before_the_widths() -> None:
    model = perceptron(nn.Tanh())
    batches = batches_for(model, 6)
    everything = fxgrow.widen(model, "+3", init=fxgrow.GradMax(F.mse_loss, batches))
    assert [group.width for group in everything.plan.groups] == [(4, 7), (3, 6)]
    few = fxgrow.widen(model, "+3", init=fxgrow.GradMax(F.mse_loss, batches, keep=2))
    assert [group.width for group in few.plan.groups] == [(4, 6), (3, 5)]
    assert few.plan.groups[0].reason == "2 of 3 new channels: keep is 2"
    assert few.init.strengths["0"] == everything.init.strengths["0"][:2]
    strengths = everything.init.strengths
    strongest = max(max(values) for values in strengths.values())
    threshold = 0.3
    strong = {n: sum(s >= threshold * strongest for s in v) for n, v in strengths.items()}
    assert 0 < sum(strong.values()) < 6
    init = fxgrow.GradMax(F.mse_loss, batches, threshold=threshold)
    chosen = fxgrow.widen(model, "+3", init=init)
    grown = {group.name: group.width[1] - group.width[0] for group in chosen.plan.groups}
    assert grown == {name: count for name, count in strong.items() if count}


def test_a_group_without_strong_channels_is_refused() -> None:
    model = perceptron(nn.Tanh())
    with torch.no_grad():
        model[4].weight *= 1e-3  # what group 0 does hardly matters for the output
    init = fxgrow.GradMax(F.mse_loss, batches_for(model, 6), threshold=0.9)
    plan = fxgrow.widen(model, "2x", init=init).plan
    names = [group.name for group in plan.groups]
    assert len(names) == 1
    (refused,) = [r for r in plan.refused if r.name in ("0", "2")]
    assert refused.name not in names
    assert refused.reason == f"GradMax: {fxgrow.GradMax.nothing}"


@pytest.mark.parametrize("method", [fxgrow.GradMax, fxgrow.Tiny])
def test_no_more_channels_than_the_gradient_has_ranks(method: Callable[..., object]) -> None:
    model = chain(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3))
    init = method(F.mse_loss, batches_for(model, 9, sizes=(30,)))
    with pytest.warns(FxgrowWarning, match="0 gets [123] new channels instead of 8"):
        grown = fxgrow.widen(model, "3x", init=init)
    assert "the batches give no more" in grown.plan.groups[0].reason


def test_fewer_channels_are_still_multiples() -> None:
    model = chain(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 5))
    init = fxgrow.GradMax(F.mse_loss, batches_for(model, 9), keep=3)
    assert fxgrow.widen(model, "3x", init=init, multiple_of=2).plan.groups[0].width == (4, 6)
    with pytest.raises(PlanError, match=r"up to 3 directions .* no width that is a multiple of 12"):
        fxgrow.widen(model, "3x", init=init, multiple_of=12)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * F.silu(self.gate(x)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.down(torch.tanh(self.up(x)))
        return x


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x).chunk(2, -1)[0]))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.weight = nn.Linear(3, 8), nn.Parameter(torch.ones(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.up(x)), self.weight)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (
            chain(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)),
            (3,),
            "the norm 1 keeps no statistics",
        ),
        (
            chain(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)),
            (3,),
            "the norm 1 has no weight",
        ),
        (
            chain(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 3)),
            (3,),
            "native_group_norm at 1 lies between",
        ),
        (
            chain(nn.Linear(3, 4), nn.RMSNorm(4, elementwise_affine=False), nn.Linear(4, 3)),
            (3,),
            "mean at 1 lies between",
        ),
        (
            chain(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1)),
            (2, 6, 6),
            "native_batch_norm at 1 lies between",
        ),
        (chain(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3)), (3,), "makes 0.5 of zero"),
        (Gated(), (4,), r"2 layers write it \(up, gate\)"),
        (Twice(), (3,), "used more than once"),
        (Halved(), (3,), "not each one row of up and columns of down alone"),
        (Functional(), (3,), "no plain linear layer"),
        (
            chain(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1)),
            (2, 6, 6),
            "1 is a grouped convolution",
        ),
        (
            chain(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 3)),
            (3,),
            "0 is no plain linear layer",
        ),
    ],
)
@pytest.mark.parametrize("method", [fxgrow.GradMax, fxgrow.Tiny])
def test_groups_that_cannot_be_treated_are_refused_with_the_reason(
    method: Callable[..., object], model: nn.Module, shape: tuple[int, ...], reason: str
) -> None:
    model = model.double()
    batches = batches_for(model, *shape)
    with pytest.raises(PlanError, match=reason):
        fxgrow.widen(model, "2x", batches[0][0], init=method(F.mse_loss, batches))


def test_gradmax_tells_of_a_relu_that_would_never_learn() -> None:
    model = chain(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 7))
    batches = batches_for(model, 6)
    with pytest.raises(PlanError, match=r"slope 0 at 0.*give 0 a bias; or nn\.Threshold\(-1e-30"):
        fxgrow.widen(model, "2x", init=fxgrow.GradMax(F.mse_loss, batches))
    same = chain(nn.Linear(6, 4, bias=False), RELU, nn.Linear(4, 7))
    assert torch.equal(same(batches[0][0]), model(batches[0][0]))
    grown = fxgrow.widen(same, "+2", init=fxgrow.GradMax(F.mse_loss, batches))
    assert grown.report.verification.verdict == "preserved"
    before = gradient_norm(grown.model, grown.plan.groups[0], batches)
    assert before > 0


def test_a_group_that_cannot_be_treated_leaves_the_others_alone() -> None:
    model = chain(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    plan = fxgrow.widen(model, "+1", init=fxgrow.GradMax(F.mse_loss, batches_for(model, 3))).plan
    assert [group.name for group in plan.groups] == ["2"]
    assert plan.refused[0].name == "0"
    assert "native_group_norm at 1 lies between the layers" in plan.refused[0].reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "no batches"),
        ({"batches": [torch.ones(2, 6)]}, "a batch is a Tensor, no pair"),
        ({"loss_fn": None}, "is a NoneType, no function"),
        ({"keep": 0}, "at least 1, not 0"),
        ({"keep": 1.5}, r"at least 1, not 1\.5"),
        ({"threshold": -0.1}, "from 0 to 1"),
        ({"threshold": float("nan")}, "from 0 to 1"),
        ({"loss_fn": lambda out, y: out - y}, r"no scalar \(\(9, 7\)\)"),
        ({"loss_fn": lambda out, y: 1.0}, r"no scalar \(float\)"),
        ({"loss_fn": lambda out, y: (out * torch.nan).sum()}, "loss of batch 0 is nan"),
        ({"loss_fn": lambda out, y: out.detach().sum()}, "has no gradient"),
        ({"loss_fn": lambda out, y: out.sub(out.detach()).abs().sum().sqrt()}, "is not finite"),
        ({"loss_fn": lambda out, y: (out * 0).sum()}, "can grow none of the groups"),
    ],
)
@pytest.mark.parametrize("method", [fxgrow.GradMax, fxgrow.Tiny])
def test_bad_input_is_refused(
    method: Callable[..., object], arguments: dict[str, object], message: str
) -> None:
    model = perceptron(nn.Tanh())
    whole = {"loss_fn": F.mse_loss, "batches": batches_for(model, 6)} | arguments
    with pytest.raises(PlanError, match=message):
        fxgrow.widen(model, "2x", init=method(**whole))


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (fxgrow.GradMax, {"pairing": "replicate"}, "'replicate' copies old channels"),
        (fxgrow.Tiny, {"pairing": "copy_pair"}, "'copy_pair' copies old channels"),
        (fxgrow.Tiny, {"pairing": "replicate_random"}, "'replicate_random' copies old channels"),
        (fxgrow.Tiny, {"preset": "net2wider"}, "'replicate' copies old channels"),
        (fxgrow.GradMax, {"pairing": "v_zero"}, "GradMax cannot be laid out so: its new rows are"),
        (fxgrow.GradMax, {"preset": "random"}, "GradMax cannot be laid out so: its new rows are"),
        (fxgrow.Tiny, {"pairing": "vv_znegz"}, "there is no pairing 'vv_znegz'"),
        (fxgrow.Tiny, {"pairing": "vv_z_negz"}, "makes 2 channels, and 1 is asked for"),
        (fxgrow.Tiny, {"strict": True}, "would not be preserved: Tiny"),
    ],
)
def test_what_goes_with_no_data_is_refused(
    method: Callable[..., object], arguments: dict[str, object], message: str
) -> None:
    model = perceptron(nn.Tanh())
    init = method(F.mse_loss, batches_for(model, 6))
    with pytest.raises((PlanError, NotPreservedError), match=message):
        fxgrow.widen(model, "+1", init=init, **arguments)


def test_a_plan_is_carried_out_with_the_init_it_was_made_with() -> None:
    model = perceptron(nn.Tanh())
    init = fxgrow.GradMax(F.mse_loss, batches_for(model, 6))
    with pytest.raises(PlanError, match="has not been given a network"):
        init.for_place(Place("0.weight", "writer0"), None)
    plan = api.plan(model, "+1", init=init)
    again = fxgrow.Plan.from_json(plan.to_json())
    assert again == plan
    with pytest.raises(PlanError, match=r"come from data \(GradMax\), and a plan holds none"):
        again.apply(model)
    grown = api.carry_out(again, model, init=init)
    assert grown.report.verification.verdict == "preserved"
    later = apply_to_module(again, model, grown.init)
    for one, other in zip(grown.model.parameters(), later.parameters(), strict=True):
        assert torch.equal(one, other)
    api.plan(model, "+2", init=init)
    with pytest.raises(PlanError, match="no new weights for this plan"):
        api.carry_out(plan, model, init=init)
    with pytest.raises(PlanError, match=r"no new weights of 2\.weight were computed"):
        apply_to_module(api.plan(model, "+2", init=init), model, grown.init)


@pytest.mark.parametrize("pairing", [None, "vv_z_negz"])
@pytest.mark.parametrize("method", [fxgrow.GradMax, fxgrow.Tiny])
def test_a_plan_is_carried_out_with_the_same_data_again(
    method: Callable[..., object], pairing: str | None
) -> None:
    model = perceptron(nn.Tanh())
    batches = batches_for(model, 6)
    grown = fxgrow.widen(model, "+2", pairing=pairing, init=method(F.mse_loss, batches))
    plan = fxgrow.Plan.from_json(grown.plan.to_json())
    later = plan.apply(model, init=method(F.mse_loss, batches))
    for one, other in zip(grown.model.parameters(), later.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(PlanError, match="other channels than the plan makes room for"):
        plan.apply(model, init=method(F.mse_loss, batches, keep=1, threshold=1.0))


@pytest.mark.parametrize("method", [fxgrow.GradMax, fxgrow.Tiny])
def test_a_plan_takes_no_other_init_than_it_was_made_with(method: Callable[..., object]) -> None:
    """Its room is for what was computed: what draws would give a function that it does not tell."""
    model = perceptron(nn.Tanh())
    batches = batches_for(model, 6)
    grown = fxgrow.widen(model, "+2", init=method(F.mse_loss, batches), verify=False)
    plan = fxgrow.Plan.from_json(grown.plan.to_json())
    plan.apply(model, init=grown.init)
    for given in (
        {"init": "kaiming"},
        {"init": {"0": "zeros", "*": "kaiming"}},
        {"output_init": "zeros", "input_init": "kaiming"},
        {"init": method(F.mse_loss, batches), "input_init": "kaiming"},
    ):
        with pytest.raises(PlanError, match=rf"come from data \({method.__name__}\)"):
            plan.apply(model, **given)
    for other in {fxgrow.GradMax, fxgrow.Tiny} - {method}:
        with pytest.raises(PlanError, match=f"not made with {other.__name__}: .* those of"):
            plan.apply(model, init=other(F.mse_loss, batches))
    drawn = fxgrow.widen(model, "+2", verify=False, init={"0": "zeros"}).plan
    with pytest.raises(PlanError, match=rf"not made with {method.__name__}: .* those of zeros"):
        drawn.apply(model, init=method(F.mse_loss, batches))


def test_a_name_gives_no_data() -> None:
    with pytest.raises(PlanError, match="needs data"):
        fxgrow.widen(perceptron(nn.Tanh()), "2x", init="fxgrow.grow.data:GradMax")
    init = fxgrow.GradMax(F.mse_loss, [(torch.ones(1), torch.ones(1))])
    with pytest.raises(PlanError, match="by name only"):
        init(torch.ones(1), None, 1)


def test_a_data_driven_step_follows_another() -> None:
    model = perceptron(nn.Tanh())
    first = api.plan(model, {"0": "+2"})
    batches = batches_for(model, 6)
    init = fxgrow.GradMax(F.mse_loss, batches)
    grown = fxgrow.widen(model, {"2": "+2"}, init=init, after=first)
    assert grown.report.verification.verdict == "preserved"
    assert grown.model[2].weight.shape == (5, 6)
    mean_loss(grown.model, batches).backward()
    norms = grown.model[2].weight.grad[3:].norm(dim=1)
    assert norms.tolist() == pytest.approx(grown.init.strengths["2"])


@pytest.mark.parametrize("method", [fxgrow.GradMax, fxgrow.Tiny])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_lower_precision_works_alike(
    method: Callable[..., object], dtype: torch.dtype, rounding: float
) -> None:
    model = perceptron(nn.Tanh())
    batches = batches_for(model, 6)
    exact = fxgrow.widen(model, "+1", init=method(F.mse_loss, batches))
    lower = [(x.to(dtype), y.to(dtype)) for x, y in batches]
    rounded = fxgrow.widen(copy.deepcopy(model).to(dtype), "+1", init=method(F.mse_loss, lower))
    assert {p.dtype for p in rounded.model.parameters()} == {dtype}
    for name, strengths in exact.init.strengths.items():
        assert rounded.init.strengths[name] == pytest.approx(strengths, rel=rounding)


def test_the_network_is_only_read() -> None:
    model = chain(
        nn.Linear(6, 2),
        nn.Tanh(),
        nn.Linear(2, 5),
        nn.BatchNorm1d(5),
        nn.Dropout(),
        nn.Linear(5, 3),
    ).train()
    batches = batches_for(model, 6)
    before = copy.deepcopy(model.state_dict())
    for method in (fxgrow.GradMax, fxgrow.Tiny):
        grown = fxgrow.widen(model, "+1", include=["0"], init=method(F.mse_loss, iter(batches)))
        assert grown.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_inputs_may_be_keywords() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(first * second)))

    inputs = {"first": torch.randn(5, 3), "second": torch.randn(5, 3)}
    init = fxgrow.GradMax(lambda out, target: out.square().mean(), [(inputs, None)])
    assert fxgrow.widen(Named(), "+1", inputs, init=init).plan.groups[0].width == (4, 5)


def test_the_auxiliary_layer_is_exact_at_borders() -> None:
    writer = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    reader = nn.Conv2d(3, 4, 2, padding=1, padding_mode="circular").double()
    x = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        writer.bias.zero_()
    z = reader(writer(x))
    gradient = torch.randn_like(z)
    matrix = correlation(reader, patches(writer, x), gradient)
    z.backward(gradient)
    # ∂L/∂row of the writer is the correlation applied to the reader's columns
    found = torch.einsum("oihw,ochw->ci", matrix, reader.weight.detach()).reshape(3, 2, 3, 3)
    assert torch.allclose(found, writer.weight.grad)


class Reordered(nn.Module):
    """Two linear layers over as many tokens as there are samples, with a movement between."""

    def __init__(self, movement: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.movement = movement

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.movement(self.first(x))))


@pytest.mark.parametrize(
    "movement",
    [
        lambda x: x.flatten(0, 1).clone().unflatten(0, (5, 5)),
        lambda x: x.transpose(0, 1),
        lambda x: x.flip(0),
        lambda x: x.roll(1, 1).mean(0, keepdim=True).repeat(5, 1, 1),
    ],
)
def test_numbers_may_be_viewed_otherwise_between_the_layers_and_reordered(
    movement: Callable[[Tensor], Tensor],
) -> None:
    inputs = torch.randn(5, 5, 3, dtype=torch.float64)
    batches = [(inputs, torch.randn(5, 5, 2, dtype=torch.float64))]
    model = Reordered(movement).double()
    grown = fxgrow.widen(model, "+1", inputs, init=fxgrow.GradMax(F.mse_loss, batches))
    assert grown.report.verification.verdict == "preserved"
    found = gradient_norm(grown.model, grown.plan.groups[0], batches)
    (strength,) = grown.init.strengths["first"]
    assert found == pytest.approx(strength, rel=1e-9)
