"""Draw the numbers of one tensor: by an init, from a generator of its own, on the CPU."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.errors import PlanError, shown
from fxgrow.modules.bits import same_bits
from fxgrow.modules.dispatch import DispatchMode
from fxgrow.modules.standin import first_line
from fxgrow.plan.deviations import Place, dtype_of_draws
from fxgrow.plan.init import Init, PlacedInit, chosen_init, init_name


def draw(
    shape: tuple[int, ...],
    like: Tensor,
    init: Init,
    fan_in: int,
    *,
    seed: int,
    place: Place,
    room: Tensor | None = None,
) -> Tensor:
    """Return a freshly drawn tensor that depends on (seed, name, role) alone.

    Args:
        shape: shape of the new tensor.
        like: the rescaled old weights: reference of the law, and dtype and device of the result.
        init: what fills it.
        fan_in: of the layer after growth.
        seed: with name and role of the place, what the random numbers depend on.
        place: where the new entries lie.
        room: what may be filled, if its dtype and its device allow, instead of a new tensor.

    Raises:
        PlanError: the init wrote into the old weights, of which it is given a copy, did not run, or
            did not fill the new ones with finite numbers.

    Low-precision tensors are drawn in float32 and rounded, on the CPU, so that the same numbers
    come out on every device.
    """
    if like.device.type == "meta":
        return torch.empty(shape, dtype=like.dtype, device="meta")
    init = chosen_init(init, place)
    own, dtype = _is_own(init), dtype_of_draws(like.dtype)
    fits = own and room is not None and room.is_cpu and room.dtype == dtype and room.is_contiguous()
    tensor = room if fits and room is not None else torch.empty(shape, dtype=dtype)
    digest = hashlib.sha256(f"{seed}\0{place.name}\0{place.role}".encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    reference = like.detach().cpu()
    # A user's law could change the network that is only read; these do not, and a copy takes time.
    given = reference if own else reference.clone(memory_format=torch.contiguous_format)
    if not own:
        tensor.fill_(math.nan)  # so that what a user's law leaves out is seen
    try:
        with torch.no_grad():
            law = init.for_place(place, given) if isinstance(init, PlacedInit) else init
            with _DrawingFrom(generator):
                law(tensor, given, fan_in)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        if own or isinstance(error, torch.OutOfMemoryError):
            raise
        told = f"does not run on new weights of shape {list(shape)}: {first_line(error)}"
        raise _faulty(init, place, told, "It is given biases and other vectors too.") from error
    if not own:
        if not same_bits(given, reference):
            told = "changed the old weights, which are only there to be read"
            way_out = "Write into the first argument alone, or work on reference.clone()."
            raise _faulty(init, place, told, way_out)
        if not bool(torch.isfinite(tensor).all()):
            told = f"left some of the new weights of shape {list(shape)} without a finite number"
            raise _faulty(init, place, told, "Fill the first argument in place; return nothing.")
    return tensor.to(device=like.device, dtype=like.dtype)


def _faulty(init: Init, place: Place, told: str, way_out: str) -> PlanError:
    """Return the error for an init that does not do what inits do."""
    name = init_name(init)
    return PlanError(f"the init {name} {told} ({shown(place.name)}).", name=name, way_out=way_out)


def _is_own(init: Init) -> bool:
    """Return whether an init is known to write into nothing but what it fills."""
    owner = type(init) if isinstance(init, PlacedInit) else init
    return str(getattr(owner, "__module__", "")).startswith("fxgrow.")


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
