"""``nn.MultiheadAttention`` and what is built of it, in the ways in which people call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow

TOGETHER = "all heads of an nn.MultiheadAttention are together as wide as what comes in"


class Cross(nn.Module):
    """Attention between two sequences that linear layers make."""

    def __init__(self, call: dict[str, Any], returns: bool = False, **options: Any) -> None:
        super().__init__()
        self.call, self.returns = call, returns
        self.batch_first = options.setdefault("batch_first", True)
        self.query, self.memory = nn.Linear(5, 12), nn.Linear(5, options.get("kdim", 12))
        self.att, self.out = nn.MultiheadAttention(12, 3, **options), nn.Linear(12, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if not self.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        memory = self.memory(y)
        mixed, weights = self.att(self.query(x), memory, memory, **self.call)
        return (self.out(mixed), weights) if self.returns else (self.out(mixed),)


def grows(net: nn.Module, inputs: tuple[Tensor, ...], **settings: Any) -> fxgrow.Grown:
    """Widen a network and compare both in eval and in train mode."""
    grown = fxgrow.widen(net.double().eval(), "2x", inputs, **settings)
    for training in (False, True):
        before, after = net.train(training)(*inputs), grown.model.train(training)(*inputs)
        for one, other in zip(before, after, strict=True):
            if one is not None:
                assert max_rel(one, other) < 1e-12
    return grown


def sequences() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)


PADDING = torch.tensor([[False, False, False, True]] * 2)
LATER = torch.ones(6, 4, dtype=torch.bool).triu(1)
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({}, {}),
    "without weights": ({"need_weights": False}, {}),
    "weights of each head": ({"average_attn_weights": False}, {}),
    "padding": ({"key_padding_mask": PADDING}, {}),
    "padding without weights": ({"key_padding_mask": PADDING, "need_weights": False}, {}),
    "mask": ({"attn_mask": LATER}, {}),
    "both": ({"attn_mask": LATER, "key_padding_mask": PADDING}, {}),
    "a mask for each head": ({"attn_mask": LATER.repeat(6, 1, 1)}, {}),
    "other keys": ({}, {"kdim": 7, "vdim": 7}),
    "learned keys": ({"key_padding_mask": PADDING}, {"add_bias_kv": True, "add_zero_attn": True}),
    "no bias": ({}, {"bias": False}),
    "time first": ({}, {"batch_first": False}),
}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "a mask for each head"])
def test_heads_grow_with_what_comes_in(name: str) -> None:
    call, options = CALLS[name]
    grown = grows(Cross(call, **options), sequences())
    assert not grown.plan.refused
    assert grown.model.att.num_heads == 6


def test_ratios_are_rounded_to_whole_heads_and_what_comes_in_grows_as_much() -> None:
    net, inputs = Cross({}).double().eval(), sequences()
    grown = fxgrow.widen(net, "1.5x", inputs)
    assert not grown.plan.refused
    assert (grown.model.att.num_heads, grown.model.att.embed_dim) == (5, 20)
    assert (grown.model.query.out_features, grown.model.out.in_features) == (20, 18)
    assert max_rel(net(*inputs)[0], grown.model(*inputs)[0]) < 1e-12


def test_numbers_of_channels_are_not_rounded_to_whole_heads() -> None:
    with pytest.raises(
        fxgrow.PlanError, match=r"possible: 48 \(4 × 12 rows\) or 60 \(5 × 12 rows\)"
    ):
        fxgrow.widen(Cross({}).double(), {"att": "54"}, sequences())


def test_a_mask_for_each_head_keeps_their_number() -> None:
    call, _ = CALLS["a mask for each head"]
    grown = grows(Cross(call), sequences())
    assert grown.model.att.num_heads == 3
    assert TOGETHER in grown.plan.refused[0].reason


def test_weights_that_are_returned_are_averaged_over_copies_of_heads() -> None:
    grown = grows(Cross({}, returns=True), sequences())
    (heads,) = (group for group in grown.plan.groups if group.name == "att")
    assert heads.pairing == "replicate"
    kept = grows(Cross({"average_attn_weights": False}, returns=True), sequences())
    assert [(refusal.name, TOGETHER in refusal.reason) for refusal in kept.plan.refused] == [
        ("memory", True)
    ]


def test_what_cannot_run_is_refused_without_verification_too() -> None:
    net, inputs = Cross({"average_attn_weights": False}, returns=True).double(), sequences()
    grown = fxgrow.widen(net, "2x", inputs, verify=False)
    assert max_rel(net.eval()(*inputs)[0], grown.model.eval()(*inputs)[0]) < 1e-12


def test_a_layer_of_three_heads_is_told_to_have_three() -> None:
    told = str(fxgrow.inspect(Cross({}), tuple(x.float() for x in sequences())))
    assert "3 × 12 rows" in told
    assert "one head" not in told


class Built(nn.Module):
    """A layer of torch's between linear ones."""

    def __init__(self, layer: nn.Module, masked: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 4)
        self.layer, self.masked = layer, masked

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        if isinstance(self.layer, nn.TransformerEncoderLayer):
            padding = PADDING[:, :1].expand(-1, x.shape[1]) if self.masked else None
            return (self.out(self.layer(self.first(x), src_key_padding_mask=padding)),)
        return (self.out(self.layer(self.first(x), self.second(y))),)


OPTIONS: dict[str, Any] = {"dropout": 0.0, "batch_first": True}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "masked encoder", "decoder", "both"])
def test_transformers_of_torch_grow_as_a_whole(kind: str, norm_first: bool) -> None:
    options = {**OPTIONS, "norm_first": norm_first}
    layer = {
        "encoder": lambda: nn.TransformerEncoderLayer(12, 3, 16, **options),
        "masked encoder": lambda: nn.TransformerEncoderLayer(12, 3, 16, **options),
        "decoder": lambda: nn.TransformerDecoderLayer(12, 3, 16, **options),
        "both": lambda: nn.Transformer(12, 3, 1, 1, 16, **options),
    }[kind]()
    grown = grows(Built(layer, kind == "masked encoder"), sequences(), where="all")
    assert [refusal.name for refusal in grown.plan.refused] == ["out"]
    if kind == "both":
        assert (grown.model.layer.d_model, layer.d_model) == (24, 12)


def test_heads_whose_stream_stays_are_refused_in_words_of_our_own() -> None:
    grown = grows(Built(nn.TransformerEncoderLayer(12, 3, 16, **OPTIONS)), sequences())
    assert [group.name for group in grown.plan.groups] == ["layer.linear1"]
    (refusal,) = grown.plan.refused
    assert (refusal.name, TOGETHER in refusal.reason) == ("layer.self_attn", True)


class Functional(nn.Module):
    """Attention by the function, whose width its code fixes."""

    def __init__(self, says: str = "") -> None:
        super().__init__()
        self.query, self.says = nn.Linear(5, 8), says
        self.packed, self.bias = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24))
        self.project, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.query(x).transpose(0, 1)
        if self.says and x.shape[-1] != 8:
            raise ValueError(self.says)
        weights = (self.project.weight, self.project.bias)
        found, _ = nn.functional.multi_head_attention_forward(
            x, x, x, 8, 2, self.packed, self.bias, None, None, False, 0.0, *weights
        )
        return self.out(found.mean(0))


@pytest.mark.parametrize("says", ["", "these heads need 8 channels"])
def test_code_that_stops_is_named_and_says_what_it_says_itself(says: str) -> None:
    grown = fxgrow.widen(Functional(says).double(), "2x", sequences()[0], where="all")
    reasons = [refusal.reason for refusal in grown.plan.refused if refusal.name == "query"]
    assert (says or "in forward: found, _ = nn.functional.multi_head_atten") in reasons[0]
    assert "was expecting" not in reasons[0]


def test_an_attribute_that_code_compares_follows() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            y = torch.relu(self.first(x))
            if y.shape[-1] != self.width:
                raise ValueError(f"{self.width} channels are needed")
            return (self.last(y),)

    grown = grows(Checked(), sequences()[:1])
    assert (grown.model.width, grown.model.first.out_features) == (16, 16)


class Beside(nn.Module):
    """Attention whose weights are returned for each head, and layers that nothing uses."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)
        if unused:
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stream = self.first(x)
        mixed, weights = self.att(stream, stream, stream, average_attn_weights=False)
        return self.out(stream + mixed), weights


@pytest.mark.filterwarnings("ignore::fxgrow.FxgrowWarning")
@pytest.mark.parametrize("width", ["2x", "1.5x"])
@pytest.mark.parametrize("unused", [False, True])
def test_heads_that_are_returned_keep_their_number_beside_unused_layers(
    unused: bool, width: str
) -> None:
    with pytest.raises(fxgrow.PlanError, match=f"first cannot be widened: {TOGETHER}"):
        fxgrow.widen(Beside(unused), width, sequences()[0].float(), where="all")


class Padded(nn.Module):
    """Token ids into an encoder of torch's as it comes: it nests tensors in eval mode."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.table, self.out = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, norm)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.encoder(self.table(ids), src_key_padding_mask=ids == 0))


class Translating(nn.Module):
    """Token ids of two languages into the whole transformer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, ids: Tensor, others: Tensor) -> Tensor:
        x, y = self.table(ids), self.table(others)
        return self.out(self.layer(x, y, src_key_padding_mask=ids == 0))


IDS = torch.tensor([[3, 5, 7, 9, 2, 4], [8, 6, 1, 0, 0, 0]])


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (Padded, (IDS,)),
        (lambda: Padded(nn.LayerNorm(8)), (IDS,)),
        (Translating, (IDS, IDS[:, :3] + 1)),
    ],
)
def test_padded_sequences_take_the_fast_path_as_before(
    network: Callable[[], nn.Module], inputs: tuple[Tensor, ...]
) -> None:
    torch.manual_seed(0)
    net = network().double().eval()
    grown = fxgrow.widen(net, "2x", inputs, where="all")
    assert grown.model.table.embedding_dim == 16
    assert torch.backends.mha.get_fastpath_enabled()
    for fast in (True, False):
        with torch.set_grad_enabled(not fast):
            assert max_rel(net(*inputs), grown.model(*inputs)) < 1e-12


@pytest.mark.parametrize("network", [Padded, Translating])
def test_token_ids_of_each_argument_are_inferred(network: Callable[[], nn.Module]) -> None:
    found = fxgrow.widen(network(), "2x").report.verification
    assert found.verdict == "preserved"
    assert "2x16" in found.inputs
