"""A directory with a model in it: weights, mostly a ``config.json``, and what goes with them.

This is how Hugging Face libraries keep models. Which weights a directory holds is told by the names
that these libraries use; the first of :data:`WEIGHTS` counts.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fxgrow.files.checkpoint.foreign import refuse_foreign
from fxgrow.files.checkpoint.formats import FORMATS, Candidate, Contents, FileFormat, read_file
from fxgrow.files.checkpoint.reading import (
    AGAIN,
    FileReader,
    parse_json,
    read_bytes,
    refuse_source,
    refuse_unreadable,
)
from fxgrow.files.checkpoint.safetensors_files import check_inside, read_index

CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
WEIGHTS = (_SINGLE, _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
# Weights in this or another form, and an optimizer's state: the new ones would belie them.
_OLD = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json",
    "consolidated*.pth", "tf_model*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot",
    "optimizer.pt", "optimizer.bin", ".git", ".cache",
)  # fmt: skip
_NEVER = (".git", ".cache")  # neither read nor told of
_CONFIG_LIMIT = 16 << 20  # bytes; with the labels of 21000 classes it has 1 MB
_PIECE = 16 << 20  # bytes that are copied at once


class _Directory(FileFormat):
    name = "directory"

    def sniff(self, found: Candidate) -> bool:
        return holds_model(found.path)

    def read(self, found: Candidate, *, trust_pickle: bool) -> Contents:
        path = found.path
        for _ in _files(path, skipped=_NEVER):  # each is checked
            pass
        weights = next((path / name for name in WEIGHTS if (path / name).exists()), None)
        if weights is None:
            refuse_foreign(path, found.file)
            names = ", ".join(WEIGHTS)
            refuse_source(path, f"has a {CONFIG} but none of {names}", "Copy the weights too.")
        check_inside(path, weights)
        _, contents = read_file(weights, trust_pickle=trust_pickle, opener=found.opener)
        contents.folder = path
        if os.path.lexists(path / CONFIG):
            contents.config = read_config(path / CONFIG, inside=True)
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
    return path.is_dir() and any((path / name).exists() for name in (CONFIG, *WEIGHTS))


def left_out(folder: Path) -> list[str]:
    """Return what a copy of a model's directory goes without, apart from the weights it read."""
    weights = next((name for name in WEIGHTS if (folder / name).exists()), "")
    is_index = weights.endswith(".index.json")
    shards = set(read_index(folder / weights)[0].values()) if is_index else set()
    return [name for name in _old(folder) if name not in {weights, *shards, *_NEVER}]


def is_weights(name: str) -> bool:
    """Return whether a file of this name holds weights, or what goes with those alone."""
    return any(fnmatch(name, glob) for glob in _OLD)


def others(folder: Path) -> Iterator[Path]:
    """Yield the files of a directory that go with any weights, and are copied.

    Raises:
        SourceError: something there is no file of the directory.
    """
    yield from _files(folder, skipped=(*_old(folder), CONFIG))


def _old(folder: Path) -> list[str]:
    """Return the names in a directory of what does not fit new weights."""
    return [name for name in sorted(entry.name for entry in folder.iterdir()) if is_weights(name)]


def _copy_others(folder: Path, path: Path) -> None:
    """Copy what goes with the weights: a tokenizer, the settings for generation, a description.

    Raises:
        SourceError: something there is no file of the directory, or there is no room for all.
    """
    files = list(others(folder))
    size = sum(os.stat(file).st_size for file in files)
    if size > shutil.disk_usage(path).free:
        what = f"holds {size} bytes beside the weights, for which there is no room"
        refuse_source(folder, what, "Take away what does not belong to the model.")
    for file in files:
        copy = path / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        _copy(file, copy)


def _copy(file: Path, copy: Path) -> None:
    """Copy what a file holds. What is zero is not written: holes stay holes."""
    with FileReader(file) as old, copy.open("xb") as new:
        for start in range(0, old.size, _PIECE):
            piece = old.read(start, min(_PIECE, old.size - start))
            if piece.strip(b"\0"):
                new.write(piece)
            else:
                new.seek(len(piece), os.SEEK_CUR)
        new.truncate(old.size)


def _files(folder: Path, skipped: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files in a directory and below it, sorted; no link is followed to a directory.

    Args:
        folder: the directory.
        skipped: names in it (not below it) that are not looked at.

    Raises:
        SourceError: something is neither a directory nor a file of its own.
    """
    waiting = [path for path in _entries(folder) if path.name not in skipped]
    while waiting:
        path = waiting.pop()
        if stat.S_ISDIR(os.lstat(path).st_mode):
            waiting.extend(_entries(path))
        else:
            check_inside(folder, path)
            yield path


def _entries(folder: Path) -> list[Path]:
    """Return what is in a directory, the first name last."""
    try:
        return sorted(folder.iterdir(), reverse=True)
    except OSError as error:
        refuse_unreadable(folder, error)


def read_config(path: Path, *, inside: bool = False) -> dict[str, Any]:
    """Return what a model's configuration says.

    Args:
        path: the file.
        inside: whether it belongs to a directory, and may not be a link out of it.

    Raises:
        SourceError: it cannot be read, or is no JSON object.
    """
    if inside and os.path.lexists(path):
        check_inside(path.parent, path)
    config = parse_json(read_bytes(path, _CONFIG_LIMIT), path)
    if not isinstance(config, dict):
        refuse_source(path, "is not a JSON object", AGAIN)
    return config
