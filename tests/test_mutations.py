"""Faults planted in every part of a run are seen by the run itself, and nothing is written.

Half of them are silent: the network computes the same on its example, or what is wrong is beside
the network. Faults that leave the function alone whatever is tried are those of formulas, see
``test_formulas.py``.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import growth_mutations
import mutations
import pytest
import torch
from growth_mutations import EXECUTOR, PLANNER
from mutations import AVERAGE, CONFIGURATION, OPTIMIZER, RECORD, WRITER, Fault, Patch, run
from torch import Tensor

import fxgrow
from fxgrow.files import copies, models, targets
from fxgrow.modules.calling import tensors_in

SECTIONS: dict[str, list[Fault]] = {
    "planner": PLANNER,
    "executor": EXECUTOR,
    "writer": [*WRITER, *AVERAGE],
    "optimizer": OPTIMIZER,
    "configuration": CONFIGURATION,
    "record": RECORD,
}
FAULTS = [fault for section in SECTIONS.values() for fault in section]
RUNS = {**mutations.RUNS, **growth_mutations.RUNS}
EXAMPLES = {**mutations.EXAMPLES, **growth_mutations.EXAMPLES}
SILENT = [fault for fault in FAULTS if fault.silent]
CHECKS = (  # of files
    (targets, "check_written"), (targets, "check_directory"), (models, "check_optimizer"),
    (copies, "check_layout"),
)  # fmt: skip
NAME = r"\w+\.\w+|breaks is \w+|'\w+'|\b_\w+"  # of a tensor, a layer or a key
FILE = r"\S*\b(net|out)\.\S+"
ROUNDING = 1e-5  # of float32, relative to the largest output


def named(fault: Fault) -> str:
    return f"{fault.run}: {fault.name}"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def output(run_name: str, folder: Path, patch: Patch, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return what the network that a run writes without any check computes on its example."""
    arguments = RUNS[run_name](folder)
    with monkeypatch.context() as patches:
        patch(patches)
        for module, check in CHECKS:
            patches.setattr(module, check, lambda *arguments, **keywords: None)
        result = run([*arguments, "--no-verify"])
    assert result.exit_code == 0, result.output
    arch = dict(itertools.pairwise(arguments)).get("--arch")
    keys = dict(part.split("=") for part in arguments if part.startswith("skip="))
    out = arguments[arguments.index("-o") + 1]
    grown = fxgrow.load(out, arch=arch, arch_arguments=keys).eval()
    with torch.no_grad():
        return tensors_in(grown(EXAMPLES[run_name]))[0]


def see(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a run ends without a file, and with words on what is wrong."""
    arguments = RUNS[fault.run](folder)
    before = files(folder)
    fault.patch(monkeypatch)
    result = run(arguments)
    told = " ".join(result.output.split())
    assert result.exit_code == (1 if fault.refused else 3), told
    assert "unexpected" not in told, told  # an error of fxgrow's own kind
    assert files(folder) == before
    where = re.escape(fault.where) if fault.where else NAME
    assert re.search(where, re.sub(FILE, "", told)), told


@pytest.mark.sweep
@pytest.mark.parametrize("name", RUNS)
def test_without_a_fault_a_run_ends_well(name: str, tmp_path: Path) -> None:
    result = run(RUNS[name](tmp_path))
    assert result.exit_code == 0, result.output


@pytest.mark.sweep
@pytest.mark.parametrize("fault", FAULTS, ids=named)
def test_a_fault_is_seen_by_the_run_and_nothing_is_written(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(fault, tmp_path, monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("fault", SILENT, ids=named)
def test_the_example_does_not_show_a_silent_fault(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any check it is written, and computes the same on the example."""
    sound, faulty = tmp_path / "sound", tmp_path / "faulty"
    for folder in (sound, faulty):
        folder.mkdir()
    want = output(fault.run, sound, lambda patches: None, monkeypatch)
    have = output(fault.run, faulty, fault.patch, monkeypatch)
    assert torch.allclose(have, want, rtol=0, atol=ROUNDING * float(want.abs().max()))


def test_there_are_enough_faults_of_each_kind_and_half_of_them_are_silent() -> None:
    assert {section for section, faults in SECTIONS.items() if len(faults) < 6} == set()
    assert len(FAULTS) >= 40
    assert len({named(fault) for fault in FAULTS}) == len(FAULTS)
    assert 2 * sum(fault.silent for fault in FAULTS) >= len(FAULTS)


@pytest.mark.parametrize("fault", [section[1] for section in SECTIONS.values()], ids=list(SECTIONS))
def test_a_fault_of_each_kind_is_seen(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(fault, tmp_path, monkeypatch)
