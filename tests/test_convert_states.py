"""Larger siblings that concatenate more: states of a stream, of a chain, and branches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxgrow

IMAGES = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Two convolutions, and what went in where it is residual."""

    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm, self.residual = nn.BatchNorm2d(width), residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.last(self.first(x).relu()))
        return x + y if self.residual else y


class States(nn.Module):
    """Both halves of a layer, and all states of what follows the second (C2f of YOLOv8)."""

    def __init__(
        self, blocks: int, half: int = 4, residual: bool = True, order: int = 1, norm: bool = False
    ) -> None:
        super().__init__()
        self.order = order
        self.first = nn.Conv2d(3, 2 * half, 1)
        self.blocks = nn.ModuleList(Block(half, residual) for _ in range(blocks))
        self.norm = nn.BatchNorm2d((2 + blocks) * half) if norm else nn.Identity()
        self.last = nn.Conv2d((2 + blocks) * half, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        states = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            states.append(block(states[-1]))
        return self.last(self.norm(torch.cat(states[:: self.order], 1)))


class Branches(nn.Module):
    """Convolutions side by side, whose results are concatenated."""

    def __init__(self, *kernels: int, width: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, width, k, padding=k // 2) for k in kernels)
        self.last = nn.Conv2d(width * len(kernels), 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([branch(x) for branch in self.branches], 1).relu())


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "of a stream": (lambda: States(1), lambda: States(2)),
    "of a stream, more": (lambda: States(2), lambda: States(4)),
    "of a stream, wider": (lambda: States(1), lambda: States(3, 6)),
    "of a stream, last first": (lambda: States(1, order=-1), lambda: States(3, order=-1)),
    "of a stream, normed": (lambda: States(1, norm=True), lambda: States(2, norm=True)),
    "of a chain": (lambda: States(1, residual=False), lambda: States(2, residual=False)),
    "branches": (lambda: Branches(1, 5), lambda: Branches(1, 3, 5)),
    "branches, wider": (lambda: Branches(1, 3), lambda: Branches(1, 3, 5, width=4)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_concatenated_beyond_the_source_is_read_by_zeros(pair: str) -> None:
    torch.manual_seed(0)
    small, large = (build().double() for build in PAIRS[pair])
    for module in small.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    grown = fxgrow.convert(small.eval(), large, IMAGES)
    assert grown.report.verification.verdict == "preserved"
    assert grown.model.last.weight.shape == large.last.weight.shape
    assert grown.report.verification.train is not None
    moved = set()
    optimizer = torch.optim.SGD(grown.model.train().parameters(), lr=0.01)
    for _ in range(3):  # what is read by zeros gets a gradient when these are zeros no more
        optimizer.zero_grad()
        grown.model(IMAGES).square().sum().backward()
        moved |= {name for name, p in grown.model.named_parameters() if p.grad.any()}
        optimizer.step()
    assert {n for n, p in grown.model.named_parameters() if p.ndim > 1} <= moved


def test_a_state_that_only_moves_is_no_new_one() -> None:
    """As many states as before: the last block gives what the last one gave, and is read so."""

    class Ends(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 5, 1)
            self.blocks = nn.ModuleList(Block(4, True) for _ in range(blocks))

        def forward(self, x: Tensor) -> Tensor:
            first = x = self.first(x)
            for block in self.blocks:
                x = block(x)
            return self.last(torch.cat([first, x], 1))

    small, large = Ends(1).double().eval(), Ends(3).double()
    grown = fxgrow.convert(small, large, IMAGES)
    assert grown.report.verification.verdict == "preserved"
    assert torch.equal(grown.model.last.weight, small.last.weight)
