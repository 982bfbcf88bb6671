"""Records: what rides beside weights, and the module that it rebuilds for them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxgrow.apply.module import remade
from fxgrow.errors import SourceError, listed, shown
from fxgrow.files.checkpoint import Source
from fxgrow.files.comparison import structure_difference
from fxgrow.modules.architectures import Architecture
from fxgrow.modules.tensors import aliases_of, lasting_tensors
from fxgrow.modules.uninitialised import Limit
from fxgrow.plan.schema import MOST_STEPS, Plan
from fxgrow.version import __version__

RECORD_SCHEMA = 1


def rebuild(
    architecture: Architecture,
    plans: Sequence[Plan],
    limit: Limit | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Return the module that an architecture became; its weights are uninitialised.

    Args:
        architecture: what it was.
        plans: the surgeries since, oldest first.
        limit: how much building it may take; None as for :meth:`Architecture.build`.
        device: ``meta`` for names, shapes and attributes alone.

    Raises:
        SourceError: the architecture cannot be built.
        PlanError: the plans do not fit it.
    """
    model = architecture.build(device, limit)
    for plan in plans:
        model = remade(plan, model)
    return model.eval()


def rebuilt_difference(architecture: Architecture, plans: Sequence[Plan], model: nn.Module) -> str:
    """Return how what an architecture became differs from a module, its values apart, or "".

    Args:
        architecture: what it was.
        plans: the surgeries since, oldest first.
        model: the module that it should be like: in names, shapes, classes and plain attributes.

    Raises:
        SourceError, PlanError: as for :func:`rebuild`.
    """
    again = rebuild(architecture, plans, device="meta")
    have, want = (
        {name: t.shape for name, t in lasting_tensors(each).items()} for each in (again, model)
    )
    if have != want:
        return f"another {next(n for n in (*want, *have) if have.get(n) != want.get(n))}"
    return structure_difference(again, model)


def put_weights(model: nn.Module, source: Source, architecture: Architecture) -> None:
    """Load the file's weights into a module built for them.

    Raises:
        SourceError: names or shapes differ.
    """
    weights = OrderedDict(source.state_dict)
    # load_state_dict notes in the metadata that it assigned, and whoever loads the file that these
    # are written to would assign too, behind the back of an optimizer.
    vars(weights)["_metadata"] = copy.deepcopy(getattr(source.state_dict, "_metadata", None))
    ties = aliases_of(dict(model.named_parameters(remove_duplicate=False)))
    try:
        result = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        wanted = model.state_dict().keys()
        differ = [n for n in (*(wanted - weights.keys()), *(weights.keys() - wanted))
                 if not n.endswith("num_batches_tracked")]  # fmt: skip
        if differ:  # then it is another one, and not its last layer alone
            how = (
                f"{len(differ)} names of tensors differ ({listed(sorted(differ))}), and shapes do."
            )
            raise _misfit(source, architecture, how, min(differ), alike=False) from error
        last = str(error).strip().splitlines()[-1].strip()
        raise _misfit(source, architecture, last, str(source.path)) from error
    missing = [n for n in result.missing_keys if not n.endswith("num_batches_tracked")]
    if wrong := missing or result.unexpected_keys:
        what = "miss" if missing else "have an unexpected"
        raise _misfit(source, architecture, f"they {what} {listed(wrong)}.", wrong[0])
    for name, same in ties.items():
        one, other = model.get_parameter(same), model.get_parameter(name)
        if one.data_ptr() == other.data_ptr() or other.is_meta:
            owner, _, local = name.rpartition(".")
            setattr(model.get_submodule(owner), local, one)


def _misfit(
    source: Source, architecture: Architecture, how: str, name: str, *, alike: bool = True
) -> SourceError:
    under = f", without the prefix {shown(source.prefix, 80)!r}," if source.prefix else ""
    named = architecture.origin == ""
    return SourceError(
        f"the weights in {source.path}{under} do not fit {architecture}: {how}",
        name=name,
        way_out="Name the architecture with --arch (and --arch-arg)." if not named
        else "Name another architecture with --arch." if not alike
        else "Name another architecture with --arch, or its arguments with --arch-arg, such as "
        "num_classes=10.",
    )  # fmt: skip


def record_of(architecture: Architecture | None, plans: Sequence[Plan]) -> dict[str, Any]:
    """Return what is written beside weights.

    Raises:
        SourceError: the network has been through more than a record can hold.
    """
    if len(plans) > MOST_STEPS:
        raise SourceError(
            f"this network has grown {len(plans)} times, and a record holds {MOST_STEPS}.",
            way_out="Convert it to an architecture of its size: fxgrow convert.",
        )
    return {
        "schema": RECORD_SCHEMA,
        "fxgrow": __version__,
        "architecture": architecture.to_dict() if architecture else None,
        "plans": [plan.to_dict() for plan in plans],
    }
