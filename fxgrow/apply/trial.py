"""All that planners use of the executor: a change is tried on a stand-in before it is planned.

Whether a network runs with new blocks, kernels or sizes, and what its loss is then, is found out by
making the change. The executor makes it, so that what is tried is what is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fxgrow.apply.module import apply_to_module as apply_to_module
from fxgrow.apply.module import set_attributes as set_attributes
from fxgrow.apply.rearrange import rearranged
from fxgrow.modules.standin import stand_in
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import ModuleEdit, Rearrangement


def tried(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    modules: Sequence[ModuleEdit],
    rearrangements: Sequence[Rearrangement] = (),
) -> nn.Module:
    """Return a copy of a stand-in with some changes.

    Args:
        model: a network on the meta device; only read.
        shapes: the new shapes of tensors, by their names in the copy.
        modules: attributes that change.
        rearrangements: modules that get new ones.

    Raises:
        PlanError: the network cannot be changed so.
    """
    view, views = rearranged(model, rearrangements)
    tensors = named_tensors(view)
    fresh = {name: tensors[name].new_empty(shapes[name]) for name in shapes}
    copied = stand_in(view, fresh, views=views)
    set_attributes(copied, tuple(modules), of=model)
    return copied
