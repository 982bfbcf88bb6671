"""Every block of code in README.md runs: its Python, and its fxgrow commands on a small model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from typer.testing import CliRunner

from fxgrow.cli.app import app
from fxgrow.plan.init import INITS
from fxgrow.plan.pairing import PAIRINGS
from fxgrow.plan.presets import PRESETS
from fxgrow.plan.rescaling import RESCALINGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["--input-shape", "2x3x32x32"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[list[str], list[str]]]:
    """Yield each command and the lines of output that README.md shows below it."""
    for block in blocks("console"):
        for part in re.split(r"^\$ fxgrow ", block, flags=re.MULTILINE)[1:]:
            command, *shown = part.splitlines()
            yield shlex.split(command), [line.rstrip() for line in shown if line not in ("", "…")]
        assert block.startswith("$ fxgrow "), block


def test_every_block_is_of_a_kind_that_is_run():
    assert set(re.findall(r"^```(\w+)$", README, flags=re.MULTILINE)) == {"sh", "console", "python"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of README.md have been run in order."""
    path = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=10).state_dict(), path / "model.pt")
    layers = (nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 4))
    torch.save(nn.Sequential(*layers), path / "mlp.pt")
    torch.save([(torch.randn(32, 8), torch.randint(4, (32,)))], path / "batches.pt")
    return path


def test_the_commands_and_then_the_python_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    for index, (command, shown) in enumerate(commands()):
        # The first command as it stands; the others need not all be measured.
        unmeasured = ["--no-verify"] if index and command[0] not in ("inspect", "verify") else []
        small = [] if "mlp.pt" in command else SMALL
        result = CliRunner().invoke(app, [*command, *small, *unmeasured])
        assert result.exit_code == 0, f"{command}: {result.output}"
        printed = {line.rstrip() for line in result.stdout.splitlines()}
        assert not [line for line in shown if line not in printed], result.stdout
    try:
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    finally:
        INITS._entries.pop("tenths", None)  # which one of them registers


def test_the_setup_commands_are_those_that_ci_runs():
    install, test = (block.strip() for block in blocks("sh"))
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert test in script
    assert "examples/quickstart.py" in install


@pytest.mark.parametrize("names", [RESCALINGS, PAIRINGS, INITS, PRESETS])
def test_every_name_has_a_row(names):
    missing = [name for name in names if f"\n| `{name}`" not in README]
    assert not missing
