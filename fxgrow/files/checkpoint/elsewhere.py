"""What to say of a file in which no weights were found: what it holds, and what is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np

from fxgrow.errors import SourceError, shown
from fxgrow.files.checkpoint.matching import is_weight

_MOST = 10_000  # entries that are looked at
_TAKEN = "what is taken is a state_dict, or one in dicts within three levels"


def refuse_without_weights(path: Path, saved: object) -> NoReturn:
    """Refuse what a file holds, in none of whose places weights were found.

    Weights that lie where they are not looked for (in a list, deeper, as arrays of NumPy's) are
    named, with the line of code that saves them by themselves.

    Args:
        path: the file.
        saved: what it holds.

    Raises:
        SourceError: always.
    """
    found = next(_weights_in(saved), None)
    if found is None:
        raise SourceError(
            f"{path} holds no weights but {_describe(saved)}.",
            name=str(path),
            way_out="Give a file with a state_dict: torch.save(model.state_dict(), 'model.pt').",
        )
    place, weights = found
    where = "saved" + "".join(f"[{shown(repr(key), 60)}]" for key in place)
    is_numpy = all(isinstance(value, np.ndarray) for value in weights if is_weight(value))
    what = "arrays of NumPy's" if is_numpy else "a state_dict"
    taken = f"{{k: torch.as_tensor(v) for k, v in {where}.items()}}" if is_numpy else where
    raise SourceError(
        f"{path} holds {what} in {where} ({_describe(saved)}); {_TAKEN}.",
        name=str(path),
        way_out=f"Save it by itself: torch.save({taken}, 'model.pt'), where saved is "
        "torch.load(…).",
    )


def _weights_in(saved: object) -> Iterator[tuple[tuple[str | int, ...], list[object]]]:
    """Yield where dicts of weights by name lie in an object, the least deep first, with these."""
    waiting: list[tuple[tuple[str | int, ...], object]] = [((), saved)]
    for place, value in waiting:  # grows while it is gone through
        if isinstance(value, Mapping):
            named = [each for key, each in value.items() if isinstance(key, str)]
            if any(map(is_weight, named)):
                yield place, named
        waiting += (((*place, key), each) for key, each in _inside(value, _MOST - len(waiting)))


def _inside(value: object, most: int) -> Iterator[tuple[str | int, object]]:
    """Yield the first dicts and sequences in a dict or a sequence, with their keys."""
    pairs: Iterator[tuple[object, object]] = iter(())
    if isinstance(value, Mapping):
        pairs = iter(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        pairs = iter(enumerate(value))
    kept = (
        (key, each)
        for key, each in pairs
        if isinstance(key, (str, int)) and isinstance(each, (Mapping, list, tuple))
    )
    return islice(kept, max(most, 0))


def _describe(saved: object) -> str:
    if isinstance(saved, Mapping):
        entries = [f"{key} ({type(value).__name__})" for key, value in list(saved.items())[:5]]
        more = ", …" if len(saved) > len(entries) else ""
        return f"a dict of {', '.join(entries)}{more}" if entries else "an empty dict"
    return f"an object of type {type(saved).__name__}"
