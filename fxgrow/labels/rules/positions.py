"""What tells positions by values, and what is written at positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxgrow.labels.gains import agree, not_homogeneous
from fxgrow.labels.layers import Layer, Layers, clusters, core, support
from fxgrow.labels.operators import aten
from fxgrow.labels.padding import joined
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules.record import rule
from fxgrow.labels.step import Step


@rule(
    *aten(
        "nonzero argwhere _unique2 unique_dim unique_consecutive bincount repeat_interleave equal "
        "allclose _local_scalar_dense"
    ),
    "torchvision.nms",
    gain=not_homogeneous,
)
def told(step: Step) -> tuple[Layers, ...]:
    """Tell positions, or a number: nobody sees what is done with those."""
    for tensor in step.operands:
        step.pin(step.layers(tensor), PinKind.LOOKED_UP, step.target._opname)
    return tuple(() for _ in step.outputs)


@rule(*aten("_is_all_true _is_any_true"), gain=not_homogeneous)
def checked(step: Step) -> tuple[Layers, ...]:
    """Say whether values are what they should be, as the arguments of torch.distributions are.

    Only an error depends on that.
    """
    return tuple(() for _ in step.outputs)


@rule("aten._pack_padded_sequence")
def packed(step: Step) -> tuple[Layers, ...]:
    """Steps of sequences behind one another, less their padding: the channels of a step pass."""
    x = step.args[0]
    shape = step.outputs[0].shape
    kept = step.beside(x, range(2, x.ndim), PinKind.POSITIONS, "pack_padded_sequence")
    return (tuple(layer[0, :1].expand(shape) for layer in kept), ())


@rule("aten.index_put", gain=agree, padding=joined)
def written(step: Step) -> tuple[Layers, ...]:
    """Write at positions of some dims, or add there: the others have the same channels in both."""
    x, indices, values = step.args[:3]
    places = _Places.of(x, indices, values)
    for tensor in indices:
        if tensor is not None:
            step.pin(step.layers(tensor), PinKind.LOOKED_UP, "index")
    if places is None:
        return step.give_up(PinKind.LOOKED_UP, "a mask or in dims apart")
    inside: list[Layer] = []
    for layer in step.layers(x):
        if support(layer) & set(places.dims):
            step.pin((layer,), PinKind.LOOKED_UP, "index")
        else:
            inside.append(places.at(layer))
    shape = places.shape
    out: list[Layer] = []
    for mine, theirs in clusters([tuple(inside), step.stretched(values, shape)]):
        found = _met(step, places, mine, theirs)
        if found is not None:
            out.append(places.whole(found))
    return (tuple(out),)


def _met(step: Step, places: _Places, mine: Layer | None, theirs: Layer | None) -> Layer | None:
    """Return the labels of what is written over or added to, None where there are none left."""
    x, _, values = step.args[:3]
    if mine is None or theirs is None:
        other, alone = (x, theirs) if mine is None else (values, mine)
        if alone is None:
            return None
        if not step.value(other).is_uniform and other.ndim:
            step.pin((alone,), PinKind.FIXED, step.met_by("combined with"))
            return None
        if mine is None:
            step.value(other).taken.append(places.whole(alone))
        return alone
    dims = support(mine) | support(theirs)
    if dims & set(places.found):  # values of their own at each position
        step.pin((mine, theirs), PinKind.LOOKED_UP, "index")
        return None
    step.space.unify(core(mine, dims), core(theirs, dims))
    return mine


class _Places:
    """Where positions are looked up, in a tensor and in what lies there.

    Attributes:
        dims: of the tensor, which are adjacent.
        found: of what lies there: those of the positions.
        shape: of what lies there.
    """

    def __init__(self, x: Tensor, dims: Sequence[int], sizes: Sequence[int]) -> None:
        self._whole = x.shape
        self.dims = tuple(dims)
        self.found = tuple(range(dims[0], dims[0] + len(sizes)))
        self.shape = (*x.shape[: dims[0]], *sizes, *x.shape[dims[-1] + 1 :])

    @classmethod
    def of(cls, x: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> _Places | None:
        """Return the places that indices tell, None where these are apart.

        How many positions a mask tells, only the values say that are to be there.
        """
        dims: list[int] = []
        sizes: list[int] = []
        dim = 0
        for index in indices:
            is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
            covered = index.ndim if index is not None and is_mask else 1
            if index is not None:
                dims += range(dim, dim + covered)
                own = [1] if is_mask else [*index.shape]
                sizes = [1] * (len(own) - len(sizes)) + sizes
                for place, size in enumerate(reversed(own), start=1):
                    sizes[-place] = max(size, sizes[-place])
            dim += covered
        if not dims or dims[-1] - dims[0] != len(dims) - 1:
            return None
        behind = values.ndim - (x.ndim - dims[-1] - 1)
        if sizes == [1] and behind > 0:
            sizes = [values.shape[behind - 1]]
        return cls(x, dims, sizes)

    def at(self, layer: Layer) -> Layer:
        """Return what lies at the positions, of a layer that does not vary over them."""
        for dim in reversed(self.dims):
            layer = layer.select(dim, 0)
        for dim in self.found:
            layer = layer.unsqueeze(dim)
        return layer.expand(self.shape)

    def whole(self, layer: Layer) -> Layer:
        """Return a layer of the whole tensor, of which one of what lies at positions is a part."""
        for dim in reversed(self.found):
            layer = layer.select(dim, 0)
        for dim in self.dims:
            layer = layer.unsqueeze(dim)
        return layer.expand(self._whole)
