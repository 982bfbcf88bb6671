"""Modules that are written whole, as pickles: which can be, and who reads them again."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from fxgrow.errors import FxgrowWarning, SourceError

_BY_PLAN = (
    "Write torch.save(grown.model.state_dict(), 'weights.pt') and the text of "
    "grown.plan.to_json(). Then "
    "net = fxgrow.Plan.from_json(text).apply(old_network), then "
    "net.load_state_dict(torch.load('weights.pt')) gives it back."
)


def check_pickled(model: nn.Module, out: Path, target: str) -> None:
    """Check that a module can be pickled whole, and warn where few programs can read it again.

    Args:
        model: the module.
        out: the file that it is to be written to.
        target: the name of the file's format.

    Raises:
        SourceError: the file holds tensors alone; or the module is a graph, which a pickle compiles
            again when it is read; or it has parametrizations, which make a class of their own for
            each layer, and torch pickles none of these.
    """
    if target != "torch":
        raise SourceError(
            f"{out} cannot hold this model: it grew from no known architecture, and a module is no "
            "tensor.",
            name=str(out),
            way_out=_BY_PLAN,
        )
    if isinstance(model, fx.GraphModule):
        raise SourceError(
            f"{out} cannot hold this model: it grew from no known architecture, and became a "
            "GraphModule, whose pickle is code.",
            name=str(out),
            way_out=_BY_PLAN,
        )
    found = next((name for name, part in model.named_modules() if is_parametrized(part)), None)
    if found is not None:
        raise SourceError(
            f"{out} cannot hold this model: it grew from no known architecture, and "
            f"{found or 'it'} has a parametrization (such as weight norm), which no pickle holds.",
            name=found,
            way_out=_BY_PLAN,
        )
    own = {type(m).__qualname__ for m in model.modules() if type(m).__module__ == "__main__"}
    if own:
        warnings.warn(
            f"{out} holds {', '.join(sorted(own))} of __main__, which only this script finds: "
            f"there, fxgrow.load({str(out)!r}, trust_pickle=True) reads it. Put the class into a "
            "module of its own, and others can.",
            FxgrowWarning,
            stacklevel=4,
        )
