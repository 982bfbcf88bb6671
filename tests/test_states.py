"""First states that a forward makes itself: the sizes of constants, told by what they meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow
from fxgrow.labels.graphs import symbolic_trace

State = Callable[[nn.Module, Tensor], Tensor]
STATES: dict[str, State] = {
    "zeros, to device": lambda s, x: torch.zeros(1, len(x), s.hidden).to(x.device).to(x.dtype),
    "zeros on device": lambda s, x: torch.zeros(
        1, len(x), s.hidden, device=x.device, dtype=x.dtype
    ),
    "zeros of a tuple": lambda s, x: torch.zeros((1, len(x), s.hidden), dtype=x.dtype),
    "new_zeros": lambda s, x: x.new_zeros(1, len(x), s.hidden),
    "new": lambda s, x: next(s.parameters()).data.new(1, len(x), s.hidden).zero_(),
    "filled": lambda s, x: torch.empty(1, len(x), s.hidden, dtype=x.dtype).fill_(0),
    "ones": lambda s, x: x.new_ones(1, len(x), s.hidden),
    "expanded": lambda s, x: x.new_zeros(s.hidden).expand(1, len(x), -1).contiguous(),
    "stacked": lambda s, x: torch.stack([x.new_zeros(len(x), s.hidden)]),
    "of the layer": lambda s, x: x.new_zeros(1, len(x), s.layer.hidden_size),
}


class Recurrent(nn.Module):
    """A recurrent layer that is given its first state."""

    def __init__(self, state: str, kind: type[nn.Module] = nn.GRU, **options: object) -> None:
        super().__init__()
        self.hidden, self.state = 8, state
        self.layer = kind(5, 8, batch_first=True, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = STATES[self.state](self, x)
        both = (first, first.clone()) if isinstance(self.layer, nn.LSTM) else first
        return self.head(self.layer(x, both)[0][:, -1])


class Layered(nn.Module):
    """A layer whose state has a place for each layer and direction."""

    def __init__(self, kind: type[nn.Module], layers: int, directions: int) -> None:
        super().__init__()
        self.hidden_size, self.places = 6, layers * directions
        self.layer = kind(5, 6, layers, batch_first=True, bidirectional=directions > 1)
        self.head = nn.Linear(6 * directions, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, c = (torch.zeros(self.places, len(x), self.hidden_size, dtype=x.dtype) for _ in "hc")
        out, _ = self.layer(x, (h, c) if isinstance(self.layer, nn.LSTM) else h)
        return self.head(out)


class Loop(nn.Module):
    """A cell in a loop, whose outputs are written into zeros."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.hidden = 8
        self.cell, self.head = kind(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, c = (torch.zeros(len(x), self.hidden, dtype=x.dtype) for _ in "hc")
        out = torch.zeros(*x.shape[:2], self.hidden, dtype=x.dtype)
        for step in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, step], (h, c))
            else:
                h = self.cell(x[:, step], h)
            out[:, step] = h
        return self.head(out)


class ConvCell(nn.Module):
    """One layer of a ConvLSTM, split by its attribute."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden_dim = hidden
        self.conv = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = torch.split(self.conv(torch.cat([x, h], 1)), self.hidden_dim, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first state; what calls this is another module."""
        shape = (len(x), self.hidden_dim, *x.shape[-2:])
        return torch.zeros(shape, dtype=x.dtype), torch.zeros(shape, dtype=x.dtype)


class ConvLoop(nn.Module):
    """A ConvLSTM of several layers."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        cells = zip((2, *widths), widths, strict=False)
        self.cells, self.head = (
            nn.ModuleList(ConvCell(*c) for c in cells),
            nn.Conv2d(widths[-1], 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        steps = [*x.unbind(1)]
        for cell, state in [(cell, cell.first(x)) for cell in self.cells]:
            for place, step in enumerate(steps):
                state = cell(step, state)
                steps[place] = state[0]
        return self.head(steps[-1])


class Joined(nn.Module):
    """A recurrent network of linear layers, which read input and state side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 8
        self.next, self.out = nn.Linear(13, 8), nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), self.hidden_size, dtype=x.dtype)
        for step in x.unbind(1):
            both = torch.cat([step, h], 1)
            h = torch.tanh(self.next(both))
        return self.out(both)


SEQUENCE, IMAGES = (2, 3, 5), (2, 3, 2, 5, 5)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (lambda name=name: Recurrent(name), SEQUENCE) for name in STATES},
    "LSTM": (lambda: Recurrent("zeros, to device", nn.LSTM), SEQUENCE),
    "RNN": (lambda: Recurrent("zeros, to device", nn.RNN), SEQUENCE),
    "LSTM, 2 × 2": (lambda: Layered(nn.LSTM, 2, 2), SEQUENCE),
    "GRU, 2": (lambda: Layered(nn.GRU, 2, 1), SEQUENCE),
    **{kind.__name__: (lambda kind=kind: Loop(kind), SEQUENCE)
       for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)},
    "ConvLSTM": (lambda: ConvLoop(4, 6), IMAGES),
    "ConvLSTM of equals": (lambda: ConvLoop(6, 6), IMAGES),
    "joined": (Joined, SEQUENCE),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::fxgrow.FxgrowWarning")
@pytest.mark.parametrize("name", NETS)
def test_states_of_zeros_are_as_wide_as_what_they_meet(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NETS[name]
    net, x = make().double(), torch.randn(shape, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x, where="all")
    assert type(grown.model) is type(net)
    assert {refusal.reason for refusal in grown.plan.refused} <= {"an output of the network"}
    for training in (False, True):
        after, before = grown.model.train(training), net.train(training)
        assert max_rel(before(x), after(x)) < 1e-12
    optimizer = torch.optim.SGD(grown.model.parameters(), 0.01)
    grown.model(x).square().sum().backward()
    optimizer.step()
    assert grown.model(x).isfinite().all()


def test_the_attribute_that_a_state_is_made_of_is_set() -> None:
    net = Recurrent("zeros, to device")
    grown = fxgrow.widen(net, "2x", torch.randn(3, 6, 5), where="all").model
    assert (grown.hidden, grown.layer.hidden_size) == (16, 16)


def test_a_literal_state_is_rewritten_in_the_graph() -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x, x.new_zeros(1, x.shape[0], 8))[0])

    net, x = Literal().double(), torch.randn(3, 6, 5, dtype=torch.float64)
    with pytest.warns(fxgrow.FxgrowWarning, match="GraphModule"):
        grown = fxgrow.widen(net, "2x", x, where="all").model
    assert max_rel(net(x), grown(x)) < 1e-12
    assert grown(torch.cat([x, x])).shape == (6, 6, 3)


def test_constants_that_meet_data_of_fixed_width_keep_theirs() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8
            self.first, self.last = nn.Linear(8, 8), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            given = x + torch.zeros(len(x), self.width, dtype=x.dtype)
            return self.last(torch.cat([torch.relu(self.first(x)), given], 1))

    net, x = Beside().double(), torch.randn(3, 8, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x).model
    assert (grown.first.out_features, grown.width, grown.last.in_features) == (16, 8, 24)
    assert max_rel(net(x), grown(x)) < 1e-12


@pytest.mark.parametrize(
    ("net", "shape"),
    [(Loop(nn.GRUCell), SEQUENCE), (ConvLoop(4), IMAGES), (Layered(nn.LSTM, 2, 2), SEQUENCE)],
)
def test_what_a_loop_adds_to_its_state_is_no_residual_block(
    net: nn.Module, shape: tuple[int, ...]
) -> None:
    assert fxgrow.inspect(net, torch.randn(shape)).to_dict()["blocks"] == []


def test_gates_written_by_hand_are_no_residual_blocks_and_repeated_blocks_are() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.update, self.new, self.old = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(len(x), 8)
            for step in x.unbind(1):
                gate = torch.sigmoid(self.update(step) + self.old(h))
                h = gate * h + (1 - gate) * torch.tanh(self.new(step))
            return h.sum(1)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 8)
            self.block = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            for _ in range(3):
                h = h + self.block(h)
            return self.last(h)

    def blocks(net: nn.Module, *shape: int) -> int:
        return len(fxgrow.inspect(net, torch.randn(shape)).to_dict()["blocks"])

    assert blocks(Gated(), 3, 6, 5) == 0
    assert blocks(Shared(), 3, 5) == 3


class Cell(nn.Module):
    """One step of a cell from a state that is made for it; kept in an attribute or not."""

    def __init__(self, kind: type[nn.Module], kept: bool) -> None:
        super().__init__()
        self.width, self.kept, self.state = 8, kept, None
        self.cell, self.out = kind(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), self.width, dtype=x.dtype)
        found = self.cell(x, (state, state) if isinstance(self.cell, nn.LSTMCell) else state)
        found = found if isinstance(found, Tensor) else found[0]
        if self.kept:
            self.state = found
        return self.out(found)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_one_step_of_a_cell_grows(kind: type[nn.Module], kept: bool) -> None:
    torch.manual_seed(0)
    net, x = Cell(kind, kept).double(), torch.randn(3, 4, dtype=torch.float64)
    grown = fxgrow.widen(net, "1.5x", x).model
    assert (type(grown), grown.width, grown.cell.hidden_size) == (Cell, 12, 12)
    assert net.state is None
    assert max_rel(net(x), grown(x)) < 1e-12


class ByHand(nn.Module):
    """One step of a GRU of linear layers: its state of zeros is read, and added to channels."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.inner, self.state, self.out = nn.Linear(4, 24), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), self.width, dtype=x.dtype)
        (a, b, c), (d, e, f) = self.inner(x).chunk(3, 1), self.state(h).chunk(3, 1)
        update, new = torch.sigmoid(b + e), torch.tanh(c + torch.sigmoid(a + d) * f)
        return self.out((1 - update) * new + update * h)


def test_columns_that_read_a_state_of_zeros_read_what_it_is_combined_with() -> None:
    torch.manual_seed(0)
    net, x = ByHand().double(), torch.randn(3, 4, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x).model
    assert (type(grown), grown.width, grown.state.in_features) == (ByHand, 16, 16)
    assert max_rel(net(x), grown(x)) < 1e-12


class Shortest(nn.Module):
    """A recurrent layer, followed on sequences of one step."""

    def __init__(self, kind: type[nn.Module], **options: object) -> None:
        super().__init__()
        self.layer = kind(4, 8, batch_first=True, **options)
        self.out = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.RNN, {}),
        (nn.GRU, {}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"proj_size": 4}),
    ],
)
def test_sequences_of_one_step_tell_what_a_layer_reads(
    kind: type[nn.Module], options: dict[str, object]
) -> None:
    torch.manual_seed(0)
    net, x = Shortest(kind, **options), torch.randn(2, 5, 4, dtype=torch.float64)
    net(x.float())
    net = net.double()
    grown = fxgrow.widen(net, "2x", x[:, :1], where="all").model
    assert grown.layer.hidden_size == 16
    assert max_rel(net(x), grown(x)) < 1e-12


class Carrying(nn.Module):
    """A state made where none fits, and carried on to the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.state = 8, None
        self.cell, self.out = nn.GRUCell(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None or self.state.size(0) != x.size(0):
            self.state = torch.zeros(x.size(0), self.width, dtype=x.dtype)
        self.state = self.cell(x, self.state.detach())
        return self.out(self.state)


class Masking(nn.Module):
    """A mask of later positions made where none fits."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = None
        self.table, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0), 1)

    def forward(self, ids: Tensor) -> Tensor:
        if self.mask is None or len(self.mask) != len(ids):
            full = torch.full((len(ids), len(ids)), -torch.inf, dtype=self.out.weight.dtype)
            self.mask = torch.triu(full, 1)
        return self.out(self.encoder(self.table(ids), self.mask))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [Carrying, Masking])
def test_what_is_made_where_none_fits_is_made_in_each_run(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind().double().eval()
    calls = [torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 4)]
    if kind is Masking:
        calls = [torch.randint(20, (length, 2)) for length in (6, 6, 3)]
    calls = [call.double() if call.is_floating_point() else call for call in calls]
    grown = fxgrow.widen(net, "2x", calls[0], where="all").model
    assert (net.state if kind is Carrying else net.mask) is None
    assert type(grown) is kind
    for call in calls:
        assert max_rel(net(call), grown(call)) < 1e-12


def test_what_stands_for_data_while_tracing_is_kept_nowhere() -> None:
    class Noting(nn.Linear):
        seen = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = super().forward(x)
            return 2 * self.seen

    net = Noting(4, 3)
    assert symbolic_trace(net).nodes
    assert net.seen is None
