"""safetensors: one file, or several *shards* with an index that says which tensor is in which.

A header holds texts alone, and a file holds no tensor twice. What else weights have is told by the
header: a tied tensor by its name and the one it is the same as (as ``safetensors.torch.save_model``
does), and the versions that ``load_state_dict`` asks for under ``_metadata``.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from fxgrow.errors import SourceError, shown
from fxgrow.files.checkpoint.formats import (
    FORMATS,
    Candidate,
    Contents,
    FileFormat,
    Opener,
    Shards,
    read_file,
)
from fxgrow.files.checkpoint.headers import read_tensors
from fxgrow.files.checkpoint.location import RECORD_KEY
from fxgrow.files.checkpoint.reading import AGAIN, parse_json, read_bytes, refuse_source

_METADATA = "_metadata"
_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_INDICES = ".index.json"  # of any format
_INDEX_LIMIT = 64 << 20  # bytes; the index of the largest published model has 10 MB


class _Safetensors(FileFormat):
    name = "safetensors"
    suffixes = (_SUFFIX,)

    def sniff(self, found: Candidate) -> bool:
        return found.head[7:9] == b"\x00{"  # a header's length in 8 bytes, then JSON

    def read(self, found: Candidate, *, trust_pickle: bool) -> Contents:
        tensors, header = read_tensors(found.file)
        return Contents(_unpacked(tensors, header), header)

    def write(self, contents: Contents, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = cast(Mapping[str, Tensor], contents.data)
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)  # the user's; the library's own are private
        save_file(dict(tensors), path, metadata=contents.header or None)
        path.chmod(mode)


class _Sharded(FileFormat):
    """An index (``model.safetensors.index.json``) with its shards beside it.

    Those of an index may be pickles (``pytorch_model.bin.index.json``), which are read as safely as
    any; what is written is safetensors.
    """

    name = "sharded"
    suffixes = (INDEX_SUFFIX,)

    def sniff(self, found: Candidate) -> bool:
        return found.path.name.endswith(_INDICES) and found.head.lstrip().startswith(b"{")

    def read(self, found: Candidate, *, trust_pickle: bool) -> Contents:
        path = found.path
        places, metadata = read_index(path)
        names: dict[str, list[str]] = {}
        for name, shard in places.items():
            names.setdefault(shard, []).append(name)
        tensors: OrderedDict[str, Tensor] = OrderedDict()
        header: dict[str, str] = {}
        limit = 0
        for shard in names:
            contents = _read_shard(
                path, path.with_name(shard), trust_pickle=trust_pickle, opener=found.opener
            )
            held = cast("OrderedDict[str, Tensor]", contents.data)
            for name in names[shard]:
                if name not in held:
                    refuse_source(
                        path,
                        f"says that {shown(name, 80)} is in {shown(shard, 80)}, where it is not",
                        "Copy or download it and the index again.",
                    )
            limit = max(limit, sum(tensor.nbytes for tensor in held.values()))
            tensors.update(held)
            header.update(contents.header)
            vars(tensors).update(vars(held))
        return Contents(_unpacked(tensors, header), header, Shards(limit, metadata))

    def write(self, contents: Contents, path: Path) -> None:
        tensors = cast(Mapping[str, Tensor], contents.data)
        shards = contents.shards or Shards(0)
        groups = list(_groups(tensors, shards.limit))
        stem = path.name.removesuffix(INDEX_SUFFIX)
        header = dict(contents.header)
        places: dict[str, str] = {}
        total = 0
        for number, names in enumerate(groups, start=1):
            shard = f"{stem}-{number:05d}-of-{len(groups):05d}{_SUFFIX}"
            part = {name: tensors[name] for name in names}  # of one shard at a time
            total += sum(tensor.nbytes for tensor in part.values())
            FORMATS["safetensors"].write(Contents(part, header), path.with_name(shard))
            header.pop(RECORD_KEY, None)  # the first shard holds it
            places.update(dict.fromkeys(names, shard))
        index = {"metadata": {**shards.metadata, "total_size": total}, "weight_map": places}
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


for _format in (_Safetensors(), _Sharded()):
    FORMATS.register(_format.name)(_format)


def packed(
    tensors: Mapping[str, Tensor], ties: Mapping[str, str], metadata: object
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what goes into a file for weights of which some are the same: tensors and texts.

    Args:
        tensors: the weights by name, of which no two that are not tied share memory.
        ties: for each name whose tensor is another's, that one's name.
        metadata: the state_dict's ``_metadata``, or None.
    """
    header = dict(ties)
    if metadata:
        header[_METADATA] = json.dumps(metadata)
    return {name: tensor for name, tensor in tensors.items() if name not in ties}, header


def _unpacked(
    tensors: OrderedDict[str, Tensor], header: dict[str, str]
) -> OrderedDict[str, Tensor]:
    """Add what a header tells of the weights to them; what is left in the header is other texts."""
    for name, same in list(header.items()):
        if name != "format" and name not in tensors and same in tensors:
            tensors[name] = tensors[same]
            del header[name]
    try:
        metadata = json.loads(header.get(_METADATA, "null"))
    except (ValueError, RecursionError):
        metadata = None  # a text of somebody else's
    if isinstance(metadata, dict):
        del header[_METADATA]
        vars(tensors)[_METADATA] = OrderedDict(metadata)
    return tensors


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return what an index says: the file of each tensor by name, and more of the whole.

    Raises:
        SourceError: it is no index, or names files outside of its directory.
    """
    index = parse_json(read_bytes(path, _INDEX_LIMIT), path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        refuse_source(path, "has no weight_map, so it is no index of weights", AGAIN)
    first: dict[str, str] = {}
    for name, shard in places.items():
        first.setdefault(shard if isinstance(shard, str) else "", name)
    for shard, name in first.items():
        if not _is_name(shard) or shard.endswith(_INDICES):
            what = "no file's name" if not _is_name(shard) else "an index itself"
            told = f"says that {shown(name, 80)} is in '{shown(str(places[name]), 80)}'"
            refuse_source(path, f"{told}, which is {what}", AGAIN)
    metadata = index.get("metadata")
    kept = dict(metadata) if isinstance(metadata, dict) else {}
    for size in ("total_size", "total_parameters"):  # no longer true of other weights
        kept.pop(size, None)
    return places, kept


def superseded(index: Path, new: Collection[str]) -> set[str]:
    """Return the shards of an index that another index in its place would leave behind.

    Args:
        index: the old index, if there is one.
        new: the names of the new one and of its shards.

    Returns:
        Names of shards, as those of this index are called, that no other index beside it names. Of
        an index that cannot be read, all that are called so.
    """
    stem = re.escape(index.name.removesuffix(INDEX_SUFFIX))
    named = _shards(index)
    if not named and index.is_file():
        named = {path.name for path in index.parent.iterdir() if path.is_file()}
    gone = {name for name in named if re.fullmatch(rf"{stem}-\d+-of-\d+\.\w+", name)}
    others = (path for path in index.parent.glob(f"*{_INDICES}") if path != index)
    return gone.difference(new, *map(_shards, others)) if gone else gone


def _shards(index: Path) -> set[str]:
    """Return the files that an index names; none if there is no such index."""
    try:
        return set(read_index(index)[0].values())
    except SourceError:
        return set()


def _is_name(name: str) -> bool:
    """Return whether a text is a file's name on any system, without a directory."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def check_inside(folder: Path, path: Path) -> None:
    """Check that what lies in a directory is a file of its own.

    A link may lead to another file of the directory or, in the cache of the Hugging Face Hub, to
    one among the blobs of the same model.

    Args:
        folder: the directory.
        path: something in it or below it.

    Raises:
        SourceError: it is a directory or no regular file, or a link to anything else.
    """
    what = f"holds '{shown(os.path.relpath(path, folder), 80)}', which"
    try:
        mode = os.lstat(path).st_mode
        if not stat.S_ISLNK(mode):
            if not stat.S_ISREG(mode):
                kind = "a directory" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
                refuse_source(folder, f"{what} is {kind}, not a file", "Take it away.")
            return
        target = path.resolve(strict=True)
        places = _own_places(folder.resolve(strict=True))
        if not any(place in target.parents for place in places):
            refuse_source(folder, f"{what} is a link out of it", "Put a copy of the file there.")
        if not stat.S_ISREG(os.lstat(target).st_mode):
            refuse_source(folder, f"{what} is a link to no file", "Put a copy of the file there.")
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to each other
        refuse_source(folder, f"{what} cannot be followed", "Put a copy of the file there.", error)


def _own_places(folder: Path) -> list[Path]:
    """Return where the files of a directory may lie, if its path has no links in it."""
    entry = folder.parent.parent
    is_cached = folder.parent.name == "snapshots" and entry.name.startswith("models--")
    return [folder, entry / "blobs"] if is_cached else [folder]


def _read_shard(index: Path, path: Path, *, trust_pickle: bool, opener: Opener) -> Contents:
    """Read one of the files that an index names.

    Raises:
        SourceError: it is missing, damaged, or holds no tensors by name.
    """
    if not os.path.lexists(path):
        refuse_source(
            index,
            f"needs {shown(path.name, 80)}, which is not beside it",
            "Copy or download that file too.",
        )
    check_inside(path.parent, path)
    _, contents = read_file(path, trust_pickle=trust_pickle, opener=opener)
    if not isinstance(contents.data, Mapping):
        refuse_source(path, "holds no tensors by name", AGAIN)
    items = contents.data.items()
    found = OrderedDict((name, value) for name, value in items if isinstance(value, Tensor))
    if metadata := getattr(contents.data, _METADATA, None):
        vars(found)[_METADATA] = metadata
    return Contents(found, contents.header)


def _groups(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Yield the names for each shard: as many tensors in order as fit, at least one."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names
