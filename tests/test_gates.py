"""Widths of recurrent layers, whose gates have a row each for every entry of the state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxgrow

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


class Recurrent(nn.Module):
    """A recurrent layer of an odd width, and a head."""

    def __init__(self, kind: type[nn.Module], **options: int | float | bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = kind(5, 7, batch_first=True, **options)
        out = int(options.get("proj_size", 7)) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(out, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch tells how it runs them
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "dropout": 0.1}, {"bidirectional": True}, {"proj_size": 3}],
    ids=str,
)
def test_a_ratio_is_rounded_to_whole_states(kind: type[nn.Module], options: dict[str, int]) -> None:
    if "proj_size" in options and kind is not nn.LSTM:
        pytest.skip("torch has projections in LSTMs alone")
    net, x = Recurrent(kind, **options).eval(), torch.randn(2, 6, 5)
    grown = fxgrow.widen(net, "1.5x", x, where="all")
    assert grown.model.layer.hidden_size == 11  # as of any layer of seven
    assert grown.model.layer.weight_hh_l0.shape[0] == 11 * GATES[kind]
    assert grown.model.layer.proj_size == (5 if "proj_size" in options else 0)
    assert "l" not in {refusal.name for refusal in grown.plan.refused}
    assert grown.report.verification is not None
    assert grown.report.verification.verdict == "preserved"
    torch.testing.assert_close(grown.model(x), net(x), atol=1e-6, rtol=1e-5)


def test_a_number_is_not_rounded_and_the_nearest_are_told() -> None:
    net, x = Recurrent(nn.LSTM).eval(), torch.randn(2, 6, 5)
    with pytest.raises(fxgrow.PlanError, match=r"width 30 is no whole number .* possible: 32 \(8"):
        fxgrow.widen(net, "30", x, where="all")
    assert fxgrow.widen(net, "+4", x, where="all").model.layer.hidden_size == 8
