"""What is running: the module of a network, or the node of its graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fxgrow.labels.propagate import Place
from fxgrow.modules.decisions import Decider
from fxgrow.modules.on_meta import OnMeta
from fxgrow.modules.tensors import module_names


@contextlib.contextmanager
def running_modules(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep in ``stack`` the names of the modules that are running; a failure leaves them there."""
    names = module_names(model)

    def enter(module: nn.Module, _: object) -> None:
        if id(module) in names:
            stack.append(names[id(module)])

    def leave(module: nn.Module, *_: object) -> None:
        if id(module) in names:
            stack.pop()

    # For all modules at once: hooks of their own would take as long as the run.
    handles = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def module_of(node: fx.Node, inside: str = "") -> str:
    """Return the innermost module that a node of a graph was traced in.

    Args:
        node: of the graph.
        inside: the module that was traced, "" for the whole.
    """
    stack = node.meta.get("nn_module_stack") or {}
    inner = next(reversed(stack.values()), ("",))[0]
    return f"{inside}.{inner}".strip(".")


class Interpreter(fx.Interpreter):
    """Runs a graph and knows which node it is at."""

    def __init__(self, target: nn.Module, graph: fx.Graph, module: str) -> None:
        super().__init__(target, garbage_collect_values=False, graph=graph)
        self._at: Place = ("", "")
        self._module = module

    def run_on(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on arguments that may be keywords."""
        for node in self.graph.find_nodes(op="placeholder")[len(args) :] if kwargs else ():
            args += (kwargs.get(str(node.target), *node.args[:1]),)
        return self.run(*args)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and know that it is the one."""
        self._at = (n.name, module_of(n, self._module))
        return super().run_node(n)

    def place(self) -> Place:
        """Return the node that is running and the module that it was traced in."""
        return self._at


class Listing(OnMeta):  # type: ignore[no-untyped-call]
    """Lists the operations that run by name, and the nodes that run them."""

    def __init__(self, place: Callable[[], Place], decider: Decider | None = None) -> None:
        super().__init__(decider, "spread")
        self.found: list[tuple[str, str]] = []
        self._place = place

    def ran(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
        result: object,
    ) -> None:
        """List an operation."""
        self.found.append((func._opname.rstrip("_"), self._place()[0]))
