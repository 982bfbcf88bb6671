"""On a GPU: what is made there is what is made on the CPU, bit for bit, and it is judged there."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import efficientnet_b0, resnet18, vit_b_16
from typer.testing import CliRunner

import fxgrow
from fxgrow.cli.app import app

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")
@pytest.mark.parametrize("options", [{}, {"preset": "vt"}, {"preset": "net2wider"}])
@pytest.mark.parametrize("build", [resnet18, efficientnet_b0, vit_b_16])
def test_surgery_is_the_same_on_both_devices(build, options: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    made = fxgrow.widen(model, "1.5x", verify=False, **options)
    there = made.plan.apply(copy.deepcopy(model).cuda()).state_dict()
    for name, tensor in made.model.state_dict().items():
        assert there[name].is_cuda
        assert torch.equal(there[name].cpu(), tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [resnet18, efficientnet_b0])
def test_networks_are_judged_where_they_are(build, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build().eval().to("cuda", dtype)
    found = fxgrow.widen(model, "1.5x").report.verification
    assert found.verdict == "preserved"
    assert found.eval.float64.max_rel <= 1e-10
    assert found.drawn.residual.max_rel <= 1e-10
    assert found.without_gradient == ()


def test_the_command_line_makes_the_same_file_on_both_devices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), tmp_path / "model.pt")
    files = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.pt"
        command = ["widen", str(tmp_path / "model.pt"), "--width", "2x", "--device", device]
        found = CliRunner().invoke(app, [*command, "-o", str(out)])
        assert found.exit_code == 0, found.output
        files[device] = torch.load(out)
    for name, tensor in files["cpu"].items():
        assert files["cuda"][name].device.type == "cpu"
        assert torch.equal(tensor, files["cuda"][name]), name


def test_a_planted_fault_is_found_on_the_gpu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)).cuda()
    grown = fxgrow.widen(model, "2x", verify=False).model
    with torch.no_grad():
        grown[2].weight[0, 9] += 0.1
    assert fxgrow.verify(model, grown).verdict == "failed"
