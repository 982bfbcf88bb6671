"""Inits: what fills the new rows V and columns Z, and the new entries of biases.

An init fills a tensor in place: ``init(tensor, reference, fan_in) -> None``. ``reference`` holds
the layer's old weights after rescaling (None if there are none), ``fan_in`` is that of the layer
after growth. What it draws by torch's functions comes from a generator that is seeded for each
tensor from (seed, fully qualified name, role), so that results depend on no order; torch's global
one is left alone. Both tensors are on the CPU, so that the same numbers come out on every device.

One that must know more, which tensor it fills or where the outputs are in it, is a
:class:`PlacedInit`.
"""

from __future__ import annotations

import abc
import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fxgrow.errors import PlanError, UsageError
from fxgrow.plan.deviations import (
    Place,
    deviation_by_output,
    deviation_of,
    quick_deviation_of,
)
from fxgrow.registry import Registry

if TYPE_CHECKING:
    from fxgrow.plan.schema import Plan

Init: TypeAlias = Callable[[Tensor, "Tensor | None", int], None]
INITS: Registry[Init] = Registry("init")
NAME_OF_INIT = re.compile(r"[\w.+-]+")
# What computes new weights from data: the name on the command line, and the class in Python.
FROM_DATA = {"tiny": "Tiny", "gradmax": "GradMax"}


class PlacedInit(abc.ABC):
    """An init that must know where in which tensor the new entries lie."""

    notes: tuple[str, ...] = ()  # what a report should tell

    def chosen(self, place: Place) -> Init:
        """Return the init that fills a place, of one that is made of several; else itself."""
        del place
        return self

    @abc.abstractmethod
    def for_place(self, place: Place, reference: Tensor | None) -> Init:
        """Return what fills the new entries at one place.

        Args:
            place: the place.
            reference: the layer's old weights after rescaling, only to be read.
        """

    def computed_for(self, made: Plan) -> PlacedInit:
        """Return what fills the new weights of one plan, of one that computes these; else itself.

        Raises:
            PlanError: it computed those of another plan.
        """
        del made
        return self

    def __call__(self, tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
        """Refuse to fill a tensor without a name.

        Raises:
            PlanError: always.
        """
        raise PlanError(f"{type(self).__name__} fills tensors that it knows by name only.")


class InitOfSeveral(PlacedInit):
    """An init that is made of several, one of which fills each place."""

    @abc.abstractmethod
    def chosen(self, place: Place) -> Init:
        """Return the one that fills a place."""

    def for_place(self, place: Place, reference: Tensor | None) -> Init:
        """Return what fills the new entries at one place."""
        found = self.chosen(place)
        return found.for_place(place, reference) if isinstance(found, PlacedInit) else found


def chosen_init(init: Init, place: Place) -> Init:
    """Return the init that fills a place, of one that may be made of several."""
    while isinstance(init, PlacedInit) and (chosen := init.chosen(place)) is not init:
        init = chosen
    return init


class _CopyRows(PlacedInit):
    """U(±√3·σ): σ of the whole reference for new rows, of each output's entries for new columns.

    Twins cancel in each output to within the rounding of what they contribute to it. With the
    deviation of the whole reference, that would be far above the output's own rounding where its
    old weights are small.
    """

    def for_place(self, place: Place, reference: Tensor | None) -> Init:
        """Return the law of new columns if outputs read them, else that of new rows."""
        if not place.outputs or reference is None:
            return self
        deviation = deviation_by_output(reference, place)
        if deviation is None:
            return kaiming

        def fill(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
            del reference, fan_in
            tensor.uniform_(-math.sqrt(3), math.sqrt(3)).mul_(deviation)

        return fill

    def __call__(self, tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
        """Fill new rows, or entries of a vector; one whose entries are all alike stays so.

        Biases that are all zero are those of new channels too, which would else be far above the
        old ones where signals are small.
        """
        if reference is not None and reference.ndim == 1 and _is_constant(reference):
            tensor.copy_(reference[0])
            return
        _fill_uniform(tensor, reference, fan_in, quick_deviation_of)


copy_rows = INITS.register("copy_rows")(_CopyRows())


def _is_constant(reference: Tensor) -> bool:
    """Return whether several entries are all alike."""
    return reference.numel() > 1 and bool((reference == reference[0]).all())


class _NormalRows(PlacedInit):
    """N(0, σ²) with σ of each output's entries: noise that is small where the old weights are."""

    def for_place(self, place: Place, reference: Tensor | None) -> Init:
        """Return the law at one place."""
        deviation = None if reference is None else deviation_by_output(reference, place)
        if deviation is None:
            return kaiming_normal

        def fill(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
            del reference, fan_in
            tensor.normal_().mul_(deviation)

        return fill


normal_rows = _NormalRows()


@INITS.register("copy_uniform")
def copy_uniform(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """U(±√3·σ), the variance of the old weights; kaiming where they tell none."""
    _fill_uniform(tensor, reference, fan_in, deviation_of)


def standard_normal(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """N(0, 1): noise that is scaled afterwards; no init by name."""
    del reference, fan_in
    tensor.normal_()


def _fill_uniform(
    tensor: Tensor, reference: Tensor | None, fan_in: int, measure: Callable[[Tensor], float]
) -> None:
    """Fill a tensor by U(±√3·σ), or by kaiming where a measure of σ returns 0."""
    deviation = 0.0 if reference is None else measure(reference)
    if not deviation:
        kaiming(tensor, reference, fan_in)
        return
    bound = math.sqrt(3) * deviation
    tensor.uniform_(-bound, bound)


@INITS.register("copy_normal")
def copy_normal(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """N(0, σ²), the variance of the old weights; kaiming_normal where they tell none."""
    deviation = 0.0 if reference is None else deviation_of(reference)
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


@INITS.register("lecun")
def lecun(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """U(±√(3/fan_in)), variance 1/fan_in (LeCun et al. 1998, section 4.6)."""
    del reference
    bound = math.sqrt(3 / max(fan_in, 1))
    tensor.uniform_(-bound, bound)


@INITS.register("lecun_normal")
def lecun_normal(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """N(0, 1/fan_in) (LeCun et al. 1998, section 4.6)."""
    del reference
    tensor.normal_(0.0, math.sqrt(1 / max(fan_in, 1)))


@INITS.register("zeros")
def zeros(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """Zeros."""
    del reference, fan_in
    tensor.zero_()


inits: Mapping[str, Init] = INITS.entries


def register_init(name: str, init: Init | None = None) -> Any:
    """Give an init a name, by which ``init=`` and plans take it from then on, in this process.

    Args:
        name: letters, digits, ``_``, ``.``, ``+`` and ``-``.
        init: ``(tensor, reference, fan_in) -> None``, which fills ``tensor`` in place;
            ``reference`` has the old weights after rescaling, and ``fan_in`` is that of the layer
            after growth. None returns a decorator.

    Returns:
        The init, or the decorator.

    Raises:
        UsageError: the name is taken or is none, or the init is not callable.

    Example::

        @fxgrow.register_init("halves")
        def halves(tensor, reference, fan_in):
            tensor.fill_(0.5)
    """
    if callable(name):
        named = getattr(name, "__name__", type(name).__name__)
        raise UsageError(
            "register_init was given an init where its name is due.",
            name=named,
            way_out=f'Write @register_init("{named}"), with a name.',
        )
    if not isinstance(name, str) or not NAME_OF_INIT.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name of an init.", way_out="Use letters, digits, '_', '.', '+', '-'."
        )
    if name in INITS:
        raise UsageError(f"there is an init {name!r} already.", name=name)

    def register(given: Init) -> Init:
        if not callable(given) or isinstance(given, type):
            raise UsageError(f"the init {name!r} is not callable on a tensor.", name=name)
        return INITS.register(name)(given)

    return register if init is None else register(init)


def find_init(init: str | Init) -> Init:
    """Return an init given by registered name, by ``package.module:function`` or as a callable.

    Raises:
        PlanError: no such init.
    """
    if isinstance(init, type):
        raise UsageError(
            f"the init is the class {init.__name__}, and no init.",
            way_out=f"Make one of it: init={init.__name__}(…).",
        )
    if callable(init):
        return init
    if isinstance(init, str) and init in FROM_DATA:
        raise UsageError(
            f"{init} computes new weights from data, which a name does not give.",
            name=init,
            way_out=f"In Python: init=fxgrow.{FROM_DATA[init]}(loss_fn, batches).",
        )
    if not isinstance(init, str) or ":" not in init:
        return INITS[init]
    module, _, function = init.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"the init {init!r} cannot be imported: {error}.", name=init) from error
    if isinstance(found, type) and issubclass(found, PlacedInit):
        raise UsageError(
            f"the init {init!r} needs data, which a name does not give.",
            name=init,
            way_out=f"Make one in Python: init=fxgrow.{found.__name__}(loss_fn, batches).",
        )
    if not callable(found):
        raise UsageError(f"the init {init!r} is not callable.", name=init)
    typed: Init = found
    return typed


def is_from_data(name: str) -> bool:
    """Return whether a plan's name of an init is that of one that computes weights from data."""
    return name.startswith("fxgrow.grow.data.")


def told_init(name: str) -> str:
    """Return what an init is called, where a plan names it by its class.

    Example:
        >>> told_init("fxgrow.grow.data.tiny:Tiny"), told_init("copy_rows")
        ('tiny', 'copy_rows')
    """
    by_class = {made: called for called, made in FROM_DATA.items()}
    return by_class.get(name.rpartition(":")[2], name) if is_from_data(name) else name


def init_of_plan(name: str) -> Init:
    """Return the init a plan names; a plan is data, so code that it names is not imported.

    Raises:
        PlanError: the init is not a registered one.
    """
    if is_from_data(name):
        raise PlanError(
            f"the new weights of this plan come from data ({name.rpartition(':')[2]}), and a plan "
            "holds none.",
            name=name,
            way_out="In Python, give it the init object that it was made with: plan.apply(model, "
            "init=…); on the command line, run `fxgrow widen` with the same options and without "
            "--dry-run.",
        )
    if ":" in name:
        raise PlanError(
            f"the plan fills new weights by code of its own, {name}, which is not run unasked.",
            name=name,
            way_out="If you trust it, give it: plan.apply(model, init=…), or --init on the command "
            "line; as output_init or input_init where the plan says it is one.",
        )
    return INITS[name]


def init_name(init: str | Init) -> str:
    """Return the name a plan records for an init."""
    if isinstance(init, str):
        return init
    for name in INITS:
        if INITS[name] is init:
            return name
    return f"{init.__module__}:{getattr(init, '__qualname__', type(init).__qualname__)}"


def identity_(tensor: Tensor) -> Tensor:
    """Return the weight of a layer that passes on what it gets, written into a tensor of zeros."""
    middle = tensor
    for size in tensor.shape[2:]:
        middle = middle.select(2, size // 2)
    rows = torch.arange(tensor.shape[0], device=tensor.device)
    middle[rows, rows % tensor.shape[1]] = 1
    return tensor
