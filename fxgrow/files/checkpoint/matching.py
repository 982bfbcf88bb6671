"""Which parts of a saved object are the weights of a network, once the network is known.

A trainer's state_dict holds the network's under a prefix, the name of an attribute (``model.``,
``net.``, ``module.model.``), beside other parts (a loss, metrics) and often beside an average of
the same weights (``model_ema.``). Averages are kept under other keys too, by name, with the trained
parameters alone, or as a list in the order of the parameters. What fits is found by names and
shapes; a part that may be anything else is none.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from torch import Tensor, nn

from fxgrow.files.checkpoint.location import (
    Keys,
    Location,
    as_tensor,
    by_name,
    end_to_end,
    flattened,
    unwrapped,
)
from fxgrow.files.checkpoint.weights import is_optimizer

Shape: TypeAlias = tuple[int, ...]
# Given shapes in order, returns names of parameters in the only way that they fit, or ().
InOrder: TypeAlias = Callable[[Sequence[Sequence[Shape]]], Sequence[str]]

_COUNTER = "num_batches_tracked"  # old checkpoints lack it
_AVERAGES = frozenset(
    {"average", "averaged", "avg", "ema", "momentum", "shadow", "slow", "swa", "target", "teacher"}
)
# Of what lies in the shapes of weights and is none: gradients, and what is made of them.
_NO_WEIGHTS = re.compile(
    r"optim|grad|fisher|hessian|exp_avg|moment[s1-9]|variance|(^|[._])(sq|square|squared|mask|masks|"
    r"importance|velocity|accum|accumulated|diff|delta|deltas|std|var|residual)([._]|$)",
    re.IGNORECASE,
)
# Keys of averages, wherever they stand: some optimizers keep one.
_SURELY = frozenset({"ema", "ema_params", "shadow", "shadow_params", "swa"})
_MOST_ENTRIES = 3_000_000


@dataclass(frozen=True)
class Wanted:
    """The tensors of a network.

    Attributes:
        shapes: of all that its state_dict holds, by name.
        parameters: the names of its parameters, each once, in order.
        in_order: finds the parameters that a list holds.
    """

    shapes: Mapping[str, Shape]
    parameters: Sequence[str]
    in_order: InOrder = lambda shapes: ()

    @classmethod
    def of(cls, model: nn.Module, in_order: Callable[..., Any] | None = None) -> Wanted:
        """Return those of a module."""
        held = {n: tuple(t.shape) for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if in_order is None:
            return cls(held, list(parameters))
        return cls(held, list(parameters), lambda shapes: in_order(shapes, parameters))

    @property
    def needed(self) -> list[str]:
        """The names that every file has."""
        return [name for name in self.shapes if not name.endswith(_COUNTER)]

    @property
    def buffers(self) -> list[str]:
        """Those of them that are no parameters; some averages keep the two apart."""
        parameters = {*self.parameters}
        return [name for name in self.needed if name not in parameters]


def is_average(place: str) -> bool:
    """Return whether a place is called after an average of weights.

    Example:
        >>> is_average("model_ema."), is_average("model.")
        (True, False)
    """
    return not _AVERAGES.isdisjoint(re.split(r"[._\-]", place.lower()))


def prefixes(names: Sequence[str]) -> list[str]:
    """Return what names have before their dots: "" first, then those that more of them share.

    Example:
        >>> prefixes(["net.0.weight", "net.0.bias", "loss.weight"])
        ['', 'net.', 'net.0.', 'loss.']
    """
    count: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        count.update(".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
    return ["", *sorted(count, key=lambda prefix: (-count[prefix], prefix.count(".")))]


def part_of(location: Location, prefix: str) -> Location:
    """Return what lies under a prefix of a location's names, as a location of its own."""
    if not prefix:
        return location
    size = len(prefix)
    names = {
        name[size:]: location.stored_name(name)
        for name in location.state_dict
        if name.startswith(prefix)
    }
    stored = {n.removesuffix(bare) for bare, n in names.items() if n.endswith(bare)}
    found = stored.pop() if len(stored) == 1 else location.prefix + prefix
    mapping = cast("Mapping[str, Any]", location.stored)
    return by_name(location.keys, mapping, names, found)


def first_of(locations: Sequence[Location], wanted: Wanted) -> Location | None:
    """Return the network's own weights among some locations, or None.

    All of its names must be there, and its shapes where that is possible. Of several, one that is
    not called after an average comes first.
    """
    needed = wanted.needed
    found: list[tuple[tuple[int, bool], Location]] = []
    for location in locations:
        if isinstance(location.stored, nn.Module):
            continue
        for prefix in prefixes(list(location.state_dict)):
            names = location.state_dict
            if needed and all(prefix + name in names for name in needed):
                part = part_of(location, prefix)
                other = sum(part.shapes[name] != wanted.shapes[name] for name in needed)
                found.append(((other, is_average(str(part))), part))
    return min(found, key=lambda item: item[0])[1] if found else None


def nearest_of(location: Location, wanted: Wanted) -> Location:
    """Return the part of a location that has most of a network's names."""
    names = location.state_dict

    def shared(prefix: str) -> int:
        return sum(prefix + name in names for name in wanted.shapes)

    return part_of(location, max(prefixes(list(names)), key=shared))


def copies_of(
    saved: object, first: Location, others: Sequence[Location], wanted: Wanted
) -> list[Location]:
    """Return the other sets of the network's weights in a saved object.

    Args:
        saved: what the file holds.
        first: the network's own weights.
        others: places with weights that are known; of these, modules are taken.
        wanted: the network's tensors, in the shapes that they have in the file.
    """
    found: list[Location] = []
    for keys, item in walk(saved):
        if _NO_WEIGHTS.search(".".join(map(str, keys))) and str(keys[-1]) not in _SURELY:
            continue
        if isinstance(item, nn.Module):
            held = next((each for each in others if each.keys == keys), None)
            if held is not None and isinstance(first.stored, nn.Module) and held is not first:
                found += [held] if held.shapes == first.shapes else []
        elif isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
            taken = set(first.stored_names.values()) if keys == first.keys else set()
            found += _by_name(keys, item, taken, wanted)
        elif keys and (location := _by_order(keys, item, wanted)) is not None:
            found.append(location)
    inside = [each.keys for each in found if not each.is_by_name]
    return [each for each in found if not any(_is_below(each.keys, keys) for keys in inside)]


def _is_below(keys: Keys, other: Keys) -> bool:
    return len(keys) > len(other) and keys[: len(other)] == other


def walk(saved: object) -> Iterator[tuple[Keys, object]]:
    """Yield everything in nested dicts, lists and tuples with its place, but optimizers.

    Raises:
        ValueError: there are too many entries to look at.
    """
    waiting: list[tuple[Keys, object]] = [((), saved)]
    seen: set[int] = set()
    left = _MOST_ENTRIES
    while waiting:
        keys, item = waiting.pop()
        yield keys, item
        if isinstance(item, Mapping):
            if is_optimizer(item) or id(item) in seen:
                continue
            children = [((*keys, key), value) for key, value in item.items()]
        elif isinstance(item, (list, tuple)) and id(item) not in seen:
            children = [((*keys, index), value) for index, value in enumerate(item)]
        else:
            continue
        seen.add(id(item))
        left -= len(children)
        if left < 0:
            raise ValueError("its containers have too many entries")
        waiting += reversed(children)


def _by_name(
    keys: Keys, item: Mapping[Any, object], taken: set[str], wanted: Wanted
) -> Iterator[Location]:
    """Yield the sets of weights that a mapping holds by name, each under a prefix of its own."""
    left = {unwrapped(n): n for n in item if n not in taken and _is_numbers(item[n])}
    undotted = {name.replace(".", ""): name for name in wanted.shapes}
    buffers = wanted.buffers
    fewest = min(len(wanted.parameters) / 2, len(buffers) or math.inf)
    for prefix in prefixes(list(left)):
        inside = {n[len(prefix) :]: n for n in left if n.startswith(prefix)}
        if len(inside) < fewest:
            break  # of those that follow, no more names begin with any
        if _NO_WEIGHTS.search(prefix):
            continue
        stored = {bare: left[n] for bare, n in inside.items()}
        for flat, known in ((False, {name: name for name in wanted.shapes}), (True, undotted)):
            names = _fitting(item, stored, known, wanted, buffers)
            if names is not None:
                bare, first = next(iter(stored.items()))
                found = first.removesuffix(bare) if first.endswith(bare) else prefix
                yield by_name(keys, item, names, found, undotted=flat)
                for name in inside.values():
                    left.pop(name, None)
                break


def _fitting(
    item: Mapping[Any, object],
    stored: Mapping[str, str],
    known: Mapping[str, str],
    wanted: Wanted,
    buffers: Sequence[str],
) -> dict[str, str] | None:
    """Return the network's names with those in a mapping, or None where they are no set of weights.

    Args:
        item: the mapping.
        stored: its names, by what they are without a prefix.
        known: the network's names, by what a mapping may call them.
        wanted: the network's tensors.
        buffers: those that are no parameters, which may be a set by themselves.
    """
    names = {
        known[bare]: name
        for bare, name in stored.items()
        if bare in known and _shape(item[name]) == wanted.shapes[known[bare]]
    }
    if not all(name in names for name in wanted.needed):
        parameters = sum(name in names for name in wanted.parameters)
        rest = {*stored.values()} - {*names.values()}
        apart = bool(buffers) and not parameters and all(name in names for name in buffers)
        some = apart or 2 * parameters >= len(wanted.parameters)
        if not some or any(is_weight(item[n]) for n in rest):
            return None
    return {name: names[name] for name in wanted.shapes if name in names}


def _by_order(keys: Keys, item: Any, wanted: Wanted) -> Location | None:
    """Return the weights that a list, lists in a list, a dict by numbers or a vector holds."""
    if _is_numbers(item):
        return _vector(keys, item, wanted)
    by_number = isinstance(item, Mapping) and list(item) == list(range(len(item)))
    if not item or not (by_number or type(item) in (list, tuple)):
        return None
    values = flattened(item)
    if not values or not all(map(_is_numbers, values)):
        return None
    shapes = [_shape(value) for value in values]
    if not all(map(is_weight, values)):  # those of a whole state_dict, counters too
        whole = shapes == list(wanted.shapes.values())
        tensors = OrderedDict(zip(wanted.shapes, map(as_tensor, values), strict=False))
        return Location(keys, item, tensors) if whole else None
    groups = [shapes] if len(values) == len(item) else [list(map(_shape, part)) for part in item]
    orders = [wanted.parameters, list(wanted.shapes), wanted.needed]
    names = next((o for o in orders if [wanted.shapes.get(n) for n in o] == shapes), ())
    if not names and 2 * len(values) >= len(wanted.parameters):
        names = wanted.in_order(groups)
    start = None
    is_flat = type(item) in (list, tuple) and len(values) == len(item)
    if not names and is_flat and is_average(".".join(map(str, keys))):
        start, names = _run_of(shapes, [[wanted.shapes[n] for n in o] for o in orders], orders)
    if not names:
        return None
    own = values if start is None else values[start : start + len(names)]
    tensors = OrderedDict(zip(names, map(as_tensor, own), strict=True))
    return Location(keys, item, tensors, start=start)


def _run_of(
    shapes: Sequence[Shape], runs: Sequence[Sequence[Shape]], orders: Sequence[Sequence[str]]
) -> tuple[int | None, Sequence[str]]:
    """Return where the weights of a network stand among those of more, and their names.

    A list by a trainer may hold those of a loss or of another network too. Only a run that stands
    there once, in one of the orders, is certain.

    Args:
        shapes: of all that a list holds.
        runs: those of the network's tensors, for each order.
        orders: the names of these.

    Returns:
        The place of the first and the names; None and () where there is none, or more than one.
    """
    found = {
        (start, len(run)): names
        for run, names in zip(runs, orders, strict=True)
        if 1 < len(run) < len(shapes)
        for start in range(len(shapes) - len(run) + 1)
        if shapes[start] == run[0] and list(shapes[start : start + len(run)]) == list(run)
    }
    longest = max((length for _, length in found), default=0)
    (*places,) = (start for start, length in found if length == longest)
    return (places[0], found[places[0], longest]) if len(places) == 1 else (None, ())


def _vector(keys: Keys, item: Any, wanted: Wanted) -> Location | None:
    """Return the parameters that stand end to end in one vector."""
    shapes = {name: wanted.shapes[name] for name in wanted.parameters}
    length = sum(map(math.prod, shapes.values()))
    if len(shapes) < 2 or not is_weight(item) or tuple(item.shape) != (length,):
        return None
    return end_to_end(keys, item, shapes) if isinstance(item, Tensor) else None


def _is_numbers(value: object) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.itemsize <= 16
    )


def is_weight(value: Any) -> bool:
    """Return whether a value may be a weight: an array of numbers that are not whole."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and (value.is_floating_point() or value.is_complex())
    return isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "fc"


def _shape(value: Any) -> Shape:
    return tuple(value.shape)
