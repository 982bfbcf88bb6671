"""Operations tell what they do: powers of a factor, linearity, zero, likeness, copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fxgrow
from fxgrow.labels import ask
from fxgrow.labels.propagate import propagate
from fxgrow.labels.tape import Operation

SHAPE = (2, 6, 12, 12)


def operation(function: Callable[..., object], *shapes: tuple[int, ...]) -> Operation:
    """Return the last operation of a function, as it runs on inputs of some shapes."""
    inputs = tuple(torch.empty(shape, device="meta") for shape in shapes or (SHAPE,))
    _, tape = propagate(function, nn.Module(), inputs)
    return [op for op in tape.operations if op.name != "detach"][-1]


def degrees(function: Callable[..., object], *shapes: tuple[int, ...]) -> tuple[float | None, ...]:
    op = operation(function, *shapes)
    return ask.degrees(op, [v for v in dict.fromkeys(op.inputs) if v.dtype.is_floating_point])


HOMOGENEOUS = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "relu_": torch.relu_,
    "clamp(min=0)": lambda x: x.clamp(min=0),
    "abs": torch.abs,
    "masked_fill": lambda x: x.masked_fill(torch.ones(12, dtype=torch.bool), 0.0),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 7),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 5),
    "reflection": lambda x: F.pad(x, (3, 2, 1, 4), mode="reflect"),
    "replication": lambda x: F.pad(x, (3, 2, 1, 4), mode="replicate"),
    "zeros": lambda x: F.pad(x, (1, 1)),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "unfold": lambda x: F.unfold(x, 3),
    "cumsum": lambda x: x.cumsum(2),
    "sort": lambda x: torch.sort(x, -1),
    "std": lambda x: x.std((2, 3)),
    "index_select": lambda x: x.index_select(3, torch.tensor([4, 1])),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "amax": lambda x: x.amax((2, 3)),
    "dropout": lambda x: torch.native_dropout(x, 0.5, True),
}
NOT = {
    "relu6": F.relu6,
    "clamp(max=1e9)": lambda x: x.clamp(max=1e9),
    "clamp(max=1e40)": lambda x: x.clamp(max=1e40),
    "clamp(min=-1e-40)": lambda x: x.clamp(min=-1e-40),
    "softshrink": lambda x: F.softshrink(x, 1e-3),
    "elu": F.elu,
    "gelu": F.gelu,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(1),
    "+ 1e-12": lambda x: x + 1e-12,
    "one padded on": lambda x: F.pad(x, (1, 1), value=1.0),
    "fmod": lambda x: x.fmod(3.0),
    "round": torch.round,
    "threshold": lambda x: F.threshold(x, 1e12, 0.0),
    "2 to the x": lambda x: torch.pow(2.0, x),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_what_is_homogeneous_says_so(name: str) -> None:
    assert degrees(HOMOGENEOUS[name])[0] == 1


@pytest.mark.parametrize("name", NOT)
def test_what_is_not_homogeneous_says_so(name: str) -> None:
    assert degrees(NOT[name])[0] is None


@given(st.sampled_from((-2.0, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0, 3.0)))
def test_a_power_is_found(exponent: float) -> None:
    assert degrees(lambda x: x**exponent) in ((exponent,), (1.0 if exponent == 1 else exponent,))


def test_each_output_and_each_operand_has_a_power_of_its_own() -> None:
    assert degrees(lambda x: torch.sort(x, -1)) == (1, 0)
    assert degrees(lambda x: torch.var_mean(x, (2, 3))) == (2, 1)
    op = operation(lambda x, y: x / y, SHAPE, SHAPE)
    assert [ask.degrees(op, [value]) for value in op.inputs] == [(1.0,), (-1.0,)]
    assert ask.degrees(op, op.inputs) == (0.0,)
    op = operation(torch.maximum, SHAPE, SHAPE)
    assert [ask.degrees(op, [value]) for value in op.inputs] == [(None,), (None,)]
    assert ask.degrees(op, op.inputs) == (1.0,)


@pytest.mark.parametrize(
    ("function", "linear"),
    [
        (torch.neg, True),
        (lambda x: x.cumsum(1), True),
        (lambda x: F.pad(x, (1, 1), value=2.0), True),  # what it adds does not depend on x
        (torch.abs, False),
        (torch.ones_like, False),
        (lambda x: x + 1.0, False),
        (lambda x: x * x, False),
        (lambda x: x.masked_fill(torch.ones(12, dtype=torch.bool), 0.0), True),
    ],
)
def test_what_is_linear_says_so(function: Callable[..., object], linear: bool) -> None:
    op = operation(function)
    assert ask.is_linear(op, [value for value in op.inputs if value.shape == SHAPE]) is linear


def test_zero_and_the_slope_there() -> None:
    def at_zero(function: Callable[..., object]) -> ask.AtZero | None:
        op = operation(function)
        return ask.at_zero(op, op.inputs[:1])

    assert at_zero(F.gelu) == (0.0, pytest.approx(0.5 * 2 * 6 * 8 * 8))
    assert at_zero(F.relu) == (0.0, 0.0)
    assert at_zero(torch.sigmoid).value == 0.5
    assert at_zero(lambda x: F.max_pool2d(x, 2)).value == 0
    assert at_zero(lambda x: F.max_pool2d(x, 2)).slope > 0


def test_alike_and_copies() -> None:
    op = operation(lambda x: F.avg_pool2d(x, 2))
    assert ask.is_alike(op, op.inputs, (1,), (1,))
    op = operation(lambda x: x * torch.arange(6.0).view(6, 1, 1))
    assert not ask.is_alike(op, op.inputs[:1], (1,), (1,))
    for function, ignores in (
        (lambda x: x.mean(1), True),
        (lambda x: x.amax(1), True),
        (lambda x: x.var(1, correction=0), True),
        (lambda x: x.var(1), False),
        (lambda x: x.sum(1), False),
        (lambda x: x.argmax(1), False),  # copies lie beside one another, or anywhere
    ):
        op = operation(function)
        assert ask.ignores_copies(op, op.inputs[0], (1,)) is ignores


class Between(nn.Module):
    """conv → relu → conv → an operation → BatchNorm: the norm takes a gain up if it gets there."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.between(self.second(self.first(x).relu())))
        return self.last(x.relu())


@pytest.mark.parametrize(
    ("between", "preserves"),
    [
        *((HOMOGENEOUS[name], "exact") for name in ("reflection", "replication", "bicubic")),
        (lambda x: F.fold(F.unfold(x, 2, stride=2), (12, 12), 2, stride=2), "exact"),
        (HOMOGENEOUS["cumsum"], "exact"),
        (lambda x: torch.sort(x, -1)[0], "exact"),
        (lambda x: x.std((2, 3), keepdim=True).expand_as(x) + x, "exact"),
        (HOMOGENEOUS["index_select"], "exact"),
        (NOT["clamp(max=1e9)"], "no"),
        (NOT["relu6"], "no"),
    ],
)
def test_a_homogeneous_operation_leaves_a_gain_to_the_norm(
    between: Callable[[Tensor], Tensor], preserves: str
) -> None:
    torch.manual_seed(0)
    net = Between(between).double().eval()
    inputs = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", inputs, rescaling="default_vt", include=["first"])
    (group,) = grown.plan.groups
    assert (group.factors["second"] != 1, group.preserves) == (True, preserves)
    verdict = "preserved" if preserves == "exact" else "as predicted"
    assert grown.report.verification.verdict == verdict


def test_an_offset_that_comes_first_is_seen() -> None:
    net = Between(lambda x: torch.add(x, torch.add(1.0, x))).double().eval()
    inputs = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", inputs, rescaling="default_vt", include=["first"])
    assert [group.preserves for group in grown.plan.groups] == ["no"]
