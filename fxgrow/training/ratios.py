"""How large the parts of weights are beside the first one: what their rates go by."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fxgrow.training.parts import Part, runs_of

_LONG = 64  # entries of a run: norms of shorter ones cost more than the views that they save


@dataclass
class PartsByGrowth:
    """The parts of a parameter, by the growth that wrote them.

    Attributes:
        growths: the parts of the first growth and of each later one.
        shape: of the parameter.
    """

    growths: tuple[tuple[Part, ...], ...]
    shape: tuple[int, ...]

    @cached_property
    def runs(self) -> tuple[int, int] | None:
        """Runs of entries that lie in one part, (dim, length); None where they are short."""
        parts = itertools.chain.from_iterable(self.growths)
        dim, length = runs_of(parts, self.shape)
        return (dim, length) if length * prod(self.shape[dim + 1 :]) >= _LONG else None

    def views(self, parameter: Tensor, dtype: torch.dtype) -> list[list[Tensor]]:
        """Return, for each growth, tensors whose squares sum up to those of its entries.

        A parameter is read from its first entry to its last where it can: memory is what norms
        cost, and reading it in strides takes twice as long.
        """
        runs = self.runs if parameter.is_contiguous() else None
        if runs is not None:
            dim, length = runs
            parameter = parameter.view(*self.shape[:dim], self.shape[dim] // length, -1)
            parameter = vector_norm(parameter, dim=-1, dtype=dtype)
        views = [
            [view for part in parts for view in part.views(parameter, runs)]
            for parts in self.growths
        ]
        if runs is not None:
            return views
        # Norms of rows first are several times as fast over strides.
        return [[vector_norm(view.flatten(1), dim=1, dtype=dtype) for view in own] for own in views]


def ratios_of(members: Sequence[tuple[Tensor, PartsByGrowth]]) -> list[tuple[Tensor, ...]]:
    """Return ‖W_part‖/‖W_0‖ for each later growth of each parameter; 1 where either is 0.

    Args:
        members: parameters, each with its parts.

    Returns:
        For each parameter the ratios in order, shape () and of the parameter's dtype and device.
    """
    found: list[tuple[Tensor, ...]] = [()] * len(members)
    for device in {parameter.device for parameter, _ in members}:
        here = [number for number, (own, _) in enumerate(members) if own.device == device]
        dtypes = [members[number][0].dtype for number in here]
        wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
        growths = [
            views for number in here for views in members[number][1].views(members[number][0], wide)
        ]
        norms = torch.stack(torch._foreach_norm([view for views in growths for view in views]))
        which = [number for number, views in enumerate(growths) for _ in views]
        squares = norms.new_zeros(len(growths))
        squares.index_add_(0, torch.tensor(which, device=device), norms.square())
        counts = [len(members[number][1].growths) for number in here]
        firsts = [*itertools.accumulate(counts[:-1], initial=0)]
        first = squares[firsts].repeat_interleave(torch.tensor(counts, device=device))
        ratios = (squares / first).sqrt().where((squares > 0) & (first > 0), 1.0).unbind()
        for number, begin, count in zip(here, firsts, counts, strict=True):
            dtype = members[number][0].dtype
            found[number] = tuple(own.to(dtype) for own in ratios[begin + 1 : begin + count])
    return found
