"""What objects that are passed on may be made of, so that loading them runs nothing of a file.

A pickle that fxgrow writes is loaded elsewhere with all that a pickle may do: what is called there
gets its arguments, what is made there gets its state. So each kind of
:class:`~fxgrow.files.checkpoint.kept.Kept` has a check of all its parts. None lets a function or
class of the file's choice stand where it would be called, an attribute take the place of a method
that loading or copying calls, or a state into memory that is not its own.

Sources: the ``__reduce__``, ``__getstate__``, ``__setstate__`` and ``__setitem__`` of each class;
``load_reduce``, ``load_newobj`` and ``load_build`` of Python's ``pickle``.
"""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fxgrow.files.checkpoint import kept_names as names
from fxgrow.files.checkpoint.kept import Kept, Name
from fxgrow.files.checkpoint.pickles import SCALARS, PickleError

_DICTS = (dict, OrderedDict, defaultdict)
_DATA = (*SCALARS, list, tuple, set, frozenset, *_DICTS)
_FRACTION = re.compile(r"-?[0-9]{1,4000}(/[0-9]{1,4000})?")
_METHODS = frozenset((*dir(dict), *dir(list)))
# Attributes of configurations of the yacs family that look like parts of a class.
_FLAGS = frozenset(("__immutable__", "__deprecated_keys__", "__renamed_keys__", "__new_allowed__"))
_FURTHEST = {"pos": 624, "buffer_pos": 4}  # in memory that generators do not check themselves


def check_kept(kept: Kept) -> None:
    """Return if an object is made of what such objects are made of, and of nothing that is called.

    Raises:
        PickleError: it is not.
    """
    name = str(kept.name)
    check = (_CALLED if kept.called else _MADE).get(name)
    if check is None or not check(kept):
        raise PickleError(f"a {name} that is made of other things than those are")


def parts(kept: Kept) -> Iterator[object]:
    """Yield what an object that was checked holds and its check does not look into."""
    for item in kept.arguments:
        if not isinstance(item, Name):  # the check has looked at it
            yield item
    yield kept.items
    yield kept.entries
    if parent(kept) is not None:
        yield {key: value for key, value in kept.state.items() if key != "_parent"}
    elif kept.has_state and kept.state is not kept:
        yield kept.state


def parent(kept: Kept) -> Kept | None:
    """Return the configuration that one is part of, or None; :func:`parts` does not yield it.

    It holds the other in turn.
    """
    state = kept.state
    found = state.get("_parent") if type(state) is dict else None
    return found if isinstance(found, Kept) and str(kept.name) in names.CONFIGURATIONS else None


# ── what is called ──────────────────────────────────────────────────────────────────────────────


def _is_bare(kept: Kept) -> bool:
    return not (kept.items or kept.entries or kept.has_state)


def _of(*kinds: type, most: int = 99) -> Callable[[Kept], bool]:
    """Return a check of a call with arguments of these very types, and no more parts."""

    def check(kept: Kept) -> bool:
        known = all(type(item) in kinds for item in kept.arguments)
        return _is_bare(kept) and known and len(kept.arguments) <= most

    return check


def _is_kept(item: object, kinds: Iterable[str]) -> bool:
    return isinstance(item, Kept) and str(item.name) in kinds


def _time(kept: Kept) -> bool:
    """Numbers, and for times with a zone and zones, what ``datetime`` itself has for those."""
    zones = {
        "datetime.timezone": ("datetime.timedelta",),
        "datetime.datetime": ("datetime.timezone",),
        "datetime.time": ("datetime.timezone",),
    }.get(str(kept.name), ())
    return _is_bare(kept) and all(
        type(item) in (int, bytes, str, type(None)) or _is_kept(item, zones)
        for item in kept.arguments
    )


def _fraction(kept: Kept) -> bool:
    """A text without an exponent, which would be written out."""
    given = kept.arguments
    if len(given) == 1 and type(given[0]) is str:
        return _is_bare(kept) and _FRACTION.fullmatch(given[0]) is not None
    return _of(int, most=2)(kept)


def _deque(kept: Kept) -> bool:
    items, most = (*kept.arguments, None, None)[:2]
    known = len(kept.arguments) <= 2 and type(items) in (tuple, list, type(None))
    return known and type(most) in (int, type(None)) and not kept.entries and not kept.has_state


def _namespace(kept: Kept) -> bool:
    filled = not kept.has_state or _has_names(kept.state)
    return kept.arguments == () and not kept.items and not kept.entries and filled


def _partial(kept: Kept) -> bool:
    """Of a listed type, with arguments that are data; it is not called when it is loaded."""
    if len(kept.arguments) != 1 or not _is_value(kept.arguments[0]) or kept.items or kept.entries:
        return False
    state = kept.state if kept.has_state else (kept.arguments[0], (), None, None)
    if type(state) is not tuple or len(state) != 4:
        return False
    function, given, keywords, attributes = state
    known = function == kept.arguments[0] and type(given) is tuple and not attributes
    return known and (keywords is None or _has_names(keywords))


def _is_value(item: object) -> bool:
    return isinstance(item, Name) and item.is_value


def _bit_generator(kept: Kept) -> bool:
    """A generator by its name or class, and its numbers."""
    known = len(kept.arguments) <= 1 and all(_is_bits(item) for item in kept.arguments)
    return known and _has_numbers(kept)


def _is_bits(item: object) -> bool:
    if isinstance(item, Name):
        return str(item) in names.BIT_GENERATORS.values()
    return type(item) is str and item in names.BIT_GENERATORS


def _generator(kept: Kept) -> bool:
    """Of a bit generator, or of its name and what makes one of that name, which is called."""
    first, *rest = kept.arguments or ("MT19937",)
    known = _is_kept(first, (names.BIT_GENERATOR,)) or (type(first) is str and _is_bits(first))
    made = len(rest) <= 1 and all(
        isinstance(item, Name) and str(item) == names.BIT_GENERATOR for item in rest
    )
    return known and made and _has_numbers(kept)


def _has_numbers(kept: Kept) -> bool:
    """The state of a generator: a dict, or one and what its seeds were."""
    state = kept.state if kept.has_state else None
    if type(state) is tuple and len(state) == 2:
        state, seeds = state
        if seeds is not None and not _is_kept(seeds, (names.SEEDS,)):
            return False
    known = state is None or (type(state) is dict and _are_numbers(state))
    return known and not kept.items and not kept.entries


def _are_numbers(state: object, key: object = None) -> bool:
    """Numbers all through, of which none points beyond the memory of its generator."""
    if type(state) is dict:
        return all(type(k) is str and _are_numbers(v, k) for k, v in state.items())
    if key in _FURTHEST:
        return type(state) is int and 0 <= state <= _FURTHEST[str(key)]
    if type(state) in (list, tuple):
        return all(type(item) is int for item in state)  # type: ignore[attr-defined]
    return type(state) in (bool, int, float, str) or isinstance(state, (np.ndarray, np.generic))


def _seeds(kept: Kept) -> bool:
    """``(class, checksum, None)``, and numbers of which the fourth is the size of the third."""
    given, state = kept.arguments, kept.state
    known = len(given) == 3 and given[0] == Name(*names.SEED_SEQUENCE.rsplit(".", 1))
    if not known or type(given[1]) is not int or given[2] is not None:
        return False
    if type(state) is not tuple or len(state) != 5 or kept.items or kept.entries:
        return False
    numbers = all(item is None or _are_numbers(item) for item in state if type(item) is not dict)
    pool, size = state[2:4]
    sized = type(pool) is np.ndarray and type(size) is int and size == len(pool)
    return numbers and sized and dict not in map(type, state)


# ── what is made empty and filled ───────────────────────────────────────────────────────────────


def _has_names(held: object, flags: frozenset[str] = frozenset()) -> bool:
    """Return whether a dict has names as attributes have them, none of them of a class's parts."""
    if type(held) not in _DICTS:
        return False
    table: Mapping[Any, object] = held  # type: ignore[assignment]
    return all(type(key) is str and _is_free(key, held, flags) for key, held in table.items())


def _is_free(key: object, value: object, flags: frozenset[str] = frozenset()) -> bool:
    """Return whether an entry takes the place of no method, where entries are also attributes."""
    if type(key) is not str:
        return True
    if key.startswith("__") and key.endswith("__"):
        return key in flags and type(value) in _DATA
    return key not in _METHODS or not _may_be_called(value)


def _may_be_called(value: object) -> bool:
    """Return whether something is a function, a class, or passed on and one of those."""
    callables = ("functools.partial", *names.TRANSFORMS)
    return isinstance(value, Name) or callable(value) or _is_kept(value, callables)


def _attributes(kept: Kept) -> bool:
    """Attributes alone; tables among them may be attributes to whoever asks for one."""
    state = kept.state if kept.has_state else {}
    if kept.arguments or kept.items or kept.entries or not _has_names(state):
        return False
    tables = [value for value in _values(state) if type(value) in _DICTS]
    return all(_is_free(key, value) for table in tables for key, value in table.items())


def _values(state: object) -> list[Any]:
    return list(state.values()) if isinstance(state, dict) else []


def _mapping(kept: Kept) -> bool:
    """Entries, and the same or flags once more as attributes."""
    flags = _FLAGS if str(kept.name) in names.YACS else frozenset[str]()
    free = all(_is_free(key, value) for key, value in kept.entries.items())
    state = kept.state if kept.has_state else None
    known = state is None or _has_names(state, flags)
    return free and known and not kept.arguments and not kept.items


def _addict(kept: Kept) -> bool:
    """Its entries as arguments, which are not looked at, then as entries, and as its own state."""
    pairs = all(
        type(pair) is tuple and len(pair) == 2 and type(pair[0]) in SCALARS
        for pair in kept.arguments
    )
    free = all(_is_free(key, value) for key, value in kept.entries.items())
    own = not kept.has_state or kept.state is kept or _has_names(kept.state)
    return pairs and free and own and not kept.items


def _box(kept: Kept) -> bool:
    """Entries or items, and options, of which none is called but the class of boxes itself."""
    free = all(_is_free(key, value) for key, value in kept.entries.items())
    state = kept.state if kept.has_state else {}
    listed = str(kept.name) == names.BOX_LIST or not kept.items
    if kept.arguments or not free or not listed or not _has_names(state):
        return False
    options = [pair for table in _values(state) for pair in _items(table)]
    return all(
        _are_scalars(value)
        or (key in ("box_class", "default_box_attr") and str(value) in names.BOXES)
        for key, value in options
    )


def _are_scalars(value: object) -> bool:
    held = value if type(value) is tuple else [*_values(value)] if type(value) is dict else [value]
    return all(type(item) in SCALARS for item in held)


def _frozen(kept: Kept) -> bool:
    return _attributes(kept) and _is_kept(_entry(kept, "_configdict"), (names.CONFIG_DICT,))


def _entry(kept: Kept, key: str) -> object:
    return kept.state.get(key) if isinstance(kept.state, dict) else None


def _configuration(kept: Kept) -> bool:
    """A node of a tree: data and what it says of them; it may hold the node above it."""
    above = _entry(kept, "_parent")
    known = above is None or _is_kept(above, names.CONFIGURATIONS)
    return known and _attributes(kept) and _is_kept(_entry(kept, "_metadata"), names.METADATA)


def _transform(kept: Kept) -> bool:
    """Attributes without hooks, none of which takes the place of what is called."""
    state = kept.state if kept.has_state else {}
    plain = all(not value for key, value in _items(state) if "hook" in str(key))
    return plain and _attributes(kept) and "forward" not in dict(_items(state))


def _items(state: object) -> list[tuple[object, object]]:
    return list(state.items()) if isinstance(state, dict) else []


def _uuid(kept: Kept) -> bool:
    state = kept.state
    known = type(state) is dict and state.keys() <= {"int", "is_safe"}
    return known and _attributes(kept) and all(type(value) is int for value in _values(state))


def _checks(*groups: tuple[Iterable[str], Callable[[Kept], bool]]) -> dict[str, Any]:
    return {name: check for group, check in groups for name in group}


_CALLED: dict[str, Callable[[Kept], bool]] = _checks(
    (names.PATHS, _of(str)),
    (names.TIMES, _time),
    (names.ENUMS, _of(str, most=1)),
    (names.GENERATORS, _generator),
    ([names.BIT_GENERATOR], _bit_generator),
    ([names.SEEDS], _seeds),
    (["builtins.range", "builtins.slice"], _of(int, type(None), most=3)),
    (["collections.deque"], _deque),
    (["decimal.Decimal"], _of(str, most=1)),
    (["fractions.Fraction"], _fraction),
    (["functools.partial"], _partial),
    (["types.SimpleNamespace"], _namespace),
)
_MADE: dict[str, Callable[[Kept], bool]] = _checks(
    (names.MAPPINGS, _mapping),
    (names.ADDICTS, _addict),
    (names.BOXES, _box),
    ([names.CONFIG_DICT], _attributes),
    ([names.FROZEN_CONFIG_DICT], _frozen),
    ([*names.METADATA, *names.SCALERS], _attributes),
    (names.CONFIGURATIONS, _configuration),
    (names.TRANSFORMS, _transform),
    ([names.UUID], _uuid),
)
