"""Scalars on the edges of an fx graph: how a function is restored, and how one is predicted."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence

from torch import fx, nn

from fxgrow.errors import TraceError
from fxgrow.plan.schema import Multiplier
from fxgrow.standin import keeping_modes


def insert_multipliers(
    model: nn.Module, multipliers: Sequence[Multiplier], *, both_modes: bool = True
) -> fx.GraphModule:
    """Return the model as a GraphModule with a scalar on each of the given edges.

    Args:
        model: a module that ``torch.fx`` can trace; it becomes the owner of the graph's modules.
        multipliers: edges by the names of the traced graph's nodes.
        both_modes: require that the graph is the same in train and eval mode; without, the
            result is that of eval mode (its norms and dropout modules still follow the mode).

    Raises:
        TraceError: there is no such edge, or the graph differs between train and eval mode, so
            that one graph cannot serve both.
    """
    with keeping_modes(model):
        graphs = [_trace(model.train(mode)) for mode in (True, False)]
    graph = graphs[1]
    if both_modes and str(graphs[0]) != str(graph):
        raise TraceError(
            f"the graph of {type(model).__name__} differs between train and eval mode (functional "
            "dropout, stochastic depth), so no multiplier can be put into it.",
            way_out="Use dropout modules, or --rescaling none.",
        )
    nodes = {node.name: node for node in graph.nodes}
    for multiplier in multipliers:
        producer = nodes.get(multiplier.producer)
        consumer = nodes.get(multiplier.consumer)
        operand = _operand(producer, consumer)
        if operand is None or consumer is None:
            raise TraceError(
                f"the graph has no edge from {multiplier.producer} to {multiplier.consumer}.",
                name=multiplier.producer,
            )
        with graph.inserting_after(operand):
            scaled = graph.call_function(operator.mul, (operand, multiplier.factor))
        consumer.replace_input_with(operand, scaled)
    result = fx.GraphModule(model, graph, class_name=type(model).__name__)
    result.training = model.training
    return result


def _operand(producer: fx.Node | None, consumer: fx.Node | None) -> fx.Node | None:
    """Return the input of ``consumer`` that carries what ``producer`` computed, or None.

    Between them may lie nodes that pass it on as it is (dropout in eval mode).
    """
    if producer is None or consumer is None:
        return None
    for operand in consumer.all_input_nodes:
        node = operand
        while node is not producer and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        if node is producer:
            return operand
    return None


def _trace(model: nn.Module) -> fx.Graph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fx.Tracer().trace(model)
