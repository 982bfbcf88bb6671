"""Numbers that code makes of the stream's width: weights take up that they change, or it stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxgrow

WIDTH, HEAD = 8, 4

Mix = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """One head, narrower than its stream.

    Args:
        mix: returns what queries, keys, values and the stream make.
        fused: one layer writes queries, keys and values.
        width: of the stream.
    """

    def __init__(self, mix: Mix | None = None, fused: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(3, width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * HEAD) if fused else None
        self.q, self.k, self.v = (nn.Linear(width, HEAD) for _ in range(3))
        self.proj, self.head = nn.Linear(HEAD, width), nn.Linear(width, 2)
        self.mix, self.n_embd = mix, width

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(x)
        parts = (self.q(h), self.k(h), self.v(h)) if self.qkv is None else self.qkv(h).chunk(3, -1)
        mixed = self.own(*parts) if self.mix is None else self.mix(*parts, x)
        return self.head(x + self.proj(mixed))

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * self.n_embd**-0.5).softmax(-1) @ v


class Pixels(nn.Module):
    """Attention of a diffusion model: convolutions, and a number of the shape."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 1), nn.BatchNorm2d(width)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj, self.head = nn.Conv2d(width, width, 1), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, width, rows, columns = x.shape
        h = self.norm(x)
        q = self.q(h).permute(0, 2, 3, 1).view(batch, rows * columns, width)
        k = self.k(h).view(batch, width, rows * columns)
        scores = nn.functional.softmax(torch.bmm(q, k) * (int(width) ** (-0.5)), dim=-1)
        v = self.v(h).permute(0, 2, 3, 1).view(batch, rows * columns, width)
        mixed = torch.bmm(scores, v).view(batch, rows, columns, width).permute(0, 3, 1, 2)
        return self.head(x + self.proj(mixed))


def products(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def causal(scores: Tensor) -> Tensor:
    later = torch.ones(scores.shape[-2:]).triu(1) == 1
    return scores.masked_fill(later, float("-inf"))


def alpha(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=x.shape[-1] ** -0.5)
    return scores.softmax(-1) @ v


PAID: dict[str, Mix] = {
    "behind": lambda q, k, v, x: (products(q, k) * x.shape[-1] ** -0.5).softmax(-1) @ v,
    "divided": lambda q, k, v, x: (products(q, k) / math.sqrt(x.size(-1))).softmax(-1) @ v,
    "queries": lambda q, k, v, x: products(q * x.shape[-1] ** -0.5, k).softmax(-1) @ v,
    "keys": lambda q, k, v, x: products(q, k / x.shape[-1] ** 0.5).softmax(-1) @ v,
    "masked": lambda q, k, v, x: causal(products(q, k) * x.shape[-1] ** -0.5).softmax(-1) @ v,
    "mask first": lambda q, k, v, x: (causal(products(q, k)) / x.shape[-1] ** 0.5).softmax(-1) @ v,
    "in place": lambda q, k, v, x: products(q, k).mul_(x.shape[-1] ** -0.5).softmax(-1) @ v,
    "one call": lambda q, k, v, x: nn.functional.scaled_dot_product_attention(
        q, k, v, scale=x.shape[-1] ** -0.5
    ),
    "tensor": lambda q, k, v, x: (
        (products(q, k) / torch.sqrt(torch.tensor(x.shape[-1], device=x.device))).softmax(-1) @ v
    ),
    "full": lambda q, k, v, x: (
        (products(q, k) * torch.full((1,), x.shape[-1] ** -0.5, dtype=x.dtype)).softmax(-1) @ v
    ),
    "alpha": alpha,
    "values": lambda q, k, v, x: (products(q, k).softmax(-1) / x.shape[-1]) @ v,
    "two paths": lambda q, k, v, x: (
        ((products(q, k) + products(q, k).mean(-1, keepdim=True)) * x.shape[-1] ** -0.5).softmax(-1)
        @ v
    ),
}
REFUSED: dict[str, tuple[Mix, str]] = {
    "added": (
        lambda q, k, v, x: (products(q, k) + 0.1 * x.shape[-1]).sigmoid() @ v,
        "add at the top level computes with 0.8 at the present widths and with 1.6",
    ),
    "behind a softmax": (
        lambda q, k, v, x: (products(q, k).softmax(-1) * x.shape[-1]).sigmoid() @ v,
        "mul at the top level computes with 8 at the present widths and with 16",
    ),
    "clamped": (
        lambda q, k, v, x: products(q, k).clamp(max=x.shape[-1] / 100).softmax(-1) @ v,
        "clamp at the top level computes with 0.08 at the present widths and with 0.16",
    ),
    "power": (
        lambda q, k, v, x: products(q, k).square().pow(x.shape[-1] / 8).softmax(-1) @ v,
        "pow at the top level computes with 1 at the present widths and with 2",
    ),
}


def made(net: nn.Module) -> nn.Module:
    """Return a network in float64 with larger weights, so that scores differ."""
    generator = torch.Generator().manual_seed(1)
    net = net.double().eval()
    for parameter in net.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.5 * drawn
    return net


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def check(net: nn.Module, grown: fxgrow.Grown, x: Tensor) -> None:
    """Check that the stream grew, that nothing changed in either mode, and that it trains."""
    assert any(group.kind == "stream" for group in grown.plan.groups)
    assert all(group.preserves == "exact" for group in grown.plan.groups)
    for training in (False, True):
        old, new = net.train(training)(x), grown.model.train(training)(x)
        assert (old - new).abs().max() <= 1e-10 * old.abs().max()
    grown.model(x).square().mean().backward()
    torch.optim.SGD(grown.model.parameters(), lr=0.1).step()
    assert grown.model(x).isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mix", PAID.values(), ids=PAID)
def test_what_is_multiplied_by_a_number_of_the_width_is_written_smaller(
    mix: Mix, fused: bool
) -> None:
    net, x = made(Attention(mix, fused)), data(2, 5, 3)
    for width, where in (("2x", "all"), ("1.5x", "stream")):
        check(net, fxgrow.widen(net, width, x, where=where), x)


@pytest.mark.filterwarnings("ignore:the code of the model fixes sizes")
@pytest.mark.parametrize("width", ["2x", "1.5x"])
def test_a_number_of_an_image_shape_is_taken_up_through_a_file_too(
    width: str, tmp_path: Path
) -> None:
    net, x = made(Pixels()), data(2, 3, 4, 4)
    grown = fxgrow.widen(net, width, x, where="all")
    fxgrow.save(grown, tmp_path / "grown.pt")
    saved = torch.load(tmp_path / "grown.pt", weights_only=False)
    assert torch.equal(grown.model.eval()(x), saved.eval()(x))
    check(net, grown, x)


@pytest.mark.parametrize(("mix", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_number_that_nobody_can_take_up_keeps_the_stream_and_is_named(
    mix: Mix, reason: str
) -> None:
    net, x = made(Attention(mix)), data(2, 5, 3)
    grown = fxgrow.widen(net, "2x", x, where="all")
    assert [group.name for group in grown.plan.groups] == ["v"]
    refused = {refusal.name: refusal.reason for refusal in grown.plan.refused}
    assert refused["stem"].startswith(reason)
    assert "the code makes a number of a width" in refused["stem"]
    assert (net(x) - grown.model(x)).abs().max() <= 1e-10


def test_an_attribute_that_code_makes_the_number_of_follows_so_that_a_new_model_fits() -> None:
    net, x = made(Attention()), data(2, 5, 3)
    grown = fxgrow.widen(net, "2x", x, where="stream").model
    assert grown.n_embd == 2 * WIDTH
    anew = Attention(width=2 * WIDTH).double().eval()
    anew.load_state_dict(grown.state_dict())
    assert (net(x) - anew(x)).abs().max() <= 1e-10


def test_an_attribute_that_tells_the_width_of_a_head_stays() -> None:
    net, x = made(Attention(width=HEAD)), data(2, 5, 3)  # as wide as the head: it may be either
    grown = fxgrow.widen(net, "2x", x, where="stream")
    assert grown.model.n_embd == HEAD
    check(net, grown, x)
