"""One place in a saved object that holds weights, and how new ones are laid out in it.

Weights lie there by name (a state_dict, or a part of one under a prefix), in the order of the
network's parameters (a list, as some moving averages keep them), or end to end in one vector.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

RECORD_KEY = "_fxgrow"
Keys: TypeAlias = tuple[str | int, ...]
Stored: TypeAlias = Mapping[Any, object] | Sequence[object] | Tensor | nn.Module


@dataclass
class Location:
    """One place in a saved object that holds weights.

    Attributes:
        keys: the way from the outermost container to it; () if the saved object is it.
        stored: what lies there: a mapping, a list of tensors (or a list of such lists, or a dict by
            numbers), one vector, or a module.
        state_dict: its tensors under the names of the bare model, with ``_metadata`` if it had one.
        stored_names: bare name -> the name it is stored under, where these lie by name.
        prefix: what new names get in front when they are stored.
        undotted: whether the names are stored without their dots.
        start: where the network's tensors begin in a list that holds others before or after them;
            None where a list holds none.
    """

    keys: Keys
    stored: Stored
    state_dict: OrderedDict[str, Tensor]
    stored_names: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    undotted: bool = False
    start: int | None = None

    def __str__(self) -> str:
        place = ".".join(map(str, self.keys))
        inside = self.prefix.rstrip(".") if self.is_part else ""
        return ".".join(filter(None, (place, inside)))

    @property
    def is_by_name(self) -> bool:
        """Whether the weights lie under names, in a mapping."""
        return bool(self.stored_names) and isinstance(self.stored, Mapping)

    @property
    def is_part(self) -> bool:
        """Whether the mapping holds tensors under other prefixes, too."""
        return self.is_by_name and any(
            isinstance(value, Tensor) and not str(name).startswith(self.prefix)
            for name, value in cast("Mapping[Any, object]", self.stored).items()
        )

    @property
    def is_of_layers(self) -> bool:
        """Whether the names are those of layers; tensors of random states are named otherwise."""
        return any("." in name or name in ("weight", "bias") for name in self.state_dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of its tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict.items()}

    def stored_name(self, bare: str) -> str:
        """Return the name under which a tensor is stored, or would be."""
        if bare in self.stored_names:
            return self.stored_names[bare]
        return self.prefix + (bare.replace(".", "") if self.undotted else bare)

    def of(self, stored: Any, wanted: Mapping[str, Tensor]) -> Location:
        """Return the same place in another saved object.

        Args:
            stored: what lies there.
            wanted: tensors of the names and shapes that it should hold.

        Raises:
            LookupError: it does not.
        """
        if self.is_by_name:
            stored_names = {name: self.stored_name(name) for name in wanted}
            return by_name(self.keys, stored, stored_names, self.prefix, undotted=self.undotted)
        if isinstance(self.stored, Tensor):
            return end_to_end(self.keys, stored, {n: tuple(t.shape) for n, t in wanted.items()})
        tensors = [as_tensor(item) for item in flattened(stored)]
        count = len(tensors) - len(self.beside)
        if count != len(wanted):
            raise LookupError(f"{count} tensors for {len(wanted)} names")
        own = tensors[self.start or 0 :][:count]
        held = OrderedDict(zip(wanted, own, strict=True))
        return Location(self.keys, stored, held, start=self.start)

    @property
    def beside(self) -> list[object]:
        """What a list holds before and after the network's tensors."""
        if self.start is None:
            return []
        items = flattened(self.stored)
        return items[: self.start] + items[self.start + len(self.state_dict) :]


def by_name(
    keys: Keys,
    stored: Mapping[str, Any],
    names: dict[str, str],
    prefix: str,
    *,
    undotted: bool = False,
) -> Location:
    """Return the location of tensors in a mapping, with the versions that it tells of.

    Args:
        keys: where the mapping lies.
        stored: the mapping.
        names: bare name -> the name of a tensor in it.
        prefix: what the stored names begin with.
        undotted: whether they are stored without their dots.

    Raises:
        LookupError: there is no tensor under one of the names.
    """
    held = OrderedDict((name, as_tensor(stored[key])) for name, key in names.items())
    if (found := versions(stored, prefix)) is not None:
        vars(held)["_metadata"] = found
    return Location(keys, stored, held, names, prefix, undotted)


def end_to_end(keys: Keys, stored: Any, shapes: Mapping[str, tuple[int, ...]]) -> Location:
    """Return the location of tensors that stand one behind the other in a vector.

    Raises:
        LookupError: it is no vector, or of another length.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    if not isinstance(stored, Tensor) or tuple(stored.shape) != (sum(sizes),):
        raise LookupError(f"no vector of {sum(sizes)} numbers")
    pieces: Any = torch.split(stored, sizes)
    parts = zip(shapes.items(), pieces, strict=True)
    return Location(keys, stored, OrderedDict((name, t.view(shape)) for (name, shape), t in parts))


def versions(stored: object, prefix: str) -> OrderedDict[str, object] | None:
    """Return what a state_dict's ``_metadata`` says below a prefix, or None if it has none."""
    metadata = getattr(stored, "_metadata", None)
    if not isinstance(metadata, Mapping):
        return None
    return OrderedDict(
        (unwrapped(f"{path}."[len(prefix) :]).rstrip("."), value)
        for path, value in metadata.items()
        if path != RECORD_KEY and f"{path}.".startswith(prefix) and _is_version(value)
    )


def _is_version(value: object) -> bool:
    """Return whether a part of a state_dict's metadata is as modules of torch write it."""
    version = value.get("version") if isinstance(value, Mapping) else ""
    return version is None or isinstance(version, int)


def unwrapped(name: str) -> str:
    """Remove what ``torch.compile`` of a part of the model put in the middle of a name."""
    return name.replace("_orig_mod.", "")


def as_tensor(value: Any) -> Tensor:
    """Return a tensor, or an array of numpy's as one that shares its memory.

    Raises:
        LookupError: it is neither.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.itemsize <= 16:
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.array(native, order="C"))
    raise LookupError(f"a {type(value).__name__} is no tensor")


def flattened(stored: Any) -> list[object]:
    """Return what a list, a list of lists or a dict by numbers holds, in order."""
    items = list(stored.values()) if isinstance(stored, Mapping) else list(stored)
    if all(type(item) in (list, tuple) for item in items):
        return [entry for item in items for entry in item]
    return items


def store(location: Location, new: Mapping[str, Tensor]) -> Any:
    """Lay out new weights as the old ones were: names, type, parameters, and other entries.

    Args:
        location: where the old weights lie; it holds no module.
        new: the new tensors under the names of the bare model.

    Returns:
        A new dict, or an OrderedDict with the old one's ``_metadata`` where that is none; a list
        where there was a list.
    """
    if not location.is_by_name:
        return _in_order(location, list(new.values()))
    old = cast(Mapping[str, object], location.stored)
    names = {bare: location.stored_name(bare) for bare in new}
    weights = {names[bare]: _as(old.get(names[bare]), tensor) for bare, tensor in new.items()}
    replaced_names = set(location.stored_names.values())
    others = {n: v for n, v in old.items() if n not in weights and n not in replaced_names}
    in_place = [name for name in old if name in weights] == list(weights)
    entries: dict[str, object] = {}
    for name in old if in_place else [*weights, *others]:
        if name in weights:
            entries[name] = weights[name]
        elif name in others:
            entries[name] = others[name]
    return like(old, entries)


def like(old: Mapping[Any, object], new: dict[Any, object]) -> dict[Any, object]:
    """Return ``new`` as a dict of the class of ``old``, with its attributes."""
    if type(old) is dict:
        return new
    if isinstance(old, OrderedDict) or not isinstance(old, dict):
        result: dict[Any, object] = OrderedDict(new)
        for name, value in getattr(old, "__dict__", {}).items():
            vars(result)[name] = OrderedDict(value) if name == "_metadata" else value
        return result
    copied = copy.copy(old)  # of a defaultdict, its default too
    copied.clear()
    copied.update(new)
    return copied


def _in_order(location: Location, tensors: list[Tensor]) -> Any:
    """Return new weights in a list, in lists or in a dict by numbers, as the old ones were."""
    stored: Any = location.stored
    if location.start is not None:  # a flat list
        count = location.start + len(location.state_dict)
        own = [_as(old, t) for old, t in zip(stored[location.start :], tensors, strict=False)]
        own += tensors[len(own) :]
        return type(stored)([*stored[: location.start], *own, *stored[count:]])
    if isinstance(stored, Tensor):
        return _as(stored, torch.cat([tensor.reshape(-1) for tensor in tensors]))
    new = [_as(old, t) for old, t in zip(flattened(stored), tensors, strict=False)]
    new += tensors[len(new) :]
    if isinstance(stored, Mapping):
        keys = list(stored)
        keys += range(len(keys), len(new))
        return like(stored, dict(zip(keys, new, strict=True)))
    if len(new) == len(stored):
        return type(stored)(new)
    sizes = [len(part) if type(part) in (list, tuple) else 1 for part in stored]
    if sum(sizes) != len(new):  # new parameters come last, as where there are no parts
        return type(stored)(new)
    items = iter(new)
    return type(stored)(
        type(part)(next(items) for _ in part) if type(part) in (list, tuple) else next(items)
        for part in stored
    )


def _as(before: object, tensor: Tensor) -> Any:
    """Return ``tensor``, as a parameter or an array where there was one before."""
    if isinstance(before, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=before.requires_grad)
    if isinstance(before, np.ndarray):
        return tensor.detach().numpy().astype(before.dtype, copy=True)
    return tensor


def at(saved: Any, keys: Keys) -> Any:
    """Return what lies at a place in nested containers.

    Raises:
        LookupError: there is no such place.
    """
    for key in keys:
        try:
            saved = saved[key]
        except (TypeError, AttributeError) as error:
            raise LookupError(str(key)) from error
    return saved
