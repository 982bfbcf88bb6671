"""Plain chains: a unit of a layer, a norm and an activation that begins as the identity.

Net2DeeperNet (Chen et al. 2016): the new layer passes on what it gets, which keeps the
function if the activation after it changes nothing that came out of one before, as a ReLU does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from fxgrow.errors import PlanError
from fxgrow.grow.identity.concrete_run import (
    ModuleCall,
    Recording,
    argument,
    norms_among,
    run_concretely,
)
from fxgrow.grow.identity.new_block import Filling, NewBlock, of_norms, passes
from fxgrow.grow.identity.stages import Stage
from fxgrow.plan.edits import ModuleEdit
from fxgrow.plan.init import identity_


def find_unit(model: nn.Module, stage: Stage, before: Recording) -> tuple[Stage, tuple[int, ...]]:
    """Return the unit that a stage names a module of: a layer and what follows it.

    What follows belongs to it up to the next layer, as far as it keeps the shape (a norm, an
    activation); dropout is left out.

    Returns:
        The stage with new modules after the unit, and the places of the unit's modules.

    Raises:
        PlanError: no layer is there.
    """
    children = [model.get_submodule(stage.child(place)) for place in range(len(stage.names))]
    layers = [place for place, child in enumerate(children) if _is_layer(child)]
    first = next((place for place in reversed(layers) if place <= stage.after), None)
    if first is None or not isinstance(model.get_submodule(stage.container), nn.Sequential):
        raise PlanError(
            f"{stage.key} is no layer in a plain chain of layers, one after the other in an "
            "nn.Sequential.",
            name=stage.key,
            way_out="Name a convolution or linear layer in one, such as features.3; for residual "
            "blocks, use r2deeper or zero_last.",
        )
    unit = [first]
    for place in range(first + 1, len(children)):
        if not _follows(children[place], before.calls[stage.child(place)]):
            break
        unit.append(place)
    while isinstance(children[unit[-1]], _DropoutNd):
        unit.pop()
    plain = tuple(place for place in unit if not isinstance(children[place], _DropoutNd))
    return replace(stage, after=unit[-1]), plain


def _follows(module: nn.Module, calls: Sequence[ModuleCall]) -> bool:
    """Return whether a module can belong to the layer before it: it has none, and keeps shapes."""
    kept = all(call.inputs and call.inputs[0].shape == call.outputs[0].shape for call in calls)
    return kept and not any(map(_is_layer, module.modules()))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd))


def reshaped_layer(module: nn.Module, name: str) -> tuple[dict[str, tuple[int, ...]], list[Any]]:
    """Return the new shapes of a layer's tensors and the edits that let it give what it takes.

    Args:
        module: the layer that is copied.
        name: of the new one.

    Raises:
        PlanError: no kernel of the layer's size passes on what it gets at the same size.
    """
    if isinstance(module, nn.Linear):
        width = module.out_features
        edit = ModuleEdit(name, "in_features", module.in_features, width)
        return {"weight": (width, width)}, _changes([edit])
    if not isinstance(module, _ConvNd):
        return {}, []
    kernel = tuple(module.kernel_size)
    if module.transposed or any(size % 2 == 0 for size in kernel):
        kind = "a transposed convolution" if module.transposed else f"of the even size {kernel}"
        raise PlanError(f"{name} would be {kind}, which has no middle to pass its input through.")
    width = module.out_channels
    groups = module.groups if module.in_channels == width else 1
    padding = tuple(d * (size - 1) // 2 for d, size in zip(module.dilation, kernel, strict=True))
    if module.padding_mode != "zeros" and module.padding not in (padding, "same"):
        raise PlanError(f"{name} would have to pad by {padding} in mode {module.padding_mode}.")
    edits = [
        ModuleEdit(name, "in_channels", module.in_channels, width),
        ModuleEdit(name, "groups", module.groups, groups),
        ModuleEdit(name, "stride", tuple(module.stride), (1,) * len(kernel)),
    ]
    if module.padding != "same":
        edits.append(ModuleEdit(name, "padding", module.padding, padding))
    return {"weight": (width, width // groups, *kernel)}, _changes(edits)


def _changes(edits: list[ModuleEdit]) -> list[ModuleEdit]:
    return [edit for edit in edits if edit.before != edit.after]


def net2deeper(block: NewBlock) -> Filling:
    """A layer that passes on what it gets, and a batch norm that is the identity in eval mode.

    A batch norm with mean 0, variance 1 and weight √(1 + eps) changes nothing in eval mode. In
    train mode it normalises by the statistics of the batch, as any does.
    """
    norms = {  # those with statistics of their own
        weight: eps
        for op, weight, eps in norms_among(block.runs[0].inside(block.modules))
        if argument(op, "running_var") is not None
    }
    drawn = {name for name, _ in block.fills(("draw",))}
    weights = {name for name in drawn if block.tensors[name].ndim > 1}
    numbers = {**of_norms(block), **dict.fromkeys(drawn - weights, 0.0)}
    numbers |= {name: math.sqrt(1 + eps) for name, eps in norms.items()}
    constants: dict[str, float | Tensor] = {**numbers}
    for name in weights:
        constants[name] = identity_(torch.zeros(block.tensors[name].shape, dtype=torch.float64))
    if not passes(block, block.runs[0], constants):
        raise PlanError(_obstacle(block, constants))
    trained = block.runs[1:]  # none where the network does not run in train mode
    kept = not norms or (bool(trained) and all(passes(block, run, constants) for run in trained))
    return Filling(
        numbers,
        identities=frozenset(weights),
        zeroed=tuple(sorted(weights)),
        notes=[] if kept else ["in train mode its batch norm normalises by the batch's statistics"],
        in_training="exact" if kept else "no",
    )


def _obstacle(block: NewBlock, constants: Mapping[str, float | Tensor]) -> str:
    """Return what in a unit does not pass on what it gets."""
    recording = block.runs[0]
    found = run_concretely(recording, block.modules, constants)
    (_, entry), *_ = block.exits(recording)
    for op in recording.inside(block.modules):
        if not op.inputs or any(value.is_weight for value in op.outputs) or op.target.is_view:
            continue
        if not any(found.same_as(value, entry, flat=True) for value in op.outputs):
            return (
                f"{op.name} at {op.module} does not keep what comes out of the layer before it: "
                "it is not idempotent"
            )
    return "it does not give what it gets"
