"""Write new weights into a file of the same kind as the one the old weights came from."""

from __future__ import annotations

import copy
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fxgrow.files.checkpoint.directory import left_out
from fxgrow.files.checkpoint.foreign import refuse_foreign_output
from fxgrow.files.checkpoint.formats import FORMATS, Contents, Shards, format_of_name
from fxgrow.files.checkpoint.location import RECORD_KEY, Keys, store
from fxgrow.files.checkpoint.safetensors_files import INDEX_SUFFIX, packed
from fxgrow.files.checkpoint.source import Source
from fxgrow.files.checkpoint.weights import (
    OptimizerChange,
    keep_ties,
    replaced,
    rewrap,
    unshared,
    with_optimizers,
)
from fxgrow.files.checkpoint.writing import Check, check_output, write_file
from fxgrow.modules.calling import Arguments

_LABEL_LENGTH = 60
_SHARD_LIMIT = 5_000_000_000  # bytes, where the source does not say; as the Hub recommends
TENSORS_ONLY = ("safetensors", "sharded", "directory")


def save_source(
    source: Source,
    state_dicts: Sequence[Mapping[str, Tensor]],
    out: str | Path,
    *,
    record: Mapping[str, Any],
    model: nn.Module | None = None,
    optimizer: OptimizerChange | None = None,
    config: Mapping[str, Any] | None = None,
    inputs: Arguments | None = None,
    check: Check | None = None,
    force: bool = False,
) -> list[str]:
    """Write new weights to ``out``, in a file of the same kind and format as the source's.

    Everything else that the source holds is kept, except for what the format of ``out`` cannot
    hold. ``record`` rides in the state_dict's ``_metadata`` (which ``load_state_dict`` ignores),
    beside the weights of a checkpoint, or in a safetensors header; modules, programs and
    directories with a configuration need none.

    Args:
        source: what :func:`load_source` returned; it is not changed.
        state_dicts: new weights for each of ``source.state_dicts``, in that order, under the names
            of the bare model.
        out: the file to write.
        record: JSON-able; found again as :attr:`Source.record`.
        model: the new module, where ``source.model`` is one or ``out`` is to hold one.
        optimizer: what becomes of each optimizer's state_dict in a checkpoint; given it and its
            dotted place. Without, they are kept.
        config: the new ``config.json``, where ``out`` is a directory with one.
        inputs: what a program is exported with, where ``out`` is one.
        check: looks at what was written before it takes its name, and raises if it is wrong.
        force: overwrite ``out`` if it exists. The source itself is never written to.

    Returns:
        What the user should know, one sentence each.

    Raises:
        SourceError: ``out`` cannot be written; nothing is left behind.
        ValueError: the number of state_dicts is not that of the source, or the model is missing.
        TypeError: ``record`` is not JSON-able.
    """
    out = Path(out)
    if len(state_dicts) != len(source._locations):
        raise ValueError(f"{len(state_dicts)} state_dicts for {len(source._locations)} locations")
    if source.model is not None and model is None:
        raise ValueError("the source holds a module, so a new module is needed")
    check_output(out, source.path, force=force)
    plain_record: dict[str, Any] = json.loads(json.dumps(dict(record)))
    file_format = output_format(source, out, configured=config is not None)
    warnings: list[str] = []
    tied = []
    for location, new in zip(source._locations, state_dicts, strict=True):
        kept, parted = keep_ties(location.state_dict, new)
        tied.append(kept)
        warnings.extend(f"{name} was tied to another tensor and no longer is." for name in parted)
    if file_format in TENSORS_ONLY:
        contents = _tensors_only(source, tied, file_format, plain_record, config, warnings)
    elif file_format == "pt2":
        if model is None:
            raise ValueError("a program is exported from a module, so one is needed")
        contents = Contents(model, inputs=inputs, dynamic=source._contents.dynamic)
    else:
        contents = _pickled(source, tied, plain_record, model, optimizer)
    if file_format not in TENSORS_ONLY:
        texts = sorted(source._contents.header.keys() - {"format", RECORD_KEY})
        if texts:
            warnings.append(f"{out} is without the texts of the header: {', '.join(texts)}.")
    write_file(contents, out, file_format, source=source.path, force=force, check=check)
    return warnings


def output_format(source: Source, out: Path, *, configured: bool = False) -> str:
    """Return the name of the format that ``out`` will have.

    Args:
        source: what is grown; its format counts where the name of ``out`` asks for none.
        out: the file or directory to write.
        configured: whether there is a ``config.json`` for a directory, which is then what a name
            without a suffix asks for.
    """
    refuse_foreign_output(out)
    asked = format_of_name(out)
    if out.name.lower().endswith(FORMATS[source.format].suffixes or "/"):
        return source.format
    if asked is None:
        without = configured and not out.suffix and bool(source.path.suffix)
        return "directory" if without else source.format
    # A legacy file has the suffixes of a newer one, and stays one.
    return source.format if (asked, source.format) == ("torch", "torch_legacy") else asked


def default_output(path: str | Path, label: str) -> Path:
    """Return the name of the output next to ``path``: ``<stem>-<label><suffix>``.

    Example:
        >>> default_output("runs/model.pt", "2x").name
        'model-2x.pt'
        >>> default_output("model.pth.tar", "layer1.* 2x").name
        'model-layer1._2x.pth.tar'
    """
    path = Path(path)
    stem, suffix = path.stem, path.suffix
    if path.is_dir():
        stem, suffix = path.name, ""
    elif path.name.endswith(".index.json"):
        stem, suffix = path.name.split(".")[0], INDEX_SUFFIX
    if suffix == ".tar" and Path(stem).suffix in FORMATS["torch"].suffixes:
        stem, suffix = Path(stem).stem, Path(stem).suffix + suffix
    safe = re.sub(r"[^\w.+=-]+", "_", label)[:_LABEL_LENGTH].strip("_")
    return path.with_name(f"{stem}-{safe}{suffix}")


def _tensors_only(
    source: Source,
    new: Sequence[Mapping[str, Tensor]],
    file_format: str,
    record: dict[str, Any],
    config: Mapping[str, Any] | None,
    warnings: list[str],
) -> Contents:
    """Return what a format takes that holds named tensors and texts, and nothing else."""
    old = source._contents
    tensors, texts = _plain_tensors(source, new, file_format, warnings)
    header = {"format": "pt", **old.header, **texts, RECORD_KEY: json.dumps(record)}
    if config is not None:
        del header[RECORD_KEY]
    shards = old.shards or (Shards(_SHARD_LIMIT) if file_format == "sharded" else None)
    folder = old.folder if file_format == "directory" else None
    if folder is not None and (gone := left_out(folder)):
        warnings.append(f"what does not fit the new weights is not copied: {', '.join(gone)}.")
    return Contents(tensors, header, shards, folder, None if config is None else dict(config))


def _plain_tensors(
    source: Source, new: Sequence[Mapping[str, Tensor]], file_format: str, warnings: list[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the texts of a file that holds nothing else; warn of what is left."""
    bare = source.kind != "state_dict"
    entries: Mapping[str, object] = new[0] if bare else _stored(source, new)[()]  # type: ignore[assignment]
    found = unshared({n: value for n, value in entries.items() if isinstance(value, Tensor)})
    if found.copied:
        warnings.append(f"{', '.join(found.copied)} shared memory and became copies.")
    rest = ", ".join(name for name in entries if name not in found.tensors)
    if left := f"the rest of the {source.kind}" if bare else rest:
        warnings.append(f"a {file_format} output holds tensors alone: it is without {left}.")
    return packed(found.tensors, found.ties, getattr(entries, "_metadata", None))


def _stored(
    source: Source, tied: Sequence[Mapping[str, Tensor]], model: nn.Module | None = None
) -> dict[Keys, object]:
    """Return what takes the place of each container of weights."""
    replacements: dict[Keys, object] = {}
    for location, new in zip(source._locations, tied, strict=True):
        if not isinstance(location.stored, nn.Module):
            # Several sets may lie in one mapping, under prefixes of their own.
            before: Any = replacements.get(location.keys, location.stored)
            replacements[location.keys] = store(replace(location, stored=before), new)
        elif model is not None:
            first = location is source._locations[0]
            module = model if first else _with_weights(model, new)
            replacements[location.keys] = rewrap(location.stored, module)
    return replacements


def _pickled(
    source: Source,
    tied: Sequence[Mapping[str, Tensor]],
    record: dict[str, Any],
    model: nn.Module | None,
    optimizer: OptimizerChange | None,
) -> Contents:
    replacements = _stored(source, tied, model)
    if source.format == "pt2":
        return Contents(_with_record(tied[0], record))
    if source.kind == "module":
        return Contents(replacements[()])
    if source.kind == "state_dict":
        weights = cast("Mapping[str, object]", replacements[()])
        return Contents(_with_record(weights, record))
    saved = replaced(source._contents.data, replacements)
    if optimizer is not None:
        saved = with_optimizers(saved, optimizer)
    cast("dict[str, object]", saved)[RECORD_KEY] = record
    return Contents(saved)


def _with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.load_state_dict(weights, strict=False)  # extra state stays as it is
    return copied


def _with_record(weights: Mapping[str, object], record: dict[str, Any]) -> OrderedDict[str, object]:
    """Return the weights as an OrderedDict, whose ``_metadata`` can carry the record."""
    ordered = OrderedDict(weights)
    metadata = getattr(weights, "_metadata", {})
    vars(ordered)["_metadata"] = OrderedDict({**metadata, RECORD_KEY: record})
    return ordered
