"""Warnings of what a grown network has in memory alone, whose file is another matter."""

from __future__ import annotations

UNHELD = "a state_dict does not hold"
AS_GRAPH = "is a torch.fx.GraphModule with the same names"


def is_of_memory(warning: str) -> bool:
    """Return whether a warning is untrue where a configuration describes the whole result.

    A class that is built by it holds all that attributes, hooks or a graph have in memory.
    """
    return UNHELD in warning or AS_GRAPH in warning
