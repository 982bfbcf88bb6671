"""What new channels cost: the parameters of a network as a function of the widths of its groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fxgrow.channels.analysis import Analysis
from fxgrow.modules.tensors import aliases_of, named_tensors


@dataclass(frozen=True)
class _Dim:
    """A dim of a parameter.

    Attributes:
        size: at present.
        per_channel: positions that each channel of a group takes in it, by the group's name.
    """

    size: int
    per_channel: Mapping[str, Fraction]


class Costs:
    """The numbers of parameters that new channels bring.

    Rows, columns and carriers (of a norm, say) count, and where both layers around a weight grow,
    what is new in both.

    Args:
        analyses: of the network, or of the parts of it that are followed.
    """

    def __init__(self, analyses: Sequence[Analysis]) -> None:
        self._dims: dict[str, list[_Dim]] = {}
        self._touched: dict[str, dict[str, None]] = {}
        for part in analyses:
            self._add(part)

    def _add(self, part: Analysis) -> None:
        """Note which dims the groups of a part grow."""
        standin = part.traced.standin
        shapes = {name: tuple(p.shape) for name, p in standin.named_parameters()}
        first = aliases_of(named_tensors(standin))
        positions: dict[tuple[str, int], dict[str, Fraction]] = {}
        for group in part.groups:
            for index in group.axes:
                axis = part.channels.axes[index]
                name = first.get(axis.tensor, axis.tensor)
                if name not in shapes:
                    continue
                own = int(np.isin(part.channels.of_axis(index), group.channels).sum())
                # The inputs of a grouped convolution are seen once for each of its groups.
                times = Fraction(shapes[name][axis.dim], max(axis.size, 1))
                by_group = positions.setdefault((name, axis.dim), {})
                by_group[group.name] = times * Fraction(own, len(group.channels))
                self._touched.setdefault(group.name, {})[name] = None
        for name in {name for name, _ in positions}:
            self._dims[name] = [
                _Dim(size, positions.get((name, dim), {})) for dim, size in enumerate(shapes[name])
            ]

    def _size(self, tensor: str, new: Mapping[str, int]) -> Fraction:
        """Return how many entries a parameter has with some new channels in each group."""
        size = Fraction(1)
        for dim in self._dims[tensor]:
            size *= dim.size + sum(per * new.get(g, 0) for g, per in dim.per_channel.items())
        return size

    def of(self, group: str, count: int, new: Mapping[str, int]) -> int:
        """Return what more channels of one group cost.

        Args:
            group: its name.
            count: how many.
            new: the channels that the groups have got before.
        """
        after = {**new, group: new.get(group, 0) + count}
        tensors = self._touched.get(group, {})
        return int(sum(self._size(name, after) - self._size(name, new) for name in tensors))

    def beside(self, group: str) -> Collection[str]:
        """Return the groups whose channels cost something else when this one grows."""
        tensors = self._touched.get(group, {})
        return {
            name for tensor in tensors for dim in self._dims[tensor] for name in dim.per_channel
        }
