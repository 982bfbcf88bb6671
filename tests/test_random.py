"""Random networks out of all pieces: what fxgrow widens computes what it said, or it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from networks import max_rel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fxgrow

Draw = Callable[..., object]


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.branch, self.skip = branch, skip

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


class Concat(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Halves(nn.Module):
    """One half passes, the other is computed."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([a, self.branch(b)], 1)


class Gate(nn.Module):
    """One half times the other, as it is or between 0 and 1."""

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.alike = alike

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * (b if self.alike else torch.sigmoid(b))


class Sum(nn.Module):
    """Several modules on the same input, added up."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return sum(part(x) for part in self.parts)  # type: ignore[return-value]


class Folded(nn.Module):
    """A linear layer over the channels of 2x2 pixels, side by side."""

    def __init__(self, width: int, out: int, before: bool) -> None:
        super().__init__()
        self.before = before  # whether the pixels come before the channels
        self.linear = nn.Linear(4 * width, 4 * out)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2)
        order = (0, 2, 4, 3, 5, 1) if self.before else (0, 2, 4, 1, 3, 5)
        x = self.linear(x.permute(order).flatten(3))
        return F.pixel_shuffle(x.permute(0, 3, 1, 2), 2)


class Squeeze(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Twice(nn.Module):
    """A shared module, called twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.relu(self.inner(x)))


class Scale(nn.Module):
    """A raw parameter, or a buffer, with an entry per channel."""

    def __init__(self, width: int, buffer: bool) -> None:
        super().__init__()
        values = torch.rand(width, 1, 1) + 0.5
        if buffer:
            self.register_buffer("scale", values)
        else:
            self.scale = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ChannelsLast(nn.Module):
    """LayerNorm or a linear layer over the channels of an image."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * size)
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(n, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(mixed).transpose(1, 2).view(n, -1, h, w)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


ACTIVATIONS = [nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Identity]


@st.composite
def pieces(draw: Draw, width: int, depth: int, out: int | None = None) -> tuple[nn.Module, int]:
    """Return a module on (n, width, 4, 4) and its number of output channels (``out`` if given)."""
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):  # type: ignore[call-overload]
        layer, width = draw(_piece(width, depth))  # type: ignore[misc]
        layers.append(layer)
    if out is not None and width != out:
        layers.append(nn.Conv2d(width, out, 1))
        width = out
    return nn.Sequential(*layers), width


@st.composite
def _piece(draw: Draw, width: int, depth: int) -> tuple[nn.Module, int]:
    kinds = ["conv", "conv", "norm", "activation", "depthwise", "squeeze", "scale", "prelu", "last"]
    kinds += ["folded"] + (["again"] if width < 6 else [])
    if depth:
        kinds += ["residual", "residual", "concat", "sum", "twice", "attention", "deconv"]
    if width % 2 == 0:
        kinds += ["shuffle", "gate", "grouped"] + (["halves"] if depth else [])
    kind = draw(st.sampled_from(kinds))
    new = draw(st.integers(2, 7))
    if kind == "conv":
        size = draw(st.sampled_from([1, 3]))
        return nn.Conv2d(width, new, size, padding=size // 2, bias=draw(st.booleans())), new
    if kind == "grouped":
        return nn.Conv2d(width, 2 * new, 3, padding=1, groups=2), 2 * new
    if kind == "deconv":
        return nn.ConvTranspose2d(width, new, 3, padding=1), new
    if kind == "depthwise":
        return nn.Conv2d(width, width, 3, padding=1, groups=width), width
    if kind == "norm":
        norms = [
            nn.BatchNorm2d(width), nn.BatchNorm2d(width, affine=False),
            *(nn.GroupNorm(groups, width) for groups in range(1, width + 1) if width % groups == 0),
            nn.InstanceNorm2d(width, affine=True), ChannelsLast(nn.LayerNorm(width)),
            ChannelsLast(nn.RMSNorm(width)),
        ]  # fmt: skip
        return draw(st.sampled_from(norms)), width
    if kind == "activation":
        return draw(st.sampled_from(ACTIVATIONS))(), width
    if kind == "prelu":
        return nn.PReLU(width), width
    if kind == "scale":
        return Scale(width, draw(st.booleans())), width
    if kind == "squeeze":
        return Squeeze(width, new), width
    if kind == "last":
        return ChannelsLast(nn.Linear(width, new)), new
    if kind == "shuffle":
        return Shuffle(draw(st.sampled_from([g for g in (2, 3, 4) if width % g == 0]))), width
    if kind == "gate":
        return Gate(draw(st.booleans())), width // 2
    if kind == "folded":
        return Folded(width, new, draw(st.booleans())), new
    if kind == "sum":
        parts = [draw(pieces(width, depth - 1, new))[0] for _ in range(draw(st.integers(2, 3)))]
        return Sum(*parts), new
    if kind == "again":
        parts = [_treatment(draw, width) for _ in range(draw(st.integers(2, 4)))]
        return Concat(*parts), width * len(parts)
    if kind == "halves":
        return Halves(draw(pieces(width // 2, depth - 1, width // 2))[0]), width
    if kind == "twice":
        return Twice(draw(pieces(width, depth - 1, width))[0]), width
    if kind == "attention":
        return Attention(width, draw(st.integers(1, 3)), 2), width
    if kind == "residual":
        branch, _ = draw(pieces(width, depth - 1, width))
        return Residual(branch, nn.Identity()), width
    first, a = draw(pieces(width, depth - 1))
    second, b = draw(pieces(width, depth - 1))
    return Concat(first, second, nn.Identity()), a + b + width


def _treatment(draw: Draw, width: int) -> nn.Module:
    """Return what leaves the channels the ones that they are."""
    treatments = (nn.Identity, nn.Tanh, lambda: nn.BatchNorm2d(width), lambda: Scale(width, False))
    depthwise = lambda: nn.Conv2d(width, width, 1, groups=width)  # noqa: E731
    return draw(st.sampled_from([*treatments, depthwise]))()  # type: ignore[operator]


@st.composite
def networks(draw: Draw) -> nn.Module:
    """Return a network on (2, 3, 4, 4)."""
    width = draw(st.integers(2, 6))
    body, last = draw(pieces(width, 2))
    head = (
        [nn.Flatten(), nn.Linear(last * 16, 3)]
        if draw(st.booleans())
        else [Pool(), nn.Linear(last, 3)]
    )
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), body, *head)


def liven(net: nn.Module, seed: int) -> nn.Module:
    """Give norms and scales values as they occur in trained networks, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.2, 3.0, generator=generator)
    return net.double().eval()


def check(net: nn.Module, width: str, options: dict[str, str], seed: int) -> None:
    """Widen a network; it computes the same, or what was predicted, or it is refused."""
    liven(net, seed)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    note(str(net))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fxgrow.FxgrowWarning)
            grown = fxgrow.widen(net, width, x, **options)  # type: ignore[arg-type]
    except fxgrow.PlanError as error:
        note(f"refused: {error}")
        return
    note(f"{grown.plan.preserves}: {[(g.name, g.width, g.pairing) for g in grown.plan.groups]}")
    for tensor, parameter in zip(net.parameters(), grown.model.parameters(), strict=False):
        assert parameter.requires_grad == tensor.requires_grad
    if grown.plan.preserves == "exact":
        with torch.no_grad():
            assert max_rel(net(x), grown.model(x)) < 1e-9


OPTIONS = st.fixed_dictionaries(
    {
        "pairing": st.sampled_from(
            ["vv_z_negz", "v_zero", "replicate", "replicate_random", "zero_z", "copy_pair"]
        ),
        "rescaling": st.sampled_from(["none", "none", "default_vt", "vt_constraint_new_shape"]),
        "where": st.sampled_from(["hidden", "all"]),
        "grouped": st.sampled_from(["width", "count"]),
    }
)
WIDTHS = st.sampled_from(["2x", "3x", "1.5x", "+1", "+2", "+5"])


@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
@given(networks(), WIDTHS, OPTIONS, st.integers(0, 99))
def test_random_networks(net: nn.Module, width: str, options: dict[str, str], seed: int) -> None:
    check(net, width, options, seed)


@pytest.mark.sweep
@settings(max_examples=1000, deadline=None, suppress_health_check=[*HealthCheck])
@given(networks(), WIDTHS, OPTIONS, st.integers(0, 10_000))
def test_a_thousand_random_networks(
    net: nn.Module, width: str, options: dict[str, str], seed: int
) -> None:
    check(net, width, options, seed)
