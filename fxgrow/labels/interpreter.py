"""One interpreter for what is followed through a finished run: gains, and what channels hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

from fxgrow.labels.operators import operator_name
from fxgrow.labels.rules import RULES
from fxgrow.labels.tape import Operation


class Flow(Protocol):
    """What is followed: a fact about each value, worked out operation by operation.

    Attributes:
        part: the part of an :class:`~fxgrow.labels.rules.OpRule` that says how.
        is_over: whether nothing more can be learned.
    """

    @property
    def part(self) -> Literal["gain", "padding"]: ...  # noqa: D102
    @property
    def is_over(self) -> bool: ...  # noqa: D102

    def concerns(self, op: Operation) -> bool:
        """Return whether an operation gets anything that is followed."""

    def generic(self, op: Operation) -> Any:
        """Return the fact about the outputs of an operation without a rule, which is asked."""

    def record(self, op: Operation, fact: Any) -> None:
        """Keep the fact about an operation's outputs."""


def interpret(operations: Iterable[Operation], flow: Flow) -> None:
    """Follow facts through operations, in their order."""
    for op in operations:
        if not flow.concerns(op):
            continue
        rule = RULES.get(operator_name(op.target))
        of_part = None if rule is None else getattr(rule, flow.part)
        flow.record(op, flow.generic(op) if of_part is None else of_part(flow, op))
        if flow.is_over:
            return
