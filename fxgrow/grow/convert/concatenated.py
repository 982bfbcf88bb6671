"""What new modules add to a concatenation, where it holds channels that the others share.

The blocks of a residual stream whose states are all concatenated (C2f of YOLOv8) add states of the
same channels: each is there once more, at places of its own. What reads a state that the source has
not is no column of the old channel, and is to be zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.channels import Channels
from fxgrow.grow.convert.alignment import Alignment
from fxgrow.grow.identity.concrete_run import any_inside
from fxgrow.labels.forest import IntArray
from fxgrow.labels.layers import core, cover, support
from fxgrow.labels.tape import Operation


def added_places(source: Analysis, target: Analysis, alignment: Alignment) -> IntArray:
    """Return the labels of what the target reads of channels that new modules add once more.

    Args:
        source: of the network at hand.
        target: of the larger one.
        alignment: of their modules.
    """
    channels = target.channels
    found = [np.zeros(0, dtype=np.int64)]
    for before, after in _pairs(source, target, alignment):
        made = [
            value.producer is not None
            and any_inside(target.tape.operations[value.producer].module, alignment.fresh)
            for value in after.args[0]
        ]
        if sum(made) != len(made) - len(before.args[0]):
            continue  # some of them take the place of what the source has there
        dim = (after.args[1] if len(after.args) > 1 else 0) % len(after.outputs[0].shape)
        layer = cover(after.outputs[0].layers, dim)
        if layer is not None and support(layer) == {dim}:
            line = core(layer, (dim,)).reshape(-1).numpy()
            sizes = [value.shape[dim] for value in after.args[0]]
            found.append(line[np.repeat(made, sizes)].astype(np.int64))
    labels = np.concatenate(found)
    places = labels[(labels > 0) & ~np.isin(labels, channels.label_of_row)]
    if not len(places):
        return places
    return np.flatnonzero(np.isin(channels.rows.of_label, channels.rows.of_label[places]))


def _pairs(
    source: Analysis, target: Analysis, alignment: Alignment
) -> Iterator[tuple[Operation, Operation]]:
    """Yield the concatenations of both networks that are one and the same in their code."""
    old, new = map(_concatenations, (source, target))
    for module, after in new.items():
        before = old.get(alignment.modules.get(module, module), [])
        if module in alignment.modules and len(before) == len(after):
            yield from zip(before, after, strict=True)


def _concatenations(analysis: Analysis) -> dict[str, list[Operation]]:
    """Return the concatenations of a run in order, by the module that makes them."""
    found: dict[str, list[Operation]] = {}
    for op in analysis.tape.operations:
        if op.name == "cat":
            found.setdefault(op.module, []).append(op)
    return found


def apart(channels: Channels, labels: IntArray) -> Channels:
    """Return channels in which the rows of some labels are channels of their own.

    Args:
        channels: of a run.
        labels: of whole rows; those that no axis has are looked over.
    """
    if not len(labels):
        return channels
    own = np.full(len(channels.channel_of_label), -1, dtype=np.int64)
    _, numbers = np.unique(channels.rows.of_label[labels], return_inverse=True)
    own[labels] = channels.count + numbers
    row = own[channels.label_of_row]
    return replace(
        channels,
        channel=np.where(row >= 0, row, channels.channel),
        channel_of_label=np.where(own >= 0, own, channels.channel_of_label),
        count=channels.count + int(numbers.max()) + 1,
    )
