"""What no output depends on: attributes of modules as a plan sets them, and flags as they were.

What a layer says of its sizes is read by people, by ``repr`` and by what is exported or pickled,
and a parameter that lost its flag is not trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NoReturn

from torch import nn

from fxgrow.errors import PlanError, VerificationError
from fxgrow.grow.sizes.attributes import sizes_told
from fxgrow.modules.tensors import layer_of, named_tensors
from fxgrow.plan.edits import ModuleEdit
from fxgrow.plan.names import tensor_origins
from fxgrow.plan.schema import Plan


def check_attributes(plan: Plan, grown: nn.Module) -> None:
    """Return if the modules of a grown network have the attributes that a plan gives them.

    Those that a later step sets again are looked at there, and those of a step before new modules
    came in not at all. Modules that became graphs keep no attributes of their own.

    Args:
        plan: the plan.
        grown: the network that it made.

    Raises:
        VerificationError: an attribute has another value; the message names it and the module.
    """
    modules = dict(grown.named_modules(remove_duplicate=False))
    later: set[tuple[str, str]] = set()
    for step in reversed(plan.steps):
        last = {(edit.module, edit.attribute): edit for edit in step.modules}
        for place, edit in last.items():  # the last one counts, as for the executor
            if place not in later:
                _check(edit, modules)
        later.update((edit.module, edit.attribute) for edit in step.modules)
        if step.rearrangements:  # modules may have had other names before
            return


def _check(edit: ModuleEdit, modules: Mapping[str, nn.Module]) -> None:
    """Compare one attribute with its new value, where there is such an attribute.

    Raises:
        VerificationError: it has another value.
    """
    holder: object = modules.get(edit.module)
    *path, name = edit.attribute.split(".")
    for part in path:
        holder = getattr(holder, part, None)
    present = vars(holder).get(name) if hasattr(holder, "__dict__") else None
    if present is None or _is_set(present, edit):
        return
    where = f"{edit.module}.{edit.attribute}" if edit.module else edit.attribute
    _refuse(edit.module, f"{where} is {present!r} and not {edit.after!r}, as the plan sets it")


def _is_set(present: object, edit: ModuleEdit) -> bool:
    """Return whether an attribute has its new value; of a tuple, in the parts that an edit sets."""
    before, after = edit.before, edit.after
    if isinstance(present, (list, tuple)) and isinstance(after, tuple):
        if not isinstance(before, tuple) or len(before) != len(after):
            return tuple(present) == after
        parts = zip(present, before, after, strict=False)
        return len(present) == len(after) and all(x == new for x, old, new in parts if old != new)
    return bool(present == after)


def check_fit(plan: Plan, before: nn.Module, grown: nn.Module) -> None:
    """Return if what modules of a grown network say of their sizes is what their tensors have.

    Classes of which one module said another thing before are left out, and so are modules that
    only share a tensor that is another's, of which plans tell nothing, and networks of another
    architecture, which the plan makes no modules of.

    Args:
        plan: the plan, which may have been edited.
        before: the network that it was made for.
        grown: the network that it made.

    Raises:
        PlanError: an attribute does not fit; the message names it and the module.
    """
    if any(step.names for step in plan.steps):
        return
    free = {type(module) for module in before.modules() if any(_unfit(module))}
    tied = {layer_of(name) for step in plan.steps for name in step.aliases}
    set_ = {edit.module for step in plan.steps for edit in step.modules}
    for name, module in grown.named_modules():
        if type(module) in free or name in tied - set_:
            continue
        for attribute, present, wanted in _unfit(module):
            where = f"{name}.{attribute}" if name else attribute
            raise PlanError(
                f"the plan makes {where} {present!r}, and its tensors make it {wanted!r}.",
                name=name,
                way_out="The plan was edited, or is for another network: make it anew.",
            )


def _unfit(module: nn.Module) -> Iterator[tuple[str, object, object]]:
    """Yield each attribute that repeats a size of a module's tensors otherwise than it is."""
    for attribute, wanted in sizes_told(module).items():
        present = getattr(module, attribute, wanted)
        if present != wanted:
            yield attribute, present, wanted


def check_flags(plan: Plan, before: nn.Module, grown: nn.Module) -> None:
    """Return if parameters and modules have the flags of those that they come from.

    A network of another architecture has flags of its own. Modules that a step renames are not
    compared.

    Args:
        plan: the plan.
        before: the network that it was made for.
        grown: the network that it made.

    Raises:
        VerificationError: a flag differs; the message names the parameter or the module.
    """
    if any(step.names for step in plan.steps):
        return
    old, new = named_tensors(before), named_tensors(grown)
    for name, origin in tensor_origins(old, plan.steps).items():
        if name not in new:
            continue
        was, now = old[origin.name], new[name]
        if isinstance(was, nn.Parameter) != isinstance(now, nn.Parameter):
            kind = "no parameter any more" if isinstance(was, nn.Parameter) else "a parameter"
            _refuse(name, f"{name} has become {kind}")
        if was.requires_grad != now.requires_grad:
            _refuse(name, f"requires_grad of {name} has become {now.requires_grad}")
    if any(step.rearrangements for step in plan.steps):
        return
    modules = dict(before.named_modules())
    for name, module in grown.named_modules():
        former = modules.get(name)
        if former is None or type(former) is not type(module):  # what a graph is made of
            continue
        if former.training != module.training:
            _refuse(name, f"training of {name or 'the network'} has become {module.training}")


def _refuse(name: str, how: str) -> NoReturn:
    """Refuse a grown network.

    Raises:
        VerificationError: always.
    """
    raise VerificationError(
        f"{how}. That is a fault of fxgrow, or of what changed the network since: please report "
        "it.",
        name=name,
    )
