"""Carry a plan out: old tensors in, new tensors out. Nothing is decided here.

The executor turns (plan, name → tensor) into new tensors one at a time, so that it serves a live
module, a state_dict and anything else that has names and tensors. A plan may be anybody's: what it
can do at all is told by :mod:`fxgrow.plan.checks`, and what does not fit the network is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from numbers import Integral, Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.apply.graph import (
    graph_module,
    insert_multipliers,
    module_at,
    sized_graph,
    with_submodule,
)
from fxgrow.apply.rearrange import rearranged
from fxgrow.apply.tensors import Lookup, grow_tensor
from fxgrow.apply.untie import untie
from fxgrow.errors import FxgrowError, PlanError, shown
from fxgrow.labels.in_code import Sized, change_sizes
from fxgrow.modules.exclusive import check_network
from fxgrow.modules.standin import first_line, stand_in, with_computed_weights
from fxgrow.modules.states import is_carried
from fxgrow.modules.tensors import named_tensors, scalar_buffers, zero_buffers
from fxgrow.plan.edits import ModuleEdit, SizeEdit
from fxgrow.plan.fingerprint import fingerprint
from fxgrow.plan.init import Init, PlacedInit
from fxgrow.plan.inits_by_side import init_for, init_for_step
from fxgrow.plan.names import names_after
from fxgrow.plan.requests import Convert
from fxgrow.plan.schema import Plan

_FITTING = "Apply the plan to the network it was made for."


def check_source(plan: Plan, model: nn.Module, *, dtypes: bool = True) -> None:
    """Refuse a plan on anything but the network it was made for.

    Args:
        plan: the plan.
        model: the network at hand.
        dtypes: compare dtypes too.

    Raises:
        PlanError: a name, a shape or a dtype differs; the first difference is named.
    """
    found = fingerprint(model, plan.source)
    way_out = "Make a plan for this network: `fxgrow widen SOURCE --dry-run --plan PLAN.json`."
    for name in sorted(plan.source.keys() | found.keys()):
        expected, present = plan.source.get(name), found.get(name)
        if present is None and is_carried(model, name):
            raise PlanError(
                f"{shown(name)} holds what a forward left there, and the plan is for zeros.",
                name=name,
                way_out="Reset the state of the network first.",
            )
        if expected is None or present is None:
            which = "has no" if present is None else "has an unexpected"
            raise PlanError(
                f"the plan is for another network: this one {which} {shown(name)}.",
                name=name,
                way_out=way_out,
            )
        if expected[0] != present[0] or (dtypes and expected[1] != present[1]):
            raise PlanError(
                f"the plan is for another network: {shown(name)} is {present[1]}"
                f"{list(present[0])} here, {expected[1]}{list(expected[0])} in the plan.",
                name=name,
                way_out=way_out,
            )


def new_tensors(
    plan: Plan, lookup: Lookup, init: Init | None = None, like: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that one step edits by name, one at a time, in the plan's order."""
    for name in plan.tensors:
        yield name, grow_tensor(plan, name, lookup, init, like)


def apply_to_state_dict(
    plan: Plan,
    state_dict: Mapping[str, Tensor],
    init: Init | None = None,
    like: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the grown state_dict; tied tensors stay tied, and untouched ones are passed on.

    Args:
        plan: the plan.
        state_dict: the old weights.
        init: what fills new weights, where the plan was made with code of the user's.
        like: other old weights, whose new weights these get too; see :func:`grow_tensor`.

    Raises:
        PlanError: the state_dict is not of the network the plan was made for.
    """
    found = dict(state_dict)
    for step in plan.steps:
        # What no state_dict holds (a buffer that is not persistent) is new in the module alone.
        held = {n: e for n, e in step.tensors.items() if (e.source or n) in found}
        kept, own = replace(step, tensors=held), init_of_step(init, step, plan)
        grown = dict(new_tensors(kept, found.__getitem__, own, like))
        like = None if like is None else apply_to_state_dict(step, like, own)
        after: dict[str, Tensor] = {}
        for name, before, new in names_after(found, step):
            first = step.aliases.get(name, name)
            if new and first not in grown:
                raise PlanError(f"nothing makes the new {shown(name)}.", name=name)
            after[name] = grown[first] if first in grown else found[before]
        found = after
    return found


def init_of_step(init: Init | None, step: Plan, plan: Plan) -> Init | None:
    """Return the init of a step: one that is given is for the last, and for those that name it."""
    if init is None:
        return None
    drawing = step.request.drawing
    own = init_for_step(init, drawing, plan.request.drawing)
    # One that knows its places was made for the plan; a function fills what the plan names it for.
    return own if own is None or isinstance(own, PlacedInit) else init_for(drawing, own)


def apply_to_module(
    plan: Plan, model: nn.Module, init: Init | None = None, like: nn.Module | None = None
) -> nn.Module:
    """Return a grown copy of a module; the module itself is not touched.

    Args:
        plan: the plan.
        model: the network the plan was made for.
        init: what fills new weights, where the plan was made with code of the user's.
        like: the same network with other weights, whose new weights this one gets too; see
            :func:`grow_tensor`.

    Returns:
        A module of the same class, or a :class:`torch.fx.GraphModule` where the plan changes what
        code says (see :attr:`Plan.makes_graphs`). Flags, hooks, ties, dtypes and devices are those
        of ``model``.

    Raises:
        PlanError: the plan is for another network, or what is given is none.
    """
    check_network(model)
    if isinstance(init, PlacedInit):
        init = init.computed_for(plan)
    followed = None if like is None else named_tensors(like)
    return _grown_module(plan, model, init, dtypes=True, like=followed)


def _grown_module(
    plan: Plan,
    model: nn.Module,
    init: Init | None,
    *,
    dtypes: bool,
    like: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    for step in plan.steps:
        _check_makes_module(step)
        tensors, own = named_tensors(model), init_of_step(init, step, plan)
        check_source(step, model, dtypes=dtypes)
        grown = dict(new_tensors(step, tensors.__getitem__, own, like))
        like = None if like is None else apply_to_state_dict(step, like, own)
        model = reshaped(step, model, grown)
    return model


def meta_module(plan: Plan, model: nn.Module) -> nn.Module:
    """Return what a plan makes of a network, on the meta device: names, shapes and code alone.

    Raises:
        PlanError: the plan is for another network.
    """
    check_source(plan.steps[0], model)
    tensors = named_tensors(model)
    numbers = scalar_buffers(model)  # they may be made of a width
    meta = {name: x.to("meta") for name, x in tensors.items() if name not in numbers}
    return _grown_module(plan, stand_in(model, meta), None, dtypes=True)


def remade(plan: Plan, model: nn.Module) -> nn.Module:
    """Return a copy of a module as one step makes it, for weights that are yet to be put in.

    Args:
        plan: the step; anybody's.
        model: a network of the architecture that the plan was made for.

    Returns:
        The copy. New tensors that are copies of old ones hold what these do, and others nothing.

    Raises:
        PlanError: the plan does not fit the network.
    """
    _check_makes_module(plan)
    old, zeros = named_tensors(model), zero_buffers(model)
    tensors: dict[str, Tensor] = {}
    for name, edit in plan.tensors.items():
        like = old.get(edit.source or name)
        if like is None or tuple(like.shape) != edit.shape:
            found = "no such tensor" if like is None else f"one of {list(like.shape)}"
            raise PlanError(
                f"the plan is for another network: it expects {shown(edit.source or name)} of "
                f"{list(edit.shape)}, and there is {found}.",
                name=name,
            )
        # A copy may be of a constant that no file holds.
        copied = edit.source and not edit.axes and not edit.fill
        made = torch.zeros if name in zeros else torch.empty
        tensors[name] = like.clone() if copied else made(edit.new_shape, dtype=like.dtype)
    return reshaped(plan, model, tensors)


def _check_makes_module(plan: Plan) -> None:
    """Refuse a plan that makes the tensors of another architecture.

    Raises:
        PlanError: it does.
    """
    if isinstance(plan.request, Convert):
        target = shown(plan.request.target)
        raise PlanError(
            f"the plan makes the tensors of {target}, and no module.",
            name=target,
            way_out="Carry it out as a conversion: fxgrow convert, fxgrow.convert.",
        )


def reshaped(plan: Plan, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module with other tensors, and all else that one step changes.

    Args:
        plan: the step.
        model: the network it was made for; only read.
        tensors: the new tensor of every name that it edits.

    Raises:
        PlanError: the network lacks a module or an attribute that the plan names.
        TraceError: a graph is to be changed that it does not have.
    """
    sizes: dict[str, list[SizeEdit]] = {}
    lines: dict[str, list[Sized]] = {}
    for edit in plan.sizes:
        if edit.at:
            lines.setdefault(edit.module, []).append(Sized(edit.at, edit.before, edit.after))
        else:
            sizes.setdefault(edit.module, []).append(edit)
    try:
        own = {name: tensor for name, tensor in tensors.items() if name not in plan.untied}
        view, views = rearranged(model, plan.rearrangements)
        grown = stand_in(view, own, views=views)
        if plan.untied:
            untie(grown, plan, tensors)
        graphs = {name: sized_graph(module_at(grown, name), sizes[name]) for name in sizes}
        set_attributes(grown, plan.modules, of=model)
        for name, changed in lines.items():
            change_sizes(module_at(grown, name), changed)
        for name, graph in graphs.items():
            grown = with_submodule(grown, name, graph_module(module_at(grown, name), graph))
        grown = with_computed_weights(grown)
        return insert_multipliers(grown, plan.multipliers) if plan.multipliers else grown
    except (FxgrowError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of modules that are copied: a graph that lost one of its own
        what = f"{type(model).__name__}: {first_line(error)}"
        raise PlanError(f"the plan does not fit {shown(what)}.", way_out=_FITTING) from error


def set_attributes(
    model: nn.Module,
    edits: tuple[ModuleEdit, ...],
    *,
    of: nn.Module | None = None,
    back: bool = False,
) -> None:
    """Set the attributes of a module tree to their new values, or back to the old, in place.

    Args:
        model: the tree.
        edits: of its modules, or of configurations that they hold.
        of: what it is a copy of, which stays as it is.
        back: go back.

    Raises:
        PlanError: an edit names no plain attribute of the tree's own, or one that has another value
            than the edit is for; nothing is changed then.
    """
    held = (
        () if of is None else (value for module in of.modules() for value in vars(module).values())
    )
    foreign = {id(value) for value in held}  # what no copy was made of: a logger, a word of an enum
    first: dict[tuple[int, str], tuple[Any, object]] = {}
    try:
        for edit in edits:
            before, after = (edit.after, edit.before) if back else (edit.before, edit.after)
            owner, name = _owner(model, edit, foreign)
            present = vars(owner)[name]
            _, original = first.setdefault((id(owner), name), (owner, present))
            if not back:
                _check_value(original, edit)
            setattr(owner, name, _changed(present, before, after))
    except Exception as error:
        for (_, name), (owner, value) in first.items():
            setattr(owner, name, value)
        if isinstance(error, PlanError):
            raise
        # A configuration may check what it is set to.
        raise _unfit(edit, f"cannot be set: {first_line(error)}") from error


def _owner(model: nn.Module, edit: ModuleEdit, foreign: Set[int]) -> tuple[Any, str]:
    """Return the object that has an attribute, a module or what it is configured by, and its name.

    Raises:
        PlanError: there is no such attribute, or it is a class's, or no plain one.
    """
    holder, _, name = edit.attribute.rpartition(".")
    owner: object = module_at(model, edit.module)
    if holder:
        owner = vars(owner).get(holder)
        code = isinstance(owner, (nn.Module, Tensor, type, ModuleType)) or callable(owner)
        if code or not hasattr(owner, "__dict__") or id(owner) in foreign:
            raise _unfit(edit, f"is of no configuration of its own: {holder} is none")
    # What the class computes when it is set would run code, and could change anything.
    computed = inspect.isdatadescriptor(inspect.getattr_static(type(owner), name, None))
    if name not in vars(owner) or name.startswith("__") or computed:
        raise _unfit(edit, "is no plain attribute of it")
    return owner, name


def _unfit(edit: ModuleEdit, why: str) -> PlanError:
    """Return the error for an attribute that a network does not have as a plan expects it."""
    where = f"{edit.module or 'the network'}: its attribute {edit.attribute}"
    return PlanError(f"{shown(where)} {shown(why)}.", name=edit.module, way_out=_FITTING)


def _check_value(present: object, edit: ModuleEdit) -> None:
    """Return if an attribute has the value that an edit is for, or has the new one already.

    Modules may share a configuration, and then each has an edit of it.

    Raises:
        PlanError: it has another value, or is of another kind.
    """
    if not (_is(present, edit.before) or _is(present, edit.after)):
        raise _unfit(edit, f"is {shown(repr(present))}, the plan expects {edit.before!r}")


def _is(present: object, told: object) -> bool:
    """Return whether an attribute has a value that an edit tells, of the same kind."""
    if isinstance(told, bool):
        return present is told
    if isinstance(told, tuple):
        if not isinstance(present, (tuple, list)) or len(present) != len(told):
            return False
        return all(map(_is, present, told))
    if isinstance(told, str):
        return isinstance(present, str) and present == told
    whole = isinstance(told, int)
    if isinstance(present, bool) or isinstance(present, Integral) != whole:
        return False
    return isinstance(present, Real) and bool(present == told)


def _changed(present: object, before: object, after: object) -> object:
    """Return the new value of an attribute; an earlier edit of another part of it is kept."""
    if isinstance(present, (tuple, list)) and isinstance(before, tuple):
        if isinstance(after, tuple) and len(present) == len(before) == len(after):
            parts = zip(present, before, after, strict=True)
            after = tuple(now if old == new else new for now, old, new in parts)
        return list(after) if isinstance(present, list) and isinstance(after, tuple) else after
    return after
