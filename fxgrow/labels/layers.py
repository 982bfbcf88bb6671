"""The algebra of label layers.

A tensor's labels are a tuple of *layers*. A layer is an int32 tensor of the tensor's own shape,
with stride 0 along every dim it does not vary in, so that a layer over a (2, 512, 56, 56)
activation holds 512 numbers. The *support* of a layer is the set of dims it varies in; the layers
of one tensor have disjoint supports (an MLP-Mixer's activation has one for its tokens and one for
its channels). Label 0 means "no channel": a constant, padding, or data of fixed width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Layer: TypeAlias = Tensor
Layers: TypeAlias = tuple[Tensor, ...]


def support(layer: Layer) -> frozenset[int]:
    """Return the dims along which ``layer`` varies.

    Example:
        >>> support(torch.arange(3, dtype=torch.int32)[None, :, None].expand(2, 3, 4))
        frozenset({1})
    """
    return _varying(layer.shape, layer.stride())


@functools.lru_cache(1 << 14)  # asked ten times for each operation, and few are unlike all others
def _varying(shape: tuple[int, ...], strides: tuple[int, ...]) -> frozenset[int]:
    sizes = zip(shape, strides, strict=True)
    return frozenset([dim for dim, (size, stride) in enumerate(sizes) if stride and size > 1])


def along(labels: Tensor, dim: int, shape: Sequence[int]) -> Layer:
    """Return a layer of ``shape`` that holds the 1-D ``labels`` along ``dim``.

    Example:
        >>> along(torch.tensor([7, 8]), 1, (3, 2)).tolist()
        [[7, 8], [7, 8], [7, 8]]
    """
    strides = [0] * len(shape)
    strides[dim] = labels.stride(0)
    return labels.as_strided(shape, strides)


def core(layer: Layer, dims: Iterable[int]) -> Tensor:
    """Return ``layer`` narrowed to one entry along every dim that is not in ``dims``."""
    shape = layer.shape
    thin = _thin(shape, dims if type(dims) is frozenset else frozenset(dims))
    return layer if thin == shape else layer.as_strided(thin, layer.stride())


@functools.lru_cache(1 << 14)
def _thin(shape: tuple[int, ...], dims: frozenset[int]) -> tuple[int, ...]:
    return tuple([size if dim in dims else min(size, 1) for dim, size in enumerate(shape)])


def narrowed(layer: Layer, dims: Iterable[int]) -> Tensor:
    """Return the largest label along every dim that is not in ``dims``, these having size one.

    Where a layer has labels at some positions and none at others, this finds one that it has.
    """
    others = sorted(support(layer) - set(dims))
    thin = core(layer, support(layer))
    return thin.amax(others, keepdim=True) if others else thin


def compact(layer: Layer) -> Layer:
    """Return the same layer with stride 0 along every dim in which it is constant.

    Needed after an operation that copied (a view that merged a varying and a constant dim, say).
    Costs about one pass over what varies.
    """
    dims = support(layer)
    thin = core(layer, dims)
    for dim in sorted(dims):
        first = thin.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(thin), thin):
            thin = first
    return thin.expand(layer.shape)


def cover(layers: Layers, dim: int) -> Layer | None:
    """Return the layer that varies along ``dim``, or None. At most one does."""
    for layer in layers:
        if dim in _varying(layer.shape, layer.stride()):
            return layer
    return None


def without_repeats(layers: Layers) -> Layers:
    """Return layers without those that put a tensor into a channel it lies in as a whole already.

    What is made of several tensors that each carry one (a row of a table, added to a stream that
    queries, keys and values are made of) would else carry it several times, and more at each step.

    Example:
        >>> row = torch.tensor(7, dtype=torch.int32).expand(2, 3)
        >>> len(without_repeats((row, row.expand(2, 3), along(torch.arange(3), 1, (2, 3)))))
        2
    """
    if len(layers) < 2:
        return layers
    kept: list[Layer] = []
    known: set[int] = set()
    for layer in layers:
        if not _varying(layer.shape, layer.stride()):
            label = int(layer[(0,) * layer.ndim])
            if label in known:
                continue
            known.add(label)
        kept.append(layer)
    return tuple(kept)


def clusters(layers_of: list[Layers]) -> list[list[Layer | None]]:
    """Group the layers of several tensors that vary along a common dim, one per tensor."""
    clusters: list[tuple[set[int], list[Layer | None]]] = []
    for index, layers in enumerate(layers_of):
        for layer in layers:
            dims = set(support(layer))
            open_ones = [
                (known, members)
                for known, members in clusters
                if members[index] is None and (known & dims or not (known or dims))
            ]
            if open_ones:  # the one with most dims in common and fewest others
                known, members = min(open_ones, key=lambda found: len(found[0] ^ dims))
                known |= dims
                members[index] = layer
            else:
                fresh: list[Layer | None] = [None] * len(layers_of)
                fresh[index] = layer
                clusters.append((dims, fresh))
    return [members for _, members in clusters]
