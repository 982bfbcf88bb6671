"""Heads as channels with many positions: attention of every kind, grown and preserved."""

from __future__ import annotations

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow
from fxgrow.apply.module import apply_to_state_dict
from fxgrow.channels.analysis import analyse
from fxgrow.labels.trace import trace


class Attention(nn.Module):
    """Attention written out, with sizes from attributes; ``inner`` need not be ``width``."""

    def __init__(self, width: int = 8, heads: int = 2, size: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.size, self.kv_heads = heads, size, kv_heads
        self.q = nn.Linear(width, heads * size)
        self.k = nn.Linear(width, kv_heads * size)
        self.v = nn.Linear(width, kv_heads * size)
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(n, length, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(x).view(n, length, self.kv_heads, self.size).transpose(1, 2)
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(n, length, self.heads * self.size))


class Encoder(nn.Module):
    """A pre-norm transformer block between two linear layers."""

    def __init__(self, attention: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU())
        self.down = nn.Linear(16, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm(x))
        x = x + self.down(self.mlp(x))
        return self.head(x)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("pairing", ["vv_z_negz", "v_zero", "replicate"])
def test_heads_grow_in_number_and_keep_their_size(kv_heads: int, pairing: str) -> None:
    torch.manual_seed(0)
    net = Encoder(Attention(heads=4, kv_heads=kv_heads)).double().eval()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x, pairing=pairing)
    assert max_rel(net(x), grown.model(x)) < 1e-12
    attention = grown.model.get_submodule("attention")
    names = [group.name for group in grown.plan.groups]
    assert names == ["attention.q", "mlp.1"]
    shared = kv_heads == 1  # one head of keys and values, which all heads of queries read
    assert attention.kv_heads == (1 if shared else 2 * kv_heads)
    assert (attention.heads, attention.size) == (8, 4)


def test_the_reason_for_a_lone_head_is_told() -> None:
    net = Encoder(Attention(heads=1, kv_heads=1))
    groups = {group.name: group for group in analyse(trace(net, torch.randn(2, 6, 3))).groups}
    assert groups["attention.q"].kind == "pinned"
    assert "two activations are multiplied" in groups["attention.q"].reason


def test_a_width_that_is_no_whole_number_of_heads_is_refused() -> None:
    net = Encoder(Attention())
    with pytest.raises(
        fxgrow.PlanError,
        match=r"each has 4 rows, and a width counts rows; possible: 12 \(3 × 4 rows\)",
    ):
        fxgrow.widen(net, "+2", torch.randn(2, 6, 3), include=["attention.q"])


class SelfAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` of one argument."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def test_multihead_attention_grows_with_its_stream() -> None:
    torch.manual_seed(0)
    net = Encoder(SelfAttention(8, 2, batch_first=True)).double().eval()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x, where="all")
    assert max_rel(net(x), grown.model(x)) < 1e-12
    attention = grown.model.get_submodule("attention")
    assert (attention.num_heads, attention.embed_dim, attention.head_dim) == (4, 16, 4)
    assert {group.name for group in grown.plan.groups} == {"embed", "attention", "mlp.1"}


@pytest.mark.parametrize(
    ("name", "counts"),
    [("num_heads", True), ("n_head", True), ("num_key_value_heads", True), ("heads", True),
     ("dim_head", False), ("size_per_head", False), ("head_dim", False)],
)  # fmt: skip
def test_only_numbers_of_heads_are_taken_for_such(name: str, counts: bool) -> None:
    net = Encoder(Attention())
    setattr(net.attention, name, 2)
    grown = fxgrow.widen(net, "2x", torch.randn(2, 6, 3), include=["attention.*"])
    assert getattr(grown.model.attention, name) == (4 if counts else 2)


class PooledAttention(Attention):
    """Attention whose keys are filtered and normalised, by what all heads share."""

    def __init__(self, width: int = 8, heads: int = 4, size: int = 4) -> None:
        super().__init__(width, heads, size, heads)
        self.filter = nn.Conv1d(size, size, 3, padding=1, groups=size)
        self.norm = nn.LayerNorm(size)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(n, length, self.heads, self.size).transpose(1, 2)
        v = self.v(x).view(n, length, self.heads, self.size).transpose(1, 2)
        k = self.filter(k.transpose(2, 3).reshape(n * self.heads, self.size, length))
        k = self.norm(k.view(n, self.heads, self.size, length).transpose(2, 3))
        mixed = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, length, self.heads * self.size))


@pytest.mark.parametrize("width", ["2x", "1.5x"])
def test_filters_and_norms_that_all_heads_share_keep_their_size(width: str) -> None:
    torch.manual_seed(0)
    net = Encoder(PooledAttention()).double().eval()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    grown = fxgrow.widen(net, width, x)
    assert max_rel(net(x), grown.model(x)) < 1e-12
    attention = grown.model.get_submodule("attention")
    assert attention.heads == (8 if width == "2x" else 6)
    assert attention.filter.weight.shape == net.attention.filter.weight.shape
    assert attention.norm.weight.shape == net.attention.norm.weight.shape


class Slots(nn.Module):
    """Several vectors from one layer, each normalised and read alike."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.write = nn.Linear(3, 2 * self.width)
        self.norm = nn.LayerNorm(self.width)
        self.read = nn.Linear(self.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.norm(self.write(x).view(len(x), 2, self.width)))


def test_a_norm_of_vectors_that_are_no_heads_grows_with_them() -> None:
    torch.manual_seed(0)
    net = Slots().double().eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x)
    assert max_rel(net(x), grown.model(x)) < 1e-12
    assert grown.model.get_parameter("norm.weight").shape == (12,)


class GatedHeads(nn.Module):
    """As many heads as the gate behind them has channels, which could be taken for them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.into, self.qkv, self.out = nn.Linear(4, 6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        shape = (n, length, 3, self.heads, -1)
        q, k, v = self.qkv(self.into(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        value, gate = self.out(mixed).chunk(2, -1)
        return self.last(value * torch.sigmoid(gate))  # type: ignore[no-any-return]


def test_a_number_of_heads_stays_where_only_a_gate_as_wide_grows() -> None:
    torch.manual_seed(0)
    net, x = GatedHeads().double(), torch.randn(2, 5, 4, dtype=torch.float64)
    grown = fxgrow.widen(net, {"out": "2x"}, x)
    assert [group.name for group in grown.plan.groups] == ["out"]
    assert (grown.model.heads, grown.model.out.out_features) == (3, 12)
    both = fxgrow.widen(net, "2x", x)
    assert (both.model.heads, both.model.qkv.out_features) == (6, 36)


class KeysWithoutBias(nn.Module):
    """The bias of the keys is a constant that no state_dict holds."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.heads = 2
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.query, self.value = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("key", constant, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.query, self.key, self.value])
        q, k, v = nn.functional.linear(x, self.qkv.weight, bias).chunk(3, -1)
        heads = [y.unflatten(-1, (self.heads, 4)).transpose(1, 2) for y in (q, k, v)]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rescaling", ["none", "default_vt"])
def test_a_constant_of_zeros_grows_with_its_heads(rescaling: str) -> None:
    torch.manual_seed(0)
    net = Encoder(KeysWithoutBias(torch.zeros(8))).double().eval()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x, rescaling=rescaling, include=["attention.qkv"])
    assert grown.model.get_submodule("attention").heads == 4
    assert grown.model.get_buffer("attention.key").tolist() == [0.0] * 16
    assert "attention.key" not in grown.model.state_dict()
    assert grown.report.verification.verdict in ("preserved", "as predicted")
    assert (max_rel(net(x), grown.model(x)) < 1e-12) == (rescaling == "none")
    held = apply_to_state_dict(grown.plan, net.state_dict())
    assert held.keys() == net.state_dict().keys()
    assert all(torch.equal(held[name], x) for name, x in grown.model.state_dict().items())


def test_other_constants_that_no_state_dict_holds_keep_their_width() -> None:
    """At another width the class would compute others, and nobody knows which."""
    net = Encoder(KeysWithoutBias(torch.linspace(0, 1, 8))).double().eval()
    with pytest.raises(fxgrow.PlanError, match="attention"):
        fxgrow.widen(net, "2x", torch.randn(2, 6, 3).double(), include=["attention.qkv"])
