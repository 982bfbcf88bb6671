"""fx graphs of a module: traced for this thread alone, and open for other sizes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Set
from types import NoneType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgrow.errors import TraceError
from fxgrow.labels.kept_proxies import leaving_tables, note_made, without_frames
from fxgrow.labels.open_attention import open_attention
from fxgrow.modules.standin import first_line, keeping_attributes, keeping_modes

_MAKERS = (torch.ones, torch.zeros, torch.full, torch.empty, torch.arange, torch.eye)
_FLAGS = (bool, int, float, str, NoneType)
_CONSTANT = re.compile(r"\b_tensor_constant\d+\b")  # what torch.fx calls a tensor of the code's own


class ThreadTracer(fx.Tracer):
    """A tracer that leaves other threads alone.

    While it traces, ``torch.fx`` patches what calls any module and looks up its parts. A module
    that another thread runs meanwhile is called as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """Trace a module; see :meth:`torch.fx.Tracer.trace`."""
        graph = super().trace(*args, **kwargs)
        for node in graph.nodes:
            if isinstance(
                node.type, str
            ):  # never evaluated: torch before 2.11 pickles no such graph
                node.type = None
            if node.target in _MAKERS:  # torch's own, which code of the graph need not wrap again
                node.meta.pop("is_wrapped", None)
        return graph

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for the value of a node; see :meth:`torch.fx.Tracer.proxy`."""
        return note_made(super().proxy(node))

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a module, and make it a part of the graph if it is this thread's."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a part of a module, as a value of the graph if it is looked up in this thread.

        Names are looked up once for all; torch walks through the modules at each parameter.
        """
        if threading.get_ident() != self._thread or not isinstance(attr_val, Tensor):
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        """The names of the tensors that are values of the graph."""
        buffers = self.root.named_buffers() if self.proxy_buffer_attributes else ()
        named = itertools.chain(buffers, self.root.named_parameters())
        return {id(tensor): name for name, tensor in named}


class OpenTracer(ThreadTracer):
    """A tracer for which buffers are values, as parameters are, and no constants."""

    proxy_buffer_attributes = True


def symbolic_trace(standin: nn.Module) -> fx.Graph:
    """Return the graph; code that asks buffers for their values makes them constants."""
    with _without_proxies(standin), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tracer in (OpenTracer, ThreadTracer):
            try:
                return _traced(standin, tracer)
            except Exception as error:  # a user's forward may raise anything
                failed = without_frames(error)
    raise failed


@contextlib.contextmanager
def _without_proxies(model: nn.Module) -> Iterator[None]:
    """Keep what stands for data while tracing out of where forwards keep some."""
    with leaving_tables(), keeping_attributes(model.modules(), fx.Proxy):
        yield


def open_graph(model: nn.Module) -> fx.Graph:
    """Return a graph of the model in which sizes can be rewritten, the same in both modes.

    Attention modules are traced into. Modules without parameters stay closed where that makes the
    graph the same in train and eval mode (stochastic depth).

    Args:
        model: a module that ``torch.fx`` can trace; its attention modules change their class to one
            that computes the same in the open.

    Raises:
        TraceError: it cannot be traced, or the graph differs between the modes, or from the first
            run to later ones.
    """
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            open_attention(module)
    for tracer in (_MakingTracer, _ClosedTracer):
        failed: Exception | None = None
        with keeping_modes(model), _without_proxies(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                graphs = [_traced(model.train(mode), tracer) for mode in (True, False)]
            except TraceError:
                raise
            except Exception as error:  # a user's forward may raise anything
                failed = without_frames(error)
        if failed is not None:
            raise TraceError(f"torch.fx cannot trace it: {first_line(failed)}") from failed
        if same_graphs(model, *graphs):
            return graphs[1]
    raise TraceError(
        f"the graph of {type(model).__name__} differs between train and eval mode, so that sizes "
        "in its code cannot be rewritten"
    )


def _traced(model: nn.Module, tracer: type[fx.Tracer]) -> fx.Graph:
    """Return a graph of a model; what its code notes of having run is as before.

    Raises:
        TraceError: the first run does something else than later ones: no graph does both.
    """
    before = [(module, _plain_attributes(module), _tensors(module)) for module in model.modules()]
    try:
        graph = tracer().trace(model)
        changed = [
            (module, key)
            for module, plain, tensors in before
            for key, value in plain.items()
            # What keeps a table for the next run notes that, and may make it each time.
            if vars(module).get(key) != value and _tensors(module) == tensors
        ]
        if changed and not same_graphs(model, graph, tracer().trace(model)):
            module, key = changed[0]
            raise TraceError(
                f"the first run of {type(module).__name__} does something else than later ones, "
                f"for which it sets {key}, and no graph does both.",
                way_out="Run the model once on data before it grows.",
            )
    finally:
        for module, plain, _ in before:
            vars(module).update(plain)
    return graph


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    """Return the flags, numbers and strings that a module holds."""
    held = vars(module).items()
    return {key: value for key, value in held if type(value) in _FLAGS and key != "training"}


def _tensors(module: nn.Module) -> dict[str, int]:
    """Return what tells the tensors that a module holds from others."""
    held = {**vars(module), **module._parameters, **module._buffers}
    return {key: id(value) for key, value in held.items() if isinstance(value, (Tensor, fx.Proxy))}


def same_graphs(model: nn.Module, first: fx.Graph, second: fx.Graph) -> bool:
    """Return whether two graphs of a model say the same; each trace makes its constants anew."""
    constants = [_CONSTANT.findall(str(graph)) for graph in (first, second)]
    if _CONSTANT.sub("", str(first)) != _CONSTANT.sub("", str(second)):
        return False
    return len(constants[0]) == len(constants[1]) and all(
        one == other or _same_values(getattr(model, one), getattr(model, other))
        for one, other in zip(*constants, strict=True)
    )


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same values; on the meta device, whether they are one."""
    return one is other or (not one.is_meta and not other.is_meta and torch.equal(one, other))


class _MakingTracer(OpenTracer):
    """Makes constants of traced sizes (``torch.ones(length, length)``) a part of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self._autowrap_function_ids |= {id(make) for make in _MAKERS}
        self._autowrap_search.append(torch)


class _ClosedTracer(_MakingTracer):
    """Leaves modules without parameters, buffers and children as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one node of the graph."""
        bare = not (m._parameters or m._buffers or m._modules)
        return bare or super().is_leaf_module(m, module_qualified_name)


def operands_from(producer: fx.Node, consumer: fx.Node, active: Set[str]) -> list[fx.Node]:
    """Return the inputs of ``consumer`` that carry what ``producer`` computed.

    Args:
        producer: a node.
        consumer: another one of its graph.
        active: names of the nodes that compute something; between the two may lie others, which
            pass on what they get (dropout in eval mode).
    """
    found = []
    for operand in consumer.all_input_nodes:
        node = operand
        while node.name not in active and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        if node is producer:
            found.append(operand)
    return found
