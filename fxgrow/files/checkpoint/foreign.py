"""What files and directories are that hold no weights of PyTorch's, and the way out of each.

Told by the first bytes where a format has a mark, else by names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from fxgrow.errors import UsageError, shown
from fxgrow.files.checkpoint.addresses import WEIGHT_SUFFIXES
from fxgrow.files.checkpoint.reading import Readable, refuse_source

STATE_DICT = "torch.save(model.state_dict(), 'model.pt')"
_SAVE = f"Load it where it comes from, and save its weights: {STATE_DICT}."
_UNPACK = "Unpack it, and give the file with the weights."
_LISTED = 5


@dataclass(frozen=True)
class _Kind:
    """A kind of files or directories.

    Attributes:
        what: what it is called.
        way_out: what the user can do.
        marks: pairs of a place in a file and the bytes that stand there.
        names: patterns of the file's name; for a directory, of what lies in it.
    """

    what: str
    way_out: str
    marks: tuple[tuple[int, bytes], ...] = ()
    names: tuple[str, ...] = ()


_FILES = (
    _Kind("a Git LFS pointer, not the file itself", "Run: git lfs pull.",
          ((0, b"version https://git-lfs"),)),
    _Kind("a web page, not the file itself", "Download the file, not the page that shows it.",
          ((0, b"<!DOCTYPE"), (0, b"<!doctype"), (0, b"<html"))),
    _Kind("a GGUF file of llama.cpp", "Give the model that it was made from: the directory of the "
          "Hugging Face model, or its safetensors.", ((0, b"GGUF"), (0, b"lmgg"), (0, b"tjgg")),
          ("*.gguf",)),
    _Kind("an ONNX model, which is a graph without PyTorch's modules",
          "Give the weights of the PyTorch model that it was exported from: " + STATE_DICT + ".",
          ((2, b"\x12\x07pytorch"), (2, b"\x12\x04onnx")), ("*.onnx",)),
    _Kind("an HDF5 file, as Keras writes weights", "Load the weights into a PyTorch model, and "
          f"save those: {STATE_DICT}.", ((0, b"\x89HDF\r\n\x1a\n"),), ("*.h5", "*.hdf5")),
    _Kind("a model of Keras", "Load the weights into a PyTorch model, and save those: "
          f"{STATE_DICT}.", (), ("*.keras",)),
    _Kind("an array of numpy's", "Put its numbers into a state_dict by name: torch.save({name: "
          "torch.from_numpy(array), …}, 'model.pt').", ((0, b"\x93NUMPY"),), ("*.npz", "*.npy")),
    _Kind("a shard of a distributed checkpoint (torch.distributed.checkpoint)",
          "Join them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIRECTORY "
          "model.pt.", (), ("*.distcp",)),
    _Kind("a TensorFlow Lite model", _SAVE, ((4, b"TFL3"),), ("*.tflite",)),
    _Kind("a TensorFlow checkpoint or graph", "Convert it with the library that the model is of "
          f"(transformers, timm), and save the result: {STATE_DICT}.", (),
          ("*.ckpt.index", "*.ckpt.meta", "*.data-*-of-*", "*.pb", "checkpoint")),
    _Kind("weights of Flax (msgpack)", "Convert them with the library that the model is of: "
          "transformers 4 does by from_pretrained(DIRECTORY, from_flax=True).save_pretrained(…).",
          (), ("*.msgpack",)),
    _Kind("a Core ML model", _SAVE, (), ("*.mlmodel", "*.mlpackage")),
    _Kind("a TensorRT engine, which is compiled code", _SAVE, (), ("*.engine", "*.plan", "*.trt")),
    _Kind("an archive (tar)", _UNPACK, ((257, b"ustar"),)),
    _Kind("an archive (gzip)", _UNPACK, ((0, b"\x1f\x8b"),)),
    _Kind("an archive (bzip2)", _UNPACK, ((0, b"BZh"),)),
    _Kind("an archive (xz)", _UNPACK, ((0, b"\xfd7zXZ\x00"),)),
    _Kind("an archive (zstd)", _UNPACK, ((0, b"\x28\xb5\x2f\xfd"),)),
    _Kind("an archive (7z)", _UNPACK, ((0, b"7z\xbc\xaf\x27\x1c"),)),
    _Kind("an archive (zip) that torch.save did not write", _UNPACK, (), ("*.zip", "*.mar")),
)  # fmt: skip
_FOLDERS = (
    _Kind("a distributed checkpoint (torch.distributed.checkpoint)",
          "Join it into one file: python -m torch.distributed.checkpoint.format_utils "
          "dcp_to_torch {path} model.pt.", (), ("*.distcp", ".metadata")),
    _Kind("a checkpoint of DeepSpeed", "Join it into one file: python {path}/zero_to_fp32.py "
          "{path} model.pt.", (), ("zero_to_fp32.py", "*_model_states.pt")),
    _Kind("an adapter of PEFT, which holds no weights of the model itself", "Merge it into the "
          "model first: model.merge_and_unload().save_pretrained(…).", (),
          ("adapter_config.json", "adapter_model.*")),
    _Kind("a pipeline of diffusers", "Name the weights of one of its models, with --arch: "
          "{path}/unet/diffusion_pytorch_model.safetensors.", (), ("model_index.json",)),
    _Kind("a SavedModel of TensorFlow", _SAVE, (), ("saved_model.pb",)),
    _Kind("a checkpoint of TensorFlow", "Convert it with the library that the model is of, and "
          f"save the result: {STATE_DICT}.", (), ("*.data-*-of-*", "*.ckpt.index")),
    _Kind("a checkpoint of JAX (Orbax)", "Convert it with the library that the model is of, and "
          f"save the result: {STATE_DICT}.", (), ("_CHECKPOINT_METADATA", "manifest.ocdbt")),
    _Kind("a model of Keras or TensorFlow", "Convert it with transformers 4: from_pretrained("
          "DIRECTORY, from_tf=True).save_pretrained(…).", (), ("tf_model*.h5",)),
    _Kind("a model of Flax", "Convert it with transformers 4: from_pretrained(DIRECTORY, "
          "from_flax=True).save_pretrained(…).", (), ("flax_model*.msgpack",)),
)  # fmt: skip


def refuse_foreign(path: Path, file: Readable) -> None:
    """Refuse a file or directory of a kind that is known to be another's; else return.

    Args:
        path: the file or directory.
        file: its bytes.

    Raises:
        SourceError: it is of such a kind.
    """
    if os.path.isdir(path):
        _refuse_folder(path)
        return
    if (kind := _kind_of(path, file)) is not None:
        refuse_source(path, f"is {kind.what}", kind.way_out)


def foreign_kind(path: Path, file: Readable) -> str:
    """Return what a file is called that may hold weights as others keep them; "" for the rest.

    Args:
        path: the file.
        file: its bytes.
    """
    kind = _kind_of(path, file)
    return "" if kind is None or "not the file itself" in kind.what else kind.what


def _kind_of(path: Path, file: Readable) -> _Kind | None:
    for kind in _FILES:
        marked = any(_has(file, place, mark) for place, mark in kind.marks)
        if marked or any(fnmatch(path.name.lower(), pattern) for pattern in kind.names):
            return kind
    return None


def refuse_foreign_output(out: Path) -> None:
    """Refuse to write weights of PyTorch's under a name that another's kind of file has.

    Raises:
        UsageError: the name is of such a kind.
    """
    for kind in _FILES:
        suffixes = (pattern for pattern in kind.names if pattern.startswith("*."))
        if any(fnmatch(out.name.lower(), suffix) for suffix in suffixes):
            raise UsageError(
                f"{shown(str(out))} is the name of {kind.what}, which is not what fxgrow writes.",
                name=str(out),
                way_out="Give a name in .pt, .pth, .safetensors or .pt2, or a directory's.",
            )


def _has(file: Readable, place: int, mark: bytes) -> bool:
    end = place + len(mark)
    return file.size >= end and file.read(place, len(mark)) == mark


def _refuse_folder(path: Path) -> None:
    """Refuse a directory of a known kind, or one with files of weights, which are named."""
    names = sorted(os.listdir(path))
    for kind in _FOLDERS:
        if any(fnmatch(name, pattern) for pattern in kind.names for name in names):
            refuse_source(path, f"is {kind.what}", kind.way_out.format(path=path))
    files = [name for name in names if name.lower().endswith(WEIGHT_SUFFIXES)]
    if files:
        more = ", …" if len(files) > _LISTED else ""
        told = ", ".join(shown(name, 60) for name in files[:_LISTED])
        what = "is a directory without a config.json or a file of the name that libraries look for"
        refuse_source(path, f"{what}; it has {told}{more}", f"Name one: {path / files[0]}.")
