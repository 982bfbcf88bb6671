"""A run that is killed at any stage of growth goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).with_name("killed_run.py")
# A run sees 24 samples in each of 5 epochs, and grows before the second, the third and the fifth.
# Each number is how many one process sees before it ends, in the middle of an epoch.
KILLS = {"loop": (12, 36, 50), "lightning": (34, 58), "trainer": (34, 58)}
NEEDS = {"loop": "torch", "lightning": "lightning", "trainer": "accelerate"}


def run(kind: str, folder: Path, samples: int | None = None) -> None:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), kind, str(folder)]
    done = subprocess.run(
        [*command, *([str(samples)] if samples else [])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if samples else 0), done.stderr


def result(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "final.pt", weights_only=True)
    return found


@pytest.mark.parametrize("kind", KILLS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(kind, tmp_path):
    if importlib.util.find_spec(NEEDS[kind]) is None:
        pytest.skip(f"{NEEDS[kind]} is not installed")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    run(kind, whole)
    for samples in KILLS[kind]:
        run(kind, killed, samples)
    run(kind, killed)
    expected, found = result(whole), result(killed)
    assert {name: t.shape for name, t in found.items()} == {n: t.shape for n, t in expected.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (weight,) = (
        t
        for name, t in expected.items()
        if name.endswith("net.blocks.1.conv1.weight") and "module" not in name
    )
    assert weight.shape[0] == 12  # all three growths were seen
