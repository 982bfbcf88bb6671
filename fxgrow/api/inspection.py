"""What a network's channels are: the groups, blocks and pins, and what growing them would gain."""

from __future__ import annotations

from torch import nn

from fxgrow.api.report.data import Growth, Inspection
from fxgrow.api.requirements import require_values
from fxgrow.channels.scope import follow
from fxgrow.errors import UsageError
from fxgrow.grow.data import DataDriven
from fxgrow.grow.data.expected import expected_growth
from fxgrow.grow.sizes.narrow import at_other_widths
from fxgrow.modules.exclusive import exclusive


@exclusive
def inspect(
    model: nn.Module,
    example_inputs: object = None,
    *,
    module: str = "",
    growth: DataDriven | None = None,
) -> Inspection:
    """Find the channel groups, residual blocks and pins of a network.

    Args:
        model: any module; only read.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; None infers
            an input from the first layer.
        module: follow this submodule alone, on inputs of its own.
        growth: an init from data (:class:`fxgrow.Tiny`, :class:`fxgrow.GradMax`), of which to tell
            what new channels would gain in each group: ``growth`` of what is returned.

    Returns:
        The findings; ``str()`` is a table, ``to_dict()`` is JSON-able.

    Raises:
        TraceError: the network cannot be followed on these inputs.
        PlanError: ``growth``, and its batches tell nothing.
    """
    if growth is not None and not isinstance(growth, DataDriven):
        raise UsageError(
            f"growth is a {type(growth).__name__}, no init from data.",
            way_out="Give one: growth=fxgrow.Tiny(loss_fn, batches).",
        )
    followed, warned = follow(model, example_inputs, module)
    analyses = tuple(map(at_other_widths, followed))
    if growth is None:
        return Inspection(analyses, warned)
    require_values(model)
    found = Growth(growth.name, expected_growth(growth, model, analyses))
    return Inspection(analyses, warned, found)
