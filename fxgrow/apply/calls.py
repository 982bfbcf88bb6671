"""Calls of new modules, put into the graph of the module that calls those before them.

Where code names its blocks one by one (``x = self.block2(self.block1(x))``), a new block would be
held and never called. So the code of that one module is traced, with all modules in it closed, and
each new block is called on what the one before it gives; whatever used that uses its result.
"""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

from torch import fx, nn

from fxgrow.apply.graph import graph_module
from fxgrow.errors import PlanError
from fxgrow.labels.graphs import OpenTracer
from fxgrow.modules.standin import first_line
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import Rearrangement


class _CodeTracer(OpenTracer):
    """Follows the code of one module; those that it calls stay closed."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one node of the graph: any is."""
        return True


def with_calls(old: nn.Module, new: nn.Module, edit: Rearrangement) -> fx.GraphModule:
    """Return a module as a GraphModule that calls the new modules in it.

    Args:
        old: the module that calls the blocks, before the rearrangement; only read.
        new: the same after it.
        edit: the rearrangement, whose ``caller`` this module is.

    Raises:
        PlanError: the code cannot be traced, differs between the modes or does not call each
            block once, or the module holds tensors that a graph of it would not.
    """
    path = edit.container.removeprefix(edit.caller or "").removeprefix(".")
    prefix = f"{path}." if path else ""
    graph = _traced(old)
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    _rename(graph, prefix, {child.source: child.name for child in edit.children if not child.new})
    last: fx.Node | None = None
    for before, child in pairwise(edit.children):
        if child.new:
            if last is None or not before.new:
                last = _only(calls, prefix + before.source)
            like = _only(calls, prefix + child.source)
            last = _call_after(graph, last, like, prefix + child.name)
    _check(graph, new)
    made = graph_module(new, graph)
    return graph_module(made, _followed(made))  # its nodes are named after its modules


def _traced(module: nn.Module) -> fx.Graph:
    """Return the graph of a module's code.

    Raises:
        PlanError: it cannot be traced, differs between train and eval mode, or holds constants.
    """
    kind = type(module).__name__
    graphs = []
    for mode in (True, False):
        view = copy.copy(module)  # a tracer writes to what it traces
        vars(view)["training"] = mode
        graphs.append(_followed(view))
        held = {*named_tensors(module), *(name for name, _ in module.named_modules())}
        if any(node.target not in held for node in graphs[-1].find_nodes(op="get_attr")):
            raise PlanError(f"{kind} makes a constant, which would be a buffer of its graph")
    if str(graphs[0]) != str(graphs[1]):
        raise PlanError(f"the graph of {kind} differs between train and eval mode")
    return graphs[1]


def _followed(module: nn.Module) -> fx.Graph:
    """Return the graph of a module's code in its present mode.

    Raises:
        PlanError: it cannot be traced.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _CodeTracer().trace(module)
    except Exception as error:  # a user's forward may raise anything
        kind = type(module).__name__
        raise PlanError(f"torch.fx cannot trace {kind}: {first_line(error)}") from error


def _rename(graph: fx.Graph, prefix: str, names: dict[str, str]) -> None:
    """Let the nodes of a graph refer to modules by their new names, in place."""
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and node.target.startswith(prefix):
            local, dot, rest = node.target.removeprefix(prefix).partition(".")
            node.target = f"{prefix}{names.get(local, local)}{dot}{rest}"


def _only(calls: dict[str, list[fx.Node]], name: str) -> fx.Node:
    """Return the one call of a module.

    Raises:
        PlanError: there is none, or there are several.
    """
    found = calls.get(name, [])
    if len(found) != 1:
        raise PlanError(f"it calls {name} {len(found)} times", name=name)
    return found[0]


def _call_after(graph: fx.Graph, last: fx.Node, like: fx.Node, name: str) -> fx.Node:
    """Call a module as another one is, on what a node gives, and let it take that one's place.

    Raises:
        PlanError: the other one gets nothing from the graph.
    """
    if not like.all_input_nodes:
        raise PlanError(f"it gives nothing to {like.target}", name=name)
    entry = like.all_input_nodes[0]
    with graph.inserting_after(last):
        made = graph.call_module(name, like.args, like.kwargs)
    made.replace_input_with(entry, last)
    last.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made


def _check(graph: fx.Graph, module: nn.Module) -> None:
    """Return if a graph can run, and has all that a module holds.

    Raises:
        PlanError: it has not, or something is used before it is there.
    """
    try:
        graph.lint()
    except RuntimeError as error:
        raise PlanError(f"its graph cannot be put in order: {first_line(error)}") from error
    used = {n.target for n in graph.nodes if n.op in ("call_module", "get_attr")}
    for name in named_tensors(module):
        parts = name.split(".")
        if used.isdisjoint(".".join(parts[:length]) for length in range(1, len(parts) + 1)):
            kind = type(module).__name__
            raise PlanError(f"{kind} does not use {name}, which its graph would lose", name=name)
