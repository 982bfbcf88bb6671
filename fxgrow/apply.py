"""Carry a plan out: old tensors in, new tensors out. Nothing is decided here.

The executor turns (plan, name → tensor) into new tensors one at a time, so that it serves a live
module, a state_dict and anything else that has names and tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from fxgrow.errors import PlanError
from fxgrow.graph import graph_module, insert_multipliers, sized_graph, with_part
from fxgrow.init import Init, init_name
from fxgrow.labels.propagate import named_tensors
from fxgrow.layout import Lookup, grow_tensor
from fxgrow.plan.schema import Plan
from fxgrow.plan.surgery import ModuleEdit, SizeEdit
from fxgrow.rearrange import names_after, rearranged
from fxgrow.standin import stand_in


def check_source(plan: Plan, tensors: Mapping[str, Tensor], *, dtypes: bool = True) -> None:
    """Refuse a plan on anything but the network it was made for.

    Args:
        plan: the plan.
        tensors: the parameters and buffers of the network at hand.
        dtypes: compare dtypes too.

    Raises:
        PlanError: a name, a shape or a dtype differs; the first difference is named.
    """
    found = fingerprint(tensors)
    way_out = "Make a plan for this network: fxgrow widen SOURCE --dry-run --plan PLAN.json."
    for name in sorted(plan.source.keys() | found.keys()):
        expected, present = plan.source.get(name), found.get(name)
        if expected is None or present is None:
            which = "has no" if present is None else "has an unexpected"
            raise PlanError(
                f"the plan is for another network: this one {which} {name}.",
                name=name,
                way_out=way_out,
            )
        if expected[0] != present[0] or (dtypes and expected[1] != present[1]):
            raise PlanError(
                f"the plan is for another network: {name} is {present[1]}{list(present[0])} here, "
                f"{expected[1]}{list(expected[0])} in the plan.",
                name=name,
                way_out=way_out,
            )


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every tensor by name: what a plan is made for."""
    return {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }


def new_tensors(
    plan: Plan,
    lookup: Lookup,
    init: Init | None = None,
    like: Mapping[str, Tensor] | None = None,
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
        kept, own = replace(step, tensors=held), _own(init, step, plan)
        grown = dict(new_tensors(kept, found.__getitem__, own, like))
        like = None if like is None else apply_to_state_dict(step, like, own)
        found = {
            name: grown[step.aliases.get(name, name)]
            if new or step.aliases.get(name, name) in grown
            else found[before]
            for name, before, new in names_after(found, step)
        }
    return found


def _own(init: Init | None, step: Plan, plan: Plan) -> Init | None:
    """Return the init of a step: one that is given is for the last, and for those that name it."""
    meant = init is not None and step.request.init in (plan.request.init, init_name(init))
    return init if meant else None


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
        PlanError: the plan is for another network.
    """
    followed = None if like is None else named_tensors(like)
    return _grown_module(plan, model, init, dtypes=True, like=followed)


def grow_float64(plan: Plan, model: nn.Module, init: Init | None = None) -> nn.Module:
    """Return a grown copy of a float64 copy of the network the plan was made for.

    Raises:
        PlanError: names or shapes differ from the plan's; dtypes are not compared.
    """
    return _grown_module(plan, model, init, dtypes=False)


def _grown_module(
    plan: Plan,
    model: nn.Module,
    init: Init | None,
    *,
    dtypes: bool,
    like: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    for step in plan.steps:
        if step.names:
            raise PlanError(
                f"the plan makes the tensors of {step.request.target}, and no module.",
                name=step.request.target,
                way_out="Carry it out as a conversion: fxgrow convert, fxgrow.convert.",
            )
        tensors, own = named_tensors(model), _own(init, step, plan)
        check_source(step, tensors, dtypes=dtypes)
        grown = dict(new_tensors(step, tensors.__getitem__, own, like))
        like = None if like is None else apply_to_state_dict(step, like, own)
        model = reshaped(step, model, grown)
    return model


def meta_module(plan: Plan, model: nn.Module) -> nn.Module:
    """Return what a plan makes of a network, on the meta device: names, shapes and code alone.

    Raises:
        PlanError: the plan is for another network.
    """
    check_source(plan.steps[0], named_tensors(model))
    return _grown_module(plan, stand_in(model), None, dtypes=True)


def reshaped(plan: Plan, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module with other tensors, and all else that one step changes.

    Args:
        plan: the step.
        model: the network it was made for; only read.
        tensors: the new tensor of every name that it edits.
    """
    grown = stand_in(rearranged(model, plan.rearrangements), tensors)
    sizes: dict[str, list[SizeEdit]] = {}
    for edit in plan.sizes:
        sizes.setdefault(edit.module, []).append(edit)
    graphs = {name: sized_graph(grown.get_submodule(name), sizes[name]) for name in sizes}
    set_attributes(grown, plan.modules)
    for name, graph in graphs.items():
        grown = with_part(grown, name, graph_module(grown.get_submodule(name), graph))
    return insert_multipliers(grown, plan.multipliers) if plan.multipliers else grown


def set_attributes(model: nn.Module, edits: tuple[ModuleEdit, ...], *, back: bool = False) -> None:
    """Set the attributes of a module tree to their new values, or back to the old, in place."""
    for edit in edits:
        *path, name = edit.attribute.split(".")
        owner: object = model.get_submodule(edit.module)
        for step in path:
            owner = getattr(owner, step)
        value = edit.before if back else edit.after
        is_list = isinstance(value, tuple) and isinstance(getattr(owner, name), list)
        setattr(owner, name, list(value) if is_list else value)  # type: ignore[arg-type]
