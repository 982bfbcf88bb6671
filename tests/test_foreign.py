"""What is no weights of PyTorch's is called what it is, with the way out."""

from __future__ import annotations

import gzip
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.cli.app import app

FILES = {
    "a.gguf": (b"GGUF\x03\x00\x00\x00", "GGUF", "safetensors"),
    "renamed.bin": (b"GGUF\x03\x00\x00\x00", "GGUF", "safetensors"),
    "a.onnx": (b"\x08\x08\x12\x07pytorch", "ONNX", "state_dict()"),
    "a.h5": (b"\x89HDF\r\n\x1a\n0000", "HDF5", "state_dict()"),
    "a.npy": (b"\x93NUMPY\x01\x00", "numpy", "from_numpy"),
    "a.tflite": (b"\x1c\x00\x00\x00TFL3", "TensorFlow Lite", "state_dict()"),
    "flax_model.msgpack": (b"\x81\xa6params", "Flax", "from_flax"),
    "__0_0.distcp": (b"PK", "distributed checkpoint", "dcp_to_torch"),
    "a.ckpt.data-00000-of-00001": (b"\x00\x01", "TensorFlow", "state_dict()"),
    "a.engine": (b"\x00\x01", "TensorRT", "state_dict()"),
    "page.pt": (b"<!DOCTYPE html>\n<html>", "web page", "Download"),
    "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", "git lfs pull"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c\x00", "7z", "Unpack"),
    "config.json": (b'{"a": 1}', "JSON", "directory"),
    "plain.pkl": (pickle.dumps({"a": 1}), "pickle that torch.save did not write", "torch.save"),
}
FOLDERS = {
    "dcp": ((".metadata", "__0_0.distcp"), "distributed checkpoint", "dcp_to_torch"),
    "deepspeed": (("latest", "zero_to_fp32.py"), "DeepSpeed", "zero_to_fp32.py"),
    "peft": (("adapter_config.json", "adapter_model.safetensors"), "PEFT", "merge_and_unload"),
    "diffusers": (("model_index.json",), "diffusers", "unet"),
    "tensorflow": (("config.json", "tf_model.h5"), "TensorFlow", "from_tf"),
    "saved": (("saved_model.pb",), "SavedModel", "state_dict()"),
    "orbax": (("_CHECKPOINT_METADATA",), "JAX", "state_dict()"),
    "runs": (("epoch1.pt", "epoch2.pt"), "epoch1.pt, epoch2.pt", "Name one"),
}


def told(path: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["inspect", str(path), *options])
    assert done.exit_code == 1
    assert len(done.output.splitlines()) == 1, done.output
    return done.output


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_others_is_called_what_it_is(tmp_path, name):
    content, what, way_out = FILES[name]
    (tmp_path / name).write_bytes(content)
    text = told(tmp_path / name)
    assert str(tmp_path / name) in text
    assert what in text
    assert way_out in text.partition(what)[2]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_directory_of_others_is_called_what_it_is(tmp_path, name):
    files, what, way_out = FOLDERS[name]
    for file in files:
        (tmp_path / file).write_text("{}")
    text = told(tmp_path)
    assert what in text
    assert way_out in text.partition(what)[2]


@pytest.mark.parametrize("suffix", [".zip", ".keras", ".npz", ".tar", ".gz"])
def test_archives_are_called_what_they_are(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    (tmp_path / "x").write_text("x")
    if suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "x")
    elif suffix == ".gz":
        path.write_bytes(gzip.compress(b"x"))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.write(tmp_path / "x", "x")
    words = {".keras": "model of Keras", ".npz": "array of numpy"}
    assert words.get(suffix, "is an archive") in told(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert-base-uncased", "hf download bert-base-uncased"),
        ("timm/resnet50.a1_in1k", "hf download timm/resnet50.a1_in1k"),
        ("hf-hub:timm/resnet50.a1_in1k", "hf download timm/resnet50.a1_in1k"),
        ("https://example.org/model.pt", "download the file"),
        ("model.pt", "does not exist. Check the path.\n"),
        ("../runs/best", "does not exist. Check the path.\n"),
    ],
)
def test_a_name_that_is_no_path_is_told_what_it_may_be(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    assert words in told(Path(name))


class Own(nn.Module):
    """Saved as if it were of the script that runs."""


def test_a_class_of_the_script_that_wrote_the_file_is_told_how_to_come_by(tmp_path, monkeypatch):
    monkeypatch.setattr(Own, "__module__", "__main__")
    import __main__

    monkeypatch.setattr(__main__, "Own", Own, raising=False)
    torch.save({"model": Own()}, tmp_path / "a.pt")
    monkeypatch.delattr(__main__, "Own")
    for options in ((), ("--trust-pickle",)):
        text = told(tmp_path / "a.pt", *options)
        assert "Own of __main__" in text
        assert "trust_pickle=True" in text
        assert "--arch SCRIPT:Own" in text


def test_close_names_are_told_once(tmp_path):
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "a.pt")
    text = told(tmp_path / "a.pt", "--arch", "resnet81")
    names = text.partition("Did you mean ")[2].strip("?\n").split(", ")
    assert len(names) == len(set(names)) == 3


@pytest.mark.parametrize("name", ["a.onnx", "a.gguf", "a.h5", "a.npz", "a.zip"])
def test_nothing_is_written_under_the_name_of_another_kind(tmp_path: Path, name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.save(net, tmp_path / "net.pt")
    asked = ["widen", str(tmp_path / "net.pt"), "--width", "2x", "-o", str(tmp_path / name)]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 2
    assert name in found.stderr
    assert ".safetensors" in found.stderr
    with pytest.raises(fxgrow.PlanError, match="is the name of"):
        fxgrow.save(fxgrow.widen(net, "2x"), tmp_path / name)
    assert not (tmp_path / name).exists()
