"""Names in a schedule, checked against a network before its training begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fxgrow.channels.groups import ChannelGroup
from fxgrow.channels.scope import follow
from fxgrow.errors import PlanError, shown
from fxgrow.grow.sizes.widths import must_match_group
from fxgrow.training.due import Due


def check_names(growths: Iterable[Due], network: nn.Module, inputs: object) -> None:
    """Return if the names in growths that are to come are of the network.

    Those of blocks that come with a growth before are not there yet, so only growths up to the
    first one in depth are looked at.

    Args:
        growths: in order.
        network: what grows.
        inputs: of the network, where a growth says no others; None infers them.

    Raises:
        TraceError: the network cannot be followed.
        PlanError: a glob matches nothing, or there is no such module.
    """
    groups: tuple[ChannelGroup, ...] | None = None
    for due in growths:
        if due.deepens:
            for name in due.options["blocks"]:
                _check_module(network, name)
            return
        globs = _globs(due.options)
        if globs and groups is None:
            given = due.options.get("example_inputs", inputs)
            analyses, _ = follow(network, given)
            if len(analyses) > 1:
                return  # parts have names of their own
            groups = analyses[0].groups
        for glob in globs:
            must_match_group(glob, groups or ())


def _globs(options: Mapping[str, Any]) -> list[str]:
    """Return the globs over channel groups that options of a growth name."""
    width = options.get("width")
    named = [*(width if isinstance(width, Mapping) else ())]
    for which in ("include", "exclude"):
        given = options.get(which, ())
        named += [given] if isinstance(given, str) else [*given]
    return [name for name in named if name != "*"]


def _check_module(network: nn.Module, name: str) -> None:
    """Return if a network has a module.

    Raises:
        PlanError: it does not.
    """
    try:
        network.get_submodule(name)
    except AttributeError as error:
        raise PlanError(
            f"the schedule makes {shown(name)} deeper, and {type(network).__name__} has no such "
            "module.",
            name=shown(name),
            way_out="Give names as in model.named_modules().",
        ) from error
