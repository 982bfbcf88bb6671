"""Batches of data from a file that may be anybody's: tensors in tuples, lists and dicts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from fxgrow.errors import SourceError
from fxgrow.files.checkpoint.reading import FileReader, naming, refuse_source
from fxgrow.files.checkpoint.unpickling import load_untrusted
from fxgrow.grow.data.batches import Batch

_SAVE = "Save plain tensors: torch.save([(inputs, targets), …], PATH)."
_PLAIN = (type(None), bool, int, float, str)
_DEPTH = 8  # of nested inputs


def read_batches(path: Path) -> tuple[Batch, ...]:
    """Return the batches of inputs and targets in a file.

    Args:
        path: what ``torch.save`` wrote: a list of pairs of inputs and targets, or one such pair.
            Inputs are a tensor, a tuple of arguments or a dict of keyword arguments. No code that
            the file names is run.

    Raises:
        SourceError: the file cannot be read, asks for code, or holds something else.
    """
    with naming(path), FileReader(path) as file:
        if not file.size:
            refuse_source(path, "is empty", _SAVE)
        try:
            found = load_untrusted(file)
        except SourceError as error:
            raise SourceError(error.message, name=str(path), way_out=_SAVE) from error
    batches = [found] if _is_pair(found) else found
    if not isinstance(batches, (list, tuple)) or not batches:
        _refuse(path, f"holds a {type(found).__name__}" if batches else "holds nothing")
    for number, batch in enumerate(batches):
        if not _is_pair(batch):
            _refuse(path, f"holds as batch {number} something else")
    return tuple((inputs, targets) for inputs, targets in batches)


def _is_pair(batch: Any) -> bool:
    """Return whether data is a pair of inputs and targets, of which both hold tensors alone."""
    is_two = isinstance(batch, (list, tuple)) and len(batch) == 2
    return is_two and isinstance(batch[1], Tensor) and _is_data(batch[0], _DEPTH)


def _is_data(item: Any, depth: int) -> bool:
    """Return whether something is a tensor, or holds nothing but tensors and plain values."""
    if isinstance(item, Tensor):
        return not item.is_meta
    if not depth:
        return False
    if isinstance(item, dict):
        names = all(isinstance(key, str) for key in item)
        return bool(item) and names and all(_held(value, depth) for value in item.values())
    return isinstance(item, (list, tuple)) and bool(item) and all(_held(v, depth) for v in item)


def _held(item: Any, depth: int) -> bool:
    return isinstance(item, _PLAIN) or _is_data(item, depth - 1)


def _refuse(path: Path, what: str) -> NoReturn:
    """Refuse a file without batches.

    Raises:
        SourceError: always.
    """
    refuse_source(path, f"{what}, and not pairs of inputs and targets that are tensors", _SAVE)
