"""The fields of a configuration that are numbers, and the values that they may have become."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from fxgrow.modules.huggingface import LABELS

Config: TypeAlias = dict[str, Any]
Place: TypeAlias = tuple[str | int, ...]
Change: TypeAlias = tuple[tuple[Place, object], ...]
Number: TypeAlias = int | float

_MOST_ITEMS = 256  # that are looked at one by one; sizes are given for each layer at most


@dataclass(frozen=True)
class Difference:
    """Something that is not yet as it is in the grown model.

    Attributes:
        name: of a tensor, or of a module's attribute.
        have, want: its sizes; () if it is missing.
        is_tensor: whether it is a tensor.
    """

    name: str
    have: tuple[Number, ...]
    want: tuple[Number, ...]
    is_tensor: bool = True


def proposals(
    config: Config, left: Sequence[Difference], every: bool
) -> Iterator[tuple[Place, object]]:
    """Yield fields with new values: numbers times the ratios by which sizes must grow.

    Args:
        config: the configuration.
        left: what is still different.
        every: try fractions, and fields without a value, which may be any size that is wanted.
    """
    sizes = (zip(each.have, each.want, strict=False) for each in left)
    pairs = [(have, want) for have, want in itertools.chain(*sizes) if have != want and have]
    ratios = dict.fromkeys(_ratio(have, want) for have, want in pairs)
    for place, value in _leaves(config):
        if not every and not isinstance(value, (int, list)):
            continue
        wanted = (want for _, want in pairs)
        found = wanted if value is None else (_scaled(value, ratio) for ratio in ratios)
        yield from ((place, each) for each in dict.fromkeys(found) if each is not None)


def _leaves(config: object, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield all numbers in a configuration, lists of them, and fields without a value.

    The entries of long lists and mappings are ids and names, such as a vocabulary's, and no fields.
    """
    if isinstance(config, list) and config and all(is_number(item) for item in config):
        yield place, config
    if isinstance(config, (dict, list)):
        if len(config) > _MOST_ITEMS and place:
            return
        entries = config.items() if isinstance(config, dict) else enumerate(config)
        for key, value in entries:
            if key not in LABELS:
                yield from _leaves(value, (*place, key))
    elif is_number(config) or config is None:
        yield place, config


def _ratio(have: Number, want: Number) -> Fraction | float:
    if isinstance(have, int) and isinstance(want, int):
        return Fraction(want, have)
    return want / have


def _scaled(value: Number | list[Number], ratio: Fraction | float) -> object:
    """Return a number, or each of some, times a ratio; None if one should be whole and is not."""
    if isinstance(value, list):
        items = tuple(_scaled(item, ratio) for item in value)
        return None if None in items else items
    if isinstance(value, float):
        return value * float(ratio)
    scaled = value * ratio
    return int(scaled) if scaled == int(scaled) else None


def is_number(value: object) -> bool:
    """Return whether a value is a number, which a flag is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def changed(config: Config, changes: Iterable[tuple[Place, object]]) -> Config:
    """Return a configuration with some fields set; what is not on the way to them is shared."""
    result: Any = config
    for place, value in changes:
        result = _with(result, place, list(value) if isinstance(value, tuple) else value)
    return dict(result)


def _with(holder: Any, place: Place, value: object) -> Any:
    """Return a part of a configuration with one field set."""
    if not place:
        return value
    copied = copy.copy(holder)
    inner = copied.get(place[0], {}) if isinstance(copied, dict) else copied[place[0]]
    copied[place[0]] = _with(inner, place[1:], value)
    return copied
