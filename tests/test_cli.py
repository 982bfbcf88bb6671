"""The command line: exit codes, one-line errors, what is written and what never is."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models import resnet18, squeezenet1_1
from typer.testing import CliRunner, Result

import fxgrow
from fxgrow.cli.app import app
from fxgrow.cli.arguments import parse_shapes, parse_widths
from fxgrow.cli.options import INIT_NAMES
from fxgrow.files.checkpoint import archive, formats, unpickling
from fxgrow.files.checkpoint.reading import FileReader
from fxgrow.plan.init import INITS

SHAPE = ("--input-shape", "2x3x16x16")


class Residual(nn.Module):
    """A residual network without norms, whose class a weights-only unpickler does not know."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.act = act or nn.ReLU()
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        x = x + self.conv2(self.act(self.conv1(x)))
        return self.head(x.mean((2, 3)))


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(6, 5),
    )  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Result, code: int = 1) -> str:
    """Check that a command ended with one line on stderr, and return it."""
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    return lines[0]


def saved(obj: object, path: Path) -> Path:
    torch.save(obj, path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A pickled module of torch classes, which loads without fxgrow and is quick to widen."""
    torch.manual_seed(0)
    return saved(plain(), tmp_path / "model.pt")


@pytest.fixture(scope="session")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    return saved(model.state_dict(), tmp_path_factory.mktemp("resnet") / "model.pt")


@pytest.fixture
def normless(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return saved(Residual(), tmp_path / "normless.pt")


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_widen_as_typed_writes_a_file_that_loads_and_computes_the_same(source):
    result = run("widen", source, "--width", "2x", *SHAPE)
    assert (result.exit_code, result.stderr) == (0, "")
    assert files_in(source.parent) == ["model-2x.pt", "model.pt"]
    before, after = (fxgrow.load(p) for p in (source, source.with_name("model-2x.pt")))
    assert after[0].out_channels == 8
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(before.eval()(x), after.eval()(x))
    for part in ("4 → 8", "exact", "parameters", "FLOPs", "preserved", "eval mode", "train mode"):
        assert part in result.stdout
    assert "fxgrow.load(" in result.stdout


def test_a_state_dict_of_a_known_architecture_is_recognised(resnet_file):
    out = resnet_file.with_name("out.pt")
    result = run(
        "widen", resnet_file, "--width", "2x", "--rescaling", "default_vt",
        "--input-shape", "4x3x32x32", "-o", out,
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    assert "state_dict of torchvision:resnet18(num_classes=10)" in result.stdout
    assert fxgrow.load(out).layer1[0].conv1.out_channels == 128
    verified = run("verify", resnet_file, out, "--input-shape", "4x3x32x32", "--json")
    assert verified.exit_code in (0, 3)
    assert json.loads(verified.stdout)["eval"]["float64"]["max_rel"] < 1e-5


def test_safetensors_stays_safetensors(tmp_path, resnet_file):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(torch.load(resnet_file), path)
    result = run("widen", path, "--width", "+6", "--no-verify")
    assert result.exit_code == 0, result.output
    assert fxgrow.load(tmp_path / "model-+6.safetensors").layer1[0].conv1.out_channels == 70


def test_widths_per_glob(source):
    result = run("widen", source, "--width", "0=+2", "--width", "3=8", "-o", source.parent / "o.pt",
                 *SHAPE)  # fmt: skip
    assert result.exit_code == 0, result.output
    grown = fxgrow.load(source.parent / "o.pt")
    assert (grown[0].out_channels, grown[3].out_channels) == (6, 8)


@pytest.mark.parametrize(
    ("texts", "widths"),
    [
        (["2x"], "2x"),
        (["-3x"], "-3x"),
        (["a=2x", "*=+6"], {"a": "2x", "*": "+6"}),
        (["a=2x", "+6"], {"a": "2x", "*": "+6"}),
        (["x[a=b]=3x"], {"x[a=b]": "3x"}),
    ],
)
def test_widths_are_read_in_order(texts, widths):
    assert parse_widths(texts) == widths


@pytest.mark.parametrize("text", ["", "x", "1x", "1x-3", "axb", "1x0x3", "1.5x3", "9" * 30, "²x3"])
def test_a_shape_that_is_none_is_refused(text):
    with pytest.raises(fxgrow.PlanError, match="cannot be read"):
        parse_shapes([text])


def test_the_inits_in_the_help_are_the_registered_ones():
    assert tuple(INITS) == INIT_NAMES


# ── refusals ──────────────────────────────────────────────────────────────────────────────────


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return files that cannot be widened, by what is wrong, with a word of the message."""
    whole = saved(plain().state_dict(), folder / "whole.pt").read_bytes()
    (folder / "empty.pt").touch()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("weights: 3\n")
    (folder / "folder").mkdir()
    quantized = torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8)
    return {
        "missing": (folder / "missing.pt", "does not exist"),
        "empty": (folder / "empty.pt", "empty"),
        "truncated": (folder / "truncated.pt", "truncated"),
        "text": (folder / "text.pt", "text file"),
        "directory": (folder / "folder", "directory"),
        "unrecognised": (
            saved(plain().state_dict(), folder / "unknown.pt"),
            "package.module:callable",
        ),
        "no weights": (saved({"epoch": 3}, folder / "none.pt"), "no weights"),
        "quantized": (saved({"w": quantized}, folder / "quantized.pt"), "quantized"),
    }


BROKEN = ("missing", "empty", "truncated", "text", "directory", "unrecognised", "no weights",
          "quantized")  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("command", ["widen", "inspect"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, what, command):
    path, word = broken_files(tmp_path)[what]
    there = files_in(tmp_path)
    options = ("--width", "2x") if command == "widen" else ()
    assert word in refused(run(command, path, *options))
    assert files_in(tmp_path) == there


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)

    def __init__(self, target: str) -> None:
        self.target = target


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    target = tmp_path / "ran"
    path = saved({"state_dict": Malicious(str(target))}, tmp_path / "bad.pt")
    assert "mkdir" in refused(run("widen", path, "--width", "2x"))
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(str(target))))
    assert target.exists(), "the test's own pickle does nothing"


def test_an_unknown_class_is_named_and_trust_pickle_mentioned(normless):
    message = refused(run("widen", normless, "--width", "2x"))
    assert "Residual" in message
    assert "--trust-pickle" in message


@pytest.mark.parametrize("width", ["-3x", "abc", "", "+x", "+1.5x", "2.5", "*="])
def test_a_width_that_is_none_is_wrong_usage(source, width):
    assert "width" in refused(run("widen", source, "--width", width, *SHAPE), code=2)
    assert files_in(source.parent) == ["model.pt"]


@pytest.mark.parametrize("width", ["0x", "0.5x", "2"])
def test_a_width_below_the_present_one_is_refused(source, width):
    assert "width" in refused(run("widen", source, "--width", width, *SHAPE))
    assert files_in(source.parent) == ["model.pt"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--width", "nowhere=2x"], "nowhere"),
        (["--width", "2x", "--include", "nowhere*"], "nowhere*"),
        (["--width", "2x", "--exclude", "*"], "nothing to widen"),
        (["--width", "2x", "-o", "nowhere/out.pt"], "nowhere"),
        (["--width", "2x", "--plan", "nowhere/plan.json"], "nowhere"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(source, arguments, word, monkeypatch):
    monkeypatch.chdir(source.parent)
    assert word in refused(run("widen", source, *arguments))
    assert files_in(source.parent) == ["model.pt"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--width", "2x", "--width", "3x"], "two widths"),
        (["--width", "2x", "--multiple-of", "0"], "multiple_of"),
        (["--width", "2x", "--rescaling", "vt"], "default_vt"),
        (["--width", "2x", "--pairing", "zz"], "vv_z_negz"),
        (["--width", "2x", "--preset", "zz"], "netmorph"),
        (["--width", "2x", "--init", "zz"], "copy_uniform"),
        (["--width", "2x", "--init", "nowhere:f"], "nowhere"),
        (["--width", "2x", "--where", "zz"], "stream"),
        (["--width", "2x", "--gain", "zz"], "gain"),
        (["--width", "2x", "--gain", "-1"], "gain"),
        (["--width", "2x", "--noise", "-1"], "noise"),
        (["--width", "2x", "--split-noise", "-1"], "split_noise"),
        (["--width", "2x", "--grouped", "zz"], "count"),
        (["--width", "2x", "--arch-arg", "a=1"], "--arch"),
        (["--width", "2x", "--arch", "alexnet", "--arch-arg", "a"], "KEY=VALUE"),
        (["--width", "2x", "--input-shape", "1x3xq"], "1x3xq"),
        (["--width", "2x", "--report", "x.txt"], "x.txt"),
        (["--width", "2x", "--plan", "same.json", "--report", "same.json"], "twice"),
        (["--width", "2x", "--dry-run", "-o", "out.pt"], "--dry-run"),
    ],
)
def test_wrong_usage_is_one_line(source, arguments, word, monkeypatch):
    monkeypatch.chdir(source.parent)
    assert word in refused(run("widen", source, *arguments), code=2)
    assert files_in(source.parent) == ["model.pt"]


def test_an_existing_output_needs_force(source):
    out = source.with_name("model-2x.pt")
    out.write_text("precious")
    assert "--force" in refused(run("widen", source, "--width", "2x", *SHAPE))
    assert out.read_text() == "precious"
    assert run("widen", source, "--width", "2x", "--force", *SHAPE).exit_code == 0
    assert fxgrow.load(out)[0].out_channels == 8


def test_the_source_is_never_written_to(source):
    before = source.read_bytes()
    for option in ("-o", "--plan"):
        arguments = ("--width", "2x", option, source, "--force", *SHAPE)
        assert "source" in refused(run("widen", source, *arguments))
    assert source.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(source):
    source.parent.chmod(0o500)
    try:
        assert "not writable" in refused(run("widen", source, "--width", "2x"))
    finally:
        source.parent.chmod(0o700)


def test_wrong_usage_ends_with_2():
    for arguments in (["widen"], ["nonsense"], ["widen", "a.pt", "--wdith", "2x"]):
        assert run(*arguments).exit_code == 2


def test_the_members_of_an_archive_are_looked_up_once(source, monkeypatch):
    looked, read = [], archive.read_archive

    def look(file: FileReader) -> archive.Archive:
        looked.append(file.path)
        return read(file)

    for user in (formats, unpickling):
        monkeypatch.setattr(user, "read_archive", look)
    assert run("widen", source, "--width", "2x", *SHAPE).exit_code == 0
    assert looked.count(source) == 1
    assert len(looked) == 2  # and what was written, to be compared with what was judged


def test_an_unexpected_error_is_one_line_and_a_traceback_with_debug(source, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("cannot happen")

    monkeypatch.setattr("fxgrow.api.widen.plan", broken)
    message = refused(run("widen", source, "--width", "2x"))
    assert "ZeroDivisionError: cannot happen" in message
    assert "--debug" in message
    result = run("--debug", "widen", source, "--width", "2x")
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interrupt_ends_with_130(source, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxgrow.api.widen.plan", interrupt)
    assert run("widen", source, "--width", "2x").exit_code == 130
    assert files_in(source.parent) == ["model.pt"]


# ── what preserves and what does not ──────────────────────────────────────────────────────────


VT = ("--width", "2x", "--rescaling", "default_vt", "--trust-pickle", *SHAPE)


def test_strict_refuses_what_is_scaled_and_writes_nothing(normless):
    for extra in ((), ("--dry-run", "--plan", normless.parent / "plan.json")):
        result = run("widen", normless, *VT, "--include", "conv1", "--strict", *extra)
        assert "conv1" in refused(result, code=4)
        assert files_in(normless.parent) == ["normless.pt"]


def test_a_scaled_group_is_announced_with_its_reason(normless):
    result = run("widen", normless, *VT)
    assert result.exit_code == 0, result.output
    for part in ("scaled", "0.7071", "because:", "as predicted", "predicted"):
        assert part in result.stdout


def test_compensate_preserves(normless):
    result = run("widen", normless, *VT, "--compensate")
    assert result.exit_code == 0, result.output
    assert "preserved" in result.stdout
    assert "GraphModule" in result.stderr


def test_no_pairing_is_announced_as_not_preserving(source):
    result = run("widen", source, "--width", "2x", "--preset", "random", *SHAPE)
    assert result.exit_code == 0, result.output
    assert "do not cancel" in result.stdout
    assert "cannot say by how much" in result.stdout


def test_nan_weights_are_named_once_and_widened_all_the_same(source):
    model = plain()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    saved(model, source)
    result = run("widen", source, "--width", "2x", *SHAPE)
    assert result.exit_code == 0, result.output
    assert [line.split()[1] for line in result.stderr.splitlines()] == ["0.weight"]
    assert source.with_name("model-2x.pt").exists()


# ── plans, reports, inspection, verification ──────────────────────────────────────────────────


def test_a_plan_from_a_dry_run_gives_the_same_file_as_widen(source):
    plan, out = source.with_name("plan.json"), source.with_name("out.pt")
    result = run("widen", source, "--width", "2x", "--dry-run", "--plan", plan, *SHAPE)
    assert result.exit_code == 0, result.output
    assert files_in(source.parent) == ["model.pt", "plan.json"]
    assert run("apply", plan, source, "-o", out, *SHAPE).exit_code == 0
    assert run("widen", source, "--width", "2x", *SHAPE).exit_code == 0
    first, second = (fxgrow.load(p).state_dict() for p in (out, source.with_name("model-2x.pt")))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "exists" in refused(run("apply", plan, source, *SHAPE))


def test_a_plan_is_refused_on_another_network(source):
    plan = source.with_name("plan.json")
    run("widen", source, "--width", "2x", "--dry-run", "--plan", plan, *SHAPE)
    other = saved(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), source.parent / "o.pt")
    refused(run("apply", plan, other, *SHAPE))
    refused(run("apply", source, source, *SHAPE))
    plan.write_text("{}")
    refused(run("apply", plan, source, *SHAPE))
    assert files_in(source.parent) == ["model.pt", "o.pt", "plan.json"]


def test_a_plan_runs_no_code_unasked(source, tmp_path, monkeypatch):
    (tmp_path / "myinit.py").write_text(
        "def fill(tensor, reference, fan_in):\n    tensor.zero_()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan = tmp_path / "plan.json"
    made = ("widen", source, "--width", "2x", "--init", "myinit:fill", *SHAPE)
    assert run(*made, "--dry-run", "--plan", plan).exit_code == 0
    assert "--init" in refused(run("apply", plan, source, *SHAPE))
    assert run("apply", plan, source, "--init", "myinit:fill", *SHAPE).exit_code == 0


@pytest.mark.parametrize("suffix", [".json", ".html"])
def test_a_report_is_written_beside_the_model(source, suffix):
    report = source.with_name(f"report{suffix}")
    result = run("widen", source, "--width", "2x", "--report", report, *SHAPE)
    assert result.exit_code == 0, result.output
    text = report.read_text(encoding="utf-8")
    if suffix == ".json":
        assert json.loads(text)["verification"]["verdict"] == "preserved"
    else:
        assert "α" in text
        assert "preserved" in text


def test_inspect_shows_groups_blocks_and_pins(normless):
    result = run("inspect", normless, "--trust-pickle", *SHAPE)
    assert result.exit_code == 0, result.output
    for part in (
        "residual blocks",
        "conv1 → relu → conv2",
        "stream",
        "pinned, because",
        "an output",
    ):
        assert part in result.stdout
    as_json = run("inspect", normless, "--trust-pickle", "--json", *SHAPE)
    found = json.loads(as_json.stdout)
    assert [block["skip"] for block in found["blocks"]] == ["identity"]


def test_verify_ends_with_3_where_a_weight_was_changed(source):
    assert run("widen", source, "--width", "2x", *SHAPE).exit_code == 0
    out = source.with_name("model-2x.pt")
    assert run("verify", source, out, *SHAPE).exit_code == 0
    model = fxgrow.load(out)
    with torch.no_grad():
        model[3].weight[0, -1] += 0.1
    torch.save(model, out)
    result = run("verify", source, out, *SHAPE)
    assert "different functions" in refused(result, code=3)
    assert "failed" in result.stdout


def test_verify_of_unlike_networks_names_the_file_that_does_not_run(tmp_path):
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    torch.save(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), one)
    torch.save(plain(), other)
    text = refused(run("verify", one, other), code=3)
    assert text.startswith(f"error: {one} and {other} compute different functions")
    assert "verify=False" not in text
    text = refused(run("verify", one, other, *SHAPE), code=3)
    assert "the first network, a Sequential, does not run on 2x3x16x16" in text


def test_two_reports_are_both_written(source):
    reports = source.with_name("r.json"), source.with_name("r.html")
    both = [part for path in reports for part in ("--report", path)]
    assert run("widen", source, "--width", "2x", "--no-verify", *SHAPE, *both).exit_code == 0
    assert json.loads(reports[0].read_text())["schema"] == 1
    assert "<html" in reports[1].read_text().lower()


# ── the process ───────────────────────────────────────────────────────────────────────────────


def python(*code: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, check=False, **keywords
    )


@pytest.mark.parametrize(
    "arguments", [[], ["widen"], ["apply"], ["inspect"], ["verify"]], ids=lambda a: a and a[0]
)
def test_help_needs_no_torch(arguments: Sequence[str]):
    code = (
        "import sys\nfrom fxgrow.cli import main\n"
        f"sys.argv = ['fxgrow', *{list(arguments)!r}, '--help']\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Usage: fxgrow" in done.stdout


def test_the_module_is_the_command():
    done = python("-m", "fxgrow", "--version")
    assert done.stdout.strip() == f"fxgrow {fxgrow.__version__}"


def test_a_closed_pipe_is_no_traceback(source):
    command = f"{sys.executable} -m fxgrow inspect {source} {' '.join(SHAPE)} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_morph_kernel_writes_a_file_that_loads_and_computes_the_same(source):
    result = run("morph-kernel", source, "--size", "0=5", "--size", "+4", *SHAPE)
    assert (result.exit_code, result.stderr) == (0, "")
    assert files_in(source.parent) == ["model-kernel_0=5_=+4.pt", "model.pt"]
    grown = fxgrow.load(source.with_name("model-kernel_0=5_=+4.pt"))
    assert [grown[0].kernel_size, grown[3].kernel_size] == [(5, 5), (7, 7)]
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(grown.eval()(x), fxgrow.load(source).eval()(x))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "1"], 1, "would shrink to 1x1"),
        (["--size", "5", "--include", "6"], 1, "matches no layer with a kernel. Near it: 0, 3"),
        (["--size", "5", "--size", "7"], 2, "there are two sizes for '*'"),
        (["--size", "huge"], 2, "cannot be read"),
    ],
)
def test_kernels_that_cannot_be_had_are_refused_in_one_line(source, arguments, code, message):
    assert message in refused(run("morph-kernel", source, *arguments, *SHAPE), code)
    assert files_in(source.parent) == ["model.pt"]


def test_an_output_that_cannot_be_printed_does_not_make_a_written_one_a_failure(tmp_path):
    torch.save(squeezenet1_1(num_classes=4).state_dict(), tmp_path / "m.pt")
    command = [sys.executable, "-m", "fxgrow", "widen", "m.pt", "--width", "2x", "--no-verify"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "-o", "full.pt"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, (tmp_path / "full.pt").exists()) == (0, True)
    assert "full.pt was written, but not its report" in done.stderr
    closed = f"exec {shlex.join([*command, '-o', 'closed.pt'])} >&-"
    done = subprocess.run(
        ["bash", "-c", closed], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, (tmp_path / "closed.pt").exists()) == (0, True)


def test_arguments_of_apply_that_are_swapped_are_told(tmp_path):
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "m.pt")
    done = subprocess.run(
        [sys.executable, "-m", "fxgrow", "apply", "m.pt", "plan.json", "-o", "o.pt"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert (
        done.stderr == "error: m.pt holds weights, not a plan. The plan comes first: PLAN SOURCE.\n"
    )


@pytest.mark.parametrize("shape", ["2x5:int64", "2,5:long", "2x5"])
def test_a_shape_may_be_that_of_token_ids(tmp_path, shape):
    path = saved(token_network().state_dict(), tmp_path / "a.pt")
    arch = ("--arch", "test_cli:token_network", "--input-shape", shape, "--verify", "quick")
    done = run("widen", path, "--width", "2x", *arch)
    assert done.exit_code == 0, done.output


def token_network() -> nn.Module:
    layers = (nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return nn.Sequential(nn.Embedding(9, 4), *layers)


def test_a_preset_and_what_contradicts_it_are_not_both_taken(tmp_path):
    path = saved(token_network().state_dict(), tmp_path / "a.pt")
    for options in (("vt", "--rescaling", "none"), ("netmorph", "--pairing", "vv_z_negz")):
        told = run("widen", path, "--width", "2x", "--preset", *options)
        assert told.exit_code == 2
        assert f"--preset {options[0]} means {options[1]}" in told.stderr
