"""Plan how the tensors of one architecture become those of a larger one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from fxgrow.channels.analysis import Analysis
from fxgrow.errors import PlanError
from fxgrow.grow.convert.alignment import Alignment, setting_differences
from fxgrow.grow.convert.concatenated import added_places
from fxgrow.grow.convert.fresh import Fresh, bridges, units_of
from fxgrow.grow.convert.regroup import Regrouping, regrouped, regrouped_towards
from fxgrow.grow.convert.target import towards
from fxgrow.grow.identity.stages import child_of
from fxgrow.grow.widen.planner import attempts_for, plan_of
from fxgrow.labels.space import Normed
from fxgrow.modules.tensors import aliases_of, named_tensors
from fxgrow.plan.edits import AxisEdit, Run, TensorEdit
from fxgrow.plan.requests import Convert, Widen
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import BlockPlan, KernelPlan


@dataclass(frozen=True)
class Possible:
    """An architecture that a source might become.

    Attributes:
        name: of the architecture.
        parameters: how many it has.
        reason: why the source cannot become it; "" if it can.
    """

    name: str
    parameters: int
    reason: str = ""


def plan_conversion(
    source: Analysis, target: Analysis, alignment: Alignment, request: Convert
) -> Plan:
    """Return the plan that turns the tensors of one network into those of a larger one.

    Args:
        source: of the network at hand.
        target: of the larger one.
        alignment: of their modules.
        request: the pairing, the init and the seed.

    Raises:
        PlanError: that cannot be done exactly; the first thing that stands in the way is named.
    """
    old, new = source.traced.standin, target.traced.standin
    names = alignment.tensors(named_tensors(old), named_tensors(new))
    for text in setting_differences(old, new, alignment.modules):
        raise PlanError(
            f"{text}, so that the target computes something else.", name=text.split()[0]
        )
    regrouping = regrouped_towards(source, new, alignment.modules)
    source = replace(source, channels=regrouped(source.channels, regrouping))
    fresh, blocks = _fresh_edits(alignment, source, target)
    widening = Widen({}, pairing=request.pairing, seed=request.seed)  # the target tells the widths
    added = added_places(source, target, alignment)
    found = towards(attempts_for(source, widening), target, names, bridges(fresh), added)
    made = plan_of(source, widening, found, lambda name: 1.0)
    made = _renamed(made, names, fresh, regrouping, target)
    kernels = tuple(_kernels(alignment, old, new))
    return replace(made, request=request, blocks=blocks, kernels=kernels)


def _kernels(alignment: Alignment, source: nn.Module, target: nn.Module) -> Iterator[KernelPlan]:
    """Yield the layers whose kernels are larger in the target."""
    for after, before in alignment.modules.items():
        old, new = source.get_submodule(before), target.get_submodule(after)
        if isinstance(old, _ConvNd) and isinstance(new, _ConvNd):
            small, large = tuple(old.kernel_size), tuple(new.kernel_size)
            # Holds numbers where padding is "same", each twice and the last dim first.
            paddings = (
                tuple(old._reversed_padding_repeated_twice[::-2]),
                tuple(new._reversed_padding_repeated_twice[::-2]),
            )
            if small != large:
                yield KernelPlan(after, small, large, paddings, "exact")


def _fresh_edits(
    alignment: Alignment, source: Analysis, target: Analysis
) -> tuple[dict[str, TensorEdit], tuple[BlockPlan, ...]]:
    """Return the edits of all tensors that the target has beyond the source, block by block."""
    old, network = named_tensors(source.traced.standin), target.traced.standin
    found: dict[str, TensorEdit] = {}
    blocks: list[BlockPlan] = []
    fresh = Fresh(target, units_of(network, alignment.fresh), old)
    for unit in fresh.units:
        weighty = [n for n in unit if any(True for _ in network.get_submodule(n).parameters())]
        edits, block = fresh.edits(unit, {n: _like(alignment, network, n) for n in weighty})
        found |= edits
        blocks.append(block)
    return found, tuple(blocks)


def _like(alignment: Alignment, target: nn.Module, module: str) -> str:
    """Return the old module in the same list as a new one that is most like it: the last."""
    parent = module.rpartition(".")[0]
    kind = type(target.get_submodule(module))
    siblings = [
        alignment.modules[name]
        for child, sibling in target.get_submodule(parent).named_children()
        if type(sibling) is kind and (name := child_of(parent, child)) in alignment.modules
    ]
    if not siblings:
        raise PlanError(f"the source has nothing like the target's {module}.", name=module)
    return siblings[-1]


def _renamed(
    made: Plan,
    names: Mapping[str, str],
    fresh: Mapping[str, TensorEdit],
    regrouping: Regrouping,
    target: Analysis,
) -> Plan:
    """Return a plan whose tensors have the names of the target, with those that are new."""
    edits: dict[str, TensorEdit] = {}
    tensors = named_tensors(target.traced.standin)
    aliases = aliases_of(tensors)
    became = {before: name for name, before in names.items() if name not in aliases}
    for name, tensor in tensors.items():
        if name in aliases:
            continue
        if name in fresh:
            edits[name] = fresh[name]
        elif name in names:
            before = names[name]
            shape = made.source[before][0]
            edit = made.tensors.get(before) or TensorEdit(shape, shape)
            edit = replace(edit, groups=regrouping.get(before, edit.groups))
            idle = name in target.traced.unused
            kernel = _kernel_axes(name, edit, tuple(tensor.shape), idle=idle)
            if kernel or before in made.tensors or before in regrouping:
                edits[name] = replace(
                    edit,
                    new_shape=tuple(tensor.shape),
                    axes=(*edit.axes, *kernel),
                    source="" if before == name else before,
                    normed=_renamed_parts(edit.normed, became),
                )
    batch = target.traced.input_shapes[0][0] if target.traced.inferred else 1
    return replace(
        made,
        tensors=edits,
        aliases=aliases,
        names={name: names.get(name, "") for name in tensors},
        parameters=(made.parameters[0], sum(p.numel() for p in target.traced.standin.parameters())),
        flops=(made.flops[0], target.tape.flops // batch),
    )


def _renamed_parts(parts: Normed | None, names: Mapping[str, str]) -> Normed | None:
    """Return what a weight is made of under the names of the target."""
    if parts is None:
        return None
    return replace(parts, direction=names[parts.direction], length=names[parts.length])


def _kernel_axes(
    name: str, edit: TensorEdit, shape: tuple[int, ...], *, idle: bool
) -> tuple[AxisEdit, ...]:
    """Return the edits of a kernel's dims: zeros around what was there.

    Raises:
        PlanError: another dim differs; where it is ``idle``, because no run used the tensor.
    """
    grown = {axis.dim for axis in edit.axes}
    if edit.groups[0] != edit.groups[1]:
        grown.add(1)  # the columns of a group
    found = []
    for dim, (before, after) in enumerate(zip(edit.shape, shape, strict=True)):
        if dim in grown or before == after:
            continue
        if dim < 2 or (after - before) % 2:
            text = f"dim {dim} of {name} has size {before}, which cannot become {after}"
            if idle:
                why = ": it takes no part in the run on these inputs, so it is not followed."
                raise PlanError(text + why, name=name, way_out="Give example inputs that use it.")
            raise PlanError(f"{text} so that nothing changes.", name=name)
        margin = Run("zero", 0, (after - before) // 2)
        found.append(AxisEdit(dim, "kernel", 1, (margin, Run("old", 0, before), margin)))
    return tuple(found)
