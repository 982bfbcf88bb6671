"""From a model to something that can be run on meta tensors and read as an fx graph.

``torch.fx.symbolic_trace`` changes the model it traces, so what is traced is a stand-in: the same
module tree with every parameter and buffer on the meta device. The user's model is only read.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fxgrow.errors import TraceError
from fxgrow.labels.propagate import Place, named_tensors, propagate
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Tape, tensors_in

Tracer = Literal["torch.fx", "dispatch"]


@dataclass
class Traced:
    """A model on meta tensors, its graph, and inputs it accepts.

    Attributes:
        standin: the module tree with meta parameters and buffers; fxgrow's own, free to change.
        graph_module: the fx graph over the stand-in's submodules, or None if symbolic tracing
            failed; ``untraceable`` then says why.
        inputs: meta tensors that run through it.
        inferred: whether the inputs were inferred from the first layer.
        tracer: what followed the computation.
        untraceable: why there is no graph ("" if there is one).
    """

    standin: nn.Module
    graph_module: fx.GraphModule | None
    inputs: tuple[Any, ...]
    inferred: bool
    tracer: Tracer
    untraceable: str = ""

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the input tensors, in order."""
        return tuple(tuple(tensor.shape) for tensor in tensors_in(self.inputs))

    def label(self) -> tuple[LabelSpace, Tape]:
        """Run the graph node by node (or the model, if there is no graph) under the labeller.

        Raises:
            TraceError: the run failed.
        """
        if self.graph_module is None:
            return self.label_module()
        interpreter = _Interpreter(self.graph_module)
        return propagate(interpreter.run, self.standin, self.inputs, place=interpreter.place)

    def label_module(self) -> tuple[LabelSpace, Tape]:
        """Run the stand-in's own ``forward`` under the labeller, as its sizes are now.

        Raises:
            TraceError: the run failed.
        """
        try:
            return propagate(self.standin, self.standin, self.inputs)
        except (RuntimeError, ValueError, TypeError) as error:
            raise TraceError(f"the model does not run: {_first_line(error)}") from error


class _Interpreter(fx.Interpreter):
    """Runs a graph and knows which node it is at."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self._at: Place = ("", "")

    def run_node(self, n: fx.Node) -> Any:
        stack = n.meta.get("nn_module_stack") or {}
        self._at = (n.name, next(reversed(stack), ""))
        return super().run_node(n)

    def place(self) -> Place:
        return self._at


def stand_in(model: nn.Module, replacements: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return a copy of a module tree with other tensors in place of its own.

    Ties, hooks, flags and classes survive, because this is a deep copy that finds the new tensors
    where it would copy the old ones.

    Args:
        model: the module; only read.
        replacements: new tensor by fully qualified name; None puts every parameter and buffer on
            the meta device. Tensors that are not named are copied.

    Raises:
        TraceError: some attribute cannot be copied.
    """
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        if id(tensor) in memo or (replacements is not None and name not in replacements):
            continue
        if replacements is None:
            fresh = torch.empty_like(tensor, device="meta")
        else:
            fresh = replacements[name]
        if isinstance(tensor, nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fresh
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise TraceError(
            f"the model cannot be copied: {_first_line(error)}.",
            way_out="Remove what does not survive copy.deepcopy.",
        ) from error


def trace(model: nn.Module, example_inputs: object = None) -> Traced:
    """Trace a model without touching it.

    Args:
        model: any module.
        example_inputs: a tensor or a tuple of arguments; None infers them from the first layer.

    Returns:
        The traced model. If ``torch.fx`` cannot follow the control flow, the computation is still
        followed at dispatch level, without a graph to rewrite.

    Raises:
        TraceError: the model cannot be copied, no input fits, or it does not run on ``inputs``.
    """
    standin = stand_in(model)
    graph_module: fx.GraphModule | None = None
    untraceable = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph_module = fx.symbolic_trace(standin)
    except Exception as error:  # noqa: BLE001 - a user's forward may raise anything on proxies
        untraceable = _first_line(error)
    tracer: Tracer = "dispatch" if graph_module is None else "torch.fx"
    if example_inputs is not None:
        inputs = _on_meta(example_inputs)
        return Traced(standin, graph_module, inputs, False, tracer, untraceable)
    inputs = _inferred_inputs(standin, graph_module)
    return Traced(standin, graph_module, inputs, True, tracer, untraceable)


def _on_meta(example_inputs: object) -> tuple[Any, ...]:
    """Return example inputs as a tuple of arguments, tensors on the meta device."""
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return tuple(torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments))


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# The sizes tried after (batch, channels), for the number of spatial dims of the first layer.
_SPATIAL_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1024,), (16000,)),
    2: ((224, 224), (32, 32), (256, 256), (299, 299), (28, 28)),
    3: ((16, 112, 112), (16, 224, 224), (32, 32, 32)),
}


def _inferred_inputs(standin: nn.Module, graph_module: fx.GraphModule | None) -> tuple[Any, ...]:
    """Return the first input, among those the first layer could take, that runs through."""
    name, layer = _first_layer(standin, graph_module)
    way_out = "Pass example_inputs (--input-shape 1x3x224x224 on the command line)."
    problem = "the first layer is of no known kind"
    for candidate in _candidates(layer):
        try:
            with torch.no_grad(), _evaluating(standin):
                standin(candidate)
        except Exception as error:  # noqa: BLE001 - whatever a wrong size makes a model raise
            problem = _first_line(error)
        else:
            return (candidate,)
    raise TraceError(
        f"no input could be inferred from {name or 'the model'} ({type(layer).__name__}):"
        f" {problem}.",
        name=name,
        way_out=way_out,
    )


def _candidates(layer: nn.Module) -> Iterator[Tensor]:
    """Yield inputs of batch size two that a layer could take."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return
    channels = getattr(layer, "in_channels", None)
    if isinstance(channels, int):
        for sizes in _SPATIAL_SIZES.get(weight.ndim - 2, ()):
            yield torch.empty(2, channels, *sizes, dtype=weight.dtype, device="meta")
    elif isinstance(layer, nn.Embedding):
        yield torch.empty(2, 16, dtype=torch.long, device="meta")
    elif weight.ndim == 2:
        yield torch.empty(2, weight.shape[1], dtype=weight.dtype, device="meta")


def _first_layer(
    standin: nn.Module, graph_module: fx.GraphModule | None
) -> tuple[str, nn.Module]:
    """Return the first module with a weight, in execution order where a graph tells it."""
    if graph_module is not None:
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                module = graph_module.get_submodule(str(node.target))
                if isinstance(getattr(module, "weight", None), Tensor):
                    return str(node.target), module
    for name, module in standin.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            return name, module
    return "", standin


class _evaluating:  # noqa: N801 - reads as a verb where it is used
    """Put a module tree in eval mode and restore each submodule's own flag."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._flags = [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *exception: object) -> None:
        for module, flag in self._flags:
            module.training = flag
