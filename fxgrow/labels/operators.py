"""What is known of an ATen operator by its name, its schema and its tags, whatever its arguments.

Worked out once for each operator, and looked up for each operation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload


def aten(names: str) -> frozenset[str]:
    """Return operator names from a list of them in words."""
    return frozenset(f"aten.{name}" for name in names.split())


# The same elements in the same places.
COPIES = aten("clone contiguous _to_copy lift_fresh lift_fresh_copy detach alias")
# The same elements in other places; views are recognised by their schema.
MOVEMENTS = COPIES | aten(
    "stack roll repeat flip pixel_shuffle pixel_unshuffle "
    "unsafe_split unsafe_split_with_sizes unsafe_chunk transpose t squeeze unsqueeze "
    "channel_shuffle native_channel_shuffle _unsafe_view _reshape_alias"
)
# Operations that lay out what they get.
LAYOUTS = aten("cat stack repeat _unsafe_view _reshape_alias unsafe_split")
# Tensors made in the image of another: as uniform as a scalar, as wide as their model.
LIKENESSES = aten("zeros_like ones_like full_like empty_like rand_like randn_like bernoulli")
# Tensors of given sizes that take nothing but dtype and device from another.
FACTORIES = aten("new_zeros new_ones new_empty new_full new_empty_strided")
# Tensors with one value everywhere, or with none yet.
UNIFORM = aten(
    "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full "
    "new_empty zero"
)
_FILLED = (torch.ops.aten.fill.Scalar, torch.ops.aten.fill_.Scalar)
COMMUTATIVE = aten("add mul maximum minimum")
# Pointwise operations that torch, or a torch before 2.11, does not tag as such.
UNTAGGED = aten(
    "hardswish hardtanh hardsigmoid relu6 _prelu_kernel fill zero log_sigmoid_forward masked_fill "
    "leaky_relu ldexp"
)


# What multiplies matrices or convolves: forward operations that torch counts the products of.
PRODUCTS = aten(
    "mm addmm bmm baddbmm _scaled_mm _grouped_mm convolution _convolution cudnn_convolution "
    "convolution_overrideable _slow_conv2d_forward _flash_attention_forward "
    "_efficient_attention_forward _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
)


@dataclass(frozen=True)
class Traits:
    """What an operator is, whatever it is applied to.

    Attributes:
        name: namespace and name without overload and in-place mark: ``"aten.relu"``.
        is_view: it returns a view.
        is_mutable: it writes over an argument.
        is_movement: it only moves data.
        is_pointwise: it acts on corresponding elements.
        is_layout: it leaves every value as it is: a view, a copy, a concatenation.
        is_commutative: its operands may change places.
        is_factory: it makes a tensor of its own.
        is_uniform: it makes a tensor with one value everywhere.
        is_likeness: it makes a tensor in the image of another, whatever that holds.
        is_padding: it puts one constant beside what it gets.
        is_product: it multiplies matrices or convolves.
        places: position of each argument by its name in the schema.
    """

    name: str
    is_view: bool
    is_mutable: bool
    is_movement: bool
    is_pointwise: bool
    is_layout: bool
    is_commutative: bool
    is_factory: bool
    is_uniform: bool
    is_likeness: bool
    is_padding: bool
    is_product: bool
    places: dict[str, int]


@functools.cache
def traits_of(target: OpOverload) -> Traits:
    """Return what an operator is, whatever it is applied to."""
    name = f"{target.namespace}.{target._opname.rstrip('_')}"
    tagged = torch.Tag.pointwise in target.tags
    is_view = target.is_view and target._overloadname != "dtype"  # not of labels, by their bits
    return Traits(
        name=name,
        is_view=is_view,
        is_mutable=target._schema.is_mutable,
        is_movement=is_view or name in MOVEMENTS,
        is_pointwise=tagged or name in LIKENESSES or name in UNTAGGED,
        is_layout=is_view or name in COPIES or name in LAYOUTS,
        is_commutative=name in COMMUTATIVE,
        is_factory=name in FACTORIES,
        is_uniform=name in UNIFORM or target in _FILLED,
        is_likeness=name in LIKENESSES,
        is_padding=name == "aten.constant_pad_nd",
        is_product=name in PRODUCTS,
        places={argument.name: place for place, argument in enumerate(target._schema.arguments)},
    )


def operator_name(target: OpOverload) -> str:
    """Return the namespace and the name without overload and in-place mark: ``"aten.relu"``."""
    return traits_of(target).name


def constant_of(target: OpOverload, args: Sequence[Any]) -> float | None:
    """Return the number that a tensor is everywhere that an operation makes, None if not known."""
    name = operator_name(target).removesuffix("_like").replace("new_", "")
    if name in ("aten.zeros", "aten.zero"):
        return 0.0
    if name == "aten.ones":
        return 1.0
    place = {"aten.scalar_tensor": 0, "aten.full": 1}.get(name, len(args))
    place += operator_name(target) == "aten.new_full"
    number = args[place] if place < len(args) else None
    return float(number) if isinstance(number, (bool, int, float)) else None


def place_of(target: OpOverload, node: str, module: str) -> str:
    """Return where an operation ran, as reasons and chains name it: ``"aten.add at layer1.0"``."""
    return f"{traits_of(target).name} at {module or node or 'the top level'}"


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    norm = v.norm(2, [d for d in range(v.ndim) if d != dim], keepdim=True)
    return v * (g / norm), norm


# One operation for weight norm, whichever dim has the lengths and whatever the dtype is: torch
# composes some of others, in which a norm of all columns is taken by itself.
_LIBRARY = torch.library.Library("fxgrow", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("_weight_norm_interface(Tensor v, Tensor g, int dim=0) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
_LIBRARY.impl("_weight_norm_interface", _weight_norm, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def on_numbers(target: OpOverload) -> Callable[..., Any]:
    """Return what computes an operation of any operands.

    The kernel of weight norm takes those for granted that torch gives it: contiguous ones, with
    lengths along the first dim or the last.
    """
    return _weight_norm if target is torch.ops.aten._weight_norm_interface.default else target
