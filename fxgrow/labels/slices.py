"""What an operation without a rule does to channels, told by running it on one of them at a time.

If every slice of what comes in, along a dim, makes the same slice of what comes out, channels that
lie along this dim pass: a cumulative maximum over time, a Fourier transform, a sampled image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fxgrow.labels import ask
from fxgrow.labels.layers import Layer, Layers, support
from fxgrow.labels.pins import PinKind
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Value
from fxgrow.modules.calling import map_kind

_NOWHERE = -1
# For each output, dims of an operand with those of the output that have the same slices, NOWHERE
# where it has nothing of the operand.
Slices = tuple[dict[int, int], ...]
_ROUNDING = 1e-12  # of the largest entry: a slice by itself may be summed in another order


def slice_by_slice(step: Step) -> tuple[Layers, ...]:
    """Let channels pass along the dims in which each is treated by itself; pin the others.

    Positions of other dims that belong to one channel are mixed inside it.
    """
    if not _is_safe(step):
        return step.give_up(*_no_rule(step))
    found: list[list[Layer]] = [[] for _ in step.outputs]
    lone = sum(bool(step.layers(tensor)) for tensor in step.operands) == 1
    for tensor in step.operands:
        layers = [layer for layer in step.layers(tensor) if support(layer)]
        step.pin(tuple(x for x in step.layers(tensor) if not support(x)), *_no_rule(step))
        value = step.value(tensor)
        told = ask.asked(_slices, step.call, [value], value.dtype.is_complex) if layers else ()
        for layer in layers:
            if told is None or len(told) != len(step.outputs):
                step.pin((layer,), *_no_rule(step))
                continue
            kept = [support(layer) & dims.keys() for dims in told]
            if not all(kept):  # of several, one may well be what reads another
                mixes = (PinKind.MIXED, step.target._opname) if lone else _no_rule(step)
                step.pin((layer,), *mixes)
                continue
            for place, (dims, out) in enumerate(zip(told, step.outputs, strict=True)):
                if any(dims[dim] != _NOWHERE for dim in kept[place]):
                    found[place].append(_moved(step.flat(layer, kept[place]), dims, out.shape))
    return tuple(map(tuple, found))


def _is_safe(step: Step) -> bool:
    """Return whether a kernel may be run on what is drawn, and on slices of one operand alone.

    Functions that people call check what they are given. Those that others call in their place
    (``_scaled_dot_product_flash_attention_for_cpu``, ``…_backward``) believe that sizes go
    together, and some that positions are inside (the pivots of ``linalg_ldl_solve``): they would
    leave the memory that is theirs, or divide by zero.
    """
    if step.target.is_view:  # of memory as another dtype, which is none of numbers in float64
        return False
    given: list[Value] = []
    map_kind(Value, given.append, (step.call.args, step.call.kwargs))
    name = step.target._opname
    is_checked = not (name.startswith("_") or "backward" in name or step.target._schema.is_mutable)
    if len({value.index for value in given}) > 1 and not is_checked:
        return False
    kinds = {value.dtype for value in given} - {torch.bool}
    return all(dtype.is_floating_point or dtype.is_complex for dtype in kinds)


def _no_rule(step: Step) -> tuple[PinKind, str]:
    return PinKind.NO_RULE, str(step.target)


def _moved(layer: Layer, dims: dict[int, int], shape: Sequence[int]) -> Layer:
    """Return a layer as one of an output of ``shape``, in which its dims are others."""
    strides = [0] * len(shape)
    for dim in support(layer):
        strides[dims[dim]] = layer.stride(dim)
    return layer.as_strided(shape, strides)


def _slices(numbers: ask.Numbers, is_complex: bool) -> Slices:
    found: Slices | None = None
    for seed, magnitude in enumerate(numbers.magnitudes):
        (x,) = numbers.draw(seed, magnitude)
        if is_complex:
            x = torch.complex(x, *numbers.draw(seed + 10, magnitude))
        before = numbers.run([x])
        told: Slices = tuple({} for _ in before)
        for dim in (d for d, size in enumerate(x.shape) if size > 1):
            with contextlib.suppress(RuntimeError, IndexError, ValueError):  # it takes no slice
                alone = [numbers.run([x.narrow(dim, i, 1)]) for i in range(x.shape[dim])]
                wider = numbers.run([torch.cat([x, x], dim)])
                for place, out in enumerate(before):
                    same = _same_slices(out, [parts[place] for parts in alone], dim)
                    # One slice by itself may have been broadcast, which more of them are not.
                    if same == _NOWHERE or (
                        same is not None and _is_twice(out, wider[place], same)
                    ):
                        told[place][dim] = same
        if found is None:
            found = told
        pairs = zip(found, told, strict=True)
        found = tuple({d: o for d, o in old.items() if new.get(d) == o} for old, new in pairs)
    return found or ()


def _same_slices(out: Tensor, alone: Sequence[Tensor], dim: int) -> int | None:
    """Return the dim along which an output consists of some others, ``dim`` sooner than any."""
    if all(_is_close(out, part) for part in alone):
        return _NOWHERE
    for candidate in sorted(range(out.ndim), key=lambda other: other != dim):
        parts = [out.narrow(candidate, i, 1) for i in range(out.shape[candidate])]
        if len(parts) == len(alone) and all(map(_is_close, parts, alone)):
            return candidate
    return None


def _is_twice(out: Tensor, wider: Tensor, dim: int) -> bool:
    """Return whether twice the slices of an operand make those of an output twice."""
    return _is_close(wider, torch.cat([out, out], dim))


def _is_close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    sizes = first.abs()[first.isfinite()]
    slack = _ROUNDING * float(sizes.max()) if sizes.numel() else 0.0
    return torch.allclose(first, second, 1e-9, slack, equal_nan=True)
