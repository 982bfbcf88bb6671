"""The rules of the operations, one record for each, one file for each family.

Data movement and pointwise operations need no labels of their own (:mod:`fxgrow.labels.generic`),
and most need no gain or padding, since they are asked (:mod:`fxgrow.labels.ask`). An operation
nobody knows pins what it touches. ``README.md`` shows how to add one of your own.
"""

from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules import (
    arithmetic,
    convolution,
    experts,
    layout,
    lookup,
    norms,
    positions,
    products,
    reductions,
    windows,
)
from fxgrow.labels.rules.record import RULES, OpRule, rule
from fxgrow.labels.step import Step

__all__ = [
    "RULES", "OpRule", "PinKind", "Step", "arithmetic", "convolution", "experts", "layout",
    "lookup", "norms", "positions", "products", "reductions", "rule", "windows",
]  # fmt: skip
