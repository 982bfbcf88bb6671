"""What was written is read again: every fault in writing is seen, and nothing is left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from mutations import FAULTS, RUNS, Fault, network, run
from torch import nn
from torchvision.models import resnet
from typer.testing import CliRunner

import fxgrow
from fxgrow.cli.app import app
from fxgrow.files.checkpoint.formats import FORMATS, Contents
from fxgrow.files.checkpoint.mapping import Mappings
from fxgrow.files.checkpoint.source import load_source
from fxgrow.files.checkpoint.writing import write_file

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


IMAGES = torch.randn(2, 3, 32, 32)


def spoil_on_writing(monkeypatch: pytest.MonkeyPatch, file_format: str) -> None:
    """Have a format write a network whose first number is another."""
    write = FORMATS[file_format].write

    def spoilt(contents: Contents, path: Path) -> None:
        held = contents.data
        tensors = held.parameters() if isinstance(held, nn.Module) else held.values()
        with torch.no_grad():
            first = next(iter(tensors))
            kept = first.clone()
            first.view(-1)[0] += 1
            write(contents, path)
            first.copy_(kept)

    monkeypatch.setattr(FORMATS[file_format], "write", spoilt)


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_what_is_saved_from_python_is_read_again(name, tmp_path, monkeypatch):
    net = resnet.resnet18(num_classes=3).eval()
    grown = fxgrow.widen(net, "+8", IMAGES, include="layer1.0.conv1", verify=False)
    fxgrow.save(grown, tmp_path / name)
    assert type(fxgrow.load(tmp_path / name)) is resnet.ResNet
    spoil_on_writing(monkeypatch, "torch" if name.endswith("pt") else "safetensors")
    with pytest.raises(fxgrow.VerificationError, match=r"conv1.weight\[0, 0, 0, 0\] is") as caught:
        fxgrow.save(grown, tmp_path / f"again-{name}")
    assert caught.value.exit_code == 3
    assert left_in(tmp_path) == {name}


def test_a_module_of_the_users_own_is_read_again(tmp_path, monkeypatch):
    grown = fxgrow.widen(network(), "2x", torch.randn(2, 3, 6, 6), verify=False)
    fxgrow.save(grown, tmp_path / "out.pt")
    spoil_on_writing(monkeypatch, "torch")
    with pytest.raises(fxgrow.VerificationError, match=r"stem.weight\[0, 0, 0, 0\] is"):
        fxgrow.save(grown, tmp_path / "out.pt", force=True)
    assert torch.equal(
        fxgrow.load(tmp_path / "out.pt", trust_pickle=True).stem.weight, grown.model.stem.weight
    )


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")
def test_what_became_a_graph_is_kept_by_its_weights_and_its_plan(tmp_path):
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    grown = fxgrow.widen(net, "2x", x, rescaling="default_vt", compensate=True, verify=False)
    with pytest.raises(fxgrow.SourceError, match="became a GraphModule") as caught:
        fxgrow.save(grown, tmp_path / "out.pt")
    assert "net = fxgrow.Plan.from_json(text).apply(old_network)" in caught.value.way_out
    torch.save(grown.model.state_dict(), tmp_path / "weights.pt")
    again = fxgrow.Plan.from_json(grown.plan.to_json()).apply(net)  # as the way out says
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(again(x), grown.model(x))


class Own(nn.Sequential):
    """Saved as if it were of the script that runs."""


def test_saving_a_class_of_the_script_tells_how_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Own, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Own", Own, raising=False)
    net = Own(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    grown = fxgrow.widen(net, "2x", torch.randn(3, 4), verify=False)
    with pytest.warns(fxgrow.FxgrowWarning, match=r"Own of __main__.*trust_pickle=True\) reads it"):
        fxgrow.save(grown, tmp_path / "out.pt")
    with pytest.raises(fxgrow.SourceError, match="trust_pickle=True"):
        fxgrow.load(tmp_path / "out.pt")
    loaded = fxgrow.load(tmp_path / "out.pt", trust_pickle=True)  # as both say
    assert torch.equal(loaded[0].weight, grown.model[0].weight)


def test_a_network_that_only_looks_like_a_known_one_is_pickled_whole(tmp_path):
    net = resnet.resnet18(num_classes=3).eval()
    net.layer1[0].relu = nn.GELU()
    grown = fxgrow.widen(net, "+8", IMAGES, include="layer2.0.conv1", verify=False)
    fxgrow.save(grown, tmp_path / "out.pt")
    loaded = fxgrow.load(tmp_path / "out.pt")
    torch.testing.assert_close(loaded(IMAGES), grown.model(IMAGES))
    with pytest.raises(fxgrow.SourceError, match="grew from no known architecture"):
        fxgrow.save(grown, tmp_path / "out.safetensors")


def test_a_file_that_cannot_be_read_again_is_not_kept(tmp_path, monkeypatch):
    arguments = RUNS["safetensors_file"](tmp_path)
    write = FORMATS["safetensors"].write

    def cut(contents: Contents, path: Path) -> None:
        write(contents, path)
        path.write_bytes(path.read_bytes()[:-3])

    monkeypatch.setattr(FORMATS["safetensors"], "write", cut)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3
    assert "it cannot be read" in result.stderr
    assert left_in(tmp_path) == set()


@pytest.mark.parametrize("zipped", [True, False])
def test_mapped_files_hold_the_same(zipped, tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.complex64)
    tensors = {f"{i}.weight": torch.randn(i, 3).to(dtype) for i, dtype in enumerate(dtypes, 1)}
    torch.save(tensors, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    mappings = Mappings()
    found = load_source(tmp_path / "net.pt", opener=mappings.open).state_dict
    for _ in range(2):
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        mappings.release()
    found["1.weight"].zero_()  # a copy of its own
    again = load_source(tmp_path / "net.pt").state_dict
    assert torch.equal(again["1.weight"], tensors["1.weight"])


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_files_are_as_readable_as_others_that_the_user_makes(file_format, tmp_path):
    (tmp_path / "other").touch()
    write_file(Contents({"a": torch.ones(2)}), tmp_path / "new", file_format, source=None)
    modes = {path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}
    assert len(modes) == 1
