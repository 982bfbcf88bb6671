"""Inputs for a network: inferred from its first layer, and drawn for verification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.errors import TraceError
from fxgrow.labels.propagate import OnMeta, named_tensors
from fxgrow.labels.tape import Arguments, arguments_of, tensors_in
from fxgrow.standin import first_line, stand_in

# The sizes tried after (batch, channels), for the number of spatial dims of the first layer.
_SPATIAL_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1024,), (16000,)),
    2: ((224, 224), (32, 32), (256, 256), (299, 299), (28, 28)),
    3: ((16, 112, 112), (16, 224, 224), (32, 32, 32)),
}


def inferred_inputs(
    standin: nn.Module, graph_module: fx.GraphModule | None, *, in_training: bool = False
) -> tuple[Any, ...]:
    """Return the first input, among those the first layer could take, that runs through.

    Args:
        standin: the network on meta tensors; left in eval mode.
        graph_module: its graph, if there is one.
        in_training: the input must run in train mode too (auxiliary heads may need larger ones).

    Raises:
        TraceError: none does.
    """
    name, layer = _first_layer(standin, graph_module)
    way_out = "Pass example_inputs (--input-shape 1x3x224x224 on the command line)."
    problem = "the first layer is of no known kind"
    for candidate in _candidates(standin, layer):
        try:
            with torch.no_grad(), OnMeta():
                standin.eval()(candidate)
                if in_training:
                    standin.train()(candidate)
        except Exception as error:
            problem = first_line(error)
        else:
            return (candidate,)
        finally:
            standin.eval()
    raise TraceError(
        f"no input could be inferred from {name or 'the model'} ({type(layer).__name__}):"
        f" {problem}.",
        name=name,
        way_out=way_out,
    )


def _candidates(network: nn.Module, layer: nn.Module) -> Iterator[Tensor]:
    """Yield inputs of batch size two that a network might take, judging by its first layer.

    Images are among them: what lies before the first layer may have made patches of them.
    """
    weight = getattr(layer, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
    shapes: list[tuple[int, ...]] = []
    if isinstance(layer, nn.Embedding):
        yield torch.empty(2, 16, dtype=torch.long, device="meta")
    elif isinstance(weight, Tensor):
        channels = getattr(layer, "in_channels", None)
        if isinstance(channels, int):
            shapes += [(channels, *sizes) for sizes in _SPATIAL_SIZES.get(weight.ndim - 2, ())]
        elif weight.ndim == 2:
            shapes.append((weight.shape[1],))
    images = [(3, *sizes) for sizes in _SPATIAL_SIZES[2]]
    ordered = [*shapes[:1], *images[:1], *_declared_shapes(network), *shapes[1:], *images[1:]]
    for shape in dict.fromkeys(ordered):
        yield torch.empty(2, *shape, dtype=dtype, device="meta")


def _declared_shapes(network: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield the shapes without batch that a network says it takes, in its ``pretrained_cfg``."""
    declared = getattr(network, "pretrained_cfg", None)
    size = declared.get("input_size") if isinstance(declared, Mapping) else None
    if isinstance(size, (tuple, list)) and all(isinstance(part, int) for part in size):
        yield tuple(size)


def _first_layer(standin: nn.Module, graph_module: fx.GraphModule | None) -> tuple[str, nn.Module]:
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


def batches_for(
    model: nn.Module, shapes: Sequence[Sequence[int]], inferred: bool, example: object = None
) -> list[Arguments]:
    """Return inputs to judge a network on, the same at each call.

    Args:
        model: the network; tells dtype and device, and whether a size runs.
        shapes: the input shapes that the network was followed on.
        inferred: whether these were inferred; smaller images that run are then taken, in two
            sizes and batch sizes.
        example: the user's example inputs; used as they are, and once more with new values.
    """
    generator = torch.Generator().manual_seed(0)
    reference = next((t for t in named_tensors(model).values() if t.is_floating_point()), None)
    dtype = torch.float32 if reference is None else reference.dtype
    device = torch.device("cpu") if reference is None else reference.device

    def fresh(tensor: Tensor) -> Tensor:
        on_meta = tensor.device.type == "meta"
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator)
            return values.to(device=device, dtype=dtype if on_meta else tensor.dtype)
        low, high = (0, 1) if on_meta else (int(tensor.min()), int(tensor.max()))
        if not on_meta and high - low < 2:  # a mask
            return tensor.flip(-1) if tensor.ndim else tensor
        numbers = torch.randint(low, high + 1, tensor.shape, generator=generator)
        return numbers.to(device=device, dtype=tensor.dtype)

    if example is not None:
        arguments = arguments_of(example)
        on_meta = any(t.device.type == "meta" for t in tensors_in(arguments))
        first = pytree.tree_map_only(Tensor, fresh, arguments) if on_meta else arguments
        return [first, pytree.tree_map_only(Tensor, fresh, arguments)]
    embedding = _first_embedding(model)
    if embedding is not None and len(shapes[0]) == 2:
        rows = embedding.num_embeddings
        return [(torch.randint(rows, tuple(shapes[0]), generator=generator),)]
    candidates: list[tuple[int, ...]] = [tuple(shapes[0])]
    if inferred and len(shapes[0]) == 4 and min(shapes[0][2:]) > 96:
        channels = shapes[0][1]
        smaller = [(2, channels, 64, 64), (3, channels, 96, 80)]
        candidates = [shape for shape in smaller if _runs_on(model, shape, dtype)] or candidates
    elif inferred:
        candidates.append((candidates[0][0] + 1, *candidates[0][1:]))
    return [(fresh(torch.empty(shape, device="meta")),) for shape in candidates]


def _first_embedding(model: nn.Module) -> nn.Embedding | None:
    """Return the first module with a weight, if it is an embedding."""
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            return module if isinstance(module, nn.Embedding) else None
    return None


def _runs_on(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Return whether the network takes an input of this shape, in train mode too."""
    standin = stand_in(model)
    try:
        with torch.no_grad(), OnMeta():
            standin.train()(torch.empty(shape, dtype=dtype, device="meta"))
            standin.eval()(torch.empty(shape, dtype=dtype, device="meta"))
    except Exception:
        return False
    return True
