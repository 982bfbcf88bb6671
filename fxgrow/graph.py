"""Scalars on the edges of an fx graph: how a function is restored, and how one is predicted."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence

from torch import fx, nn

from fxgrow.errors import TraceError
from fxgrow.plan.schema import Multiplier


def insert_multipliers(model: nn.Module, multipliers: Sequence[Multiplier]) -> fx.GraphModule:
    """Return the model as a GraphModule with a scalar on each of the given edges.

    Args:
        model: a module that ``torch.fx`` can trace; it becomes the owner of the graph's modules.
        multipliers: edges by the names of the traced graph's nodes.

    Raises:
        TraceError: there is no such edge.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = fx.Tracer().trace(model)
    finally:
        for module, flag in flags:
            module.training = flag
    nodes = {node.name: node for node in graph.nodes}
    for multiplier in multipliers:
        producer = nodes.get(multiplier.producer)
        consumer = nodes.get(multiplier.consumer)
        if producer is None or consumer is None or producer not in consumer.all_input_nodes:
            raise TraceError(
                f"the graph has no edge from {multiplier.producer} to {multiplier.consumer}.",
                name=multiplier.producer,
            )
        with graph.inserting_after(producer):
            scaled = graph.call_function(operator.mul, (producer, multiplier.factor))
        consumer.replace_input_with(producer, scaled)
    result = fx.GraphModule(model, graph, class_name=type(model).__name__)
    result.training = model.training
    return result
