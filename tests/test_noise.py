"""Forwards that draw numbers: the same ones in both networks, or channels that keep their width."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.labels.pins import PinKind
from fxgrow.modules.draws import RunDraws, law_of, same_chance
from fxgrow.modules.expectation import Expectation
from fxgrow.verification.exact import Exact
from fxgrow.verification.weights import drawn

# Few of the networks here use the layer for deviations.
pytestmark = pytest.mark.filterwarnings("ignore:v takes no part in the run")

Between = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """A hidden layer of twelve, a narrow one of three, and one of twelve, with noise somewhere."""

    def __init__(self, forward: Between) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.m, self.v = nn.Linear(8, 12), nn.Linear(12, 3), nn.Linear(12, 3)
        self.d, self.o = nn.Linear(3, 12), nn.Linear(12, 8)
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.e(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.o(torch.tanh(self.d(z)))


def sampled(draw: Callable[[Tensor, Tensor], Tensor]) -> Between:
    """Return a forward that draws its code by mean and deviation, and returns all three."""

    def forward(net: Net, x: Tensor) -> Any:
        h = net.encode(x)
        mean, deviation = net.m(h), (0.5 * net.v(h)).exp()
        return net.decode(draw(mean, deviation)), mean, deviation

    return forward


def hidden(change: Callable[[Tensor], Tensor], *, training: bool = True) -> Between:
    """Return a forward that changes its first hidden layer, in train mode alone or in both."""

    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.encode(x)
        h = change(h) if net.training or not training else h
        return net.decode(net.m(h))

    return forward


def mixed(net: Net, x: Tensor) -> Tensor:
    """Mix samples with one another, as mixup does."""
    h = net.encode(x)
    if net.training:
        share = np.random.beta(0.3, 0.3)
        h = share * h + (1 - share) * h[torch.randperm(len(h))]
    return net.decode(net.m(h))


def diffused(net: Net, x: Tensor) -> Any:
    """Return the loss of a denoiser at random times."""
    noise, times = torch.randn_like(x), torch.randint(0, 100, (len(x),))
    kept = torch.linspace(0.99, 0.01, 100)[times][:, None]
    return F.mse_loss(net.decode(net.m(net.encode(kept.sqrt() * x + (1 - kept).sqrt() * noise))), x)


def gumbel(net: Net, x: Tensor) -> Any:
    logits = net.m(net.encode(x))
    return net.decode(F.gumbel_softmax(logits)), logits


def skipped(net: Net, x: Tensor) -> Tensor:
    """Leave a factor out, by a number that no operation of torch shows."""
    h = net.encode(x)
    return net.decode(net.m(h if net.training and random.random() < 0.5 else 1.5 * h))


def generated(mean: Tensor, deviation: Tensor) -> Tensor:
    own = torch.Generator().manual_seed(3)
    return mean + deviation * torch.randn(mean.shape, generator=own, dtype=mean.dtype)


SAME: dict[str, Between] = {
    "randn_like": sampled(lambda m, s: m + torch.randn_like(s) * s),
    "randn": sampled(lambda m, s: m + torch.randn(m.shape) * s),
    "normal_": sampled(lambda m, s: m + s.new_empty(s.size()).normal_() * s),
    "normal": sampled(torch.normal),
    "generator": sampled(generated),
    "distribution": sampled(lambda m, s: torch.distributions.Normal(m, s, False).rsample()),
    "of the input": lambda net, x: net.decode(net.m(net.encode(x + 0.1 * torch.randn_like(x)))),
    "of the output": lambda net, x: (y := net.decode(net.m(net.encode(x)))) + torch.randn_like(y),
    "gumbel": gumbel,
    "mixup": mixed,
    "diffusion": diffused,
    "random": skipped,
    "poisson": lambda net, x: net.decode(net.m(net.encode(torch.poisson(x.abs())))),
}  # fmt: skip

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, *, training: bool) -> list[Tensor]:
    """Return what a copy of a network returns in float64, by one seed."""
    copied = copy.deepcopy(model).double().train(training)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    found = copied(X.double())
    return list(found) if isinstance(found, tuple) else [found]


def difference(before: nn.Module, after: nn.Module, *, training: bool) -> float:
    pairs = zip(outputs(before, training=training), outputs(after, training=training), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def widths(grown: fxgrow.Grown) -> dict[str, tuple[int, int]]:
    """Return the widths of the groups that grew."""
    return {g["name"]: tuple(g["width"]) for g in grown.report.to_dict()["groups"]}


@pytest.mark.parametrize("name", SAME)
def test_noise_on_channels_that_stay_is_the_same_in_both_networks(name: str) -> None:
    net = Net(SAME[name]).eval()
    grown = fxgrow.widen(net, "2x", X, include=("e", "d"))
    assert grown.report.verification.verdict == "preserved"
    assert grown.report.verification.train.float64.max_rel < 1e-12
    assert widths(grown) == {"e": (12, 24), "d": (12, 24)}
    for training in (False, True):
        assert difference(net, grown.model, training=training) < 1e-12


PINNED: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": lambda h: h + 0.1 * torch.randn_like(h),
    "randn": lambda h: h + 0.1 * torch.randn(h.shape, dtype=h.dtype),
    "randn of sizes": lambda h: h * (1 + 0.2 * torch.randn(*h.size()).to(h)),
    "normal_": lambda h: h + torch.empty_like(h).normal_(0, 0.1),
    "new normal_": lambda h: h + h.new_zeros(h.shape).normal_(0, 0.1),
    "normal": lambda h: torch.normal(h, 0.1),
    "exponential_": lambda h: h + torch.empty_like(h).exponential_(),
    "of a distribution": lambda h: h + torch.distributions.Normal(0.0, 0.1).sample(h.shape),
    "checked arguments": lambda h: torch.distributions.Normal(h, h.exp()).rsample(),
    "gaussian dropout": lambda h: h * torch.randn_like(h).mul(0.1).add(1),
    "threshold": lambda h: h * (torch.randn_like(h) > 0),
    "rand_like, added": lambda h: h + (torch.rand_like(h) - 0.5),
    "uniform_, added": lambda h: h + torch.empty_like(h).uniform_(-0.5, 0.5),
    "rand, added": lambda h: h + 0.1 * torch.rand(h.shape),
    "bits": lambda h: torch.bernoulli(h.sigmoid()),
    "bits, in place": lambda h: h * torch.empty_like(h).bernoulli_(h.sigmoid()),
    "bits by comparison": lambda h: (torch.rand_like(h) < h.sigmoid()).to(h),
    "bits by comparison the other way": lambda h: h * (h.sigmoid() > torch.rand(h.shape)),
    "bits past the gradient": lambda h: h + (torch.bernoulli(h.sigmoid()) - h).detach(),
    "bits of a distribution": lambda h: torch.distributions.Bernoulli(None, h, False).sample(),
    "signs": lambda h: torch.where(torch.rand_like(h) < 0.4, -h, h),
    "signs by numbers": lambda h: h * (2.0 * (torch.rand_like(h) < 0.4) - 1),
    "signs of bernoulli": lambda h: h * (1 - 2 * torch.empty_like(h).bernoulli_(0.4)),
    "signs by sign": lambda h: h * (torch.rand_like(h) - 0.4).sign(),
    "signs by where": lambda h: h * torch.where(torch.rand_like(h) < 0.4, -1.0, 1.0),
    "mask, added": lambda h: h + (torch.rand_like(h) < 0.5),
    "mask, subtracted": lambda h: h - 0.3 * (torch.rand(h.shape) < 0.5),
    "factor": lambda h: h * torch.rand_like(h),
    "wide factor": lambda h: h * (1 + 4 * (torch.rand_like(h) - 0.5)),
    "maximum": lambda h: torch.maximum(h, torch.rand_like(h)),
    "logarithm": lambda h: h * torch.rand_like(h).log(),
    "logarithm of rand": lambda h: h - (-torch.rand(h.shape).clamp(1e-6, 0.9).log()).log(),
    "square root": lambda h: h * torch.rand(h.shape).sqrt(),
    "power of a mask": lambda h: h * (0.5 + torch.bernoulli(torch.full_like(h, 0.5))),
    "other samples": lambda h: torch.where(torch.rand_like(h) < 0.3, h.roll(1, 0), h),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PINNED)
def test_channels_for_each_of_which_noise_is_drawn_keep_their_width(
    name: str, training: bool
) -> None:
    net = Net(hidden(PINNED[name], training=training)).eval()
    (group,) = (g for g in fxgrow.inspect(net, X).parts[0].groups if g.name == "e")
    assert group.pin.kind is PinKind.NOISE
    grown = fxgrow.widen(net, "2x", X)
    assert widths(grown) == {"m": (3, 6), "d": (12, 24)}
    assert grown.report.verification.verdict == "preserved"


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": lambda h: h * (torch.rand_like(h) > 0.3) / 0.7,
    "rand": lambda h: h * (torch.rand(h.shape) > 0.3) / 0.7,
    "uniform_": lambda h: h * (torch.empty_like(h).uniform_() > 0.3) / 0.7,
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.7)) / 0.7,
    "bernoulli_": lambda h: h * h.new_empty(h.shape).bernoulli_(0.7) / 0.7,
    "of samples": lambda h: h * (0.8 + torch.rand(len(h), 1, dtype=h.dtype)).floor_() / 0.8,
    "dropout": lambda h: F.dropout(h, 0.4, training=True),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.4, training=True),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "filled": lambda h: h.masked_fill(torch.rand_like(h) < 0.3, 0) / 0.7,
    "where": lambda h: torch.where(torch.rand_like(h) < 0.3, 0.0, h) / 0.7,
    "where the other way": lambda h: torch.where(torch.rand(h.shape) > 0.3, h, torch.zeros_like(h)),
    "scaled mask": lambda h: h * ((torch.rand_like(h) > 0.3).to(h) / 0.7),
    "numbers by where": lambda h: h * torch.where(torch.rand_like(h) < 0.3, 0.0, 1 / 0.7),
    "filled ones": lambda h: h * torch.ones_like(h).masked_fill(torch.rand_like(h) < 0.3, 0) / 0.7,
    "less than ones": lambda h: h * (torch.ones_like(h) - (torch.rand_like(h) < 0.3).float()) / 0.7,
    "less than one": lambda h: h * (1 - (torch.rand_like(h) < 0.3).float()) / 0.7,
    "not": lambda h: h * ~(torch.rand_like(h) < 0.3) / 0.7,
    "bernoulli of ones": lambda h: h * torch.bernoulli(torch.ones_like(h) * 0.7) / 0.7,
    "bernoulli of new_full": lambda h: h * h.new_full(h.shape, 0.7).bernoulli() / 0.7,
    "binary distribution": lambda h: h * torch.distributions.Bernoulli(0.7).sample(h.shape) / 0.7,
    "two masks": lambda h: h * (torch.rand_like(h) > 0.3) * (torch.rand(len(h), 1) > 0.1) / 0.63,
    "factors around one": lambda h: h * torch.empty_like(h).uniform_(0.99, 1.01),
    "own alpha dropout": lambda h: 1.1 * (h * (m := (torch.rand_like(h) > 0.3)) - 1.7 * ~m) + 0.1,
    "bits of positions": lambda h: h * torch.bernoulli(h.mean(1, keepdim=True).sigmoid()),
    "signs of positions": lambda h: torch.where(torch.rand(len(h), 1) < 0.4, -h, h),
    "noise of positions": lambda h: h + torch.randn(len(h), 1, dtype=h.dtype),
    "noise of one channel's shape": lambda h: h + 0.1 * torch.randn_like(h[:, :1]),
    "mask of one channel's shape": lambda h: h * (torch.rand_like(h[:, -1:]) > 0.3) / 0.7,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks_and_noise_that_channels_share_let_them_grow(name: str, training: bool) -> None:
    grown = fxgrow.widen(Net(hidden(MASKS[name], training=training)).eval(), "2x", X)
    assert widths(grown)["e"] == (12, 24)
    assert grown.report.verification.verdict == "preserved"


def test_what_train_mode_alone_returns_keeps_its_width() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        h = net.encode(x)
        return (net.decode(net.m(h)), h) if net.training else net.decode(net.m(h))

    grown = fxgrow.widen(Net(forward).eval(), "2x", X)
    assert widths(grown) == {"m": (3, 6), "d": (12, 24)}


def test_a_training_step_after_growth_has_the_loss_that_it_had() -> None:
    net = Net(SAME["randn_like"]).eval()
    losses = []
    for model in (net, fxgrow.widen(net, "2x", X).model):
        copied = copy.deepcopy(model).double().train()
        optimizer = torch.optim.SGD(copied.parameters(), 0.1)
        torch.manual_seed(7)
        loss = sum(y.square().mean() for y in copied(X.double()))
        loss.backward()
        optimizer.step()
        assert all(bool(p.isfinite().all()) and p.grad is not None for p in copied.parameters())
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


class Noise(nn.Module):
    """Noise in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class Injection(nn.Module):
    """Noise of the positions of an image, by a weight for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * torch.randn(len(x), 1, *x.shape[2:], dtype=x.dtype)


def test_noise_of_positions_with_a_weight_for_each_channel_lets_them_grow(tmp_path: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Injection(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    grown = fxgrow.widen(net, "2x", torch.randn(2, 3, 6, 6))
    assert (widths(grown), grown.report.verification.verdict) == ({"0": (4, 8)}, "preserved")
    fxgrow.save(grown, tmp_path / "grown.pt")
    read = torch.load(tmp_path / "grown.pt", weights_only=False)
    x = torch.randn(2, 3, 6, 6)
    found = []
    for model in (grown.model, read):
        torch.manual_seed(0)
        found.append(model(x))
    assert torch.equal(*found)


def test_a_difference_in_noise_is_found() -> None:
    nets = []
    for factor in (0.1, 0.1001):
        torch.manual_seed(0)
        nets.append(Net(hidden(lambda h, factor=factor: h + factor * torch.randn_like(h))).eval())
    assert fxgrow.verify(nets[0], nets[0], X).verdict == "preserved"
    assert fxgrow.verify(*nets, X).verdict == "failed"


def test_networks_with_noise_are_deepened_converted_and_given_larger_kernels() -> None:
    def net(width: int) -> nn.Module:
        convolutions = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, width, 3, padding=1)
        return nn.Sequential(
            Noise(), convolutions[0], nn.ReLU(), Noise(), convolutions[1], nn.ReLU(),
            nn.Conv2d(width, 2, 1),
        ).eval()  # fmt: skip

    x = torch.randn(2, 3, 6, 6)
    for grown in (
        fxgrow.morph_kernel(net(5), "5", x), fxgrow.convert(net(5), net(8), x),
    ):  # fmt: skip
        assert grown.report.verification.verdict == "preserved"


class Block(nn.Module):
    """A residual block with noise inside, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.noise = Noise()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.noise(F.relu(self.a(x))))


@pytest.mark.parametrize("method", ["r2deeper", "zero_last"])
def test_a_new_block_does_not_cancel_channels_that_noise_joins(method: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Block(), Block()), nn.Conv2d(4, 2, 1))
    grown = fxgrow.deepen(net.eval(), {"1": "+1"}, torch.randn(2, 3, 4, 4), method)
    assert grown.report.verification.verdict == "preserved"
    assert grown.report.verification.train.float64.max_rel < 1e-12


def kept(change: Callable[[Tensor], Tensor]) -> Between:
    """Return a forward with a residual branch that is left out by chance, as ``change`` does it."""

    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.encode(x)
        h = h.sin() if h.shape[1] > 12 else h.tanh()
        return x + change(net.decode(net.m(h)))

    return forward


def chance(h: Tensor) -> Tensor:
    return torch.rand(len(h), 1, dtype=h.dtype)


def rows(h: Tensor) -> Tensor:
    chosen = (chance(h)[:, 0] < 0.4).nonzero()[:, 0]
    return torch.zeros_like(h).index_add(0, chosen, h[chosen])


BRANCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "rand < keep": lambda h: h * (chance(h) < 0.3) / 0.3,
    "rand > drop": lambda h: h * (chance(h) > 0.7) / 0.3,
    "where": lambda h: torch.where(chance(h) < 0.3, h / 0.3, 0.0),
    "masked_fill": lambda h: h.masked_fill(chance(h) < 0.7, 0.0),
    "floor": lambda h: h * (0.3 + chance(h)).floor(),
    "uniform_": lambda h: h * (h.new_empty(len(h), 1).uniform_(-1, 1) > 0.4),
    "bernoulli": lambda h: torch.where(chance(h).bernoulli_(0.7).bool(), 0.0, h),
    "item": lambda h: 0 * h if torch.rand(1).item() < 0.7 else h,
    "python": lambda h: 0 * h if random.random() > 0.2 else h,
    "numpy": lambda h: 0 * h if np.random.rand() > 0.3 else h,
    "rows": rows,
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHES)
def test_both_sides_of_a_random_branch_are_judged(name: str) -> None:
    net = Net(kept(BRANCHES[name])).eval()
    with pytest.raises(fxgrow.VerificationError):  # of another width it is another function
        fxgrow.widen(net, {"e": "2x"}, X)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.m.weight += 0.5
    assert fxgrow.verify(net, other, X).verdict == "failed"
    grown = fxgrow.widen(net, {"d": "2x"}, X)
    assert grown.report.verification.verdict == "preserved"


# ── draws by themselves ───────────────────────────────────────────────────────────────────────


def test_a_draw_depends_on_its_place_and_its_sizes_alone() -> None:
    def run(dtype: torch.dtype, *, more: bool) -> list[Tensor]:
        with Expectation():
            if more:
                torch.randn(5, 5)
            x = torch.zeros(20, 3, dtype=dtype)
            own = torch.Generator().manual_seed(int(more))
            drawn = [
                torch.randn_like(x), torch.randn(20, 3, dtype=dtype, generator=own),
                x.clone().normal_(), torch.empty_like(x).exponential_(), torch.normal(x, 2.0),
            ]  # fmt: skip
            return [*drawn, torch.randperm(9), torch.randint(0, 50, (9,))]

    wide, narrow = run(torch.float64, more=False), run(torch.float32, more=True)
    assert all(
        torch.allclose(a.double(), b.double(), rtol=1e-6) for a, b in zip(wide, narrow, strict=True)
    )
    assert [t.dtype for t in narrow] == [torch.float32] * 5 + [torch.int64] * 2
    assert 0.8 < float(wide[0].std()) < 1.2
    with Expectation():
        assert not torch.equal(torch.randn(9), torch.randn(9))


def test_draws_leave_generators_where_they_were() -> None:
    own = torch.Generator().manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = own.get_state()
    with same_chance(), Expectation():
        torch.randn(3, generator=own)
        torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(first, own.get_state())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_growth_leaves_the_callers_generators_where_they_were() -> None:
    net = Net(SAME["diffusion"]).eval()
    before = torch.get_rng_state(), random.getstate()
    fxgrow.widen(net, "2x", X, where="all")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_weights_that_are_drawn_when_a_forward_asks_for_them_are_those_that_were_meant() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    weights = drawn(net)
    exact = Exact(net, weights)
    with torch.no_grad(), Expectation(exact=True):
        found = exact.module(torch.eye(3, dtype=torch.float64))
    by_hand = torch.eye(3, dtype=torch.float64)
    for layer in ("0", "1"):
        by_hand = F.linear(by_hand, weights(f"{layer}.weight"), weights(f"{layer}.bias"))
    assert torch.allclose(found, by_hand, rtol=1e-14)
    assert len(found.unique()) == found.numel()


def test_draws_into_a_view_reach_what_it_shows() -> None:
    x = torch.zeros(4, 6)
    drawn = RunDraws().draw(torch.ops.aten.normal_.default, (x[:, :3],), {})
    assert torch.equal(x[:, :3], drawn)
    assert bool((x[:, :3] != 0).all())
    assert not bool(x[:, 3:].any())


@pytest.mark.parametrize(
    ("operation", "law"),
    [
        ("randn_like", "noise"), ("normal_", "noise"), ("randperm", "noise"), ("poisson", "noise"),
        ("rand", "mask"), ("bernoulli_", "mask"), ("uniform_", "mask"), ("relu", ""),
        ("_scaled_dot_product_flash_attention_for_cpu", ""),
    ],
)  # fmt: skip
def test_operations_tell_how_they_draw(operation: str, law: str) -> None:
    packet = getattr(torch.ops.aten, operation)
    assert law_of(getattr(packet, packet.overloads()[0])) == law
