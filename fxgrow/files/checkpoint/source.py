"""Load weights from a file, remembering the container so that the same can be written again."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fxgrow.errors import SourceError, listed
from fxgrow.files.checkpoint.elsewhere import refuse_without_weights
from fxgrow.files.checkpoint.formats import Contents, Opener, read_file
from fxgrow.files.checkpoint.location import RECORD_KEY, Location
from fxgrow.files.checkpoint.matching import Wanted, copies_of, first_of, is_weight, nearest_of
from fxgrow.files.checkpoint.reading import FileReader, reading
from fxgrow.files.checkpoint.weights import bare_module, find_locations
from fxgrow.modules.calling import Arguments

Kind = Literal["state_dict", "checkpoint", "module"]


@dataclass
class Source:
    """Weights from a file.

    Attributes:
        path: the file.
        format: name of its format in :data:`fxgrow.files.checkpoint.formats.FORMATS`.
        kind: whether the file holds a bare state_dict, a dict with one inside, or a module.
        state_dict: the weights on the CPU under the names of the bare model (prefixes of
            DataParallel and torch.compile stripped), with ``_metadata`` if the file has it.
        model: the module itself where the file holds one (a checkpoint may, too), else None.
        record: what fxgrow wrote beside the weights earlier, else None. Not to be trusted more
            than the file is.
        warnings: what the user should know, one sentence each.
        trusted: whether the file was let execute code.
    """

    path: Path
    format: str
    kind: Kind
    state_dict: OrderedDict[str, Tensor]
    model: nn.Module | None = None
    record: Mapping[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    trusted: bool = False
    _contents: Contents = field(default_factory=lambda: Contents(None), repr=False)
    _locations: list[Location] = field(default_factory=list, repr=False)
    _found: list[Location] = field(default_factory=list, repr=False)

    @property
    def state_dicts(self) -> list[OrderedDict[str, Tensor]]:
        """All sets of weights that :func:`save_source` replaces.

        The first is :attr:`state_dict`; the others have the same names and shapes and other values
        (a moving average, for example). Those of :meth:`arranged` may lack some names.
        """
        return [location.state_dict for location in self._locations]

    @property
    def copies(self) -> list[str]:
        """Where the further sets of weights lie, such as moving averages."""
        return [".".join(map(str, location.keys)) for location in self._locations[1:]]

    @property
    def config(self) -> dict[str, Any] | None:
        """The ``config.json`` of a directory, or None where there is none."""
        return self._contents.config

    @property
    def inputs(self) -> Arguments | None:
        """The example inputs that a program was exported with, or None."""
        return self._contents.inputs

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the weights."""
        return self._locations[0].shapes

    @property
    def prefix(self) -> str:
        """What stands before the names of the weights in the file."""
        return self._locations[0].prefix

    @property
    def places(self) -> list[Location]:
        """All places with weights by name, those of the network and others."""
        return self._found or self._locations

    def arranged(self, wanted: Wanted) -> Source:
        """Return the source with what fits a network as its weights, under the network's names.

        These may lie under a prefix, beside others, and several times: see
        :mod:`fxgrow.files.checkpoint.matching`. Where nothing fits, the part that has most of the
        network's names is taken.

        Args:
            wanted: the network's tensors.
        """
        saved, places = self._contents.data, self.places
        with reading(self.path):
            if isinstance(places[0].stored, nn.Module):
                first: Location = places[0]
            else:
                first = first_of(places, wanted) or nearest_of(places[0], wanted)
            copies = copies_of(saved, first, places, wanted)
        locations = [first, *copies]
        for location in locations:
            _check_tensors(self.path, location)
        known = _other_weights(self.path, places, self._locations)
        told = [text for text in self.warnings if text not in known]
        told += _other_weights(self.path, places, locations)
        return replace(
            self, state_dict=first.state_dict, warnings=told, _locations=locations, _found=places
        )


def load_source(
    path: str | Path, *, trust_pickle: bool = False, opener: Opener = FileReader
) -> Source:
    """Load weights from a state_dict, a checkpoint, a module, safetensors or a directory of them.

    Args:
        path: the file or directory; its format is told by its content.
        trust_pickle: let a pickle execute code; classes outside of torch and torchvision need it.
        opener: opens each of its files.

    Returns:
        The source, everything on the CPU.

    Raises:
        SourceError: the file is missing, damaged, of no known format, would run code, or holds no
            weights or weights that cannot be widened (quantized, sparse).
    """
    path = Path(path)
    file_format, contents = read_file(path, trust_pickle=trust_pickle, opener=opener)
    saved = contents.data
    with reading(path):
        found = find_locations(saved)
    if not found:
        refuse_without_weights(path, saved)
    first = found[0]
    copies = [location for location in found if _is_copy(location, first)]
    for location in copies:
        _check_tensors(path, location)
    is_module = isinstance(first.stored, nn.Module)
    kind: Kind = "checkpoint" if first.keys else "module" if is_module else "state_dict"
    source = Source(
        path=path,
        format=file_format.name,
        kind=kind,
        state_dict=first.state_dict,
        model=bare_module(first.stored) if isinstance(first.stored, nn.Module) else None,
        trusted=trust_pickle,
        _contents=contents,
        _locations=copies,
    )
    source._found = found
    source.record = _read_record(source)
    source.warnings.extend(_other_weights(path, found, copies))
    return source


def _other_weights(path: Path, found: Sequence[Location], taken: Sequence[Location]) -> list[str]:
    """Return what to know of weights in a file that are none of the network's."""
    told = []
    for location in found:
        own = [each for each in taken if each.keys == location.keys]
        if not own and location.is_of_layers:
            told.append(
                f"{path} also holds other weights in {location}, which are left as they are."
            )
        elif own and location.is_by_name and not isinstance(location.stored, nn.Module):
            names = {name for each in own for name in each.stored_names.values()}
            stored = cast("Mapping[str, object]", location.stored)
            layers = [n for n, v in stored.items() if n not in names and is_weight(v)]
            if layers:
                left = "are left as they are" if len(layers) > 1 else "is left as it is"
                prefix = f" under {own[0].prefix!r}" if own[0].prefix else ""
                told.append(
                    f"{path} holds the network's weights{prefix}; beside them, "
                    f"{listed(layers)} {left}."
                )
    return told


def with_weights(source: Source, weights: OrderedDict[str, Tensor]) -> Source:
    """Return a source of one state_dict with other weights in it, under other names if need be."""
    location = Location((), weights, weights, {name: name for name in weights})
    contents = replace(source._contents, data=weights)
    return replace(source, state_dict=weights, _contents=contents, _locations=[location])


def _is_copy(location: Location, first: Location) -> bool:
    """Tell a second set of the same weights; a module is one only beside a module to make it of."""
    is_module, may_be = (isinstance(place.stored, nn.Module) for place in (location, first))
    return location.shapes == first.shapes and (may_be or not is_module)


def _check_tensors(path: Path, location: Location) -> None:
    for name, tensor in location.state_dict.items():
        what = ""
        if tensor.is_quantized:
            what = "is quantized"
        elif tensor.layout is not torch.strided:
            what = "is sparse"
        elif tensor.is_meta:
            what = "has a shape but no values"
        if what:
            raise SourceError(
                f"the tensor {name} in {path} {what}.",
                name=name,
                way_out="Give the weights of the float model, as dense tensors.",
            )


def _read_record(source: Source) -> Mapping[str, Any] | None:
    """Return what :func:`save_source` left, or None; a damaged record is only a warning."""
    record: object = None
    saved = source._contents.data
    if RECORD_KEY in source._contents.header:
        try:
            record = json.loads(source._contents.header[RECORD_KEY])
        except (ValueError, RecursionError):
            record = "damaged"
    elif source.kind == "checkpoint" and isinstance(saved, Mapping):
        record = saved.get(RECORD_KEY)
    elif source.kind == "state_dict":
        metadata = getattr(saved, "_metadata", None)
        record = metadata.get(RECORD_KEY) if isinstance(metadata, Mapping) else None
    if record is None or isinstance(record, Mapping):
        return record
    source.warnings.append(f"fxgrow's record in {source.path} cannot be read and is ignored.")
    return None
