"""Runs of a network for comparison: without chance, and with doubles in place of what it takes."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxgrow.errors import VerificationError
from fxgrow.modules.calling import Arguments, call, map_tensors, results_in, tensors_in
from fxgrow.modules.draws import same_chance
from fxgrow.modules.expectation import Expectation
from fxgrow.modules.standin import first_line, set_training, stand_in
from fxgrow.verification.choices import Choosing

Mode = Literal["eval", "train"]
FAULTS = (Exception,)  # what a user's forward or backward may raise


def outputs_of(
    model: nn.Module,
    arguments: Arguments,
    mode: Mode,
    without_chance: Expectation,
    *,
    choosing: Choosing | None = None,
    grown: bool = False,
) -> list[Tensor]:
    """Return the output tensors of a network in a mode; dropout is off in both.

    Other noise is drawn, the same each time, and so is what no operation shows.

    Args:
        model: the network.
        arguments: what it is called with.
        mode: the mode.
        without_chance: the run that it is a part of.
        choosing: notes its choices, or makes those of another run.
        grown: another network runs on these arguments, and this one must.

    Raises:
        NoLongerRuns: it does not run, and must.
        DoesNotRunError: it does not run; a batch norm in train mode needs more than one value.
    """
    set_mode(model, mode)
    chance = same_chance(without_chance.chance)
    try:
        with torch.no_grad(), chance as common, choosing or nullcontext(), without_chance:
            arguments = map_tensors(Tensor.clone, arguments)  # forwards may write into them
            found = [tensor.clone() for tensor in results_in(call(model, arguments))]
    except FAULTS as error:
        if grown:
            raise no_longer_runs(model, f"in {mode} mode", error) from error
        raise DoesNotRunError(
            f"{type(model).__name__} does not run in {mode} mode: {first_line(error)}.",
            way_out="Give larger example inputs or a larger batch, or skip the check "
            "(--no-verify).",
        ) from error
    without_chance.common = common.drew
    return found


class DoesNotRunError(VerificationError):
    """A network does not run on what it was to be compared on."""


class NoLongerRuns(VerificationError):  # noqa: N818 - what became of a network
    """A network does not run where the one that it was made of, or is compared with, does.

    Attributes:
        cause: what it raised, and where.
    """

    cause: str = ""


def no_longer_runs(model: nn.Module, how: str, error: BaseException) -> NoLongerRuns:
    """Return the error for a grown network that fails where the original does not.

    Args:
        model: the grown network.
        how: in which way it was run.
        error: what it raised.
    """
    layer = _layer_at(model, error)
    where = f" (at {layer})" if layer else ""
    found = NoLongerRuns(
        f"the grown {type(model).__name__} does not run {how}, where the original does: "
        f"{first_line(error)}{where}. What was done to it does not fit together.",
        name=layer,
        way_out="Leave out what it reads (--exclude), or give inputs on which every part of the "
        "network that they can reach takes part.",
    )
    found.cause = f"{first_line(error)}{where}"
    return found


def told_of_first(old: nn.Module, batch: Arguments, error: VerificationError) -> VerificationError:
    """Return the error of a comparison that makes no network, and cannot be left out.

    Args:
        old: the first network, which may not run.
        batch: what it was called with.
        error: what came of comparing it with another.
    """
    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors_in(batch))
    try:
        outputs_of(stand_in(old, {}), batch, "eval", Expectation())
    except VerificationError as problem:
        told = problem.reason.partition(": ")[2]
        return VerificationError(
            f"the first network, a {type(old).__name__}, does not run on {shapes}: {told}.",
            way_out="Give example inputs that it takes (--input-shape).",
        )
    if not isinstance(error, DoesNotRunError):
        return error
    way_out = "Give larger example inputs or a larger batch (--input-shape)."
    return VerificationError(error.message, name=error.name, way_out=way_out)


def _layer_at(model: nn.Module, error: BaseException) -> str:
    """Return the name of the innermost module of a network in whose forward an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = names.get(id(frame.f_locals.get("self")), found)
    return found


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Put a network into a mode, but for dropout, which is off in both."""
    set_training(model, mode=mode == "train")


def lent_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network with buffers of its own and the parameters of the original.

    Their values are those of the original and their objects are not: a forward that gives one other
    data gives it the copy. What writes into the values needs a whole copy.
    """
    parameters = dict(model.named_parameters())
    own = {name: p.detach() for name, p in parameters.items() if not p.is_inference()}
    # Outside of inference mode, what was made in it lets nobody set its gradient's flag.
    lent = {id(p): p for p in parameters.values() if p.is_inference()}
    return stand_in(model, own, shared=lent)


def in_double(arguments: Arguments) -> Arguments:
    """Return arguments with floating-point tensors in float64."""
    doubled: Arguments = pytree.tree_map_only(
        Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments
    )
    return doubled


def shown(names: Sequence[str]) -> str:
    """Return the first few of some names, for a note."""
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
