"""What some operations return on meta tensors, without the arithmetic torch does there.

torch computes the meta result of a norm, a softmax or an activation by running its decomposition,
some thirty operations each; that was half the time of following a network. These return an empty
tensor of the right shape, or ``NotImplemented``: what they do not serve, torch takes or refuses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.registry import Registry

_META = torch.device("meta")
Shortcut: TypeAlias = Callable[..., Any]
SHORTCUTS: Registry[Shortcut] = Registry("shortcut")


def run_on_meta(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tensor]
) -> Any:
    """Return the result of an operation on meta tensors; ``operands`` are the tensors in it."""
    shortcut = SHORTCUTS.get(func._name)
    if shortcut is not None and operands[0].is_meta:
        result = shortcut(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return func(*args, **kwargs)


def _empty_like(x: Tensor) -> Tensor:
    """Return what ``torch.empty_like`` does, sixteen times as fast on the meta device."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_META)


def _empty(shape: Sequence[int], x: Tensor) -> Tensor:
    """Return what ``x.new_empty`` does, eight times as fast on the meta device."""
    return torch.empty_strided(shape, _strides(tuple(shape)), dtype=x.dtype, device=_META)


@functools.lru_cache(1 << 12)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    sizes = [max(size, 1) for size in shape]
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(shape)))


@functools.lru_cache(1 << 12)
def broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return what ``torch.broadcast_shapes`` does, which takes long; None if they do not fit."""
    more, fewer = (one, other) if len(one) >= len(other) else (other, one)
    pairs = list(zip(more, (*[1] * (len(more) - len(fewer)), *fewer), strict=True))
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        return None
    return tuple(b if a == 1 else a for a, b in pairs)


@SHORTCUTS.register(
    "aten::gelu",
    "aten::silu",
    "aten::relu",
    "aten::sigmoid",
    "aten::hardswish",
    "aten::hardsigmoid",
    "aten::hardtanh",
    "aten::leaky_relu",
    "aten::clamp",
    "aten::clamp_min",
    "aten::mul.Scalar",
    "aten::roll",
    "aten::_safe_softmax",
    "aten::_sample_dirichlet",
    "aten::binomial",
)
def like_first(x: Tensor, *rest: object, **_: object) -> Any:
    """A function of one tensor, of its shape and dtype."""
    is_real = x.is_floating_point() and not any(isinstance(arg, complex) for arg in rest)
    return _empty_like(x) if is_real else NotImplemented


@SHORTCUTS.register(
    "aten::silu_",
    "aten::relu_",
    "aten::hardswish_",
    "aten::hardsigmoid_",
    "aten::hardtanh_",
    "aten::leaky_relu_",
)
def in_place(x: Tensor, *_: object) -> Tensor:
    """A function of one tensor, written over it."""
    return x


@SHORTCUTS.register("aten::add.Tensor", "aten::sub.Tensor", "aten::mul.Tensor", "aten::div.Tensor")
def of_two(x: Tensor, y: Tensor, *, alpha: float = 1) -> Any:
    """A function of two tensors of one dtype that broadcast together."""
    del alpha
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):  # either may be a number
        return NotImplemented
    if x.dtype != y.dtype or y.device.type != "meta" or not x.is_floating_point():
        return NotImplemented  # the quotient of integers is none
    if x.shape == y.shape:
        return _empty_like(x)
    shape = broadcast(x.shape, y.shape)
    return NotImplemented if shape is None else _empty(shape, x)


@SHORTCUTS.register("aten::add_.Tensor", "aten::mul_.Tensor")
def of_two_in_place(x: Tensor, y: Tensor, *, alpha: float = 1) -> Any:
    """The same, written over the first."""
    del alpha
    same = isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype
    return x if same else NotImplemented


@SHORTCUTS.register(
    *(f"aten::{name}.Scalar" for name in ("eq", "ne", "lt", "le", "gt", "ge")),
)
def compared(x: Tensor, number: object) -> Any:
    """Whether each entry stands in a relation to a number."""
    if not (x.is_contiguous() and isinstance(number, (int, float))):
        return NotImplemented
    return torch.empty_strided(x.shape, x.stride(), dtype=torch.bool, device=_META)


@SHORTCUTS.register("aten::masked_fill.Scalar")
def masked(x: Tensor, mask: Tensor, number: object) -> Any:
    """A number where a mask is, which broadcasts to the tensor."""
    fits = mask.is_meta and mask.dtype == torch.bool and broadcast(x.shape, mask.shape) == x.shape
    plain = x.is_floating_point() and isinstance(number, (int, float))
    return _empty_like(x) if fits and plain and x.is_contiguous() else NotImplemented


@SHORTCUTS.register("aten::clone")
def copied(x: Tensor, *, memory_format: torch.memory_format | None = None) -> Any:
    """The same, laid out as it is or anew."""
    if memory_format is torch.contiguous_format:
        return _empty(x.shape, x)
    kept = memory_format in (None, torch.preserve_format) and x.is_contiguous()
    return _empty_like(x) if kept else NotImplemented


@SHORTCUTS.register("aten::empty_like")
def unfilled(x: Tensor, *, memory_format: torch.memory_format | None = None, **others: Any) -> Any:
    """Something like a tensor in all but its entries."""
    wanted = any(
        others[name] is not None for name in others if name not in ("device", "pin_memory")
    )
    if wanted or memory_format not in (None, torch.preserve_format) or not x.is_contiguous():
        return NotImplemented
    return _empty_like(x)


@SHORTCUTS.register("aten::_unsafe_view")
def laid_out(x: Tensor, shape: Sequence[int]) -> Any:
    """As many entries in another shape."""
    fits = min(shape, default=1) > 0 and math.prod(shape) == x.numel() and x.is_contiguous()
    return _empty(shape, x) if fits else NotImplemented


@SHORTCUTS.register("aten::_softmax", "aten::_log_softmax")
def softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    """Of its shape, laid out anew."""
    plain = not half_to_float and x.is_floating_point() and -x.ndim <= dim < x.ndim
    return _empty(x.shape, x) if plain else NotImplemented


@SHORTCUTS.register("aten::index.Tensor")
def looked_up(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """The shape of an index in place of the dim that it is for."""
    given = [dim for dim, index in enumerate(indices) if index is not None]
    index = indices[given[0]] if len(given) == 1 else None
    if index is None or not index.is_meta or index.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    dim = given[0]
    plain = dim < x.ndim and x.numel() and x.is_contiguous() and index.is_contiguous()
    return (
        _empty((*x.shape[:dim], *index.shape, *x.shape[dim + 1 :]), x) if plain else NotImplemented
    )


@SHORTCUTS.register("aten::native_batch_norm")
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *_: object,
) -> Any:
    """Each vector has an entry per channel, and so have the statistics of a batch."""
    taken = x.shape[1:2] if training else (0,)
    return _normalized(x, taken, x.shape[1:2], weight, bias, running_mean, running_var)


@SHORTCUTS.register("aten::native_layer_norm")
def layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, _: float
) -> Any:
    """The last dims have the normalized shape, and so have the vectors."""
    shape = x.shape[max(x.ndim - len(normalized_shape), 0) :]
    if tuple(shape) != tuple(normalized_shape):
        return NotImplemented
    statistics = (*x.shape[: x.ndim - len(shape)], *[1] * len(shape))
    return _normalized(x, statistics, shape, weight, bias)


def _normalized(
    x: Tensor, statistics: Sequence[int], shape: Sequence[int], *vectors: Tensor | None
) -> Any:
    """Return a norm's result and its two statistics, if all vectors are of a shape."""
    if any(vector is not None and vector.shape != shape for vector in vectors):
        return NotImplemented
    return _empty_like(x), _empty(statistics, x), _empty(statistics, x)


def _check_inner(left: Tensor, right: Tensor) -> None:
    """Return if two matrices can be multiplied.

    Raises:
        RuntimeError: they cannot. torch says the same, and loads sympy to do so: sizes that a
            network may not take are tried for each.
    """
    if left.shape[1] != right.shape[0]:
        shapes = f"{list(left.shape)} X {list(right.shape)}"
        raise RuntimeError(f"a and b must have same reduction dim, but got {shapes}.")


@SHORTCUTS.register("aten::addmm")
def matrix_product(
    bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    """The inner sizes agree, and the bias is one row or a number."""
    del beta, alpha
    if left.ndim != 2 or right.ndim != 2:
        return NotImplemented
    _check_inner(left, right)
    if tuple(bias.shape) not in ((right.shape[1],), (1,), ()) or left.dtype != right.dtype:
        return NotImplemented
    return _empty((left.shape[0], right.shape[1]), left)


@SHORTCUTS.register("aten::mm")
def bare_product(left: Tensor, right: Tensor) -> Any:
    """The inner sizes agree."""
    if left.ndim != 2 or right.ndim != 2:
        return NotImplemented
    _check_inner(left, right)
    if left.dtype != right.dtype or not right.is_meta:
        return NotImplemented
    return _empty((left.shape[0], right.shape[1]), left)


@SHORTCUTS.register("aten::bmm")
def batched_product(left: Tensor, right: Tensor) -> Any:
    """A product for each of a batch; the inner sizes and the batches agree."""
    if left.ndim != 3 or right.ndim != 3 or left.dtype != right.dtype:
        return NotImplemented
    if (left.shape[0], left.shape[2]) != (right.shape[0], right.shape[1]):
        return NotImplemented
    return _empty((*left.shape[:2], right.shape[2]), left)


@SHORTCUTS.register("aten::_grouped_mm")
def grouped_product(left: Tensor, right: Tensor, *_: object, **__: object) -> Any:
    """A matrix for each group of rows; torch takes but one dtype of those that its kernels do."""
    if left.ndim != 2 or right.ndim != 3 or left.shape[1] != right.shape[1]:
        return NotImplemented
    return _empty((left.shape[0], right.shape[2]), left)


@SHORTCUTS.register("aten::convolution")
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    _: Sequence[int],
    groups: int,
) -> Any:
    """Each kernel fits its input.

    Source of the sizes: the formula in the documentation of ``torch.nn.Conv2d``.
    """
    dims = x.ndim - 2
    if transposed or {dims} != {weight.ndim - 2, len(stride), len(padding), len(dilation)}:
        return NotImplemented
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return NotImplemented
    if bias is not None and bias.shape != weight.shape[:1]:
        return NotImplemented
    covered = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    spatial = zip(x.shape[2:], padding, covered, stride, strict=True)
    sizes = [(size + 2 * pad - part) // step + 1 for size, pad, part, step in spatial]
    if min(sizes, default=1) < 1:
        return NotImplemented
    return _empty((x.shape[0], weight.shape[0], *sizes), x)


@SHORTCUTS.register("aten::max_pool2d_with_indices")
def largest(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    """The largest of each window, and where it is.

    Source of the sizes: the formula in the documentation of ``torch.nn.MaxPool2d``.
    """
    if x.ndim != 4 or not x.is_contiguous() or min(x.shape) < 1:
        return NotImplemented
    sizes = []
    for dim in range(2):
        part, step, pad, apart = (given[min(dim, len(given) - 1)] for given in (
            kernel, stride or kernel, padding, dilation,
        ))  # fmt: skip
        left = x.shape[2 + dim] + 2 * pad - apart * (part - 1) - 1
        count = -(-left // step) if ceil_mode else left // step
        if ceil_mode and count * step >= x.shape[2 + dim] + pad:
            count -= 1  # the last window begins inside
        if left < 0 or not 0 <= 2 * pad <= part:
            return NotImplemented
        sizes.append(count + 1)
    shape = (*x.shape[:2], *sizes)
    return _empty(shape, x), torch.empty(shape, dtype=torch.int64, device=_META)


@SHORTCUTS.register("aten::cat")
def concatenation(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Tensors of one dtype that differ in one dim alone."""
    first = tensors[0]
    if not -first.ndim <= dim < first.ndim:
        return NotImplemented
    dim %= first.ndim
    shapes = [list(x.shape) for x in tensors]
    total = sum(shape.pop(dim) for shape in shapes if len(shape) == first.ndim)
    if any(shape != shapes[0] for shape in shapes) or any(x.dtype != first.dtype for x in tensors):
        return NotImplemented
    return _empty((*first.shape[:dim], total, *first.shape[dim + 1 :]), first)


@SHORTCUTS.register("aten::mean.dim")
def mean(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, **others: object) -> Any:
    """The mean over some dims."""
    if not dims or others or not x.is_floating_point():
        return NotImplemented
    if not all(-x.ndim <= dim < x.ndim for dim in dims):
        return NotImplemented
    reduced = {range(x.ndim)[dim] for dim in dims}
    sizes = [1 if dim in reduced else size for dim, size in enumerate(x.shape)]
    kept = [size for dim, size in enumerate(sizes) if keepdim or dim not in reduced]
    return _empty(kept, x)
