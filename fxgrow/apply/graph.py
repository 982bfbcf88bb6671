"""Changes to fx graphs: scalars on edges, which restore or predict a function, and other sizes.

Code is made of graphs in one place, :func:`graph_module`, which checks what gets into it.
"""

from __future__ import annotations

import functools
import keyword
import operator
import re
import unicodedata
from collections.abc import Iterator, Sequence, Set
from fractions import Fraction

from torch import fx, nn

from fxgrow.errors import PlanError, TraceError, shown
from fxgrow.labels.graphs import open_graph, same_graphs, symbolic_trace
from fxgrow.labels.sizes import check_sizes, map_sizes, sizes_in
from fxgrow.modules.standin import first_line, keeping_modes
from fxgrow.plan.edits import Multiplier, SizeEdit


def insert_multipliers(
    model: nn.Module, multipliers: Sequence[Multiplier], *, both_modes: bool = True
) -> nn.Module:
    """Return the model with a scalar on each of the given edges.

    What they are inserted into becomes a GraphModule: the model, or some of its submodules.

    Args:
        model: a module that ``torch.fx`` can trace; it becomes the owner of the graph's modules.
        multipliers: edges by the names of the traced graph's nodes.
        both_modes: require that the graph is the same in train and eval mode; without, the
            result is that of eval mode (its norms and dropout modules still follow the mode).

    Raises:
        TraceError: there is no such edge, or the graph differs between train and eval mode, so
            that one graph cannot serve both.
        PlanError: there is no such module.
    """
    for module in dict.fromkeys(multiplier.module for multiplier in multipliers):
        own = [multiplier for multiplier in multipliers if multiplier.module == module]
        model = with_submodule(model, module, _as_graph(module_at(model, module), own, both_modes))
    return model


def module_at(model: nn.Module, name: str) -> nn.Module:
    """Return a module in another one by its fully qualified name.

    Raises:
        PlanError: there is none.
    """
    found: nn.Module | None = model
    for part in name.split(".") if name else ():
        found = found._modules.get(part) if found is not None else None  # no property that has one
    if found is None:
        raise PlanError(
            f"the network has no module {shown(name)}.",
            name=name,
            way_out="Apply the plan to the network it was made for.",
        )
    return found


def with_submodule(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Return the model with a submodule replaced, in place; the new one itself for the name ""."""
    if not name:
        return new
    model.set_submodule(name, new)
    return model


def _as_graph(
    model: nn.Module, multipliers: Sequence[Multiplier], both_modes: bool
) -> fx.GraphModule:
    """Return one module as a GraphModule with the multipliers in it."""
    try:
        with keeping_modes(model):
            graphs = [symbolic_trace(model.train(mode)) for mode in (True, False)]
    except TraceError:
        raise
    except Exception as error:  # a user's forward may raise anything
        raise TraceError(f"torch.fx cannot trace it: {first_line(error)}.") from error
    graph = graphs[1]
    if both_modes and not same_graphs(model, *graphs):
        raise TraceError(
            f"the graph of {type(model).__name__} differs between train and eval mode (functional "
            "dropout, stochastic depth), so no multiplier can be put into it.",
            way_out="Use dropout modules, or --rescaling none.",
        )
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
    return graph_module(model, graph)


def sized_graph(model: nn.Module, edits: Sequence[SizeEdit]) -> fx.Graph:
    """Return a graph of the model with other sizes in it.

    Args:
        model: the model, with attributes as they were when the edits were made.
        edits: made for the graph that :func:`open_graph` returns.

    Raises:
        TraceError: the graph has no such node, or other sizes there.
    """
    graph = open_graph(model)
    nodes = {node.name: node for node in graph.nodes}
    for edit in edits:
        node = nodes.get(edit.node)
        if node is None:
            raise TraceError(f"the graph has no node {edit.node}.", name=edit.node)
        check_sizes(node, edit.function, edit.before)
        present = sizes_in(edit.function, node.args, node.kwargs)
        changes = list(zip(present, edit.before, edit.after, strict=True))
        if any(old != new and isinstance(now, int) and now != old for now, old, new in changes):
            raise TraceError(
                f"the sizes in {edit.node} are {present}, the plan expects {list(edit.before)}.",
                name=edit.node,
            )
        with graph.inserting_before(node):
            sizes = iter([_resized(graph, *change) for change in changes])
        node.args, node.kwargs = map_sizes(
            edit.function, node.args, node.kwargs, functools.partial(_next, sizes)
        )
    return graph


def _resized(graph: fx.Graph, now: object, old: int | None, new: int | None) -> object:
    """Return a size as it is to be; what is computed (by a batch's size) grows in its ratio."""
    if not isinstance(now, fx.Node) or old == new or not old or not new:
        return now if old == new else new
    ratio = Fraction(new, old)
    now = graph.call_function(operator.mul, (now, ratio.numerator))
    if ratio.denominator == 1:
        return now
    return graph.call_function(operator.floordiv, (now, ratio.denominator))


def _next(sizes: Iterator[object], _: object) -> object:
    return next(sizes)


def graph_module(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a graph over a model's modules as a module that is called like the model's class.

    torch.fx writes Python for it and runs that. Into this get, as they are, the names of modules
    and tensors, which a file may have told, and those of methods and arguments, which code tells:
    they are checked. Of nodes, functions and types torch.fx makes identifiers, constants it writes
    by ``repr``, and the name of the class not at all.

    Raises:
        PlanError: the model has no such module or tensor, or torch.fx cannot write its name.
    """
    _mention(model, graph)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            _check_target(model, node)
        words = [node.name, *node.kwargs]
        if node.op in ("call_method", "placeholder"):
            words.append(str(node.target).lstrip("*"))
        for word in words:
            if not word.isidentifier() or keyword.iskeyword(word):
                raise PlanError(f"torch.fx cannot write {shown(word)} for a name.", name=word)
    try:
        result = fx.GraphModule(model, graph, class_name=type(model).__name__)
    except Exception as error:  # a module may be called like something that a GraphModule has
        raise PlanError(
            f"torch.fx cannot make a graph of {type(model).__name__}: {first_line(error)}."
        ) from error
    for name, module in result.named_modules():  # what only holds others was made anew
        module.training = module_at(model, name).training
    return result


def _mention(model: nn.Module, graph: fx.Graph) -> None:
    """Let a graph look up what it does not use, in place: torch.fx drops, and copies, by that."""
    targets = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    named = dict(model.named_modules(remove_duplicate=False))
    used = {id(named.get(target)) for target in targets}
    called = {name for name, module in named.items() if id(module) in used}  # whatever it is called
    looked_up = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    last = next(n for n in reversed(graph.nodes) if n.op == "placeholder" or n.prev.op == "root")
    with graph.inserting_after(last):
        for name in reversed([*_unused(model, "", called, looked_up)]):
            if all(map(_is_writable, name.split("."))):
                graph.get_attr(name)


def _unused(module: nn.Module, prefix: str, called: Set[str], looked_up: Set[str]) -> Iterator[str]:
    """Yield the tensors that no node refers to, or the modules that hold nothing else."""
    for local in (*module._parameters, *module._buffers):
        if getattr(module, local) is not None and prefix + local not in looked_up:
            yield prefix + local
    for local, child in module._modules.items():
        name = prefix + local
        if child is None or name in called:
            continue
        if any(target.startswith(f"{name}.") for target in (*called, *looked_up)):
            yield from _unused(child, f"{name}.", called, looked_up)
        elif any(True for _ in (*child.parameters(), *child.buffers())):
            yield name


def _check_target(model: nn.Module, node: fx.Node) -> None:
    """Check that a model has what a node refers to, and that torch.fx can write its name.

    Raises:
        PlanError: it has not, or torch.fx cannot.
    """
    target = str(node.target)
    *owners, last = target.split(".")
    for part in (*owners, last):
        if not _is_writable(part):
            raise PlanError(
                f"torch.fx cannot write the name {shown(repr(part))} of {shown(target)}, so that "
                "no graph can be made of its network.",
                name=target,
                way_out="Rename it, with letters, digits and underscores.",
            )
    first = (*owners, last)[0]
    if hasattr(fx.GraphModule, first):  # nn.Module has it too if it is no name for a module
        raise PlanError(f"a graph has something else that is called {first}.", name=target)
    owner = module_at(model, ".".join(owners))
    if last not in owner._modules if node.op == "call_module" else not hasattr(owner, last):
        raise PlanError(f"the network has no {shown(target)}, which its graph uses.", name=target)


def _is_writable(part: str) -> bool:
    """Return whether torch.fx writes a part of a name so that it is that name in Python.

    It writes ``.part`` if that is an identifier, else ``getattr(…, "part")`` on one line, and drops
    lines that hold what looks like a mark of its own.
    """
    if part.isidentifier():  # Python reads compatibility characters as others
        return not keyword.iskeyword(part) and unicodedata.normalize("NFKC", part) == part
    kinds = {unicodedata.category(character) for character in part}
    plain = kinds.isdisjoint({"Cc", "Cs", "Zl", "Zp"}) and not {'"', "\\"} & {*part}
    return bool(part) and plain and not re.search(r"# COUNTER: \d", part)
