"""Code that takes another tensor, or another value of a channel, depending on widths or places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow

_INPUTS = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Chooses(nn.Module):
    """Multiplies its hidden channels by a number that it chooses by their width."""

    def __init__(self, choose: Callable[[nn.Module, int], Tensor]) -> None:
        super().__init__()
        self.choose = choose
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)
        self.small, self.large = (nn.Parameter(torch.tensor(x)) for x in (0.5, 1.5))
        self.table = nn.Parameter(torch.randn(20))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(torch.relu(x) * self.choose(self, x.shape[1]))


@pytest.mark.parametrize(
    ("choose", "reason"),
    [
        (lambda net, width: net.large if width > 8 else net.small, "takes large .* takes small"),
        (lambda net, width: net.table[width], "entry of table by a width: 12 .* takes 8"),
    ],
)
def test_what_is_chosen_by_a_width_is_the_reason(
    choose: Callable[[nn.Module, int], Tensor], reason: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(fxgrow.PlanError, match=reason):
        fxgrow.widen(Chooses(choose).double(), "1.5x", _INPUTS)


class InPieces(nn.Module):
    """Joins pieces that are cut out of two values of the same channels."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.join = nn.Linear(4, 8), nn.Linear(8, 2), join
        self.register_buffer("mask", (torch.arange(8) % 3 > 0).double())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(x))
        return self.down(self.join(x * self.mask, x))


@pytest.mark.parametrize("pairing", ["replicate", "replicate_random", "vv_z_negz", "v_zero"])
@pytest.mark.parametrize(
    "join",
    [
        lambda masked, x: torch.cat([masked[:, :4], x[:, 4:]], 1),
        lambda masked, x: torch.cat([masked[:, 4:], x[:, :4]], 1),
        lambda masked, x: torch.cat([masked[:2], x[2:]]),
        lambda masked, x: torch.cat([masked.chunk(2, 1)[0], x.sigmoid().chunk(2, 1)[1]], 1),
    ],
    ids=["halves", "halves crossed", "samples", "chunks"],
)
def test_copies_lie_in_the_piece_of_what_they_copy(
    join: Callable[[Tensor, Tensor], Tensor], pairing: str
) -> None:
    torch.manual_seed(0)
    net = InPieces(join).double()
    grown = fxgrow.widen(net, "2x", _INPUTS, pairing=pairing)
    assert grown.report.verification.verdict == "preserved"
    assert grown.model.up.out_features == 16
    assert max_rel(net(_INPUTS), grown.model(_INPUTS)) < 1e-12


class Relations(nn.Module):
    """A matrix for each relation, made of a few (Schlichtkrull et al. 2018)."""

    def __init__(self, einsum: bool) -> None:
        super().__init__()
        self.weights, self.bases = (
            nn.Parameter(torch.randn(4, 2)),
            nn.Parameter(torch.randn(2, 4, 8)),
        )
        self.einsum, self.last = einsum, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.einsum:
            made = torch.einsum("rb,bio->rio", self.weights, self.bases)
        else:
            made = (self.weights[:, :, None, None] * self.bases[None]).sum(1)
        return self.last(torch.relu(torch.bmm(x.unsqueeze(1), made).squeeze(1)))


def test_what_the_matrices_of_a_batch_write_grows() -> None:
    torch.manual_seed(0)
    net = Relations(einsum=False).double()
    grown = fxgrow.widen(net, "1.5x", _INPUTS)
    assert grown.model.bases.shape == (2, 4, 12)
    assert max_rel(net(_INPUTS), grown.model(_INPUTS)) < 1e-13


def test_matrices_of_a_batch_that_read_an_input_say_so() -> None:
    with pytest.raises(fxgrow.PlanError, match="bases: multiplied by an input") as told:
        fxgrow.widen(Relations(einsum=True).double(), "1.5x", _INPUTS)
    assert "head" not in str(told.value)
    assert "nothing where that tensor is made of inputs" in str(told.value)
