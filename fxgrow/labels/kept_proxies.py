"""Take out of a program's own tables what ``torch.fx`` traced with, which a forward may keep there.

Code that makes a table once, for all networks, keeps what it made in a dict of its module or by
``functools.lru_cache``. In a trace that is a proxy, and the next run would compute with it.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from functools import _lru_cache_wrapper
from typing import Any

from torch import fx

_DEPTH = 3  # of tuples in tuples
_made: ContextVar[list[weakref.ref[fx.Proxy]] | None] = ContextVar("made", default=None)


def note_made(proxy: fx.Proxy) -> fx.Proxy:
    """Note a proxy, which nothing should hold once the trace is over, and return it."""
    made = _made.get()
    if made is not None:
        made.append(weakref.ref(proxy))
    return proxy


@contextlib.contextmanager
def leaving_tables() -> Iterator[None]:
    """Take the proxies that are made meanwhile out of dicts, lists, sets and caches afterwards."""
    made: list[weakref.ref[fx.Proxy]] = []
    token = _made.set(made)
    try:
        yield
    finally:
        _made.reset(token)
        kept = _alive(made)
        if kept:  # some are in cycles, of young objects
            kept.clear()
            gc.collect(1)
            kept = _alive(made)
        for _ in range(_DEPTH):
            kept = _taken_out(kept) if kept else kept


def _alive(made: list[weakref.ref[fx.Proxy]]) -> list[Any]:
    return [proxy for ref in made if (proxy := ref()) is not None]


def without_frames(error: Exception) -> Exception:
    """Return an error that holds on to nothing of what ran: frames hold proxies."""
    chain: list[BaseException | None] = [error]
    while chain:
        one = chain.pop()
        if one is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            chain.extend((one.__cause__, one.__context__))
    return error


def _taken_out(kept: list[Any]) -> list[Any]:
    """Take objects out of what holds them; return the tuples that do, which cannot change."""
    ids = {id(one) for one in kept}
    tuples: list[Any] = []
    for holder in gc.get_referrers(*kept):
        kind = type(holder)
        if holder is kept:
            continue
        if kind is tuple:
            tuples.append(holder)
        elif kind is _lru_cache_wrapper:
            holder.cache_clear()
        elif kind is list or kind is set:
            left = [one for one in holder if id(one) not in ids]
            holder.clear()
            (holder.extend if kind is list else holder.update)(left)
        elif isinstance(holder, dict) and not _is_namespace(holder):
            for key in [k for k, value in holder.items() if {id(k), id(value)} & ids]:
                del holder[key]
    return tuples


def _is_namespace(held: dict[Any, Any]) -> bool:
    """Return whether a dict holds the attributes of an object: its code sets them anew."""
    return any(getattr(one, "__dict__", None) is held for one in gc.get_referrers(held))
