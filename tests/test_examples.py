"""The examples run, and check themselves what they claim."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("quickstart.py", ["--quick", "--folder", "."], "preserved"),
        ("grow_while_training.py", ["15"], "widened by +16"),
        ("grow_fashion_mnist.py", ["--quick", "--workers", "1"], "| full method |"),
        ("r2r_growth.py", ["--quick", "--workers", "1"], "| R2DeeperR |"),
    ],
)
def test_an_example_runs(tmp_path, name, arguments, said):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_every_example_is_run():
    run = {one[0] for mark in test_an_example_runs.pytestmark for one in mark.args[1]}
    run.add("transforms_table.py")  # by test_transforms.py, which compares it with README.md
    run.add("images.py")  # what the two on real images have in common
    assert run == {path.name for path in EXAMPLES.glob("*.py")}


def test_results_are_kept_and_nothing_is_run_twice(tmp_path):
    arguments = ["--quick", "--workers", "1", "--results", str(tmp_path / "kept.jsonl")]
    runs = [
        subprocess.run(
            [sys.executable, str(EXAMPLES / "r2r_growth.py"), *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert runs[0].stdout == runs[1].stdout
    assert "4 of 4" in runs[0].stderr
    assert "of 4" not in runs[1].stderr
    assert len((tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()) == 4


def test_one_seed_tells_no_spread(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    images = importlib.import_module("images")
    assert images.mean_std([1.5]) == "1.50"
    assert images.paired({0: 2.0}, {0: 1.5, 1: 3.0}) == "+0.50"
    assert images.mean_std([1.0, 3.0]) == "2.00 ± 1.41"
    assert images.mean_error([1.0, 3.0]) == "+2.00 ± 1.00"
