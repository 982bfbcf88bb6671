"""What was written is read again: every fault in writing is seen, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import FAULTS, RUNS, Fault, run

BEFORE = {"net.pt", "net.safetensors", "net", "plan.json"}


def left_in(folder: Path) -> set[str]:
    shards = {path.name for path in folder.glob("net-*.safetensors")}
    return {path.name for path in folder.iterdir()} - BEFORE - shards - {
        "net.safetensors.index.json"
    }  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_without_a_fault_all_is_written(name, tmp_path):
    result = run(RUNS[name](tmp_path))
    assert result.exit_code == 0, result.output
    assert left_in(tmp_path)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.run}: {fault.name}")
def test_a_fault_is_seen_and_nothing_is_kept(fault: Fault, tmp_path, monkeypatch):
    arguments = RUNS[fault.run](tmp_path)
    fault.patch(monkeypatch)
    result = run(arguments)
    assert result.exit_code == 3, result.output
    assert left_in(tmp_path) == set()
