"""Operations without a rule: channels pass where each slice of them is treated by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.channels.analysis import analyse
from fxgrow.labels import ask
from fxgrow.labels.rules import RULES
from fxgrow.labels.trace import trace


class Between(nn.Module):
    """Linear → what is asked about → linear; eight channels along the last of three dims."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


def built(function: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Between(function).double(), torch.randn(2, 5, 3, dtype=torch.float64)


def sampled(x: Tensor) -> Tensor:
    image = x.transpose(1, 2).unflatten(2, (5, 1))
    grid = torch.linspace(-1, 1, 6, dtype=x.dtype).view(1, 3, 1, 2).expand(len(x), -1, -1, -1)
    return F.grid_sample(image, grid, align_corners=False).flatten(2).transpose(1, 2)


PASS = {
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(1),
    "sort": lambda x: x.sort(1).values,
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "cummax": lambda x: x.cummax(1).values,
    "kthvalue": lambda x: x.kthvalue(2, 1, keepdim=True).values,
    "median": lambda x: x.median(1, keepdim=True).values,
    "aminmax": lambda x: x.aminmax(dim=1, keepdim=True).max,
    "Fourier": lambda x: torch.fft.rfft(x, dim=1).abs(),
    "Fourier and back": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1)[:, :2], n=5, dim=1),
    "sampled": sampled,
}


@pytest.mark.parametrize("function", PASS.values(), ids=PASS)
def test_channels_pass_what_runs_along_another_dim(function: Callable[[Tensor], Tensor]) -> None:
    net, x = built(function)
    grown = fxgrow.widen(net, "2x", x)
    assert [group.width for group in grown.plan.groups] == [(8, 16)]
    assert grown.report.verification.verdict == "preserved"


MIX = {
    "logcumsumexp": lambda x: x.logcumsumexp(2),
    "cummax": lambda x: x.cummax(2).values,
    "fft_r2c": lambda x: torch.fft.fft(x, dim=2).real,
    "renorm": lambda x: x.renorm(2, 0, 1e-9),
    "renorm above a number": lambda x: x.renorm(2, 0, 1e12),
}


@pytest.mark.parametrize("function", MIX.values(), ids=MIX)
def test_channels_that_are_mixed_say_by_what(function: Callable[[Tensor], Tensor]) -> None:
    reasons = {group.name: group.reason for group in analyse(trace(*built(function))).groups}
    assert "over the channels mixes all of them" in reasons["up"]


def test_scans_need_no_rule_of_their_own() -> None:
    assert not {"aten.cumsum", "aten.cummax", "aten.sort"} & set(RULES)


def test_an_operation_that_may_read_channels_asks_for_a_rule() -> None:
    net, x = built(lambda x: torch.linalg.solve(x[:, :5, :5], x))
    reasons = {group.name: group.reason for group in analyse(trace(net, x)).groups}
    assert "no rule for aten._linalg_solve_ex" in reasons["up"]


def pivoted(x: Tensor) -> Tensor:
    pivots = torch.arange(1, 6, dtype=torch.int32).expand(len(x), 5)
    return torch.linalg.ldl_solve(torch.eye(5, dtype=x.dtype).expand(len(x), 5, 5), pivots, x)


def test_kernels_that_believe_what_they_are_given_are_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x = built(pivoted)
    tried: list[str] = []
    run = ask.run_on
    monkeypatch.setattr(
        ask, "run_on", lambda call, number: tried.append(str(call.target)) or run(call, number)
    )
    analyse(trace(net, x))
    assert not [name for name in tried if "ldl" in name]
