"""What a network's channels are: the groups, blocks and pins, and what growing them would gain."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fxgrow.api.arguments import globs
from fxgrow.api.following import follow_on
from fxgrow.api.report.data import Growth, Inspection
from fxgrow.api.requirements import require_values
from fxgrow.api.widen import Progress, silent
from fxgrow.errors import UsageError
from fxgrow.grow.data import DataDriven
from fxgrow.grow.data.expected import expected_growth
from fxgrow.grow.sizes.narrow import at_other_widths
from fxgrow.modules.exclusive import exclusive
from fxgrow.plan.requests import Widen


@exclusive
def inspect(
    model: nn.Module,
    example_inputs: object = None,
    *,
    module: str = "",
    growth: DataDriven | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = silent,
) -> Inspection:
    """Find the channel groups, residual blocks and pins of a network.

    Args:
        model: any module; only read.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; None takes
            those of the first batch of ``growth``, and without it infers an input from the first
            layer.
        module: follow this submodule alone, on inputs of its own.
        growth: an init from data (:class:`fxgrow.Tiny`, :class:`fxgrow.GradMax`), of which to tell
            what new channels would gain in each group: ``growth`` of what is returned.
        include: ``growth`` tells only of groups whose name or writers match one of these globs.
        exclude: ``growth`` leaves these out, which saves the time of large layers.
        progress: called with the name of each step as it begins, and about how long growth takes.

    Returns:
        The findings; ``str()`` is a table, ``to_dict()`` is JSON-able.

    Raises:
        TraceError: the network cannot be followed on these inputs.
        UsageError: ``include`` or ``exclude`` without ``growth``.
        PlanError: ``growth``, and a glob matches nothing, or its batches tell nothing.
    """
    if growth is not None and not isinstance(growth, DataDriven):
        raise UsageError(
            f"growth is a {type(growth).__name__}, no init from data.",
            way_out="Give one: growth=fxgrow.Tiny(loss_fn, batches).",
        )
    if growth is None and (include or exclude):
        raise UsageError("include and exclude are for growth.", way_out="Give growth=, too.")
    progress("following the channels")
    followed, warned = follow_on(model, example_inputs, module, growth)
    analyses = tuple(map(at_other_widths, followed))
    if growth is None:
        return Inspection(analyses, warned)
    require_values(model)
    chosen = Widen(width="2x", where="all", include=globs(include), exclude=globs(exclude))
    found = Growth(growth.name, expected_growth(growth, model, analyses, chosen, progress))
    return Inspection(analyses, warned, found)
