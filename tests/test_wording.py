"""Messages name options on the command line, and arguments in Python."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.cli.base import app
from fxgrow.errors import FxgrowWarning
from fxgrow.wording import in_options, worded

PACKAGE = Path(fxgrow.__file__).parent

SAID = {
    "Use --rescaling none, or --compensate where": 'Use rescaling="none", or compensate=True where',
    "--rescaling 'a.*=none' (and 2 more) --rescaling '*=default_vt'":
        'rescaling={"a.*": "none", "*": "default_vt"} (and 2 more)',
    "Give --input-shape 1x5x8x8, with": "Give example_inputs=torch.randn(1, 5, 8, 8), with",
    "Give --input-shape 1x16:int64.": "Give example_inputs=torch.zeros(1, 16, dtype=torch.int64).",
    "with --arch (and --arch-arg):": "with arch (and arch_arguments):",
    "--arch my.nets:net. --arch-arg num_classes=10.":
        'arch="my.nets:net". arch_arguments={"num_classes": 10}.',
    "Leave it out (--exclude 'a.*'), or write: -o model.safetensors.":
        'Leave it out (exclude="a.*"), or write: out="model.safetensors".',
    "Give one: --init tiny --data batches.pt.": "Give one: init=fxgrow.Tiny(loss_fn, batches).",
    "See `fxgrow inspect`; `fxgrow apply P S --data b.pt`, --where":
        "See `fxgrow.inspect`; `fxgrow apply P S --data b.pt`, where",
    "well-off, a -o, --archive and --where-ever": "well-off, a out, --archive and --where-ever",
}  # fmt: skip


@pytest.mark.parametrize("text", SAID)
def test_options_are_told_as_arguments_in_python_alone(text):
    assert worded(text) == worded(worded(text)) == SAID[text]
    with in_options():
        assert worded(text) == text


def test_errors_warnings_and_reports_are_worded():
    error = fxgrow.PlanError("no --untie.", way_out="Use --where all.")
    assert (error.message, error.way_out) == ("no untie=True.", 'Use where="all".')
    assert str(error) == 'no untie=True. Use where="all".'
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("leave it (--exclude)", FxgrowWarning, stacklevel=1)
    assert str(caught[0].message) == "leave it (exclude)"


def test_one_refusal_in_python_and_on_the_command_line(tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))
    with pytest.raises(fxgrow.NotPreservedError) as caught:
        fxgrow.widen(net, "2x", rescaling="default_vt", strict=True)
    assert 'rescaling="none"' in str(caught.value)
    assert "--" not in str(caught.value)
    torch.save(net, path := tmp_path / "net.pt")
    told = ["widen", str(path), "--width", "2x", "--rescaling", "default_vt", "--strict"]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 4
    assert "--rescaling none" in done.stderr


def test_no_message_says_both():
    both = re.compile(r"--[\w-]+ \(\w+=|\(\w+=\S+, --[a-z]")
    named = [p.name for p in PACKAGE.rglob("*.py") if both.search(p.read_text(encoding="utf-8"))]
    assert not named


NET = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_a_whole_number_is_a_width():
    wide = fxgrow.widen(NET, 16)
    assert wide.model[0].out_features == 16
    assert wide.plan.request.width == "16"
    assert fxgrow.widen(NET, {"0": 12, "*": "2x"}).model[0].out_features == 12
    for wrong in (True, 2.0, ["2x"], {"0": None}):
        with pytest.raises(fxgrow.FxgrowError, match="cannot be read"):
            fxgrow.widen(NET, wrong)  # type: ignore[arg-type]


def test_a_report_has_what_was_refused():
    net = nn.Sequential(
        nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    report = fxgrow.widen(net, "2x", where="all").report
    told = [(refusal.name, refusal.reason) for refusal in report.refused]
    assert told
    assert told == [(each["name"], each["reason"]) for each in report.to_dict()["refused"]]


def test_the_inputs_that_operations_are_counted_for_are_no_ratio():
    batches = [(torch.randn(20, 4), torch.randn(20, 5))]
    tiny = fxgrow.Tiny(nn.functional.mse_loss, batches)
    narrow = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 5))
    assert "for inputs of 2x4" in str(fxgrow.widen(narrow, "2x", init=tiny).report)
    assert "for one input of 4" in str(fxgrow.widen(NET, "2x").report)


def test_a_weight_is_not_rescaled_for_fewer_inputs():
    with pytest.raises(fxgrow.PlanError, match="fan_in 8 would have 4, and fxgrow only grows"):
        fxgrow.apply_rescaling(torch.randn(4, 8), "default_vt", new_fan_in=4)
    kept = fxgrow.apply_rescaling(weight := torch.randn(4, 8), "default_vt", new_fan_in=8)
    assert torch.equal(kept, weight)
