"""The rules of the operations that compute across a dim, one small function for each kind.

Data movement and pointwise operations need no rule of their own: see
:mod:`fxgrow.labels.generic`. An operation nobody knows pins what it touches. Register a rule for
an operator of your own with ``@rule("mylib.myop")``: the operator's name is its namespace and its
name without overload (``"aten.convolution"``).
"""

from fxgrow.labels.rules import layout, norms, products, reductions
from fxgrow.labels.rules.step import RULES, Rule, Step, rule

__all__ = ["RULES", "Rule", "Step", "layout", "norms", "products", "reductions", "rule"]
