"""Read a file again before it takes its name, and compare it with what was judged.

The file is read by the reader that everybody's files are read by, mapped into memory where its
format allows that, and compared bit for bit: the weights with the grown network itself, moving
averages and optimizers with what they have become, and all else with what the source holds. What
the writer was given counts for nothing. The record must rebuild a module like the grown one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fxgrow.errors import FxgrowError, SourceError, VerificationError
from fxgrow.files.checkpoint.harmless import holds_kept
from fxgrow.files.checkpoint.location import RECORD_KEY, Keys, Location, at
from fxgrow.files.checkpoint.mapping import Mappings
from fxgrow.files.checkpoint.saving import TENSORS_ONLY
from fxgrow.files.checkpoint.source import Source, load_source
from fxgrow.files.checkpoint.weights import is_optimizer
from fxgrow.files.comparison import (
    difference,
    keys_difference,
    module_difference,
    tensor_difference,
)
from fxgrow.files.records import rebuilt_difference
from fxgrow.modules.architectures import Architecture
from fxgrow.plan.schema import Plan, plans_of

_PIECE = 64 << 20  # bytes that are compared before their memory is given back


@dataclass(frozen=True)
class Judged:
    """What a file must give back.

    Attributes:
        model: the grown network, as it was judged.
        architecture: what the record must name; None where there is none.
        plans: those of the record, oldest first.
        source: what was read before the network grew; None for a network that was in memory.
        copies: moving averages of the weights, as they have become, in the order of the source.
        absent: names of the network's tensors that the source has none for.
        optimizers: state_dicts of optimizers as they have become, by the ids of the old ones.
    """

    model: nn.Module
    architecture: Architecture | None
    plans: tuple[Plan, ...]
    source: Source | None = None
    copies: Sequence[Mapping[str, Tensor]] = ()
    absent: Collection[str] = ()
    optimizers: dict[int, dict[str, Any]] = field(default_factory=dict)


def check_written(path: Path, judged: Judged) -> None:
    """Return if a file gives back what was judged.

    Args:
        path: a file with weights, a checkpoint or a module, or the index of shards.
        judged: what it should hold.

    Raises:
        VerificationError: it cannot be read, or the first difference.

    Complexity: about one pass over the file, whose pages are given back on the way.
    """
    _Reread(path, judged).check()


def refuse_written(path: Path, how: str, name: str = "") -> NoReturn:
    """Refuse what was written.

    Raises:
        VerificationError: always.
    """
    raise VerificationError(
        f"{path.name} is not what was judged when it is read again: {how}.",
        name=name,
        way_out="Nothing was kept. Try once more; if it happens again, report it.",
    )


def containers_copied(saved: Any) -> Any:
    """Return nested dicts and lists anew, with the same tensors: nobody else changes them."""
    if isinstance(saved, dict):
        return {key: containers_copied(value) for key, value in saved.items()}
    return [containers_copied(item) for item in saved] if type(saved) is list else saved


class _Reread:
    """One file that is read again."""

    def __init__(self, path: Path, judged: Judged) -> None:
        self._path, self._judged = path, judged
        self._mappings = Mappings()
        self._compared = 0

    def check(self) -> None:
        """Compare all that there is."""
        judged, found = self._judged, self._read()
        if found.model is not None:
            self._refuse_if(module_difference(found.model, judged.model, compared=self._count))
        source = judged.source
        kept = source if source is not None and source.kind == found.kind else None
        wanted: list[Mapping[str, Tensor]] = [self._weights()]
        if kept is not None:
            wanted += judged.copies
            found = self._placed(kept, found, wanted)
        if len(found.state_dicts) != len(wanted):
            have, want = _places(found), _places(found if source is None else source)
            self._refuse(f"it has weights in {have}, not in {want} ({len(wanted)} in all)")
        for location, weights in zip(found._locations, wanted, strict=True):
            self._check_weights(location, weights, judged.absent)
        if kept is not None:
            self._check_places(kept, found)
            self._check_others(kept, found)
        elif source is None and found.format not in TENSORS_ONLY:
            self._check_versions(judged.model.state_dict(), found.state_dict)
        if found.kind != "module":
            self._check_record(found.record)

    def _read(self) -> Source:
        """Return what the file holds, read as safely as any file if that is possible."""
        problem: FxgrowError | None = None
        source = self._judged.source
        # Classes of the user's own, and graphs. What was not made of the source is not made here.
        own = source is None or source.trusted or not holds_kept(source._contents.data)
        for trusted in (False, True) if own else (False,):
            try:
                return load_source(self._path, trust_pickle=trusted, opener=self._mappings.open)
            except SourceError as error:
                problem = problem or error
        self._refuse(f"it cannot be read: {problem.reason if problem else ''}")

    def _placed(
        self, source: Source, found: Source, wanted: Sequence[Mapping[str, Tensor]]
    ) -> Source:
        """Return what was found with its weights where the source has them."""
        places = []
        for old, weights in zip(source._locations, wanted, strict=True):
            if isinstance(old.stored, nn.Module):
                held = [each for each in found.places if each.keys == old.keys]
                places += held[:1]
                continue
            try:
                stored = at(found._contents.data, old.keys)
                places.append(old.of(stored, self._held(old, stored, weights)))
            except LookupError as error:
                self._refuse(f"the weights in {str(old)!r} are not there: {error}")
        if len(places) != len(wanted):
            self._refuse(f"it has weights in {_places(found)}, not in {_places(source)}")
        return replace(found, state_dict=places[0].state_dict, _locations=places)

    def _held(
        self, old: Location, stored: Any, weights: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return which of some weights lie in a place; a file may lack some of them."""
        absent = self._judged.absent
        if not old.is_by_name:
            return weights
        names = (n for n in weights if n not in absent or old.stored_name(n) in stored)
        return {name: weights[name] for name in names}

    def _weights(self) -> dict[str, Tensor]:
        """Return the tensors that were judged, under the names that a state_dict has."""
        held = self._judged.model.state_dict()
        return {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}

    def _check_weights(
        self, found: Location, wanted: Mapping[str, Tensor], absent: Collection[str]
    ) -> None:
        """Compare tensors bit for bit, and which of them are one."""
        where = f" in {found}" if found.keys else ""
        have = found.state_dict
        lacking = next((n for n in wanted if n not in have and n not in absent), None)
        more = next((n for n in have if n not in wanted), None)
        if lacking is not None or more is not None:
            what = f"it lacks {lacking}" if lacking is not None else f"it has {more} too"
            self._refuse(what + where, str(lacking if lacking is not None else more))
        for name, tensor in have.items():
            told = tensor_difference(_plain(tensor), _plain(wanted[name]), name)
            if told:
                self._refuse(told + where, name)
            self._count(tensor.nbytes)

    def _count(self, nbytes: int) -> None:
        """Give back the memory of what was compared, now and then."""
        self._compared += nbytes
        if self._compared > _PIECE:
            self._mappings.release()
            self._compared = 0

    def _check_places(self, source: Source, found: Source) -> None:
        """Compare where weights lie, under which names, and what lies beside them."""
        for old, new in zip(source._locations, found._locations, strict=True):
            if old.keys != new.keys or old.prefix != new.prefix:
                told = [f"{each} ({each.prefix!r})" for each in (new, old)]
                self._refuse(f"its weights are in {told[0]}, not in {told[1]}")
            self._check_ties(old.state_dict, new.state_dict)
            if isinstance(old.stored, nn.Module) or isinstance(new.stored, nn.Module):
                continue
            self._check_versions(old.state_dict, new.state_dict)
            bare = found.format in TENSORS_ONLY
            if found.kind == "checkpoint" and type(old.stored) is not type(new.stored):
                self._refuse(f"{new} is a {type(new.stored).__name__}")
            if not old.is_by_name:
                self._refuse_if(difference(new.beside, old.beside, f"beside the weights {new}"))
                continue
            mine = _beside(new, found._locations, tensors=bare)
            theirs = _beside(old, source._locations, tensors=bare)
            if bare:
                mine, theirs = (dict(sorted(each.items())) for each in (mine, theirs))
            self._refuse_if(difference(mine, theirs, f"beside the weights {new}".strip()))

    def _check_ties(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
        """Compare which tensors are one, where they still have one value."""
        before, after = _leaders(old), _leaders(new)
        for name, leader in before.items():
            both = name in new and leader in new
            if both and name not in after and tensor_difference(new[name], new[leader], "") == "":
                self._refuse(f"{name} and {leader} are no longer one tensor", name)
        allowed = {**_leaders(self._weights()), **before}
        for name, leader in after.items():
            if name not in allowed:
                self._refuse(f"{name} and {leader} became one tensor", name)

    def _check_versions(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
        """Compare what load_state_dict asks for under ``_metadata``."""
        told = [getattr(each, "_metadata", None) or {} for each in (new, old)]
        have, want = ({k: _version(v) for k, v in each.items()} for each in told)
        if {k: v for k, v in have.items() if k != RECORD_KEY} != want:
            self._refuse("its _metadata differ")

    def _check_others(self, source: Source, found: Source) -> None:
        """Compare what the source holds apart from its weights."""
        header = found._contents.header
        for text, value in source._contents.header.items():
            known = text in (RECORD_KEY, "format") or found.format not in TENSORS_ONLY
            if not known and header.get(text) != value:
                self._refuse(f"the text {text!r} of its header differs", text)
        if found.kind == "checkpoint":
            places = [location.keys for location in source._locations]
            self._check_entries(found._contents.data, source._contents.data, places, ())

    def _check_entries(self, have: Any, want: Any, places: Sequence[Keys], keys: Keys) -> None:
        """Compare a part of a checkpoint: weights apart, and optimizers as they have become."""
        place = ".".join(map(str, keys))
        if keys in places:
            return
        self._refuse_if("" if type(have) is type(want) else f"{place} is a {type(have).__name__}")
        grown = self._judged.optimizers.get(id(want))
        if grown is not None:
            self._refuse_if(difference(dict(have), grown, place, self._count), place)
        elif isinstance(want, dict) and is_optimizer(want) and want["state"]:
            self._refuse(f"the optimizer in {place!r} has not grown", place)
        elif isinstance(want, dict):
            mine, theirs = ([k for k in each if keys or k != RECORD_KEY] for each in (have, want))
            self._refuse_if(keys_difference(mine, theirs, place), place)
            for key in theirs:
                self._check_entries(have[key], want[key], places, (*keys, key))
        elif type(want) in (list, tuple) and len(have) == len(want):
            for index, (one, other) in enumerate(zip(have, want, strict=True)):
                self._check_entries(one, other, places, (*keys, index))
        else:
            self._refuse_if(difference(have, want, place, self._count), place)

    def _check_record(self, record: Mapping[str, Any] | None) -> None:
        """Compare the record with the plans, and the grown network with what it rebuilds."""
        judged = self._judged
        if record is None:
            self._refuse(f"its record ({RECORD_KEY}) is missing")
        named = judged.architecture
        told = json.loads(json.dumps(record.get("architecture")))
        if told != (None if named is None else json.loads(json.dumps(named.to_dict()))):
            self._refuse(f"its record ({RECORD_KEY}) names the architecture {told!r:.80}")
        try:
            plans = plans_of(record)
        except FxgrowError as error:
            self._refuse(f"its record cannot be read: {error.reason}")
        if plans != judged.plans:
            self._refuse(
                f"its record ({RECORD_KEY}) has {len(plans)} plans that are not those carried out"
            )
        if named is None:
            return
        try:
            known = named if named.is_code else Architecture.from_dict(told)
            how = rebuilt_difference(known, plans, judged.model)
        except FxgrowError as error:
            self._refuse(f"its record rebuilds no module: {error.reason}")
        self._refuse_if(how and f"its record rebuilds another module: {how}")

    def _refuse_if(self, how: str, name: str = "") -> None:
        if how:
            self._refuse(how, name)

    def _refuse(self, how: str, name: str = "") -> NoReturn:
        refuse_written(self._path, how, name)


def _places(source: Source) -> str:
    """Return where a file holds weights, in words."""
    return ", ".join(repr(str(location)) for location in source._locations) or "no place"


def _beside(
    location: Location, locations: Sequence[Location], *, tensors: bool
) -> dict[str, object]:
    """Return what a state_dict holds beside the tensors of the network.

    Args:
        location: the state_dict.
        locations: all places with the network's tensors, some of which may be in it too.
        tensors: leave out what is no tensor.
    """
    stored: Any = location.stored
    same = [each for each in locations if each.keys == location.keys]
    own = {name for each in same for name in each.stored_names.values()}
    kept = ((name, value) for name, value in stored.items() if name not in own)
    return {name: value for name, value in kept if not tensors or isinstance(value, Tensor)}


def _plain(tensor: Tensor) -> Tensor:
    """Return the data of a parameter, which is one in some files and not in others."""
    return tensor.detach()


def _leaders(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for each further name of a tensor, the first."""
    first: dict[object, str] = {}
    return {
        name: leader
        for name, tensor in tensors.items()
        if tensor.numel() and tensor.layout is torch.strided and not tensor.is_meta
        for key in [(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)]
        if (leader := first.setdefault(key, name)) != name
    }


def _version(value: object) -> object:
    return value.get("version") if isinstance(value, Mapping) else None
