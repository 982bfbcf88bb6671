"""What a plan leaves undone: parameters that no run reached, and twins that would never part."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fxgrow.channels.analysis import Analysis
from fxgrow.errors import listed
from fxgrow.modules.tensors import layer_of, named_tensors
from fxgrow.plan.by_layer import setting_for
from fxgrow.plan.names import names_after
from fxgrow.plan.pairing import PAIRINGS
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan

_SHOWN = 4


def left_out(made: Plan, analyses: Sequence[Analysis]) -> tuple[str, ...]:
    """Return a warning that names layers which took no part, as many as the plan may break.

    They were not followed, so that none of their axes is one of a channel group. Those that have
    an axis as wide as what grows may meet it on other inputs.

    Args:
        made: the plan.
        analyses: of the network, or of each part of it that was followed.
    """
    grown = {
        old
        for edit in made.tensors.values()
        for old, new in zip(edit.shape, edit.new_shape, strict=True)
        if old != new
    }
    names: dict[str, None] = {}
    for traced in (analysis.traced for analysis in analyses):
        tensors = named_tensors(traced.standin)
        for name in traced.unused:
            if grown.intersection(tensors[name].shape):
                names.setdefault(layer_of(name) or name)
    if not names:
        return ()
    they, use = ("they are", "them") if len(names) > 1 else ("it is", "it")
    return (
        f"{_idle(names)}, so that {they} not followed and not widened: where the network uses {use}"
        f" on channels that grew, sizes no longer fit. Give example inputs that use {use}, or "
        "leave these channels out (--exclude)",
    )


def left_new(made: Plan, analyses: Sequence[Analysis]) -> tuple[str, ...]:
    """Return a warning that names layers which are new and took no part, as many as there are.

    Nothing makes these the identity.

    Args:
        made: the plan, which adds blocks.
        analyses: of the network, or of each part of it that was followed; of a conversion, of its
            target too.
    """
    idle = {name for analysis in analyses for name in analysis.traced.unused}
    known = {name for analysis in analyses for name in named_tensors(analysis.traced.standin)}
    if made.names:
        new = [name for name, before in made.names.items() if not before and name in idle]
    else:
        new = [name for name, like, is_new in names_after(known, made) if is_new and like in idle]
    names = dict.fromkeys(layer_of(name) or name for name in sorted(new))
    if not names:
        return ()
    they, use = ("they are", "them") if len(names) > 1 else ("it is", "it")
    return (
        f"{_idle(names)}, and {they} new: where the network uses {use}, it computes something "
        f"else. Give example inputs that use {use}",
    )


def _idle(names: Collection[str]) -> str:
    """Return a sentence that some layers took no part, without its end."""
    took = "take" if len(names) > 1 else "takes"
    where = "on these inputs, in eval mode or in train mode"
    return f"{listed([*names], _SHOWN)} {took} no part in the run {where}"


def tied_twins(made: Plan) -> tuple[str, ...]:
    """Return a warning of twins that nothing parts, since their columns begin as zeros.

    Twins part because they get opposite gradients, by Z and −Z; by zeros they get the same.

    Args:
        made: the plan.
    """
    request = made.request
    if not isinstance(request, Widen):
        return ()
    names = []
    for group in made.groups:
        layout = PAIRINGS[group.pairing](2, 1, "")
        if layout.copies or len(set(layout.draws)) == 2:
            continue
        by_layer = (setting_for(request.init, (reader,), "copy_rows") for reader in group.readers)
        columns = [request.input_init] if request.input_init else by_layer
        if all(column == "zeros" for column in columns):
            names.append(group.name)
    if not names:
        return ()
    return (
        f"the new channels of {listed(names)} are twins that are read by zeros, get the same "
        "gradients and never part: with pairing v_zero they do, or with columns that are not zeros",
    )
