"""Give what reads a tied parameter a copy of its own, so that either side can grow by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.scope import follow
from fxgrow.errors import PlanError
from fxgrow.modules.standin import stand_in
from fxgrow.modules.tensors import aliases_of, named_tensors
from fxgrow.plan.edits import ModuleEdit, TensorEdit
from fxgrow.plan.fingerprint import fingerprint
from fxgrow.plan.requests import Untie
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import Scope
from fxgrow.version import __version__

_FLAG = "tie_word_embeddings"  # of the configurations of transformers


def plan_untied(
    model: nn.Module, example_inputs: object, module: str, analyses: Sequence[Analysis]
) -> Plan:
    """Return a plan that unties every parameter that both writes and reads the same channels.

    What it makes computes the same as before. The first of the parameter's names keeps it, and the
    names of the other side get a copy.

    Args:
        model: the network, or one of its shapes on the meta device.
        example_inputs: as for :func:`fxgrow.channels.scope.follow`.
        module: likewise.
        analyses: what was found in the network.

    Raises:
        PlanError: nothing is tied so, or the code reads the parameter by the name by which it
            writes it, so that no other can be put in its place.
    """
    tensors = named_tensors(model)
    aliases = aliases_of(tensors)
    tied = _tied(analyses)
    if not tied:
        raise PlanError(
            "no parameter both writes and reads the same channels, so nothing is tied.",
            way_out="Leave untie out.",
        )
    found: dict[str, str] = {}
    for first, dim in tied.items():
        names = [first, *(name for name, known in aliases.items() if known == first)]
        readers = _readers(model, example_inputs, module, names, dim)
        kept_reads = first in readers
        moved = [name for name in names if (name in readers) is not kept_reads]
        found[moved[0]] = first
        aliases = {name: known for name, known in aliases.items() if name != moved[0]}
        aliases |= dict.fromkeys(moved[1:], moved[0])
    count = sum(p.numel() for p in model.parameters())
    more = sum(tensors[name].numel() for name in found)
    flops = sum(analysis.flops for analysis in analyses)
    return Plan(
        request=Untie(module=module),
        scopes=tuple(Scope.of(analysis.traced) for analysis in analyses),
        source=fingerprint(model, ()),
        tensors={name: _copy(tensors[first], first) for name, first in found.items()},
        untied=found,
        aliases=aliases,
        modules=tuple(_flags(model)),
        parameters=(count, count + more),
        flops=(flops, flops),
        fxgrow=__version__,
    )


def _tied(analyses: Sequence[Analysis]) -> dict[str, int]:
    """Return the tensors that both write and read channels by name, each with the dim of these."""
    found: dict[str, int] = {}
    for analysis in analyses:
        dims = {axis.start: axis.dim for axis in analysis.channels.axes}
        for labels, pin in analysis.channels.tied:
            found.setdefault(pin.details[0], dims[int(labels[0])])
    return found


def _copy(tensor: Tensor, source: str) -> TensorEdit:
    """Return the edit that makes a copy of another tensor."""
    return TensorEdit(tuple(tensor.shape), tuple(tensor.shape), source=source)


def _readers(
    model: nn.Module, example_inputs: object, module: str, names: Sequence[str], dim: int
) -> set[str]:
    """Return those of a parameter's names by which it reads its channels.

    Raises:
        PlanError: by all of them, or by none, or by one by which it writes them too.
    """
    analyses, _ = follow(_apart(model, names), example_inputs, module)
    roles: dict[str, str] = {}
    for analysis in analyses:
        for axis, role in zip(analysis.channels.axes, analysis.channels.roles, strict=True):
            if axis.tensor in names and axis.dim == dim:
                roles[axis.tensor] = role
    still = {*names} & _tied(analyses).keys()
    readers = {name for name, role in roles.items() if role == "reader"}
    if still or not readers or len(readers) == len(names):
        raise PlanError(
            f"{names[0]} cannot be untied: the code reads it by the name by which it writes it, so "
            "that no copy can be put in its place.",
            name=names[0],
            way_out="Let a layer of its own read (nn.Linear, with the same weight).",
        )
    return readers


def _apart(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a network of the same shapes with a parameter of its own under each of some names."""
    kept = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    meta = {name: x.to("meta") for name, x in named_tensors(model).items() if name not in kept}
    copy = stand_in(model, meta)
    for name in names[1:]:
        owner, _, local = name.rpartition(".")
        held = copy.get_submodule(owner)._parameters
        present = held[local]
        if present is not None:
            held[local] = nn.Parameter(present.detach().clone(), present.requires_grad)
    return copy


def _flags(model: nn.Module) -> Iterator[ModuleEdit]:
    """Yield the flags of configurations that would have the class tie what is untied."""
    seen: set[int] = set()
    for name, part in model.named_modules():
        config = vars(part).get("config")
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        if vars(config).get(_FLAG) is True:
            yield ModuleEdit(name, f"config.{_FLAG}", True, False)
