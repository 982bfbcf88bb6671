"""Graphs of single modules whose code decides by sizes: traced along what was decided.

``if window >= height`` stops ``torch.fx``, and so do functions that a library wraps for that
reason. A part of a network is traced all the same if each such question is answered as it was on
the inputs; the graph then asserts the answer, so that it says so where another would be right.
"""

from __future__ import annotations

import contextlib
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.nn import functional

from fxgrow.errors import TraceError
from fxgrow.labels.graphs import OpenTracer, same_graphs
from fxgrow.modules.on_meta import OnMeta
from fxgrow.modules.standin import first_line, keeping_modes

_MESSAGE = "this size takes another branch of the code than the sizes that its graph was made for"


class _Proxy(fx.Proxy):
    """A value of the graph that can be written into."""

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write into it."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _PartTracer(OpenTracer):
    """Traces a module, wrapped functions too, and answers what its code decides by sizes.

    Attributes:
        decided: the answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decided: list[bool] = []

    def answer(self, node: fx.Node) -> bool:
        """Return what a node's value is as a truth value."""
        raise NotImplementedError

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the value of a node."""
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide as was decided, and let the graph assert it."""
        answer = self.answer(obj.node)
        self.decided.append(answer)
        same = self.create_proxy("call_function", operator.eq, (obj, answer), {})
        self.create_proxy("call_function", torch._assert, (same, _MESSAGE), {})
        return answer


class _Following(_PartTracer):
    """Answers as a list tells."""

    def __init__(self, answers: Sequence[bool]) -> None:
        super().__init__()
        self._answers = iter(answers)

    def answer(self, node: fx.Node) -> bool:
        """Return the next answer.

        Raises:
            TraceError: there is none.
        """
        found = next(self._answers, None)
        if found is None:
            raise TraceError("the code decides more than when its sizes were found", name=node.name)
        return found


class _Deciding(_PartTracer):
    """Computes on meta tensors, beside the graph, what is to be answered.

    Args:
        given: the module's arguments by name, and in order under their positions.

    Attributes:
        values: what each node is.
    """

    def __init__(self, given: Mapping[str | int, Any]) -> None:
        super().__init__()
        self.values: dict[fx.Node, Any] = {}
        self._given = given
        self._count = 0
        self._computes = False

    def answer(self, node: fx.Node) -> bool:
        """Return what it is."""
        return bool(self.values[node])

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any,
                     **named: Any) -> fx.Proxy:  # fmt: skip
        """Add a node, and compute its value."""
        proxy: fx.Proxy = super().create_proxy(kind, target, args, kwargs, *more, **named)
        self._computes = True
        try:
            self.values[proxy.node] = self._value(proxy.node)
        finally:
            self._computes = False
        return proxy

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            self._count += 1
            default = node.args[0] if node.args else None
            name = str(node.target)
            return self._given.get(name, self._given.get(self._count - 1, default))
        if node.op == "output":
            return None
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module, in the open where that is to be a part of the graph."""
        return forward(*args, **kwargs) if self._computes else super().call_module(
            m, forward, args, kwargs
        )  # fmt: skip

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a part of a module, as a value of the graph unless something is computed."""
        return attr_val if self._computes else super().getattr(attr, attr_val, parameter_proxy_cache)


def part_graph(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[fx.Graph, dict[fx.Node, Any], tuple[bool, ...]]:
    """Return the graph of a module on meta tensors, what each node is, and what was decided.

    Args:
        module: on the meta device.
        args, kwargs: what it is called with.

    Raises:
        TraceError: it cannot be traced, or differs between train and eval mode.
    """
    given = {**dict(enumerate(args)), **kwargs}
    with torch.no_grad(), OnMeta():
        graphs, tracers = _both_modes(module, lambda: _Deciding(given))
    return graphs[1], tracers[1].values, tuple(tracers[1].decided)


def decided_graph(module: nn.Module, decided: Sequence[bool]) -> fx.Graph:
    """Return the graph of a module, given what its code decides by sizes.

    Raises:
        TraceError: it cannot be traced, or differs between train and eval mode.
    """
    return _both_modes(module, lambda: _Following(decided))[0][1]


def _both_modes(module: nn.Module, tracer: Callable[[], Any]) -> tuple[list[fx.Graph], list[Any]]:
    """Trace a module in train and in eval mode.

    Raises:
        TraceError: it cannot be traced, or the graphs differ.
    """
    tracers = [tracer(), tracer()]
    held = {inner: dict(vars(inner)) for inner in module.modules()}
    try:
        with keeping_modes(module), _unwrapped():
            modes = zip(tracers, (True, False), strict=True)
            graphs = [_without_idle(tracer.trace(module.train(mode))) for tracer, mode in modes]
    except Exception as error:  # a user's forward may raise anything
        raise TraceError(f"torch.fx cannot trace it: {first_line(error)}") from error
    finally:
        for inner, attributes in held.items():  # a forward may keep what it computed
            for name in vars(inner).keys() - attributes.keys():
                if not name.startswith("_tensor_constant"):
                    delattr(inner, name)
            vars(inner).update(attributes)
    if not same_graphs(module, *graphs):
        raise TraceError("its code differs between train and eval mode")
    return graphs, tracers


def _without_idle(graph: fx.Graph) -> fx.Graph:
    """Let dropout that drops nothing be the same in both modes, in place."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is functional.dropout:
            rest = (*node.args[1:], *node.kwargs.values())
            if rest and rest[0] == 0.0:
                node.args, node.kwargs = node.args[:1], {"p": 0.0, "training": False}
    return graph


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Let ``torch.fx`` enter Python functions that libraries wrap."""
    known = _symbolic_trace._wrapped_fns_to_patch
    kept = {
        key: frame
        for key, frame in known.items()
        if not isinstance(frame.get(key[1]), types.FunctionType)
    }
    _symbolic_trace._wrapped_fns_to_patch = kept
    try:
        yield
    finally:
        _symbolic_trace._wrapped_fns_to_patch = known


def is_tensor_call(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Return whether what a node looks up, or calls, is of a tensor, and not of sizes."""
    first = node.args[0] if node.args else None
    return not isinstance(first, fx.Node) or isinstance(values.get(first), Tensor)
