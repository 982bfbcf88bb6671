"""New channels of batch norms with the statistics of data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from networks import lived_in, max_rel
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import PlanError
from fxgrow.grow.data.calibration import new_entries


class Depthwise(nn.Module):
    """Batch norms one behind the other, which new channels pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(6, 12, 1), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = nn.Conv2d(12, 12, 3, groups=12), nn.BatchNorm2d(12)
        self.project, self.norm3 = nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.expand(x)).relu()
        return self.norm3(self.project(self.norm2(self.depthwise(y)).relu()))


def depthwise() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    batches = [2 + 3 * torch.randn(8, 6, 7, 7) for _ in range(3)]
    return lived_in(Depthwise(), batches[0]), batches


@pytest.mark.parametrize("pairing", ["vv_z_negz", "v_zero"])
@pytest.mark.parametrize("width", ["2x", "+5"])
def test_calibrated_channels_are_in_eval_mode_what_they_are_in_training(
    pairing: str, width: str
) -> None:
    net, batches = depthwise()
    told = {"pairing": pairing, "example_inputs": batches[0]}
    grown = fxgrow.widen(net, width, calibration=batches, **told)  # type: ignore[arg-type]
    plain = fxgrow.widen(net, width, **told)  # type: ignore[arg-type]
    assert grown.report.verification.verdict == "preserved"
    assert max_rel(net(batches[1]), grown.model(batches[1])) < 1e-5
    gaps = {}
    for name, model in (("data", grown.model), ("none", plain.model)):
        outputs: list[Tensor] = []
        model.norm2.register_forward_hook(lambda m, i, o, to=outputs: to.append(o.detach()))
        whole = torch.cat(batches)
        model.eval()(whole)
        model.train()(whole)
        gaps[name] = float((outputs[0] - outputs[1])[:, 12:].abs().mean())
    assert gaps["data"] < 0.1 * gaps["none"]
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, grown.model.get_parameter(name)), name


def test_calibration_leaves_old_channels_and_copies_alone_and_twins_equal() -> None:
    net, batches = depthwise()
    grown = fxgrow.widen(net, "2x", batches[0], calibration=batches)
    assert new_entries(grown.plan)["norm1"].tolist() == [*range(12, 24)]
    for name in ("norm1", "norm2"):
        old, norm = net.get_submodule(name), grown.model.get_submodule(name)
        for buffer in ("running_mean", "running_var"):
            found = norm.get_buffer(buffer)
            assert torch.equal(found[:12], old.get_buffer(buffer))
            assert torch.equal(found[12:18], found[18:])
            assert len(found[12:18].unique()) == 6
    with pytest.raises(PlanError, match="no batch norm that keeps statistics"):
        fxgrow.widen(net, "2x", batches[0], pairing="replicate", calibration=batches)


def bad_batches() -> Iterator[tuple[str, object, str]]:
    yield "none", [], "got nothing"
    yield "wrong", [torch.zeros(1, 2)], "does not run"


@pytest.mark.parametrize(("name", "batches", "why"), [*bad_batches()])
def test_a_calibration_that_cannot_be_is_refused(name: str, batches: object, why: str) -> None:
    del name
    net, good = depthwise()
    with pytest.raises(PlanError, match=why):
        fxgrow.widen(net, "2x", good[0], calibration=batches)  # type: ignore[arg-type]
