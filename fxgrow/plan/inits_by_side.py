"""Inits that differ by side: one for new outputs of layers (V, biases), one for new inputs (Z)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxgrow.plan.deviations import Place
from fxgrow.plan.init import (
    Init,
    InitOfSeveral,
    PlacedInit,
    find_init,
    init_of_plan,
    is_from_data,
)
from fxgrow.plan.inits_by_layer import (
    InitByLayer,
    Inits,
    find_inits,
    inits_names,
    inits_of_plan,
)
from fxgrow.plan.requests import Drawing


@dataclass(frozen=True)
class InitBySide(InitOfSeveral):
    """An init for what writers get, and one for what readers get.

    Attributes:
        rows: of new outputs: rows V of writers and entries of their biases.
        columns: of new inputs: columns Z of readers.
    """

    rows: Init
    columns: Init

    def chosen(self, place: Place) -> Init:
        """Return the init of the side on which a place is."""
        return self.columns if place.role.startswith("reader") else self.rows


def init_for(
    drawing: Drawing,
    init: Inits | None = None,
    output_init: str | Init | None = None,
    input_init: str | Init | None = None,
) -> Init:
    """Return what fills new weights: what is given, else what a plan names.

    Args:
        drawing: of the plan.
        init: one or by layer; stands for the plan's ``init``, and for a side of which the plan
            names this very one. One that the plan names for a side, or for some layers, is for
            these alone.
        output_init: stands for that of the plan.
        input_init: likewise.

    Raises:
        PlanError: an init is none, or the plan names code that is not given, or an init from data
            for which what is given does not stand.
    """
    base = None if init is None else find_inits(init)
    own = None if base is None else inits_names(base)
    computes = isinstance(base, PlacedInit) and not isinstance(base, InitOfSeveral)
    is_whole = computes and output_init is None and input_init is None
    if isinstance(drawing.init, str) and is_from_data(drawing.init) and not is_whole:
        return init_of_plan(drawing.init)  # refused: what draws does not fit what was computed
    sides = (drawing.output_init, drawing.input_init)

    def on_side(given: str | Init | None, name: str | None) -> Init:
        if given is not None:
            return find_init(given)
        if base is None or (own in sides and name != own):  # it is one side's alone
            return inits_of_plan(drawing.init) if name is None else init_of_plan(name)
        if name is not None:
            return base if own == name else init_of_plan(name)
        by_layer = drawing.init
        if isinstance(by_layer, Mapping) and own in by_layer.values():  # that of some layers alone
            return InitByLayer(
                {glob: base if one == own else init_of_plan(one) for glob, one in by_layer.items()}
            )
        return base

    rows = on_side(output_init, drawing.output_init)
    columns = on_side(input_init, drawing.input_init)
    return rows if rows == columns else InitBySide(rows, columns)


def init_for_step(init: Init, step: Drawing, last: Drawing) -> Init | None:
    """Return the init of one step of a plan, or None if it is the registered one that it names.

    Args:
        init: that is given: for the last step, and for those that name it or a side of it.
        step: how the step draws.
        last: how the last one does.
    """
    if step.inits == last.inits:
        return init
    sides = (init.rows, init.columns) if isinstance(init, InitBySide) else ()
    return next((x for x in (init, *sides) if step.inits == (inits_names(x), None, None)), None)
