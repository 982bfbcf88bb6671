"""Copies of module trees: whatever survives ``copy.deepcopy`` survives in them."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxgrow
from fxgrow.errors import TraceError
from fxgrow.modules.standin import stand_in


class Knotted(nn.Module):
    """Holds what is hard to copy: a way back to its parent, shared lists, hooks, ties, classes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.Conv1d(4, 4, 1))
        self.traced = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.weight_normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.inner[0].whole = [self]
        self.seen: list[Tensor] = []
        self.inner[2].seen = self.seen
        self.inner[2].bias = self.inner[0].bias
        self.again = self.inner[0]
        self.inner[0].register_forward_hook(self.note)
        self.beside = (nn.Linear(4, 4),)
        self.register_buffer("flags", torch.tensor([True, False]))

    def note(self, module: nn.Module, args: object, output: Tensor) -> None:
        """Keep what a layer returned."""
        del module, args
        self.seen.append(output)

    def forward(self, x: Tensor) -> Tensor:
        """Return something that every layer had a part in."""
        y, _ = self.inner[1](self.inner[0](x))
        y = self.inner[2](y.transpose(-1, -2)).transpose(-1, -2)
        out: Tensor = self.weight_normed(self.traced(y)) + self.beside[0](y) * self.flags[0]
        return out


def knots(model: Knotted) -> tuple[bool, ...]:
    """Return what must hold of each copy."""
    first, _, last = model.inner
    (hook,) = first._forward_hooks.values()
    return (
        first.whole[0] is model,
        last.seen is model.seen,
        last.bias is first.bias,
        model.again is first,
        hook.__self__ is model,
    )


def test_a_stand_in_is_a_deep_copy() -> None:
    model = Knotted()
    replaced = {name: x.clone() for name, x in model.named_parameters(remove_duplicate=False)}
    replaced["inner.2.bias"] = replaced["inner.0.bias"]
    found, expected = stand_in(model, replaced), copy.deepcopy(model)
    assert isinstance(found, Knotted)
    assert all(knots(found)), knots(found)
    assert knots(expected) == knots(found)
    x = torch.randn(3, 5, 4)
    assert torch.equal(found(x), expected(x))
    assert len(found.seen) == 1
    assert not model.seen
    theirs = {id(module) for module in model.modules()}
    assert not theirs & {id(module) for module in found.modules()}
    for module, other in zip(found.modules(), expected.modules(), strict=True):
        assert type(module).__qualname__ == type(other).__qualname__
        assert list(vars(module)) == list(vars(other))


def test_a_stand_in_on_meta_keeps_dtypes_and_strides() -> None:
    model = nn.Conv2d(2, 3, 3).to(torch.float16, memory_format=torch.channels_last)
    meta = stand_in(model)
    assert meta.weight.is_meta
    assert meta.weight.dtype is torch.float16
    assert meta.weight.stride() == model.weight.stride()
    assert isinstance(meta.weight, nn.Parameter)
    assert not model.weight.is_meta


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", ["", "0"])
def test_compiled_code_is_refused_by_name(name: str) -> None:
    program = torch.jit.trace(nn.Linear(4, 8), torch.randn(3, 4))
    model = nn.Sequential(program, nn.Linear(8, 2)) if name else program
    for grow in (fxgrow.inspect, lambda net, x: fxgrow.widen(net, "2x", x)):
        with pytest.raises(fxgrow.TraceError, match=f"{name or 'the model'} is a TorchScript"):
            grow(model, torch.randn(3, 4))


class KeepsAll(nn.Sequential):
    """Keeps in its copies whatever it holds, as Lightning's modules do."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))


@pytest.mark.parametrize("kind", [nn.Sequential, KeepsAll])
def test_copies_of_what_was_compiled_in_place_run_their_own_code(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    model.compile(backend="eager")
    before = model(x)
    grown = fxgrow.widen(model, "2x", x)
    assert grown.model[0].out_features == 16
    with torch.no_grad():
        grown.model[2].bias += 1
    torch.testing.assert_close(grown.model(x), before + 1)
    torch.testing.assert_close(model(x), before)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


def closed(net: nn.Module) -> Any:
    own = net.forward
    return lambda x: own(x)


def closed_and_bound(net: nn.Module) -> Any:
    own = net.forward
    return MethodType(lambda self, x: own(x), net)


def closed_by_another(net: nn.Module) -> Any:
    inner = closed(net)

    def forward(x: Tensor) -> Tensor:
        return inner(x) if x.ndim else forward(x[None])

    return forward


@pytest.mark.parametrize("made", [closed, closed_and_bound, closed_by_another])
def test_a_forward_that_would_run_the_original_is_refused(made: Any) -> None:
    net = nn.Sequential(Twice())
    net[0].forward = made(net[0])
    with pytest.raises(TraceError, match=r"0 has a forward of its own.*Bind it"):
        stand_in(net)


@pytest.mark.parametrize(
    "made",
    [
        lambda net: MethodType(Twice.forward, net),
        lambda net: partial(Twice.forward, net),
        lambda net: lambda x: torch.zeros_like(x),
    ],
)
def test_a_forward_of_its_own_is_that_of_the_copy(made: Any) -> None:
    net = nn.Sequential(Twice())
    net[0].forward = made(net[0])
    found, x = stand_in(net, {}), torch.randn(2, 3)
    expected = net(x)
    with torch.no_grad():
        net[0].layer.weight.zero_()
    assert torch.equal(found(x), expected)
