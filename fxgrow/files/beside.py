"""What lies beside the weights in a directory, is copied with them, and no longer fits them.

A directory may hold weights once more: in folders below it, in another form, as an average, an
adapter or an optimizer's state. What has a name that libraries give to weights is left out where it
is written (see :mod:`.checkpoint.directory`). The rest is copied, and looked into here: nothing of
it is run, and of tensors only the names and shapes are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from fxgrow.errors import SourceError, shown
from fxgrow.files.checkpoint.addresses import WEIGHT_SUFFIXES
from fxgrow.files.checkpoint.directory import others
from fxgrow.files.checkpoint.foreign import foreign_kind
from fxgrow.files.checkpoint.formats import FORMATS, Candidate, opened
from fxgrow.files.checkpoint.mapping import HollowFile
from fxgrow.files.checkpoint.matching import Shape
from fxgrow.files.copies import grown_shapes, numbers_in
from fxgrow.plan.schema import Plan

_READ = ("safetensors", "torch", "torch_legacy")  # formats that are looked into
_MOST_TOLD = 5  # files
_UNREAD = "cannot be looked into without running code, so that it may hold weights of old widths"


def left_beside(folder: Path, before: nn.Module, after: nn.Module, plan: Plan) -> list[str]:
    """Return what to know of copied files that hold, or may hold, weights of the old widths.

    Args:
        folder: the directory that the weights were read from.
        before: the old network.
        after: the grown one.
        plan: how it grew.

    Raises:
        SourceError: something there is no file of the directory.
    """
    grown = grown_shapes(before, after, plan)
    if not grown:
        return []
    found = [(file, told) for file in others(folder) if (told := _told(file, grown))]
    notes = [f"{shown(str(file), 200)} {told}, and is copied as it is." for file, told in found]
    more = len(notes) - _MOST_TOLD
    return [*notes[:_MOST_TOLD], *([f"so are {more} more files of {folder}."] if more > 0 else [])]


def _told(file: Path, grown: Mapping[str, Shape]) -> str:
    """Return what a file holds of weights that have grown, or ""."""
    try:
        with opened(file, HollowFile) as found:
            known = next((name for name in FORMATS if FORMATS[name].sniff(found)), "")
            if known in _READ:
                return _of_tensors(found, known, grown)
            return _of_others(found, known)
    except (SourceError, ValueError):  # damaged, empty, or more than data
        return _UNREAD if file.suffix.lower() in WEIGHT_SUFFIXES else ""


def _of_others(found: Candidate, known: str) -> str:
    """Return what to know of a file in which no tensors are looked for."""
    if known in ("torchscript", "pt2"):
        return "holds a program, which goes on computing what the old network does"
    kind = foreign_kind(found.path, found.file) if not known else ""
    if kind:
        return f"is {kind}, and not looked into: if it is made of the old weights, it stays so"
    is_named = not known and found.path.suffix.lower() in WEIGHT_SUFFIXES
    return _UNREAD if is_named else ""


def _unread(file: Path) -> str:
    return "cannot be looked into without running code, so that it may hold weights of old widths"


def _of_tensors(found: Candidate, known: str, grown: Mapping[str, Shape]) -> str:
    """Return which tensors of a file have the old shape, or the name, of what has grown."""
    if known == "torch" and not any(name.startswith("data/") for name in found.members):
        return ""  # settings, such as training_args.bin: no tensors, whatever else it is
    data = FORMATS[known].read(found, trust_pickle=False).data
    shapes = {shape: name for name, shape in reversed(list(grown.items()))}
    layers = {layer for name in grown if "." in (layer := name.rpartition(".")[0])}
    told: list[str] = []
    for keys, item in numbers_in(data, optimizers=True):
        shape: Shape = tuple(getattr(item, "shape", ()))
        place = ".".join(map(str, keys))
        if shape in shapes:
            told.append(f"{shown(place, 80)} has the shape of {shapes[shape]}")
        elif any(part in layers for part in _parts(place)):
            told.append(f"{shown(place, 80)} belongs to a layer of them")
    if not told:
        return ""
    number = f"{len(told)} tensors" if len(told) > 1 else "a tensor"
    return f"holds {number} of the old widths ({told[0]})"


def _parts(name: str) -> Iterator[str]:
    """Yield what a dotted name may hold as the name of a layer.

    Example:
        >>> list(_parts("base.net.0.lora_A"))
        ['base.net.0', 'base.net', 'net.0', 'base', 'net', '0']
    """
    words = name.split(".")[:-1]
    for length in range(len(words), 0, -1):
        for start in range(len(words) - length + 1):
            yield ".".join(words[start : start + length])
