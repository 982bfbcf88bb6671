"""Networks that set their parameters by the first data they see: they stay as they are given."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow

_INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class FirstData(nn.Module):
    """Shifts its inputs by the mean of the first ones, as ActNorm does.

    Args:
        asked: what tells of the first run: a ``buffer`` whose value is read, or a ``flag``.
        how: how the shift is set.
        literal: there is a width in the code.
    """

    def __init__(self, asked: str, how: str, literal: bool = False) -> None:
        super().__init__()
        self.asked, self.how, self.literal = asked, how, literal
        self.shift = nn.Parameter(torch.zeros(1, 4))
        self.register_buffer("begun", torch.tensor(0))
        self.flag = False
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.begun.item() == 0 if self.asked == "buffer" else not self.flag:
            self.set_shift(-x.mean(0, keepdim=True).detach())
            self.begun.fill_(1)
            self.flag = True
        hidden = torch.relu(self.norm(self.first(x + self.shift)))
        return self.last(hidden.view(-1, 1, 8)[:, 0] if self.literal else hidden)

    def set_shift(self, value: Tensor) -> None:
        if self.how == "copy":
            self.shift.data.copy_(value)
        elif self.how == "index":
            self.shift.data[0] = value[0]
        elif self.how == "data":
            self.shift.data = value
        else:
            with torch.no_grad():
                self.shift.add_(value)


def _state(model: nn.Module) -> dict[str, Any]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {**tensors, "flag": torch.tensor(model.flag), "object": torch.tensor(id(model.shift))}


def _model(*how: Any) -> FirstData:
    torch.manual_seed(0)
    return FirstData(*how).double().eval()


_HOW = ["copy", "index", "data", "add"]
_TARGETS = torch.zeros(6, 2, dtype=torch.float64)
_BATCHES = [(_INPUTS, _TARGETS), (_INPUTS + 1, _TARGETS)]


def _gradmax(model: nn.Module) -> object:
    return fxgrow.widen(model, "1.5x", init=fxgrow.GradMax(nn.functional.mse_loss, _BATCHES))


_USES: dict[str, Callable[[FirstData], object]] = {
    "widen": lambda model: fxgrow.widen(model, "2x", _INPUTS),
    "calibration": lambda model: fxgrow.widen(model, "2x", _INPUTS, calibration=[_INPUTS + 1]),
    "gradmax": _gradmax,
    "inspect": lambda model: fxgrow.inspect(model, _INPUTS),
    "verify": lambda model: fxgrow.verify(model, _model(model.asked, model.how), _INPUTS),
}


@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize(("asked", "how"), [*zip(["buffer", "flag"] * 2, _HOW, strict=True)])
def test_no_run_changes_the_network_that_is_given(use: str, asked: str, how: str) -> None:
    model = _model(asked, how)
    before = _state(model)
    _USES[use](model)
    assert all(torch.equal(value, before[name]) for name, value in _state(model).items())


@pytest.mark.filterwarnings("ignore:the code of the model fixes sizes")
@pytest.mark.parametrize("asked", ["buffer", "flag"])
@pytest.mark.parametrize("how", _HOW)
@pytest.mark.parametrize(("literal", "calibrated"), [(False, True), (True, False)])
def test_the_grown_network_begins_and_goes_on_as_the_given_one(
    literal: bool, asked: str, how: str, calibrated: bool
) -> None:
    model = _model(asked, how, literal)
    batches = [_INPUTS - 1] if calibrated else None
    grown = fxgrow.widen(model, "2x", _INPUTS, calibration=batches)
    assert grown.model.first.out_features == 16
    for inputs in (_INPUTS, _INPUTS + 1, 2 * _INPUTS):
        torch.testing.assert_close(grown.model(inputs), model(inputs), rtol=1e-9, atol=1e-12)


def test_no_graph_stands_for_the_first_run_and_later_ones() -> None:
    model = _model("flag", "copy")
    with pytest.raises(fxgrow.FxgrowError, match=r"cannot be predicted"):
        fxgrow.widen(model, "2x", _INPUTS, rescaling="default_vt")
    model(_INPUTS)
    grown = fxgrow.widen(model, "2x", _INPUTS, rescaling="default_vt")
    assert grown.report.verification.verdict in ("preserved", "as predicted")


@pytest.mark.parametrize("how", _HOW)
def test_a_program_is_written_after_the_first_run_alone(tmp_path: Path, how: str) -> None:
    """A program has no flag that tells the first run from later ones: it would begin anew."""
    model, out = _model("flag", how), tmp_path / "net.pt2"
    with pytest.raises(fxgrow.SourceError, match="its first run sets shift by the data"):
        fxgrow.save(fxgrow.widen(model, "2x", _INPUTS), out)
    assert not out.exists()
    model(_INPUTS)
    fxgrow.save(fxgrow.widen(model, "2x", _INPUTS), out)
    torch.testing.assert_close(fxgrow.load(out)(_INPUTS + 1), model(_INPUTS + 1))


def test_a_program_of_a_network_that_goes_on_from_its_last_run_is_written(tmp_path: Path) -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sum", torch.zeros(1, 2, dtype=torch.float64))
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            found = self.last(torch.relu(self.first(x)))
            self.sum.add_(found.detach().mean(0, keepdim=True))
            return found + self.sum

    model = Adding().double().eval()
    fxgrow.save(fxgrow.widen(model, "2x", _INPUTS), tmp_path / "net.pt2")
    program = fxgrow.load(tmp_path / "net.pt2")
    for inputs in (_INPUTS, _INPUTS + 1):
        torch.testing.assert_close(program(inputs), model(inputs))


def test_a_part_of_a_program_without_gradients_is_read(tmp_path: Path) -> None:
    class Cut(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                found = torch.relu(self[0](x))
            return self[1](found)

    model = Cut(nn.Linear(4, 8), nn.Linear(8, 2)).double().eval()
    fxgrow.save(fxgrow.widen(model, "2x", _INPUTS), tmp_path / "net.pt2")
    torch.testing.assert_close(fxgrow.load(tmp_path / "net.pt2")(_INPUTS), model(_INPUTS))


@functools.lru_cache
def _mask(count: int) -> Tensor:
    mask = torch.zeros(count, count)
    mask[torch.ones(count, count).triu(1).bool()] = -1e9
    return mask


@functools.lru_cache
def _index(count: int) -> Tensor:
    positions = torch.arange(count)
    index = torch.zeros(size=(count + 1,) * 2, dtype=torch.int64)
    index[1:, 1:] = (positions[:, None] - positions[None]).reshape(count, count).abs()
    return index.flatten()[: count * count].view(count, count)


_TABLES: dict[tuple[int, int], Tensor] = {}


def _table(count: int, size: int) -> Tensor:
    if (count, size) not in _TABLES:
        table = torch.zeros(count, size)
        table[:, 0] = torch.arange(count).float()
        _TABLES[count, size] = table
    return _TABLES[count, size]


_SEEN: list[Tensor] = []
_BY_SIZE: dict[object, Tensor] = {}


@functools.lru_cache
def _ramp(count: int) -> Tensor:
    return torch.linspace(0, 1, count)


class Proxied(nn.Module):
    """Its tables are by a size, which is a proxy in a trace by torch.fx."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        key = (x.shape[1], "ramp")
        if key not in _BY_SIZE:
            _BY_SIZE[key] = torch.linspace(0, 1, x.shape[1]).to(x)[None, :, None]
        _SEEN.append(x)
        hidden = self.up(x) + _BY_SIZE[key] + _ramp(x.shape[1]).to(x)[:, None]
        return self.down(hidden.relu())


def test_no_proxy_of_a_trace_is_left_in_tables() -> None:
    for memo in (_BY_SIZE, _SEEN):
        memo.clear()
    model, x = Proxied(), torch.randn(2, 3, 4)
    grown = fxgrow.widen(model, "2x", x)
    assert grown.plan.scopes[0].tracer == "torch.fx"
    assert {type(key[0]) for key in _BY_SIZE} == {int}
    assert {*map(type, (*_BY_SIZE.values(), *_SEEN))} == {Tensor}
    torch.testing.assert_close(_ramp(3), torch.linspace(0, 1, 3))
    torch.testing.assert_close(grown.model(x), model(x))


class Memoised(nn.Module):
    """Attention whose tables are made once, for all networks."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(9))
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        x = x + _table(count, width).to(x)
        query, key, value = (
            layer(x).view(batch, count, -1, 4).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / 2 + _mask(count).to(x) + self.bias[_index(count)]
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, count, -1)
        return self.head(x + self.out(mixed))


def test_what_code_keeps_between_calls_is_what_it_would_be() -> None:
    """The first run is one of ours, and other runs find what that has left."""
    for memo in (_mask.cache_clear, _index.cache_clear, _TABLES.clear):
        memo()
    torch.manual_seed(0)
    model, x = Memoised().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    grown = fxgrow.widen(model, "2x", x)
    assert grown.report.verification.verdict == "preserved"
    assert grown.model.query.weight.shape[0] == 16
    kept = (_mask(5), _index(5), _table(5, 8))
    assert all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in kept)
    torch.testing.assert_close(kept[0], torch.full((5, 5), -1e9).triu(1))
    torch.testing.assert_close(grown.model(x), model(x), rtol=1e-10, atol=1e-10)


class Collecting(nn.Module):
    """Reads what hooks collect, which its first run registers, and notes in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 8)])
        self.heads = nn.ModuleList([nn.Linear(6, 10), nn.Linear(8, 10)])
        self.last = nn.Linear(10, 2)
        self.found: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "collects", False):
            for layer in self.layers:
                layer.register_forward_hook(lambda _, given, out: self.found.append(out))
            self.collects = True
        self.found = []
        for layer in self.layers:
            x = layer(x)
        told = zip(self.heads, self.found, strict=True)
        return self.last(sum(head(torch.relu(hidden)) for head, hidden in told))


def test_hooks_of_a_first_run_collect_once_in_each_run() -> None:
    torch.manual_seed(0)
    model = Collecting().double().eval()
    expected = copy.deepcopy(model)(_INPUTS)
    grown = fxgrow.widen(model, "1.5x", _INPUTS, where="all")
    assert not any("not judged" in note for note in grown.report.verification.notes)
    assert [head.in_features for head in grown.model.heads] == [9, 12]
    assert max_rel(grown.model(_INPUTS), expected) < 1e-14
    assert max_rel(grown.model(_INPUTS), expected) < 1e-14  # the second run has them too


class MadeAnew(FirstData):
    """Puts a parameter in place in its first run, of data or of a number that it looks at."""

    def set_shift(self, value: Tensor) -> None:
        if self.how == "number":
            value = torch.full_like(self.shift, value.mean().item())
        self.shift = nn.Parameter(value)


@pytest.mark.parametrize(
    ("asked", "how"), [("buffer", "number"), ("buffer", "data"), ("flag", "data")]
)
def test_a_parameter_that_the_first_run_puts_in_place_is_as_it_was(asked: str, how: str) -> None:
    torch.manual_seed(0)
    model = MadeAnew(asked, how).double().eval()
    before, first = _state(model), model.shift
    grown = fxgrow.widen(model, "1.5x", _INPUTS).model
    assert model.shift is first
    assert all(torch.equal(x, _state(model)[name]) for name, x in before.items())
    for x in (_INPUTS, _INPUTS + 1):
        assert max_rel(model(x), grown(x)) < 1e-13


class ReadsWhatItMakes(nn.Module):
    """Makes a parameter in its first run, and looks at a value of what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.shift = None

    def forward(self, x: Tensor) -> Tensor:
        if self.shift is None:
            self.shift = nn.Parameter(-x.mean(0).detach())
        x = x + self.shift
        return self.last(torch.relu(self.first(x if x.mean().item() < 9 else -x)))


def test_a_parameter_whose_values_are_not_known_is_named() -> None:
    model = ReadsWhatItMakes().double().eval()
    with pytest.raises(fxgrow.TraceError, match="makes a parameter of a tensor") as told:
        fxgrow.widen(model, "1.5x", _INPUTS)
    assert str(told.value).count("Run the network once") == 1
    model(_INPUTS)
    assert fxgrow.widen(model, "1.5x", _INPUTS).report.verification.verdict == "preserved"
