"""What a network has grown through in training, kept on the module itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fxgrow.errors import PlanError
from fxgrow.modules.tensors import module_names, modules_of
from fxgrow.plan.names import module_origins
from fxgrow.plan.schema import Plan

_HISTORY = "_fxgrow_history"


@dataclass(frozen=True, slots=True)
class PastGrowth:
    """One growth in training.

    Attributes:
        plan: what was done.
        lr: the rule of learning rates from then on; see :func:`fxgrow.training.grow_`.
        number: counts all growths of the network and of modules in it, from 1.
    """

    plan: Plan
    lr: str = "none"
    number: int = 1

    def __deepcopy__(self, memo: object) -> PastGrowth:
        """Return itself: it is data that nobody changes."""
        del memo
        return self


def stages_of(model: nn.Module) -> tuple[PastGrowth, ...]:
    """Return the growths that a module has been through, oldest first."""
    found: tuple[PastGrowth, ...] = vars(model).get(_HISTORY, ())
    return found


def stages_within(model: nn.Module) -> list[tuple[str, PastGrowth]]:
    """Return the growths of a network and of modules in it, in order.

    Returns:
        The module's name as each growth began, which later ones may have changed, and the stage.
    """
    names = module_names(model)
    today = [(names[id(m)], stage) for m in modules_of(model) for stage in stages_of(m)]
    found: list[tuple[str, PastGrowth]] = []
    later: list[tuple[str, PastGrowth]] = []
    for name, stage in sorted(today, key=lambda item: item[1].number, reverse=True):
        before = _name_before(name, later)
        if before is not None:
            found.append((before, stage))
            later.append((before, stage))
    return found[::-1]


def _name_before(name: str, later: Iterable[tuple[str, PastGrowth]]) -> str | None:
    """Return what a module was called before some growths, the last one first.

    A block that one of them brought holds what the block that it is like has been through: None.
    """
    for within, stage in later:
        prefix = f"{within}." if within else ""
        if not name.startswith(prefix) or name in ("", within):
            continue
        held = _modules_of_tensors(stage.plan.steps[0].source)
        origin = module_origins(held, stage.plan.steps).get(name.removeprefix(prefix))
        if origin is None:  # it holds no tensors
            continue
        if origin.new:
            return None
        name = prefix + origin.name
    return name


def _modules_of_tensors(names: Iterable[str]) -> list[str]:
    """Return the names of all modules that hold some tensors, or modules with such, in order."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        found.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts))))
    return list(found)


def add_stage(model: nn.Module, plan: Plan, lr: str, *, within: nn.Module | None = None) -> None:
    """Note that a module has grown.

    Args:
        model: the module.
        plan: how.
        lr: the rule of learning rates.
        within: the network that it is in, if that is known.
    """
    whole = model if within is None else within  # a module may have a length, or claim one
    number = max((stage.number for _, stage in stages_within(whole)), default=0) + 1
    vars(model)[_HISTORY] = (*stages_of(model), PastGrowth(plan, lr, number))


def named_module(model: nn.Module, name: str) -> nn.Module:
    """Return a module of a network by its name.

    Raises:
        PlanError: there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(
            f"the network has no module {name!r}, which the record says has grown.",
            name=name,
            way_out="Build the network as it was before its first growth.",
        ) from error
