"""A model that was read from a file."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from fxgrow.files.checkpoint import Source
from fxgrow.modules.architectures import Architecture
from fxgrow.modules.calling import Arguments
from fxgrow.plan.schema import Plan


@dataclass
class OpenedModel:
    """A model read from a file, with what is needed to write the same kind of file again.

    Attributes:
        source: the file's contents.
        model: the module with the file's weights, in eval mode if it was built here.
        architecture: what it was built from; None for a pickled module.
        plans: the surgeries it has been through, oldest first.
        warnings: what the user should know.
        converted: what is written is a network of ``architecture`` as it is built.
        inputs: example inputs, where the source tells which it takes.
    """

    source: Source
    model: nn.Module
    architecture: Architecture | None
    plans: tuple[Plan, ...] = ()
    warnings: list[str] = field(default_factory=list)
    inputs: Arguments | None = None
    converted: bool = False

    def become(self, architecture: Architecture) -> None:
        """Have what is written recorded as another architecture, without surgeries before it."""
        self.architecture, self.converted = architecture, True
