"""Inits: what fills the new rows V and columns Z, and the new entries of biases.

An init fills a tensor in place: ``init(tensor, reference, fan_in) -> None``. ``reference`` holds
the layer's old weights after rescaling (None if there are none), ``fan_in`` is that of the layer
after growth. What it draws by torch's functions comes from a generator that is seeded for each
tensor from (seed, fully qualified name, role), so that results depend on no order; torch's global
one is left alone.
"""

from __future__ import annotations

import abc
import hashlib
import importlib
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.errors import PlanError, UsageError
from fxgrow.modules.dispatch import DispatchMode
from fxgrow.registry import Registry

Init: TypeAlias = Callable[[Tensor, "Tensor | None", int], None]
INITS: Registry[Init] = Registry("init")


class NamedInit(abc.ABC):
    """An init that must know which tensor it fills, because each has weights of its own."""

    notes: tuple[str, ...] = ()  # what a report should tell

    @abc.abstractmethod
    def for_tensor(self, name: str, role: str) -> Init:
        """Return what fills the new entries of one tensor.

        Args:
            name: fully qualified name of the tensor.
            role: what the new entries are for: ``writer0``, ``reader1``, …: a role and a dim.
        """

    def __call__(self, tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
        """Refuse to fill a tensor without a name.

        Raises:
            PlanError: always.
        """
        raise PlanError(f"{type(self).__name__} fills tensors that it knows by name only.")


def _deviation(reference: Tensor | None) -> float:
    """Return the standard deviation of the reference, 0 where it tells nothing."""
    if reference is None or reference.numel() < 2:
        return 0.0
    deviation = (
        reference.float().std().item() if reference.dtype.itemsize < 4 else (reference.std().item())
    )
    return deviation if math.isfinite(deviation) else 0.0


@INITS.register("copy_uniform")
def copy_uniform(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """U(±√3·σ), the variance of the old weights; kaiming where they tell none."""
    deviation = _deviation(reference)
    if not deviation:
        kaiming(tensor, reference, fan_in)
        return
    bound = math.sqrt(3) * deviation
    tensor.uniform_(-bound, bound)


@INITS.register("copy_normal")
def copy_normal(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """N(0, σ²), the variance of the old weights; kaiming_normal where they tell none."""
    deviation = _deviation(reference)
    if not deviation:
        kaiming_normal(tensor, reference, fan_in)
        return
    tensor.normal_(0.0, deviation)


@INITS.register("kaiming")
def kaiming(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """U(±√(6/fan_in)), variance 2/fan_in (He et al. 2015, eq. 10)."""
    del reference
    bound = math.sqrt(6 / max(fan_in, 1))
    tensor.uniform_(-bound, bound)


@INITS.register("kaiming_normal")
def kaiming_normal(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """N(0, 2/fan_in) (He et al. 2015, eq. 10)."""
    del reference
    tensor.normal_(0.0, math.sqrt(2 / max(fan_in, 1)))


@INITS.register("zeros")
def zeros(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """Zeros."""
    del reference, fan_in
    tensor.zero_()


def find_init(init: str | Init) -> Init:
    """Return an init given by registered name, by ``package.module:function`` or as a callable.

    Raises:
        PlanError: no such init.
    """
    if callable(init):
        return init
    if ":" not in init:
        return INITS[init]
    module, _, function = init.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"the init {init!r} cannot be imported: {error}.", name=init) from error
    if isinstance(found, type) and issubclass(found, NamedInit):
        raise UsageError(
            f"the init {init!r} needs data, which a name does not give.",
            name=init,
            way_out="Use it in Python: fxgrow.widen(…, init=…).",
        )
    if not callable(found):
        raise UsageError(f"the init {init!r} is not callable.", name=init)
    typed: Init = found
    return typed


def init_of_plan(name: str) -> Init:
    """Return the init a plan names; a plan is data, so code that it names is not imported.

    Raises:
        PlanError: the init is not a registered one.
    """
    if ":" in name:
        raise PlanError(
            f"the plan fills new weights by code of its own, {name}, which is not run unasked.",
            name=name,
            way_out="If you trust it, pass it as init (--init on the command line).",
        )
    return INITS[name]


def init_name(init: str | Init) -> str:
    """Return the name a plan records for an init."""
    if isinstance(init, str):
        return init
    return f"{init.__module__}:{getattr(init, '__qualname__', type(init).__qualname__)}"


def identity_(tensor: Tensor) -> Tensor:
    """Return the weight of a layer that passes on what it gets, written into a tensor of zeros."""
    middle = tensor
    for size in tensor.shape[2:]:
        middle = middle.select(2, size // 2)
    rows = torch.arange(tensor.shape[0], device=tensor.device)
    middle[rows, rows % tensor.shape[1]] = 1
    return tensor


def draw(
    shape: tuple[int, ...],
    like: Tensor,
    init: Init,
    fan_in: int,
    *,
    seed: int,
    name: str,
    role: str,
) -> Tensor:
    """Return a freshly drawn tensor that depends on (seed, name, role) alone.

    Args:
        shape: shape of the new tensor.
        like: the rescaled old weights: reference of the law, and dtype and device of the result.
        init: what fills it.
        fan_in: of the layer after growth.
        seed: with name and role, what the random numbers depend on.
        name: fully qualified name of the tensor.
        role: what the new entries are for.

    Low-precision tensors are drawn in float32 and rounded, on the CPU, so that the same numbers
    come out on every device.
    """
    if like.device.type == "meta":
        return torch.empty(shape, dtype=like.dtype, device="meta")
    law = init.for_tensor(name, role) if isinstance(init, NamedInit) else init
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    tensor = torch.empty(shape, dtype=dtype)
    digest = hashlib.sha256(f"{seed}\0{name}\0{role}".encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    with torch.no_grad(), _DrawingFrom(generator):
        law(tensor, like, fan_in)
    return tensor.to(device=like.device, dtype=like.dtype)


class _DrawingFrom(DispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which random numbers come from a generator of its own.

    The default one belongs to the whole process: other threads may draw from it meanwhile.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, with the generator if it takes one."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            takes_one = any(argument.name == "generator" for argument in func._schema.arguments)
            name = f"{func._overloadname}_generator".removeprefix("default_")
            if not takes_one and name in func.overloadpacket.overloads():
                func, takes_one = getattr(func.overloadpacket, name), True
            if takes_one:
                kwargs = {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)
