"""Pieces of a concatenation that are cut out of several values of the same channels.

Of ``cat([(x * mask)[:, :4], x[:, 4:]], 1)`` every channel has two values, and its place tells which
of them goes on: a copy of a channel must lie in the piece where that channel lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxgrow.labels.layers import core, cover, support
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Tape, Value


def note_pieces(space: LabelSpace, tape: Tape, pieces: Sequence[Value], dim: int) -> None:
    """Note which piece the channels of each lie in, where another one's values are theirs too.

    Args:
        space: where labels are noted.
        tape: of the run so far.
        pieces: what is joined.
        dim: along which; it may be negative.
    """
    whole = [_cut_from(tape, value) for value in pieces]
    if all(a is b for a, b in zip(whole, pieces, strict=True)):
        return
    different = {value.index: value for value in whole}
    labels = [_labels_of(value) for value in different.values()]
    if len(different) < 2 or not space.is_twice(torch.cat(labels)):
        return
    for place, value in enumerate(pieces):
        layer = cover(value.layers, dim % len(value.shape))
        if layer is not None:
            space.note(f"piece {place}", core(layer, support(layer)).reshape(-1))


def _cut_from(tape: Tape, value: Value) -> Value:
    """Return the value that one is a view of, itself if it is none."""
    while value.is_view and value.producer is not None and not value.is_weight:
        value = tape.operations[value.producer].inputs[0]
    return value


def _labels_of(value: Value) -> torch.Tensor:
    """Return the labels of a value, each once."""
    found = [core(layer, support(layer)).reshape(-1) for layer in value.layers]
    return torch.unique(torch.cat(found)) if found else torch.zeros(0, dtype=torch.int32)
