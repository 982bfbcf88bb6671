"""From a model to something that can be run on meta tensors and read as an fx graph.

``torch.fx.symbolic_trace`` changes the model it traces, so what is traced is a stand-in: the same
module tree with every parameter and buffer on the meta device. The user's model is only read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from fxgrow.errors import TooLargeError, TraceError
from fxgrow.labels.graphs import symbolic_trace
from fxgrow.labels.pins import PinKind
from fxgrow.labels.propagate import MOST_ENTRIES, Place, Watch, no_watch, propagate
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Tape
from fxgrow.modules.calling import Arguments, arguments_of, call, tensors_in
from fxgrow.modules.inputs import inputs_in_training, nothing_fits, possible_inputs
from fxgrow.modules.on_meta import OnMeta
from fxgrow.modules.standin import first_line, in_eval_mode, keeping_buffers, stand_in
from fxgrow.modules.tensors import module_names, named_tensors, scalar_buffers, zero_buffers

Tracer = Literal["torch.fx", "dispatch"]
_MOST_INFERRED = 2**26  # entries of a tensor on small inputs of our own


@dataclass
class Traced:
    """A model on meta tensors, and inputs it accepts.

    Attributes:
        standin: the module tree with meta parameters and buffers; fxgrow's own, free to change.
        inputs: arguments that run through it, tensors on meta; if they are to be inferred, none
            before :meth:`follow` has found them.
        inferred: whether the inputs are inferred from the first layer.
        module: the submodule that is followed, by its fully qualified name; "" for the whole. Names
            of tensors and modules are those in the whole all the same.
        zeros: buffers that no state_dict holds and that are zeros; they may change width.
        scalars: the values of buffers without dims that no state_dict holds.
        at: during a run, returns the fx node and the module that are running; after a failure,
            those that failed.
    """

    standin: nn.Module
    inputs: Arguments
    inferred: bool
    module: str = ""
    zeros: frozenset[str] = frozenset()
    scalars: Mapping[str, float] = field(default_factory=dict)
    at: Callable[[], Place] = lambda: ("", "")

    @cached_property
    def _symbolic(self) -> tuple[fx.Graph | None, str]:
        """The fx graph, and why there is none."""
        try:
            return symbolic_trace(self.target), ""
        except Exception as error:  # a user's forward may raise anything
            return None, first_line(error)

    @property
    def graph(self) -> fx.Graph | None:
        """The fx graph over the target's submodules, or None; traced when first asked for.

        Labels flow through the network's own ``forward``. The graph is what multipliers are
        inserted into, and what tells the order of execution before anything is run.
        """
        return self._symbolic[0]

    @cached_property
    def untraceable(self) -> str:
        """Why there is no graph that runs on the inputs, or ""."""
        return self._run_of_graph[1]

    @property
    def nodes(self) -> tuple[tuple[str, str], ...]:
        """The operations that the graph runs, in order, by name, and the node of each."""
        return self._run_of_graph[0]

    @cached_property
    def _run_of_graph(self) -> tuple[tuple[tuple[str, str], ...], str]:
        """The operations of the graph with their nodes, or why there are none."""
        graph, reason = self._symbolic
        if graph is None:
            return (), reason
        interpreter = _Interpreter(self.target, graph, self.module)
        listing = _Listing(interpreter.place)
        try:
            with keeping_buffers(self.standin), torch.no_grad(), listing:
                call(interpreter.run_on, self.inputs)
        except Exception as error:  # control flow may have taken another branch
            return (), f"its graph does not run: {first_line(error)}"
        return tuple(listing.found), ""

    @property
    def tracer(self) -> Tracer:
        """What traces the computation: ``torch.fx``, or the dispatcher alone."""
        return "dispatch" if self.untraceable else "torch.fx"

    @property
    def target(self) -> nn.Module:
        """What is run: the stand-in, or the submodule of it that is followed."""
        return self.standin.get_submodule(self.module)

    @property
    def _named(self) -> frozenset[str]:
        """The buffers that no state_dict holds and that are followed all the same."""
        return self.zeros | self.scalars.keys()

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the input tensors, in order."""
        return _shapes(self.inputs)

    @property
    def _told_shapes(self) -> str:
        """The shapes of the input tensors as messages tell them."""
        return ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)

    def follow(self, watch: Watch = no_watch) -> tuple[LabelSpace, Tape]:
        """Label a run on the inputs, or on the first possible ones that fit.

        Args:
            watch: sees each run from above; see :func:`fxgrow.labels.propagate.propagate`.

        Raises:
            TraceError: the run failed, or nothing fits.
        """
        if not self.inferred:
            return self.label(watch)
        problem = "the first layer is of no known kind"
        try:
            for arguments in possible_inputs(self.target, self._get_graph):
                self.inputs = arguments
                try:
                    return self.label(watch)
                except TooLargeError:
                    raise
                except TraceError as error:
                    problem = first_line(error.__cause__ or error)
        except (TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
            problem = first_line(error)  # a layer says something of its sizes that cannot be
        raise nothing_fits(self.target, self._get_graph, problem)

    def _get_graph(self) -> fx.Graph | None:
        return self.graph

    def label_graph(self, graph: fx.Graph, watch: Watch = no_watch) -> tuple[LabelSpace, Tape]:
        """Run a graph of the target node by node under the labeller.

        Args:
            graph: over the target's submodules.
            watch: sees the run from above; see :func:`fxgrow.labels.propagate.propagate`.

        Raises:
            TraceError: the run failed.
        """
        interpreter = _Interpreter(self.target, graph, self.module)
        self.at = interpreter.place
        return self._run(interpreter.run_on, watch)

    def label(self, watch: Watch = no_watch) -> tuple[LabelSpace, Tape]:
        """Run the stand-in's own ``forward`` under the labeller, as its sizes are now.

        Args:
            watch: sees the run from above; see :func:`fxgrow.labels.propagate.propagate`.

        Raises:
            TraceError: the run failed.
        """
        stack: list[str] = []
        self.at = lambda: ("", stack[-1] if stack else "")
        with running_modules(self.standin, stack):
            return self._run(self.target, watch)

    def _run(self, run: Callable[..., Any], watch: Watch) -> tuple[LabelSpace, Tape]:
        """Label a run in eval mode, and one in train mode if that uses further parameters."""
        try:
            with keeping_buffers(self.standin):
                space, tape = propagate(
                    run, self.standin, self.inputs, place=self.at, watch=watch, zeros=self._named,
                    most=_MOST_INFERRED if self.inferred else MOST_ENTRIES,
                )  # fmt: skip
                complete = not self._unused(space) or self._label_training(space, watch)
            if not complete:
                return self._run(run, watch)
        except TraceError:
            raise
        except Exception as error:  # a user's forward may raise anything
            node, module = self.at()
            where = f" at {module or node}" if module or node else ""
            raise TraceError(
                f"the model does not run on inputs of {self._told_shapes}{where}: "
                f"{first_line(error)}.",
                name=module or node,
                way_out="" if self.inferred else "Give inputs that it takes.",
            ) from error
        finally:
            in_eval_mode(self.standin)
        self._pin_shared(space)
        return space, tape

    def _label_training(self, space: LabelSpace, watch: Watch) -> bool:
        """Label what train mode adds, or find inputs for it and return False to begin again."""
        stack: list[str] = []
        try:
            target = self.target.train()
            with running_modules(self.standin, stack):
                propagate(
                    target, self.standin, self.inputs, space=space, watch=watch, zeros=self._named,
                    place=lambda: ("", stack[-1] if stack else ""),
                )  # fmt: skip
        except Exception as error:
            if not self.inferred:
                raise TraceError(
                    f"in train mode, where it uses further parameters, the model does not run on "
                    f"inputs of {self._told_shapes}: {first_line(error)}.",
                    way_out="Give larger inputs: its auxiliary heads must follow the rest.",
                ) from error
            larger = inputs_in_training(self.target, self._get_graph, self.input_shapes)
            if not larger:
                raise
            self.inputs = larger
            return False
        return True

    def _unused(self, space: LabelSpace) -> bool:
        """Return whether some parameter with an axis to label took no part in the run."""
        tensors = named_tensors(self.standin)
        own = named_tensors(self.target) if self.module else tensors
        used = {id(tensors[axis.tensor]) for axis in space.axes if axis.tensor}
        return any(
            id(tensor) not in used
            and isinstance(tensor, nn.Parameter)
            and max(tensor.shape, default=1) > 1
            for tensor in own.values()
        )

    def _pin_shared(self, space: LabelSpace) -> None:
        """Pin what the rest of the network uses too: nobody sees what it does there."""
        if not self.module:
            return
        tensors = named_tensors(self.standin)
        inside = f"{self.module}."
        outside = {id(t): name for name, t in tensors.items() if not name.startswith(inside)}
        for axis in space.axes:
            other = outside.get(id(tensors[axis.tensor])) if axis.tensor else None
            if other is not None:
                labels = torch.arange(axis.start, axis.start + axis.size)
                space.pin(labels, PinKind.OUTSIDE, other, self.module)


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


class _Interpreter(fx.Interpreter):
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
        self._at = (n.name, module_of(n, self._module))
        return super().run_node(n)

    def place(self) -> Place:
        return self._at


class _Listing(OnMeta):  # type: ignore[no-untyped-call]
    """Lists the operations that run by name, and the nodes that run them."""

    def __init__(self, place: Callable[[], Place]) -> None:
        super().__init__()
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


def trace(model: nn.Module, example_inputs: object = None, module: str = "") -> Traced:
    """Trace a model, or one submodule of it, without touching it.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; None infers
            them from the first layer.
        module: the submodule to trace, by its fully qualified name; the inputs are then its.

    Returns:
        The traced model. Where ``torch.fx`` cannot follow the control flow, the computation still
        is, at dispatch level, without a graph to rewrite.

    Raises:
        TraceError: the model cannot be copied.
    """
    standin = in_eval_mode(stand_in(model))
    inferred = example_inputs is None
    inputs = () if inferred else _on_meta(example_inputs)
    scalars = scalar_buffers(model)
    return Traced(standin, inputs, inferred, module, zero_buffers(model) - scalars.keys(), scalars)


def _shapes(inputs: Arguments) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_in(inputs))


def _on_meta(example_inputs: object) -> Arguments:
    """Return example inputs as arguments, tensors on the meta device."""
    arguments = arguments_of(example_inputs)
    on_meta: Arguments = pytree.tree_map_only(Tensor, _on_meta_or_integer, arguments)
    return on_meta


def _on_meta_or_integer(tensor: Tensor) -> Tensor:
    """Return a tensor on the meta device; token ids and masks keep their values, on the CPU."""
    if tensor.is_floating_point() or tensor.is_meta:
        return tensor.to("meta")
    return tensor.detach().to("cpu")
