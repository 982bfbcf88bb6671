"""What messages and the README offer is there, does what is said, and is told in users' words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow


def pair() -> nn.Sequential:
    """Return two linear layers around an activation that is smooth at 0."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double()


def batches(*shape: int) -> list[tuple[Tensor, Tensor]]:
    """Return two batches of inputs of a shape, and targets of three numbers."""
    drawn = torch.Generator().manual_seed(1)
    kind = {"dtype": torch.float64, "generator": drawn}
    return [(torch.randn(8, *shape, **kind), torch.randn(8, 3, **kind)) for _ in range(2)]


def halves(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """Fill by 0.5."""
    del reference, fan_in
    tensor.fill_(0.5)


@pytest.mark.parametrize("method", [fxgrow.GradMax, fxgrow.Tiny])
def test_a_plan_is_applied_with_the_data_it_was_made_with(method: type) -> None:
    init = method(F.mse_loss, batches(4))
    net = pair()
    grown = fxgrow.widen(net, "+2", init=init)
    again = grown.plan.apply(net, init=init)
    assert all(map(torch.equal, again.parameters(), grown.model.parameters()))
    with pytest.raises(fxgrow.PlanError, match=r"plan\.apply\(model, init=…\)"):
        grown.plan.apply(net)
    fxgrow.widen(net, "+1", init=init)
    with pytest.raises(fxgrow.PlanError, match="holds no new weights for this plan"):
        grown.plan.apply(net, init=init)


def test_a_plan_is_applied_with_the_function_it_was_made_with() -> None:
    net = pair()
    grown = fxgrow.widen(net, "+2", init=halves)
    again = grown.plan.apply(net, init=halves)
    assert all(map(torch.equal, again.parameters(), grown.model.parameters()))
    with pytest.raises(fxgrow.PlanError, match=r"plan\.apply\(model, init=…\)"):
        grown.plan.apply(net)
    own = fxgrow.widen(net, "+2", output_init=halves)
    again = own.plan.apply(net, output_init=halves)
    assert all(map(torch.equal, again.parameters(), own.model.parameters()))


@pytest.mark.parametrize("name", ["Tiny", "GradMax"])
def test_a_method_by_name_says_how_it_is_made(name: str) -> None:
    with pytest.raises(fxgrow.PlanError, match=rf"init=fxgrow\.{name}\(loss_fn, batches\)"):
        fxgrow.widen(pair(), init=name.lower())


def test_a_decorator_without_a_name_says_so() -> None:
    with pytest.raises(fxgrow.PlanError, match=r'@register_init\("halves"\)'):
        fxgrow.register_init(halves)
