"""Widening one call: with twice the channels, what the old labels say of the result stays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxgrow.labels.forest import IntArray
from fxgrow.labels.validate.checks import (
    SampleCase,
    UnmatchedError,
    alike,
    difference,
    laid_out_as,
    run,
    taken,
)
from fxgrow.labels.validate.claims import Claims, Located, SampleCall, claims_of, label

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Origin:
    """Where the channels of the wide call come from.

    Attributes:
        old: for each new channel the old one that it is, or of whose kind it is; 0 for none.
        is_fresh: it was not there.
        factor: what its values are multiplied by.
        columns: what the columns of parameters that read it are multiplied by.
    """

    old: IntArray
    is_fresh: npt.NDArray[np.bool_]
    factor: FloatArray
    columns: FloatArray


def check_widening(case: SampleCase) -> str:
    """Double the channels of a call; return what is wrong, or "".

    Raises:
        UnmatchedError: nothing can be said.
    """
    claims = case.claims
    shapes = [
        _doubled(x.shape, layers) for x, layers in zip(case.operands, claims.operands, strict=True)
    ]
    if all(shape == x.shape for shape, x in zip(shapes, case.operands, strict=True)):
        raise UnmatchedError
    found = _claims_at(case, shapes)
    if isinstance(found, str):  # a dim along which channels lie whole may be of a fixed size
        pairs_of = zip(case.operands, claims.operands, strict=True)
        shapes = [_doubled(x.shape, layers, varying=True) for x, layers in pairs_of]
        if all(shape == x.shape for shape, x in zip(shapes, case.operands, strict=True)):
            raise UnmatchedError
        found = _claims_at(case, shapes)
    if isinstance(found, str):
        return f"more channels: torch refuses them ({found})"
    call, wide = found
    origin = _origin(claims, wide, case.random)
    pairs = zip(case.operands, claims.operands, wide.operands, strict=True)
    operands = [_widened(x, old, new, origin) for x, old, new in pairs]
    try:
        results = run(call, operands)
    except (RuntimeError, IndexError, ValueError) as error:
        return f"more channels: torch refuses them ({_first_line(error)})"
    continued = _continued(case, wide, results, origin)
    return difference(case, case.results, continued, "more channels")


def _continued(
    case: SampleCase, wide: Claims, results: Sequence[Tensor], origin: Origin
) -> list[Tensor]:
    """Return what of the wider results continues the old ones, in their shapes.

    Raises:
        UnmatchedError: that cannot be said.
    """
    claims, found = case.claims, list(results)
    if len(found) != len(case.results):
        raise UnmatchedError
    for place, before in enumerate(case.results):
        if claims.is_open[place]:
            continue
        old, new = claims.results[place], wide.results[place]
        if [x.dims for x in old] != [x.dims for x in new]:
            raise UnmatchedError
        for mine, theirs in zip(old, new, strict=True):
            found[place] = _kept(found[place], mine, theirs, origin)
        found[place] = _cut(found[place], before)
        if before.shape != found[place].shape and wide.numbers != claims.numbers:
            raise UnmatchedError  # what was computed from a size in Python has another one
    return found


def _cut(x: Tensor, like: Tensor) -> Tensor:
    """Return what is constant along a dim with as many entries there as another has."""
    if x.ndim != like.ndim or not like.numel():
        return like
    for dim, (size, wanted) in enumerate(zip(x.shape, like.shape, strict=True)):
        if size > wanted and bool(alike(x.narrow(dim, 0, 1).expand_as(x), x).all()):
            x = x.narrow(dim, 0, wanted)
    return x


def _doubled(
    shape: Sequence[int], layers: Sequence[Located], *, varying: bool = False
) -> torch.Size:
    """Return a shape with twice the size in each dim that is made of channels alone.

    Args:
        shape: the shape.
        layers: of the tensor.
        varying: leave dims out along which each channel lies whole.
    """
    dims = {
        dim
        for layer in layers
        if layer.channels.all()
        for place, dim in enumerate(layer.dims)
        if not varying or _varies(layer, place)
    }
    return torch.Size([size * (1 + (dim in dims)) for dim, size in enumerate(shape)])


def _varies(layer: Located, place: int) -> bool:
    """Return whether positions along one of a layer's dims are of several channels."""
    channels = layer.channels.reshape(layer.shape)
    return bool((channels != channels.take([0], place)).any())


def _claims_at(case: SampleCase, shapes: Sequence[torch.Size]) -> tuple[SampleCall, Claims] | str:
    """Return the call that runs at other shapes, with its claims; literal sizes follow.

    Returns:
        What torch has against it, if none runs.

    Raises:
        UnmatchedError: none does, and it takes sizes.
    """
    metas = [
        laid_out_as(x, torch.empty(shape, dtype=x.dtype, device="meta"))
        for x, shape in zip(case.operands, shapes, strict=True)
    ]
    refusal = ""
    for call in (case.call, *case.call.with_larger_numbers()):
        try:
            return call, claims_of(label(call, case.way, metas))
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
            refusal = refusal or _first_line(error)
    if case.claims.is_sized:
        raise UnmatchedError
    return refusal


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:100]


def _origin(claims: Claims, wide: Claims, random: np.random.Generator) -> Origin:
    """Match old channels to new ones of the same kind, in order.

    What is left are new channels in pairs of twins, whose columns cancel; or copies of the old ones
    where an operation depends on all of them.

    Raises:
        UnmatchedError: a channel has nowhere to go.
    """
    size = len(wide.group)
    old, factor, columns = np.zeros(size, dtype=np.int64), np.ones(size), np.ones(size)
    is_fresh = np.ones(size, dtype=bool)
    is_fresh[0] = False
    copies = bool(claims.is_mixed.any())
    theirs = wide.signatures()
    for signature, members in claims.signatures().items():
        new = theirs.get(signature, [])
        if len(new) < len(members):
            raise UnmatchedError
        old[new[: len(members)]] = members
        is_fresh[new[: len(members)]] = False
        rest = new[len(members) :]
        if copies:
            old[rest] = np.resize(members, len(rest))
            columns[rest] = 0.0
            continue
        for pair in itertools.zip_longest(rest[::2], rest[1::2]):
            donor, scale = random.choice(members), random.uniform(0.8, 1.0)
            for twin, sign in zip(pair, (1.0, -1.0 if pair[1] else 0.0), strict=True):
                if twin is not None:
                    old[twin], factor[twin] = donor, scale
                    columns[twin] = sign
            if pair[1] is None:
                columns[pair[0]] = 0.0
    return Origin(old, is_fresh, factor, columns)


def _widened(
    x: Tensor, layers: Sequence[Located], wide: Sequence[Located], origin: Origin
) -> Tensor:
    """Return an operand with the old channels and the new ones in their places."""
    if [layer.dims for layer in layers] != [layer.dims for layer in wide]:
        raise UnmatchedError
    like = x
    rows: IntArray = np.arange(x.shape[0]) if x.ndim else np.zeros(1, dtype=np.int64)
    for before, after in zip(layers, wide, strict=True):
        if not before.channels.all() or not after.channels.all():
            if before.channels.shape != after.channels.shape:
                raise UnmatchedError
            continue
        if len(before.dims) == 1:
            places = _places(before.channels, after.channels, origin)
            (dim,) = before.dims
            x = x.index_select(dim, torch.from_numpy(places))
            rows = places if dim == 0 else rows
        else:  # the columns of a grouped convolution, those of each row
            table = before.channels.reshape(before.shape)[rows]
            found = after.channels.reshape(after.shape)
            both = [_places(*row, origin) for row in zip(table, found, strict=True)]
            index = torch.from_numpy(np.stack(both))
            x = x.take_along_dim(index.reshape(*index.shape, *[1] * (x.ndim - 2)), 1)
        if x.is_floating_point() or x.is_complex():
            scale = (origin.columns if after.is_read else origin.factor)[after.channels]
            sizes = [n if dim in after.dims else 1 for dim, n in enumerate(x.shape)]
            x = x * torch.from_numpy(scale).reshape(sizes).to(x.dtype)
    return laid_out_as(like, x)


def _places(before: IntArray, after: IntArray, origin: Origin) -> IntArray:
    """Return, for each position after, the one before that it is, or that it is made of.

    Raises:
        UnmatchedError: there is none.
    """
    order = np.argsort(before, kind="stable")
    sources = origin.old[after]
    first = np.searchsorted(before[order], sources)
    seen: dict[int, int] = {}
    rank = np.empty_like(first)
    for place, channel in enumerate(after.tolist()):
        rank[place] = seen[channel] = seen.get(channel, -1) + 1
    found = first + rank
    if not origin.old[after].all() or (found >= len(before)).any():
        raise UnmatchedError
    places: IntArray = order[found]
    if (before[places] != sources).any():
        raise UnmatchedError
    return places


def _kept(x: Tensor, mine: Located, theirs: Located, origin: Origin) -> Tensor:
    """Return a result of the wide call at the places of old channels alone, in the old order."""
    kept = np.flatnonzero(~origin.is_fresh[theirs.channels])
    if not mine.channels.all() and len(kept) != len(mine.channels):
        raise UnmatchedError
    new_order = kept[np.argsort(origin.old[theirs.channels[kept]], kind="stable")]
    old_order = np.argsort(mine.channels, kind="stable")
    if len(new_order) != len(old_order):
        raise UnmatchedError
    places = np.empty_like(old_order)
    places[old_order] = new_order
    return taken(x, mine.dims, places, mine.shape)
