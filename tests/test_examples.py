"""The examples run, and check themselves what they claim."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
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


def quick(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--quick", "--workers", "1", *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arm", "options"),
    [
        ("grow_fashion_mnist.py", "small", ["--epochs", "1"]),  # fewer than stages
        ("r2r_growth.py", "R2WiderR", ["--before", "1", "--after", "1"]),
    ],
)
def test_an_arm_alone_is_told_and_quick_takes_other_options(tmp_path, name, arm, options):
    done = quick(tmp_path, name, "--arms", arm, "--seeds", "3", *options)
    assert done.returncode == 0, done.stderr
    assert f"1 of 1: {arm}, seed 3" in done.stderr
    assert f"| {arm} |" in done.stdout


def test_what_cannot_run_is_told_in_a_line(tmp_path):
    none = quick(tmp_path, "r2r_growth.py", "--seeds")
    few = quick(tmp_path, "grow_fashion_mnist.py", "--arms", "random", "--epochs", "2")
    for done in (none, few):
        assert done.returncode
        assert "Traceback" not in done.stderr
    assert "epochs" in few.stderr.splitlines()[-1]


def test_an_interrupted_example_ends_at_once(tmp_path):
    began = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "r2r_growth.py"), "--quick", "--workers", "1",
         "--after", "1000"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    children = Path(f"/proc/{began.pid}/task/{began.pid}/children")  # where there is such a file
    for _ in range(120):
        if not children.exists() or children.read_text():
            break
        time.sleep(1)
    time.sleep(15)  # in a run, or on the way to one
    os.killpg(began.pid, signal.SIGINT)
    try:
        _, told = began.communicate(timeout=120)
    finally:
        if began.poll() is None:
            os.killpg(began.pid, signal.SIGKILL)
            began.communicate()
    assert began.returncode == 130
    assert told.startswith("Stopped")
    assert "Traceback" not in told


def test_one_seed_tells_no_spread(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    images = importlib.import_module("images")
    assert images.mean_std([1.5]) == "1.50"
    assert images.paired({0: 2.0}, {0: 1.5, 1: 3.0}) == "+0.50"
    assert images.mean_std([1.0, 3.0]) == "2.00 ± 1.41"
    assert images.mean_error([1.0, 3.0]) == "+2.00 ± 1.00"
