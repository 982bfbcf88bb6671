"""What is predicted of a function that changes: multipliers on edges of the old network's graph."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fxgrow.channels.analysis import Analysis
from fxgrow.errors import PlanError, UnpredictedError
from fxgrow.labels.gains import GainFlow, Mismatch
from fxgrow.labels.graphs import operands_from
from fxgrow.labels.operators import traits_of
from fxgrow.labels.tape import Tape
from fxgrow.modules.tensors import layer_of
from fxgrow.plan.edits import Multiplier

_MOST_NAMED = 4  # layers in a way out


def multipliers(analysis: Analysis, flow: GainFlow) -> tuple[Multiplier, ...]:
    """Return the mismatches as multipliers on edges of the fx graph.

    Raises:
        PlanError: a mismatch lies inside a module that the graph holds as one node, or there is
            no graph.
    """
    if not flow.mismatches:
        return ()
    names = analysis.nodes
    graph = analysis.traced.graph if names else None
    nodes = {node.name: node for node in graph.nodes} if graph else {}
    found: dict[tuple[str, str], Multiplier] = {}
    for mismatch in flow.mismatches:
        place = _before_node(analysis.tape, names, mismatch) if names else -1
        producer = names[place] if place >= 0 else ""
        consumer = names[mismatch.consumer] if names and mismatch.consumer >= 0 else "output"
        if not producer or producer == consumer:
            raise UnpredictedError(
                f"this rescaling would change what the network computes: {mismatch.reason}. By how "
                "much cannot be predicted, since torch.fx cannot write that part of its code as a "
                "graph.",
                way_out=_kept(mismatch),
            )
        ends = operands_from(nodes[producer], nodes[consumer], set(names))
        if not ends:
            raise PlanError(f"the graph has no edge from {producer} to {consumer}.", name=producer)
        module = analysis.traced.module
        for end in ends:
            found[end.name, consumer] = Multiplier(end.name, consumer, mismatch.gain, module)
    return tuple(found.values())


def _kept(mismatch: Mismatch) -> str:
    """Return how to ask for the old weights where a gain comes from; numbered layers as one."""
    layers = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", layer_of(name)) for name in mismatch.sources})
    keep = " ".join(f"--rescaling '{layer}=none'" for layer in layers[:_MOST_NAMED])
    more = f" (and {len(layers) - _MOST_NAMED} more)" if len(layers) > _MOST_NAMED else ""
    told = f"{keep}{more} --rescaling '*=default_vt'" if keep else ""
    by_layer = f", or by layer, such as {told}" if told else ""
    return f"Keep the old weights there: --rescaling none{by_layer}."


def _before_node(tape: Tape, names: Sequence[str], mismatch: Mismatch) -> int:
    """Return what to scale instead of what lies inside of a node: what is moved or multiplied."""
    place = mismatch.producer
    while mismatch.consumer >= 0 and place >= 0 and names[place] == names[mismatch.consumer]:
        op = tape.operations[place]
        data = [value for value in op.inputs if not value.is_weight]
        moves = traits_of(op.target).is_movement
        if len(data) != 1 or not ((moves and data == [*op.inputs]) or op.name in ("mm", "bmm")):
            break
        place = -1 if data[0].producer is None else data[0].producer
    return place
