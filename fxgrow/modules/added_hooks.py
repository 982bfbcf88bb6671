"""Hooks that a forward registers in its first run, and that the next run is to register again.

Such code notes in an attribute that its hooks are there (transformers, to collect hidden states).
Where the attribute is put back as it was, they have to go too, or the next run has each twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class HookNote:
    """Which hooks of some modules there are, of those that run before and after a forward.

    Args:
        modules: whose.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._known: list[tuple[dict[int, Any], frozenset[int]]] = [
            (hooks, frozenset(hooks))
            for module in modules
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]

    def remove_added(self) -> None:
        """Remove the hooks that were registered since."""
        for hooks, known in self._known:
            if len(hooks) != len(known):
                for added in hooks.keys() - known:
                    del hooks[added]
