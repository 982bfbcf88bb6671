"""Leave out the last blocks of a list: what a network was before it became deeper."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from fxgrow.grow.deepen.depth import attribute_edits
from fxgrow.grow.identity.stages import Stage
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import ModuleEdit
from fxgrow.plan.schema import Plan


@contextlib.contextmanager
def as_before(networks: Sequence[nn.Module], plans: Sequence[Plan]) -> Iterator[None]:
    """Leave out what blocks networks have that growths are yet to bring, in place.

    A configuration that was saved with a grown network tells the number of blocks after growth.

    Args:
        networks: that began so, or one that is as deep already, and copies of it.
        plans: the growths, oldest first.
    """
    undo = [
        shorten_(one, name, count)
        for one in networks
        for name, count in _too_long(one, plans).items()
    ]
    try:
        yield
    except BaseException:
        for back in undo:
            back()
        raise


def _too_long(network: nn.Module, plans: Sequence[Plan]) -> dict[str, int]:
    """Return how many blocks lists had before growth, by their names, where there are more."""
    found: dict[str, int] = {}
    steps = [step for plan in plans for step in plan.steps]
    for name in (key for step in steps for key in getattr(step.request, "blocks", {})):
        for within in (name, name.rpartition(".")[0]):  # a list, or a block in one
            held = module_at(network, within)
            if not isinstance(held, (nn.Sequential, nn.ModuleList)):
                continue
            count = len(held)
            prefix = f"{within}." if within else ""  # the network may be a list itself
            while count and _is_unknown(f"{prefix}{count - 1}.", held[count - 1], steps[0].source):
                count -= 1
            if 0 < count < len(held):
                found[within] = count
    return found


def module_at(network: nn.Module, name: str) -> nn.Module | None:
    """Return a module by its name, None if there is none."""
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def _is_unknown(prefix: str, block: nn.Module, source: Collection[str]) -> bool:
    """Return whether a block has tensors, and none that a plan for the network knows."""
    names = [prefix + name for name in named_tensors(block)]
    return bool(names) and not any(name in source for name in names)


def shorten_(network: nn.Module, name: str, count: int) -> Callable[[], None]:
    """Leave the first blocks of a list, and let attributes tell their number.

    Args:
        network: the network, which changes in place.
        name: of the list.
        count: how many are left.

    Returns:
        What undoes it.
    """
    undo = contextlib.ExitStack()
    held = network.get_submodule(name)
    names = tuple(held._modules)
    # What would follow a further block follows the ones that are left, too.
    longer = Stage(name, name, names, len(names) - 1, 1)
    edits = [*attribute_edits(network, longer, (len(names) - 1,))]
    undo.callback(held._modules.update, dict(held._modules))
    for local in names[count:]:
        del held._modules[local]
    inside = f"{name}." if name else ""
    for edit in edits:
        if edit.module != name and not edit.module.startswith(inside):
            undo.callback(_set_depth(network, edit, len(names), count))
    return undo.close


def _set_depth(network: nn.Module, edit: ModuleEdit, have: int, count: int) -> Callable[[], None]:
    """Set an attribute that tells a number of blocks, or has an entry for each.

    Returns:
        What sets it back.
    """
    owner: Any = network.get_submodule(edit.module)
    *path, attribute = edit.attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    present = getattr(owner, attribute)
    if isinstance(present, int):
        setattr(owner, attribute, count)
    elif isinstance(present, (list, tuple)) and len(present) == have:
        setattr(owner, attribute, present[:count])
    elif isinstance(present, (list, tuple)) and isinstance(edit.after, tuple):
        pairs = zip(present, edit.after, strict=True)
        setattr(owner, attribute, type(present)(count if a != b else a for a, b in pairs))
    return partial(setattr, owner, attribute, present)
