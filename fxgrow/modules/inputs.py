"""Inputs for a network: inferred from its first layer, and drawn for verification."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.errors import UnknownInputsError
from fxgrow.modules.calling import Arguments, arguments_of, tensors_in
from fxgrow.modules.on_meta import OnMeta
from fxgrow.modules.standin import stand_in
from fxgrow.modules.tensors import named_tensors

GetGraph: TypeAlias = Callable[[], fx.Graph | None]
# The sizes tried after (batch, channels), for the number of spatial dims of the first layer.
_SPATIAL_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1024,), (16000,)),
    2: ((224, 224), (32, 32), (256, 256), (299, 299), (28, 28)),
    3: ((16, 112, 112), (16, 224, 224), (32, 32, 32)),
}
_IMAGE_CHANNELS = 4  # with more, these are features, which are smaller than images
_FEATURE_SIZES = ((32, 32), (14, 14), (7, 7))
# The sizes tried for verification instead of larger ones; two of them are taken.
_SMALLER_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((64, 64), (96, 80), (128, 128), (128, 160)),
    3: ((8, 32, 32), (8, 64, 48), (14, 64, 64)),
}


def possible_inputs(standin: nn.Module, graph: GetGraph) -> Iterator[tuple[Any, ...]]:
    """Yield inputs that a network might take, judging by its first layer; the likeliest first.

    Args:
        standin: the network on meta tensors.
        graph: returns its graph, or None if it has none; asked where the order of execution counts.
    """
    _, layer = _first_layer(standin, graph)
    for candidate in _candidates(standin, layer):
        yield from _arrangements(standin, candidate)


def inputs_in_training(
    standin: nn.Module, graph: GetGraph, failed: Sequence[tuple[int, ...]]
) -> tuple[Any, ...]:
    """Return the first possible input that runs through in both modes, or ().

    Auxiliary heads may need larger ones than eval mode does.

    Args:
        standin: the network on meta tensors, in eval mode after this.
        graph: returns its graph, or None if it has none.
        failed: shapes of the input that is known not to.
    """
    for arguments in possible_inputs(standin, graph):
        known = [tuple(tensor.shape) for tensor in tensors_in(arguments)] == [*failed]
        if not known and _runs(standin, arguments):
            return arguments
    return ()


def nothing_fits(
    standin: nn.Module, graph: GetGraph, problems: Sequence[str]
) -> UnknownInputsError:
    """Return the error for a network that none of the possible inputs fits.

    Args:
        standin: the network on meta tensors.
        graph: returns its graph, or None if it has none.
        problems: what went wrong with each that was tried; the likeliest first.
    """
    name, layer = _first_layer(standin, graph)
    likeliest = problems[0].rstrip(".") if problems else "the first layer is of no known kind"
    others = f", nor on {len(problems) - 1} others that were tried" if len(problems) > 1 else ""
    return UnknownInputsError(
        f"no input could be inferred from {name or 'the model'} ({type(layer).__name__}):"
        f" {likeliest}{others}.",
        name=name,
        way_out=f"Give --input-shape {_shape_for(layer)}, with the sizes that the network takes.",
    )


def _shape_for(layer: nn.Module) -> str:
    """Return a shape with the channels of a first layer, as the command line takes it."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Embedding):
        return "1x16:int64"
    channels = getattr(layer, "in_channels", None)
    dims = weight.ndim - 2 if isinstance(weight, Tensor) else 0
    if isinstance(channels, int) and channels > 0 and dims in _SPATIAL_SIZES:
        return "x".join(map(str, (1, channels, *_SPATIAL_SIZES[dims][0])))
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return f"1x{weight.shape[1]}"
    return "1x3x224x224"


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
        if isinstance(channels, int) and channels > 0:
            spatial = _SPATIAL_SIZES.get(weight.ndim - 2, ())
            if channels > _IMAGE_CHANNELS and weight.ndim == 4:
                spatial = (*_FEATURE_SIZES, *spatial)
            shapes += [(channels, *sizes) for sizes in spatial]
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


def _arrangements(model: nn.Module, tensor: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield arguments made of tensors like this one: one for each parameter, or a list of images.

    A list has two sizes, as the stages of a feature pyramid do.
    """
    shape, dtype = tensor.shape, tensor.dtype  # torch.empty_like loads sympy on the meta device
    tensors = [
        torch.empty(shape, dtype=dtype, device="meta") for _ in range(_parameter_count(model))
    ]
    yield arranged(model, tensors)
    if len(tensors) == 1 and tensor.ndim == 4:
        yield arranged(model, [tensor, tensor[..., ::2, ::2]])


def arranged(model: nn.Module, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return tensors as arguments: one each, or all in a list where ``forward`` takes but one."""
    if len(tensors) > 1 and _parameter_count(model) == 1:
        return (list(tensors),)
    return tuple(tensors)


def _parameter_count(model: nn.Module) -> int:
    """Return how many arguments ``forward`` must be given; at least one."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in kinds and p.default is p.empty for p in parameters))


def _first_layer(standin: nn.Module, graph: GetGraph) -> tuple[str, nn.Module]:
    """Return the first module with a weight, in execution order where a graph tells it.

    A convolution of images that is registered first is taken to run first.
    """
    weighted = (found for found in standin.named_modules() if _has_weight(found[1]))
    name, first = next(weighted, ("", standin))
    channels = getattr(first, "in_channels", 0)
    if isinstance(channels, int) and 0 < channels <= _IMAGE_CHANNELS:
        return name, first
    nodes = getattr(graph(), "nodes", ())
    names = (str(node.target) for node in nodes if node.op == "call_module")
    run = ((called, standin.get_submodule(called)) for called in names)
    return next((found for found in run if _has_weight(found[1])), (name, first))


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def batches_for(
    model: nn.Module,
    shapes: Sequence[Sequence[int]],
    inferred: bool,
    example: object = None,
    *,
    whole: bool = False,
) -> list[Arguments]:
    """Return inputs to judge a network on, the same at each call.

    Args:
        model: the network; tells dtype and device, and whether a size runs.
        shapes: the input shapes that the network was followed on.
        inferred: whether these were inferred; smaller images that run are then taken, in two
            sizes and batch sizes.
        example: the user's example inputs; used as they are, and once more with new values.
        whole: begin with inputs as large as the inferred ones.
    """
    generator = torch.Generator().manual_seed(0)
    floating = (t for t in named_tensors(model).values() if t.is_floating_point())
    reference = next(floating, torch.empty(0, dtype=torch.float32, device="cpu"))
    dtype, device = reference.dtype, reference.device

    def fresh(tensor: Tensor) -> Tensor:
        made = tensor.is_meta and tensor.is_floating_point()  # of a size alone
        drawn = _drawn(tensor, generator, rows if tensor is tokens else 2)
        return drawn.to(device, dtype if made else tensor.dtype)

    # Of whole numbers of which a size alone is known, the first are taken for token ids.
    rows = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)
    tokens = next((t for t in tensors_in(example) if t.is_meta and not t.is_floating_point()), None)
    if example is not None:
        arguments = arguments_of(example)
        drawn = [pytree.tree_map_only(Tensor, fresh, arguments) for _ in range(2)]
        return drawn if any(t.is_meta for t in tensors_in(arguments)) else [arguments, drawn[0]]
    first = next(filter(_has_weight, model.modules()), None)
    if isinstance(first, nn.Embedding) and len(shapes[0]) == 2:
        rows = first.num_embeddings
        ids = [torch.randint(rows, tuple(shape), generator=generator) for shape in shapes]
        return [arranged(model, ids)]
    return [
        arranged(model, [fresh(torch.empty(shape, device="meta")) for shape in found])
        for found in _sizes_to_draw(model, shapes, inferred, dtype, whole=whole)
    ]


def _sizes_to_draw(
    model: nn.Module,
    shapes: Sequence[Sequence[int]],
    inferred: bool,
    dtype: torch.dtype,
    *,
    whole: bool,
) -> list[list[tuple[int, ...]]]:
    """Return the shapes of each batch; see :func:`batches_for`."""
    followed = [tuple(shape) for shape in shapes]
    if not inferred:
        return [followed]
    others = _other_sizes(model, followed, dtype)
    return [followed, *others[:1]] if whole else others


def _drawn(tensor: Tensor, generator: torch.Generator, rows: int = 2) -> Tensor:
    """Return new values for a tensor: normal, or whole numbers of its range; a mask is turned.

    Of whole numbers of which a size alone is known, the range is up to ``rows``.
    """
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator)
    low, high = (0, rows - 1) if tensor.is_meta else (int(tensor.min()), int(tensor.max()))
    if not tensor.is_meta and high - low < 2:  # a mask
        return tensor.flip(-1) if tensor.ndim else tensor
    return torch.randint(low, high + 1, tensor.shape, generator=generator)


def _other_sizes(
    model: nn.Module, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> list[list[tuple[int, ...]]]:
    """Return shapes to draw instead of inferred ones: smaller where possible, in two batch sizes.

    Where nothing but the inferred sizes runs, these are taken.
    """
    channels, *sizes = shapes[0][1:] or (0,)
    all_smaller = _SMALLER_SIZES.get(len(sizes), ())
    smaller = [size for size in all_smaller if 2 * math.prod(size) <= math.prod(sizes)]
    found: list[list[tuple[int, ...]]] = []
    for size in smaller:
        candidate = [(2 + len(found), channels, *size)] * len(shapes)
        inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape in candidate]
        if len(found) < 2 and _runs(stand_in(model), arranged(model, inputs)):
            found.append(candidate)
    larger = [(shape[0] + 1, *shape[1:]) for shape in shapes]
    return found or ([shapes] if smaller else [shapes, larger])


def _runs(standin: nn.Module, arguments: tuple[Any, ...]) -> bool:
    """Return whether a network on meta tensors runs on inputs in both modes; it is left in eval."""
    try:
        with torch.no_grad(), OnMeta():
            standin.train()(*arguments)
            standin.eval()(*arguments)
    except Exception:  # a user's forward may raise anything; the caller tells of the first
        return False
    finally:
        standin.eval()
    return True
