"""A directory with a model in it: weights, mostly a ``config.json``, and what goes with them.

This is how Hugging Face libraries keep models. Which weights a directory holds is told by the names
that these libraries use; the first of :data:`_WEIGHTS` counts.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fxgrow.checkpoint.formats import (
    FORMATS,
    Contents,
    FileFormat,
    sniff,
)
from fxgrow.checkpoint.reading import refuse_damaged, refuse_source

CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = (_SINGLE, _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
# Weights in this or another form, and an optimizer's state: the new ones would belie them.
_OLD = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json",
    "consolidated*.pth", "tf_model*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot",
    "optimizer.pt", "optimizer.bin", ".git", ".cache",
)  # fmt: skip


class _Directory(FileFormat):
    name = "directory"

    def sniff(self, path: Path, head: bytes) -> bool:
        return holds_model(path)

    def read(self, path: Path, *, trust_pickle: bool) -> Contents:
        weights = next((path / name for name in _WEIGHTS if (path / name).exists()), None)
        if weights is None:
            names = ", ".join(_WEIGHTS)
            refuse_source(path, f"has a {CONFIG} but none of {names}", "Copy the weights too.")
        contents = sniff(weights).read(weights, trust_pickle=trust_pickle)
        contents.folder = path
        contents.config = _read_config(path / CONFIG)
        return contents

    def write(self, contents: Contents, path: Path) -> None:
        path.mkdir()
        if contents.folder is not None:
            _copy_others(contents.folder, path)
        if contents.config is not None:
            text = json.dumps(contents.config, indent=2, ensure_ascii=False)
            (path / CONFIG).write_text(text + "\n", encoding="utf-8")
        if contents.shards is None:
            FORMATS["safetensors"].write(contents, path / _SINGLE)
        else:
            FORMATS["sharded"].write(contents, path / _INDEX)


FORMATS.register(_Directory.name)(_Directory())


def holds_model(path: Path) -> bool:
    """Return whether a path is a directory with weights or a model's configuration in it."""
    return path.is_dir() and any((path / name).exists() for name in (CONFIG, *_WEIGHTS))


def left_out(folder: Path) -> list[str]:
    """Return what a copy of a model's directory goes without, apart from the weights it read."""
    weights = next((name for name in _WEIGHTS if (folder / name).exists()), "")
    shards: set[str] = set()
    if weights.endswith(".index.json"):
        shards = set(
            json.loads((folder / weights).read_text(encoding="utf-8"))["weight_map"].values()
        )
    return [name for name in _old(folder) if name not in {weights, *shards, ".git", ".cache"}]


def _old(folder: Path) -> list[str]:
    """Return the names in a directory of what does not fit new weights."""
    names = sorted(entry.name for entry in folder.iterdir())
    return [name for name in names if any(fnmatch(name, glob) for glob in _OLD)]


def _copy_others(folder: Path, path: Path) -> None:
    """Copy what goes with the weights: a tokenizer, the settings for generation, a description."""
    old = _old(folder)
    for entry in sorted(folder.iterdir()):
        if entry.name in old or entry.name == CONFIG:
            continue
        if entry.is_dir():
            shutil.copytree(entry, path / entry.name)
        else:
            shutil.copy2(entry, path / entry.name)


def _read_config(path: Path) -> dict[str, Any] | None:
    """Return a model's configuration, or None where there is none.

    Raises:
        SourceError: it is no JSON object.
    """
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        refuse_damaged(path, str(error), error)
    if not isinstance(config, dict):
        refuse_source(path, "is not a JSON object", "Copy or download it again.")
    return config
