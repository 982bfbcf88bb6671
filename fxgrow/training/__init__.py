"""Grow a network while it trains: in place, with its optimizer, schedule, rates and evidence.

>>> import torch, fxgrow.training
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
>>> grown = fxgrow.training.grow_(net, "2x", optimizer=optimizer)
>>> grown.model is net, net[0].out_features
(True, 16)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxgrow.training.in_place import Grown as Grown
    from fxgrow.training.in_place import deepen_ as deepen_
    from fxgrow.training.in_place import grow_ as grow_
    from fxgrow.training.resume import regrow_ as regrow_
    from fxgrow.training.resume import state_dict as state_dict

_HOMES: dict[str, str] = {
    **dict.fromkeys(("Grown", "deepen_", "grow_"), "fxgrow.training.in_place"),
    **dict.fromkeys(("regrow_", "state_dict"), "fxgrow.training.resume"),
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fxgrow.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
