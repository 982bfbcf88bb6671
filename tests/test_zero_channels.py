"""New channels that are written as zeros, and copies of old ones that chance picks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import max_rel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.errors import PlanError
from fxgrow.plan.pairing import replicate_random


def pair(*between: nn.Module) -> nn.Module:
    """Return linear → what is between → linear, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *between, nn.Linear(8, 3)).double()


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def widened_by_zeros(
    model: nn.Module, x: Tensor, width: str = "+5", where: str = "hidden"
) -> nn.Module:
    """Widen by channels of zeros and assert that the function is kept and everything learns."""
    grown = fxgrow.widen(model, width, x, pairing="zero_z", where=where)  # type: ignore[arg-type]
    verification = grown.report.verification
    assert (grown.plan.preserves, verification.verdict) == ("exact", "preserved")
    assert verification.without_gradient == ()
    again = fxgrow.Plan.from_json(grown.plan.to_json()).apply(model)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[n]) for n, tensor in grown.model.state_dict().items())
    return grown.model


@pytest.mark.parametrize(
    "activation",
    [nn.GELU, nn.Tanh, nn.SiLU, nn.Hardswish, nn.ELU, nn.LeakyReLU, nn.Mish, nn.PReLU,
     lambda: nn.PReLU(8), lambda: nn.SiLU(inplace=True), nn.Dropout],
)  # fmt: skip
def test_zeros_stay_zero_where_an_activation_keeps_them(activation: Callable[[], nn.Module]):
    model = pair(activation())
    grown = widened_by_zeros(model, data(7, 4))
    assert not grown[0].weight[8:].any()
    assert not grown[0].bias[8:].any()
    assert grown[2].weight[:, 8:].abs().min() > 0
    assert torch.equal(grown[0].weight[:8], model[0].weight)
    assert torch.equal(grown[2].weight[:, :8], model[2].weight)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (nn.Sigmoid(), "sigmoid at 1 makes 0.5 of a channel of zeros"),
        (nn.Softplus(), r"softplus at 1 makes 0.693147 of a channel of zeros"),
        (nn.ReLU(), "new channels of 0 would stay zero: relu at 1 has no slope at zero"),
        (nn.Hardshrink(), "hardshrink at 1 has no slope at zero"),
        (nn.BatchNorm1d(8), r"the norm 1 divides its channels .* by 316\. Choose another pairing"),
    ],
)
def test_what_does_not_keep_zeros_is_refused_with_the_reason(activation: nn.Module, reason: str):
    with pytest.raises(PlanError, match=reason):
        fxgrow.widen(pair(activation), "2x", data(7, 4), pairing="zero_z")


def test_the_reasons_are_true() -> None:
    zeros = torch.zeros(64, 1, dtype=torch.float64, requires_grad=True)
    sent = data(64, 1)
    norm = nn.BatchNorm1d(1).double()
    (back,) = torch.autograd.grad(norm(zeros), zeros, sent)
    assert torch.allclose(back, (sent - sent.mean()) * 1e-5**-0.5)
    (back,) = torch.autograd.grad(F.relu(zeros), zeros, sent)
    assert not back.any()
    both = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (back,) = torch.autograd.grad(both[0] * both[1], both)
    assert not back.any()


class Gated(nn.Module):
    """Two linear layers, multiplied in some way, and a reader."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.activation = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.activation(self.gate(x)))


def test_a_gate_may_be_anything_but_zero() -> None:
    torch.manual_seed(0)
    widened_by_zeros(Gated(torch.sigmoid).double(), data(7, 4))
    with pytest.raises(PlanError, match="multiplies channels of zeros by one another"):
        fxgrow.widen(Gated(F.silu).double(), "2x", data(7, 4), pairing="zero_z")


class Handmade(nn.Module):
    """An activation without a name: swish, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def test_an_activation_is_told_by_what_it_does() -> None:
    widened_by_zeros(pair(Handmade()), data(7, 4))


def test_kernels_and_pooling_on_the_way() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3, groups=8), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 1, groups=4), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3),
    ).double()  # fmt: skip
    grown = widened_by_zeros(model, data(2, 3, 8, 8), "2x")
    assert grown[2].weight.abs().min() > 0  # a kernel of zeros would let no gradient through
    for layer in (0, 2, 5):
        assert int((grown[layer].bias == 0).sum()) == 8
    rows = grown[5].weight[grown[5].bias != 0]
    assert rows.shape == (8, 4, 1, 1)
    assert rows.abs().min() > 0


class Residual(nn.Module):
    """A stream that a linear head reads, with a branch behind an activation."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.stem, self.branch = nn.Linear(4, 6), nn.Linear(6, 6)
        self.end, self.head = end, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.end(x + self.branch(F.relu(x))))


def test_one_way_for_the_gradient_is_enough() -> None:
    torch.manual_seed(0)
    widened_by_zeros(Residual(nn.Identity()).double(), data(7, 4), where="stream")
    with pytest.raises(PlanError, match="new channels of branch would stay zero: relu at"):
        fxgrow.widen(
            Residual(nn.ReLU()).double(), "2x", data(7, 4), pairing="zero_z", where="stream"
        )


def test_heads_of_zeros_never_learn() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = model, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    with pytest.raises(PlanError, match="bmm at attention multiplies channels of zeros"):
        fxgrow.widen(
            Attention().double(), "2x", data(2, 5, 8), pairing="zero_z", include=["attention"]
        )


@given(st.integers(1, 40), st.integers(1, 9), st.text(max_size=3))
def test_random_copies_are_of_old_channels_and_repeat_themselves(
    count: int, old: int, seed: str
) -> None:
    layout = replicate_random(count, old, seed)
    assert len(layout.copies) == count
    assert set(layout.copies) <= set(range(old))
    assert layout == replicate_random(count, old, seed)


def test_each_group_draws_its_own_copies_from_the_seed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()

    def copies(seed: int, layer: int) -> list[int]:
        grown = fxgrow.widen(model, "2x", data(7, 4), pairing="replicate_random", seed=seed)
        assert grown.report.verification.verdict == "preserved"
        edit = fxgrow.Plan.from_json(grown.plan.to_json()).tensors[f"{layer}.bias"]
        assert {run.kind for run in edit.axes[0].runs} == {"old"}  # plain runs: no chance is left
        drawn = [p for run in edit.axes[0].runs for p in range(run.start, run.start + run.length)]
        assert drawn[:8] == [*range(8)]
        assert torch.equal(grown.model[layer].bias, model[layer].bias[drawn])
        return drawn[8:]

    assert copies(0, 0) == copies(0, 0)
    assert copies(0, 0) != copies(1, 0)
    assert copies(0, 0) != copies(0, 2)
    assert len(set(copies(0, 0))) < 8  # not round-robin: some are drawn twice


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(0, 99))
def test_a_column_is_shared_by_as_many_as_were_drawn(more: int, seed: int) -> None:
    model = pair(nn.Sigmoid())
    plan_seed = {"pairing": "replicate_random", "seed": seed}
    grown = fxgrow.widen(model, f"+{more}", data(7, 4), **plan_seed)  # type: ignore[arg-type]
    new, old = grown.model[2].weight, model[2].weight
    rows = (grown.model[0].weight[:, None] == model[0].weight[None]).all(2).int().argmax(1)
    total = torch.zeros_like(old).index_add_(1, rows, new)
    assert torch.allclose(total, old, atol=1e-14)
    alone = torch.bincount(rows) == 1
    assert torch.equal(new[:, :8][:, alone], old[:, alone])
    x = data(7, 4)
    assert max_rel(model(x), grown.model(x)) < 1e-13
