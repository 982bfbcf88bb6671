"""Every layer that torch has: grown and preserved, or left alone for a reason that is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.channels.analysis import analyse
from fxgrow.labels.trace import trace

PAIRINGS = ("vv_z_negz", "v_zero", "replicate", "copy_pair")


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double().eval()


def check_preserved(net: nn.Module, x: object, width: str = "2x", where: str = "hidden") -> None:
    """Grow with each pairing; eval and train mode are judged by verification."""
    for pairing in PAIRINGS:
        grown = fxgrow.widen(net, width, x, pairing=pairing, where=where)
        assert grown.report.verification.verdict == "preserved", pairing
        assert any(group.width[1] > group.width[0] for group in grown.plan.groups)


def reasons(net: nn.Module, x: object) -> dict[str, str]:
    """Return the reason for each pinned group."""
    return {g.name: g.reason for g in analyse(trace(net, x)).groups if g.kind == "pinned"}


class Calls(nn.Module):
    """A module of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def between(middle: nn.Module | Callable[[Tensor], Tensor], out: int = 6) -> nn.Module:
    """Return conv → what is asked about → conv, with six channels before and ``out`` after."""
    inner = middle if isinstance(middle, nn.Module) else Calls(middle)
    return nn.Sequential(nn.Conv2d(3, 6, 1), inner, nn.Conv2d(out, 2, 1))


DIMS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.InstanceNorm3d),
}


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("kind", ["plain", "transposed", "depthwise", "depthwise transposed"])
@pytest.mark.parametrize("width", ["2x", "+2"])
def test_convolutions(dims: int, kind: str, width: str) -> None:
    conv, transposed, _, _ = DIMS[dims]
    middle = {
        "plain": lambda: conv(5, 4, 2),
        "transposed": lambda: transposed(5, 4, 2),
        "depthwise": lambda: conv(5, 5, 2, groups=5),
        "depthwise transposed": lambda: transposed(5, 5, 2, groups=5),
    }[kind]
    last = 5 if "depthwise" in kind else 4
    net = made(lambda: nn.Sequential(conv(3, 5, 1), nn.ReLU(), middle(), conv(last, 2, 1)))
    check_preserved(net, data(2, 3, *[4] * dims), width)


@pytest.mark.parametrize("dims", DIMS)
def test_grouped_convolutions_grow_and_grouped_transposed_ones_say_why_not(dims: int) -> None:
    conv, transposed, _, _ = DIMS[dims]
    x = data(2, 3, *[4] * dims)
    net = made(lambda: nn.Sequential(conv(3, 6, 1), conv(6, 4, 2, groups=2), conv(4, 2, 1)))
    check_preserved(net, x)
    net[1] = transposed(6, 4, 2, groups=2).double()
    assert "a grouped convolution, a transposed one" in reasons(net, x)["0"]


@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")
@pytest.mark.parametrize("dims", DIMS)
def test_norms_per_channel(dims: int) -> None:
    conv, _, batch_norm, instance_norm = DIMS[dims]
    norms = [batch_norm(5), batch_norm(5, affine=False), batch_norm(5, track_running_stats=False)]
    for affine in (False, True):
        norms += [instance_norm(5, affine=affine, track_running_stats=t) for t in (False, True)]
    for norm in norms:
        net = made(lambda norm=norm: nn.Sequential(conv(3, 5, 1), norm, nn.ReLU(), conv(5, 2, 1)))
        check_preserved(net, data(3, 3, *[4] * dims), "+3")


MIDDLES = {
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(6),
    "FrozenBatchNorm2d": lambda: torchvision.ops.FrozenBatchNorm2d(6),
    "PReLU": nn.PReLU,
    "PReLU, many": lambda: nn.PReLU(6),
    "LogSigmoid": nn.LogSigmoid,
    "Dropout": nn.Dropout,
    "AlphaDropout": nn.AlphaDropout,
    "FeatureAlphaDropout": nn.FeatureAlphaDropout,
    "Upsample": lambda: nn.Upsample(scale_factor=2),
    "Upsample, bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "circular padding": lambda: nn.CircularPad2d(1),
    "FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(2, output_size=2),
    "ChannelShuffle": lambda: nn.ChannelShuffle(2),
    "dropout, by code": lambda: Calls(lambda x: F.dropout(x, 0.5, True)),
    "an in-place addition": lambda: Calls(lambda x: F.relu_(x.clone().add_(x))),
    "masked_fill": lambda: Calls(lambda x: x.masked_fill(x > 0, 0.5)),
    "unbind and stack": lambda: Calls(lambda x: torch.stack(x.unbind(1)[::-1], 1)),
    "where": lambda: Calls(lambda x: torch.where(x > 0, x, x.tanh())),
    "area": lambda: Calls(lambda x: F.interpolate(x, size=(2, 2), mode="area")),
    "a number, times": lambda: Calls(lambda x: torch.mul(0.5, x)),
    "a number, minus": lambda: Calls(lambda x: torch.sub(1.0, x)),
    "a number, by": lambda: Calls(lambda x: torch.div(2.0, x.exp())),
    "a number, to the": lambda: Calls(lambda x: torch.pow(2.0, x)),
    "a number where positive": lambda: Calls(lambda x: torch.where(x > 0, 0.5, x)),
    "a tensor of one number": lambda: Calls(lambda x: torch.maximum(torch.tensor(0.1), x)),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_what_stands_between_convolutions(name: str) -> None:
    check_preserved(made(lambda: between(MIDDLES[name]())), data(3, 3, 4, 4))


@pytest.mark.parametrize(
    ("middle", "out"),
    [
        (lambda: nn.GLU(1), 3),
        (lambda: nn.PixelUnshuffle(2), 24),
        (lambda: nn.Sequential(nn.Unfold(2), nn.Unflatten(2, (3, 3))), 24),
        (lambda: Calls(lambda x: F.silu(x[:, ::2]) * x[:, 1::2]), 3),
        (lambda: nn.MaxPool2d(2, ceil_mode=True), 6),
    ],
)
def test_what_changes_the_number_of_channels(middle: Callable[[], nn.Module], out: int) -> None:
    check_preserved(made(lambda: between(middle(), out)), data(3, 3, 4, 4))


def test_pixel_shuffle_and_fold_write_several_rows_to_a_channel() -> None:
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1)))
    check_preserved(net, data(2, 3, 3, 3))
    net = made(lambda: nn.Sequential(nn.Conv1d(3, 12, 1), nn.Fold((3, 3), 2), nn.Conv2d(3, 2, 1)))
    check_preserved(net, data(2, 3, 4))


REFUSED = {
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(3), "avg_pool3d over these positions"),
    "softmax": (lambda: nn.Softmax(1), "softmax over the channels mixes all of them"),
    "sum": (lambda: Calls(lambda x: x - x.sum(1, True)), "sum over the channels mixes"),
    "argmax": (lambda: Calls(lambda x: x * x.argmax(1, True)), "argmax over the channels mixes"),
    "median": (lambda: Calls(lambda x: x - x.median(1, True)[0]), "median over the channels mixes"),
    "a shuffle by index": (
        lambda: Calls(lambda x: x[:, [1, 0, 3, 2, 5, 4]]),
        "looked up by index",
    ),
    "scatter": (
        lambda: Calls(lambda x: torch.zeros_like(x).scatter(2, torch.zeros_like(x).long(), x)),
        "looked up by index",
    ),
    "a constant matrix": (
        lambda: Calls(lambda x: (torch.eye(6, dtype=x.dtype) @ x.flatten(2)).view_as(x)),
        "multiplied by a tensor of fixed width",
    ),
    "a triangle": (
        lambda: Calls(lambda x: x.transpose(1, 3).tril().transpose(1, 3)),
        "looked up by comparing two dims",
    ),
    "a written constant": (
        lambda: Calls(lambda x: x.clone().copy_(torch.arange(6.0).view(6, 1, 1) + 0 * x)),
        "combined with a tensor of fixed width",
    ),
}  # fmt: skip


def written_by_index(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[torch.tensor([0, 1])] = x[:2]
    return y


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_channels_is_pinned_with_the_reason(name: str) -> None:
    middle, reason = REFUSED[name]
    assert reason in reasons(made(lambda: between(middle())), data(3, 3, 4, 4))["0"]


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_tables(table: type[nn.Module]) -> None:
    net = made(lambda: nn.Sequential(table(7, 5, padding_idx=0), nn.Tanh(), nn.Linear(5, 2)))
    x = torch.randint(7, (3, 4))
    check_preserved(net, x, "+2")
    assert fxgrow.widen(net, "2x", x).model[0].embedding_dim == 10


class Recurrent(nn.Module):
    """A recurrent layer and a reader of its outputs."""

    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(3, 4), getattr(nn, kind)(4, 5, **options)
        both = 2 if options.get("bidirectional") else 1
        self.out = nn.Linear(both * int(options.get("proj_size", 5)), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.first(x))[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "dropout": 0.5}, {"bidirectional": True}, {"batch_first": True}],
)
def test_recurrent_layers_grow_their_hidden_size(kind: str, options: dict[str, object]) -> None:
    net, x = made(lambda: Recurrent(kind, **options)), data(3, 2, 3)
    check_preserved(net, x, where="all")
    rnn = fxgrow.widen(net, "2x", x, where="all").model.rnn
    assert (rnn.input_size, rnn.hidden_size) == (8, 10)


def test_projections_of_an_lstm_grow() -> None:
    net, x = made(lambda: Recurrent("LSTM", proj_size=3)), data(3, 2, 3)
    check_preserved(net, x)
    rnn = fxgrow.widen(net, "2x", x).model.rnn
    assert rnn.proj_size == 6


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_recurrent_cells(kind: str) -> None:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = getattr(nn, kind)(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(0):
                state = self.cell(step, state)
            return self.out(state[0] if isinstance(state, tuple) else state)

    net, x = made(Unrolled), data(3, 2, 3)
    check_preserved(net, x, where="all")
    assert fxgrow.widen(net, "2x", x, where="all").model.cell.hidden_size == 10


class RawWeights(nn.Module):
    """Parameters without layers; ``how`` computes the reader's weight from its parameter."""

    def __init__(self, how: Callable[[Tensor], Tensor] = lambda v: v) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5))
        self.b = nn.Parameter(torch.randn(5))
        self.v = nn.Parameter(torch.randn(2, 5))
        self.register_buffer("scale", torch.rand(5))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(((x @ self.w + self.b) * self.scale).relu(), self.how(self.v))


@pytest.mark.parametrize("width", ["2x", "+3"])
def test_raw_parameters_and_buffers(width: str) -> None:
    check_preserved(made(RawWeights), data(4, 3), width)
    check_preserved(made(lambda: RawWeights(lambda v: -2 * v)), data(4, 3), width)


@pytest.mark.parametrize(
    "how", [torch.exp, torch.square, lambda v: v + 1.0, lambda v: v * v, lambda v: v / v.amax()]
)
def test_weights_that_are_not_linear_in_their_parameter_are_not_read_through(
    how: Callable[[Tensor], Tensor],
) -> None:
    found = reasons(made(lambda: RawWeights(how)), data(4, 3))
    assert "is not linear in v" in found["w"] or "amax" in found["w"]


def test_weights_normalised_over_their_columns_are_not_read_through() -> None:
    net = made(lambda: RawWeights(lambda v: F.normalize(v, dim=1)))
    assert "multiplied by a tensor of fixed width" in reasons(net, data(4, 3))["w"]


def test_matrices_multiply_from_both_sides_and_vectors_too() -> None:
    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4, 5))
            self.u = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return (self.v @ (self.w @ x.t()).relu()).t().tanh() @ self.u

    check_preserved(made(Sides), data(4, 3), "+2")


def test_groups_of_one_module_have_names_of_their_own() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = ((5, 3), (4, 5), (2, 4))
            self.p = nn.ParameterList(torch.randn(shape) for shape in shapes)

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.p:
                x = F.linear(x, weight).tanh()
            return x

    net, x = made(Listed), data(4, 3)
    check_preserved(net, x, "+2")
    grown = fxgrow.widen(net, {"p.1": "+2"}, x)
    assert [tuple(p.shape) for p in grown.model.p] == [(5, 3), (6, 5), (2, 6)]


def test_tied_weights_stay_tied() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.out = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.again(self.again(self.first(x)).relu()).relu())

    check_preserved(made(Twice), data(4, 3), "+2")
    net = made(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2)))
    net = nn.Sequential(net[0], nn.ReLU(), net[2], nn.ReLU(), net[2], nn.ReLU(), net[3])
    grown = fxgrow.widen(net, "2x", data(4, 3)).model
    assert grown[2].weight is grown[4].weight
    assert grown[2].weight.shape == (10, 10)


def test_a_vector_that_also_reads_is_pinned() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Linear(3, 5), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            y = self.w(x).relu()
            return (y * self.v).relu() @ self.v

    assert "both accompanies and reads" in reasons(made(Both), data(4, 3))["w"]


@dataclass
class Output:
    """What some networks return."""

    logits: Tensor
    hidden: Tensor


@pytest.mark.parametrize("kind", [dict, Output])
def test_outputs_of_every_kind_pin_what_they_show(kind: type) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, inputs: dict[str, Tensor]) -> object:
            hidden = self.a(inputs["x"]).relu()
            return kind(logits=self.c(self.b(hidden).relu()), hidden=hidden)

    net, x = made(Several), ({"x": data(4, 3)},)
    assert reasons(net, x)["a"] == "an output of the network"
    check_preserved(net, x)


class Heads(nn.Module):
    """Attention in several notations."""

    def __init__(self, how: str, kv_heads: int = 4) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.how = 4, kv_heads, how
        self.q, self.out = nn.Linear(3, 12), nn.Linear(12, 2)
        self.k, self.v = nn.Linear(3, kv_heads * 3), nn.Linear(3, kv_heads * 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.heads, 3).transpose(1, 2)
        k, v = (f(x).view(n, length, self.kv_heads, 3).transpose(1, 2) for f in (self.k, self.v))
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        if self.how == "@":
            mixed = (q @ k.mT / 3**0.5).masked_fill(~mask, -1e9).softmax(-1) @ v
        elif self.how == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
            mixed = torch.einsum("bhij,bhjd->bhid", scores, v)
        else:
            kinds = {"mask": {"attn_mask": mask}, "causal": {"is_causal": True}}
            options = kinds.get(self.how, {"enable_gqa": True})
            mixed = F.scaled_dot_product_attention(q, k, v, **options)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("how", "kv_heads"), [("@", 4), ("einsum", 4), ("mask", 4), ("causal", 4), ("grouped", 2)]
)
def test_attention_in_every_notation(how: str, kv_heads: int) -> None:
    net = made(lambda: Heads(how, kv_heads))
    check_preserved(net, data(2, 5, 3))
    assert fxgrow.widen(net, "2x", data(2, 5, 3)).model.heads == 8


@pytest.mark.parametrize("where", ["hidden", "all"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers_with_dropout_in_their_attention(where: str, norm_first: bool) -> None:
    layer = {"batch_first": True, "norm_first": norm_first, "dropout": 0.3}
    net = made(
        lambda: nn.Sequential(
            nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 10, **layer), nn.Linear(8, 2)
        )
    )
    check_preserved(net, data(2, 5, 3), where=where)


def halves_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :3] *= 2.0
    y[:, 3:] = 0.5 * x[:, :3]
    return y


def a_part_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :3].mul_(2.0)
    return y


def collected(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    y[:, : x.shape[1] // 2], y[:, x.shape[1] // 2 :] = x.chunk(2, 1)[::-1]
    return y


@pytest.mark.parametrize("write", [halves_in_place, a_part_in_place, collected])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_what_is_written_into_a_view_reaches_what_it_is_a_view_of(
    write: Callable[[Tensor], Tensor], pairing: str
) -> None:
    net, x = made(lambda: between(write)), data(2, 3, 4, 4)
    try:
        grown = fxgrow.widen(net, "2x", x, pairing=pairing)
    except fxgrow.PlanError:
        assert write is not collected  # literal widths may be refused, but never done wrong
    else:
        assert grown.report.verification.verdict == "preserved"


@pytest.mark.parametrize(
    "change", [lambda x: x + x.shape[1] ** 0.5, lambda x: x.clamp(max=1.0 / x.shape[1])]
)
def test_numbers_made_of_a_width_that_no_weight_pays_for_are_refused(
    change: Callable[[Tensor], Tensor],
) -> None:
    net = made(lambda: between(change))
    with pytest.raises(fxgrow.PlanError, match="the code makes a number of a width"):
        fxgrow.widen(net, "2x", data(2, 3, 4, 4))


def test_channels_continue_only_where_the_same_is_done_to_them() -> None:
    """A literal slice treats the first channels apart, and runs at any width."""

    def treat(x: Tensor) -> Tensor:
        return torch.cat([torch.narrow(x, 1, 0, 2) * 2, torch.narrow(x, 1, 2, x.shape[1] - 2)], 1)

    net, x = made(lambda: between(treat)), data(2, 3, 4, 4)
    for pairing in PAIRINGS:
        grown = fxgrow.widen(net, "+4", x, pairing=pairing)
        assert grown.report.verification.verdict == "preserved"


def test_batch_statistics_over_another_dim_ask_for_whole_copies() -> None:
    """A batch norm over positions takes its statistics over the channels."""
    net = made(lambda: between(Calls(lambda x: x.transpose(1, 2))))
    net.insert(2, nn.BatchNorm2d(4).double().eval())
    net.insert(3, Calls(lambda x: x.transpose(1, 2)))
    check_preserved(net, data(3, 3, 4, 4))
    with pytest.raises(fxgrow.PlanError, match="whole copies"):
        fxgrow.widen(net, "+1", data(3, 3, 4, 4))


class Placed(nn.Module):
    """Adds where each position lies, from a table that it makes anew for each size."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("places", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.places) != x.shape[1]:
            self.places = torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device)
        return self.out(torch.tanh(self.into(x) + self.places[:, None]))


def test_a_buffer_that_forward_replaces_is_no_part_of_the_plan() -> None:
    net = made(Placed)
    check_preserved(net, data(2, 5, 4))
    assert net.places.shape == (1,)
    net(data(2, 5, 4))
    check_preserved(net, data(2, 7, 4))
