"""The label mechanism: layers move with the data, unions are components, unknowns pin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxgrow
from fxgrow.channels.channels import Channels, resolve
from fxgrow.labels.forest import distinct
from fxgrow.labels.layers import along, compact, core, cover, support
from fxgrow.labels.propagate import propagate
from fxgrow.labels.rules import RULES, rule
from fxgrow.labels.space import LabelSpace
from fxgrow.modules.standin import stand_in


def channels_of(model: nn.Module, *shapes: tuple[int, ...]) -> Channels:
    """Return the channels of a network run on meta tensors."""
    meta = stand_in(model).eval()
    inputs = tuple(torch.empty(shape, device="meta") for shape in shapes)
    return resolve(propagate(meta, meta, inputs)[0])


def axis(channels: Channels, tensor: str, dim: int) -> list[int]:
    """Return the channels along one axis of a tensor."""
    (index,) = (i for i, a in enumerate(channels.axes) if (a.tensor, a.dim) == (tensor, dim))
    return channels.of_axis(index).tolist()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_layers_are_supported_where_they_vary(shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    labels = torch.arange(1, shape[dim] + 1, dtype=torch.int32)
    layer = along(labels, dim, shape)
    assert support(layer) == (frozenset({dim}) if shape[dim] > 1 else frozenset())
    dense = layer.contiguous()
    assert support(compact(dense)) == support(layer)
    assert torch.equal(compact(dense), layer)
    assert core(layer, (dim,)).numel() == shape[dim]
    if shape[dim] > 1:
        assert cover((layer,), dim) is layer


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60))
def test_roots_are_connected_components(edges: list[tuple[int, int]]) -> None:
    import networkx as nx

    space = LabelSpace()
    labels = space.axis("w", 0, 40)
    for count, (a, b) in enumerate(edges):
        space.unify(labels[a : a + 1], labels[b : b + 1])
        if count % 7 == 0:  # what is asked for meanwhile changes nothing
            assert space.is_twice(labels[[a, b]])
    roots = space.roots()[1:]
    graph = nx.Graph()
    graph.add_nodes_from(range(40))
    graph.add_edges_from(edges)
    for component in nx.connected_components(graph):
        assert {int(root) for root in roots[sorted(component)]} == {min(component) + 1}


@given(st.lists(st.integers(0, 1 << 40), max_size=60), st.integers(1, 3))
def test_distinct_numbers_are_each_found_once(numbers: list[int], times: int) -> None:
    found = distinct(np.asarray(numbers * times, dtype=np.int64))
    assert sorted(found.tolist()) == sorted(set(numbers))


def test_roles_belong_to_axes_and_the_first_stays() -> None:
    space = LabelSpace()
    first, second = space.axis("a", 0, 3), space.axis("b", 0, 2)
    space.mark(torch.cat([first, second]), "writer")
    space.mark(second, "reader")
    space.mark(torch.zeros(2, dtype=torch.int32), "reader")
    assert space.roles == {0: "writer", 1: "writer"}
    assert torch.equal(space.axis("a", 0, 3), first)


class Moves(nn.Module):
    """Write with one layer, move its channels about, read with another."""

    def __init__(self, move: object, width: int, read: int) -> None:
        super().__init__()
        self.write = nn.Conv2d(3, width, 1)
        self.read = nn.Conv2d(read, 2, 1)
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.move(self.write(x)))  # type: ignore[operator]


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize(
    ("move", "positions"),
    [
        (lambda x: x, [0, 1, 2, 3]),
        (shuffle, [0, 2, 1, 3]),
        (lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), [2, 3, 0, 1]),
        (lambda x: torch.cat([x, x], 1), [0, 1, 2, 3, 0, 1, 2, 3]),
        (lambda x: x.flip(1), [3, 2, 1, 0]),
        (lambda x: torch.roll(x, 1, 1), [3, 0, 1, 2]),
        (lambda x: x.chunk(2, 1)[1], [2, 3]),
        (lambda x: torch.stack(x.unbind(1)[::-1], 1), [3, 2, 1, 0]),
        (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), [0, 1, 2, 3]),
        (lambda x: torch.nn.functional.max_pool2d(x.relu(), 2), [0, 1, 2, 3]),
        (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), [0, 1, 2, 3]),
    ],
)
def test_labels_follow_the_data(move: object, positions: list[int]) -> None:
    channels = channels_of(Moves(move, 4, len(positions)), (2, 3, 4, 4))
    written = axis(channels, "write.weight", 0)
    assert axis(channels, "read.weight", 1) == [written[i] for i in positions]
    assert axis(channels, "write.bias", 0) == written


def test_flattening_reads_each_channel_at_every_position() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.fc = nn.Linear(4 * 6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).flatten(1))

    channels = channels_of(Flat(), (2, 3, 2, 3))
    written = axis(channels, "conv.weight", 0)
    assert axis(channels, "fc.weight", 1) == np.repeat(written, 6).tolist()


def test_gates_unify_the_halves_of_their_writer() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 8)
            self.down = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            value, gate = self.up(x).chunk(2, -1)
            return self.down(value * torch.nn.functional.silu(gate))

    channels = channels_of(Gated(), (5, 3))
    written = axis(channels, "up.weight", 0)
    assert written[:4] == written[4:] == axis(channels, "down.weight", 1)


def test_grouped_convolutions_read_each_channel_once() -> None:
    grouped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1, groups=2))
    channels = channels_of(grouped, (2, 3, 4, 4))
    assert axis(channels, "1.weight", 1) == axis(channels, "0.weight", 0)
    assert channels.convolution_groups == {"1.weight": 2}


def test_depthwise_convolutions_pass_channels_through() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    channels = channels_of(model, (2, 3, 5, 5))
    written = axis(channels, "0.weight", 0)
    assert axis(channels, "1.weight", 0) == written == axis(channels, "2.weight", 1)
    assert channels.roles[[a.tensor for a in channels.axes].index("1.weight")] == "carrier"


def test_tied_weights_are_one_axis() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    channels = channels_of(model, (2, 4))
    assert axis(channels, "0.weight", 0) == axis(channels, "0.weight", 1)


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: torch.logcumsumexp(x, 1), "logcumsumexp over the channels mixes all of them"),
        (lambda x: torch.cumsum(x, 1), "cumsum over the channels mixes all of them"),
        (lambda x: x.softmax(1), "softmax over the channels mixes all of them"),
        (lambda x: x - x.sum(1, keepdim=True), "over the channels mixes all of them"),
        (lambda x: x + torch.arange(4).view(4, 1, 1), "combined with a tensor of fixed width"),
        (lambda x: x[:, :1] * x, "a width of one is broadcast"),
    ],
)
def test_what_cannot_be_reasoned_about_is_pinned(operation: object, reason: str) -> None:
    channels = channels_of(Moves(operation, 4, 4), (2, 3, 2, 2))
    written = axis(channels, "write.weight", 0)
    assert any(reason in str(channels.pins.get(channel)) for channel in written), channels.pins


def test_rules_can_be_added_and_duplicates_raise() -> None:
    with pytest.raises(ValueError, match="registered already"):
        rule("aten.convolution")(RULES["aten.convolution"])


def test_constants_made_on_the_cpu_join_the_meta_tensors() -> None:
    def add_constant(x: Tensor) -> Tensor:
        return x + torch.tensor([1.0]) + torch.zeros(1, 1, 4, 4)

    channels = channels_of(Moves(add_constant, 4, 4), (2, 3, 4, 4))
    assert axis(channels, "read.weight", 1) == axis(channels, "write.weight", 0)
    assert not any(channel in channels.pins for channel in axis(channels, "write.weight", 0))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 2), min_size=8, max_size=8), st.sampled_from([4, 6, 8]))
def test_shuffled_channels_find_their_places(order: list[int], width: int) -> None:
    """Behind shuffles and splits old channels go where their layers read them, or it is refused."""
    moves = [shuffle, lambda x: x.flip(1), lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)]

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write = nn.Conv2d(3, width, 1)
            self.inner = nn.Conv2d(width // 2, width // 2, 1)
            self.read = nn.Conv2d(width, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.write(x)
            for move in order[:4]:
                x = moves[move](x)
            first, second = x.chunk(2, 1)
            x = torch.cat([self.inner(first.relu()), second], 1)
            for move in order[4:]:
                x = moves[move](x)
            return self.read(x.relu())

    model = Shuffled().double()
    example = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    grown = fxgrow.widen(model, "2x", example)
    assert grown.report.verification.verdict == "preserved"


def test_a_convolution_to_one_channel_passes_what_lies_in_the_batch() -> None:
    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.conv, self.out = nn.Linear(3, 5), nn.Conv2d(7, 1, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            pieces = self.into(x).view(-1, 1, 1, 1).expand(-1, 7, 3, 3)
            return self.out(self.conv(pieces).view(len(x), -1))

    channels = channels_of(Pieces(), (4, 3))
    assert axis(channels, "into.weight", 0) == axis(channels, "out.weight", 1)


class Products(nn.Module):
    """Convolutions and matrix products of every kind that is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 6, 3, 2, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.linear, self.bare = nn.Linear(4, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run all of them."""
        y = self.bare(self.linear(self.up(self.down(x)).flatten(2).mT.flatten(0, 1)))
        pairs = y.unflatten(0, (2, -1))
        return torch.baddbmm(pairs @ pairs.mT, pairs, pairs.mT)


def test_operations_are_counted_as_torch_counts_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(2, 4, 9, 9)
    counter = FlopCounterMode(display=False)
    with counter:
        Products()(x)
    meta = stand_in(Products()).eval()
    _, tape = propagate(meta, meta, (x.to("meta"),))
    assert tape.flops == counter.get_total_flops()
    assert sum(op.is_product for op in tape.operations) == 6


def test_a_row_of_a_table_is_carried_once_however_deep_the_network() -> None:
    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.table, self.scale = nn.Embedding(3, 4), nn.Embedding(2, 4)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3 * depth))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.table.weight[0] + self.table.weight[2:]
            for i in range(0, len(self.layers), 3):
                q, k, v = (layer(x * self.scale.weight[1]) for layer in self.layers[i : i + 3])
                x = x + (q @ k.mT).softmax(-1) @ v
            return x

    def layers(depth: int) -> list[int]:
        meta = stand_in(Deep(depth)).eval()
        _, tape = propagate(meta, meta, (torch.empty((2, 5, 4), device="meta"),))
        return [len(value.layers) for value in tape.values]

    shallow, deep = layers(2), layers(6)
    assert max(deep) == max(shallow) <= 4
    assert sum(deep) < 4 * sum(shallow)
