"""Classes of modules whose forward is that of a graph: all else is their own class's."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.package.importer import sys_importer

_CODE = "_fxgrow_code"  # the attribute that holds the class that is extended, and the code


def generated_class(kind: type[nn.Module], graph: fx.GraphModule) -> type[nn.Module]:
    """Return a class with the interface of another one whose forward is that of a graph.

    Args:
        kind: the class; one that was generated before stands for the class that it extends.
        graph: a graph over modules that an instance holds too, under the same names.

    Returns:
        A subclass, under the same name; the class of the graph itself where ``kind`` is that of a
        graph. Instances copy and pickle like those of ``kind``; a pickle holds the graph's code.
    """
    if issubclass(kind, fx.GraphModule):
        return type(graph)
    origin: Any = extended(kind)
    code = graph.graph.python_code("self")
    found: type[nn.Module] = _extended(
        origin, f"{_format_import_block(code.globals, sys_importer)}\n{code.src}"
    )
    return found


def extended(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a generated one extends; any other class itself."""
    found: type[nn.Module] = getattr(kind, _CODE, (kind,))[0]
    return found


@functools.cache
def _extended(origin: Any, source: str) -> Any:
    """Return a subclass with the forward that some code defines, the same for the same code."""
    return type(
        origin.__name__,
        (origin,),
        {
            "__module__": origin.__module__,
            "__qualname__": origin.__qualname__,
            "__doc__": origin.__doc__,
            "forward": _forward_from_src(source, {}),
            "__reduce_ex__": _reduce,
            _CODE: (origin, source),
        },
    )


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Return how to copy or pickle an instance: its class is made anew of its code."""
    origin, source = self._fxgrow_code
    recipe: tuple[Any, ...] = origin.__reduce_ex__(self, protocol)
    return _rebuilt, (origin, source), *recipe[2:]


def _rebuilt(origin: Any, source: str) -> nn.Module:
    """Return an instance without a state."""
    kind = _extended(origin, source)
    fresh: nn.Module = kind.__new__(kind)
    return fresh
