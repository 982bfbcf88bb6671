"""Grow trained PyTorch networks without changing what they compute.

>>> import torch, fxgrow
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> fxgrow.widen(net, "2x").model[0].out_features
16

Names are imported when they are first used, so that ``import fxgrow`` and the command line's
``--help`` do not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fxgrow.version import __version__ as __version__

if TYPE_CHECKING:
    from fxgrow.api.convert import convert as convert
    from fxgrow.api.deepen import deepen as deepen
    from fxgrow.api.kernels import morph_kernel as morph_kernel
    from fxgrow.api.report.data import Inspection as Inspection
    from fxgrow.api.report.data import Report as Report
    from fxgrow.api.widen import Grown as Grown
    from fxgrow.api.widen import inspect as inspect
    from fxgrow.api.widen import widen as widen
    from fxgrow.errors import FxgrowError as FxgrowError
    from fxgrow.errors import FxgrowWarning as FxgrowWarning
    from fxgrow.errors import NotPreservedError as NotPreservedError
    from fxgrow.errors import PlanError as PlanError
    from fxgrow.errors import SourceError as SourceError
    from fxgrow.errors import TraceError as TraceError
    from fxgrow.errors import UnsupportedOperationError as UnsupportedOperationError
    from fxgrow.errors import VerificationError as VerificationError
    from fxgrow.files.models import load as load
    from fxgrow.files.models import open_model as open_model
    from fxgrow.files.models import save as save
    from fxgrow.files.models import write_grown as write_grown
    from fxgrow.files.optimizer.growth import grow_optimizer_ as grow_optimizer_
    from fxgrow.grow.data import GradMax as GradMax
    from fxgrow.grow.data import Tiny as Tiny
    from fxgrow.plan.pairing import apply_pairing as apply_pairing
    from fxgrow.plan.rescaling import apply_rescaling as apply_rescaling
    from fxgrow.plan.schema import Plan as Plan
    from fxgrow.verification.judge import Verification as Verification
    from fxgrow.verification.measure import verify as verify

_HOMES: dict[str, str] = {
    **dict.fromkeys(("Grown", "inspect", "widen"), "fxgrow.api.widen"),
    **dict.fromkeys(("GradMax", "Tiny"), "fxgrow.grow.data"),
    **dict.fromkeys(
        (
            "FxgrowError",
            "FxgrowWarning",
            "NotPreservedError",
            "PlanError",
            "SourceError",
            "TraceError",
            "UnsupportedOperationError",
            "VerificationError",
        ),
        "fxgrow.errors",
    ),
    "convert": "fxgrow.api.convert",
    **dict.fromkeys(("load", "open_model", "save", "write_grown"), "fxgrow.files.models"),
    "morph_kernel": "fxgrow.api.kernels",
    "apply_pairing": "fxgrow.plan.pairing",
    "apply_rescaling": "fxgrow.plan.rescaling",
    "deepen": "fxgrow.api.deepen",
    "grow_optimizer_": "fxgrow.files.optimizer.growth",
    "Plan": "fxgrow.plan.schema",
    **dict.fromkeys(("Inspection", "Report"), "fxgrow.api.report.data"),
    "Verification": "fxgrow.verification.judge",
    "verify": "fxgrow.verification.measure",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fxgrow' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
