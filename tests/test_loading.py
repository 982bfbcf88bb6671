"""What is loaded when: nobody waits for a library that is not used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("networkx", "pydantic", "sympy", "triton", "torch._dynamo", "torchvision", "rich")


def loaded_by(code: str, before: str = "") -> list[str]:
    """Return the heavy libraries that a fresh interpreter loads with some code."""
    script = f"import sys\n{before}\nseen = {{*sys.modules}}\n{code}\n"
    script += f"print(*[x for x in {HEAVY} if x in sys.modules.keys() - seen])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return run.stdout.split("\n")[-2].split()


def test_a_first_widening_loads_nothing_that_it_does_not_use():
    widening = """
import fxgrow
layers = torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
fxgrow.widen(torch.nn.Sequential(*layers), "2x", rescaling="default_vt")
"""
    assert loaded_by(widening, "import torch") == []


@pytest.mark.parametrize("arguments", [["--help"], ["widen", "--help"]])
def test_help_loads_what_shows_it_alone(arguments):
    script = f"""
sys.argv = ["fxgrow", *{arguments}]
from fxgrow.cli import main
try:
    main()
except SystemExit:
    pass
"""
    assert set(loaded_by(script)) <= {"rich"}
