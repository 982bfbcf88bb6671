"""Inits that differ from layer to layer: one init that knows which layer gets which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fxgrow.modules.tensors import layer_of
from fxgrow.plan.by_layer import checked, setting_for
from fxgrow.plan.deviations import Place
from fxgrow.plan.init import (
    INITS,
    Init,
    InitOfSeveral,
    copy_rows,
    find_init,
    init_name,
    init_of_plan,
)

Inits: TypeAlias = "str | Init | Mapping[str, str | Init]"


@dataclass(frozen=True)
class InitByLayer(InitOfSeveral):
    """An init for each layer.

    Attributes:
        inits: by glob over layers, of which the first match counts.
    """

    inits: Mapping[str, Init]

    def chosen(self, place: Place) -> Init:
        """Return the init of the layer in which a place is."""
        return setting_for(self.inits, (layer_of(place.name),), copy_rows)


def find_inits(inits: Inits) -> Init:
    """Return an init, or one by layer, from what :func:`fxgrow.widen` takes.

    Raises:
        UsageError: there is no such init.
    """

    def read(init: object) -> Init:
        return find_init(init)  # type: ignore[arg-type]  # which refuses what is none

    found = checked("init", inits, read, over="layers", form=f"a name ({', '.join(INITS)})")
    return InitByLayer(found) if isinstance(found, dict) else found


def inits_of_plan(names: str | Mapping[str, str]) -> Init:
    """Return the init that a plan names, or those by layer; code that it names is not imported.

    Raises:
        PlanError: one of them is not a registered one.
    """
    if isinstance(names, Mapping):
        return InitByLayer({glob: init_of_plan(name) for glob, name in names.items()})
    return init_of_plan(names)


def inits_names(inits: Inits) -> str | dict[str, str]:
    """Return what a plan records for an init, or for those by layer."""
    if isinstance(inits, InitByLayer):
        inits = inits.inits
    if isinstance(inits, Mapping):
        return {glob: init_name(init) for glob, init in inits.items()}
    return init_name(inits)
