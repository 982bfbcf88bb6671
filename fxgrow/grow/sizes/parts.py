"""Sizes rewritten module by module, where the whole has no graph in which to rewrite them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fxgrow.channels.analysis import Analysis
from fxgrow.errors import TraceError
from fxgrow.grow.sizes.literals import Repair
from fxgrow.labels.parts import is_tensor_call, part_graph
from fxgrow.labels.sizes import SIZED, called_by, why_fixed
from fxgrow.modules.standin import stand_in
from fxgrow.plan.edits import SizeEdit


@dataclass(frozen=True)
class _Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def edits_in_parts(
    analysis: Analysis, repairs: Sequence[Repair], modules: Sequence[str]
) -> tuple[SizeEdit, ...] | None:
    """Return the sizes to be rewritten in graphs of the modules that fix them.

    Args:
        analysis: of the network.
        repairs: the sizes, in eval mode.
        modules: the module that made each call that takes sizes, in order.

    Returns:
        None if one of the modules cannot be traced, or makes other calls then.
    """
    wanted: dict[str, list[Repair]] = {}
    for repair in repairs:
        wanted.setdefault(repair.module, []).append(repair)
    traced = replace(analysis.traced, standin=stand_in(analysis.traced.standin))
    if "" in wanted or traced.module in wanted:
        return None
    calls = _calls(traced.standin, {*wanted}, traced.label)
    edits: list[SizeEdit] = []
    for module, own in wanted.items():
        if len(calls.get(module, ())) != 1:  # each call may have other sizes
            return None
        try:
            found = _edits(traced.standin.get_submodule(module), calls[module][0], own, modules)
        except TraceError:
            return None
        edits += [replace(edit, module=module) for edit in found]
    return tuple(edits)


def _edits(
    module: nn.Module, call: _Call, repairs: Sequence[Repair], modules: Sequence[str]
) -> Iterator[SizeEdit]:
    """Yield the sizes to be rewritten in the graph of one module.

    Raises:
        TraceError: it cannot be traced, or its graph has no node for a call.
    """
    graph, values, decided = part_graph(module, call.args, call.kwargs)
    nodes = [n for n in graph.nodes if called_by(n) in SIZED and is_tensor_call(n, values)]
    places = [place for place, name in enumerate(modules) if name == repairs[0].module]
    if len(nodes) != len(places):
        raise TraceError("its graph makes other calls")
    for repair in repairs:
        node = nodes[places.index(repair.call)]
        if reason := why_fixed(node, repair.function, repair.given):
            raise TraceError(reason, name=repair.module)
        yield SizeEdit(node.name, repair.function, repair.given, repair.wanted, decided=decided)


def _calls(
    standin: nn.Module, modules: Collection[str], run: Callable[[], object]
) -> Mapping[str, list[_Call]]:
    """Return what some modules are called with when a network runs in eval mode."""
    found: dict[str, list[_Call]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not module.training:
                found.setdefault(name, []).append(_Call(args, kwargs))

        return hear

    handles = [
        standin.get_submodule(name).register_forward_pre_hook(listen(name), with_kwargs=True)
        for name in modules
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
