"""What an optimizer's buffers are to the gradient, and so how they grow with their parameter.

A buffer is known by its name in the state. A rule registered under that name returns it as a
:class:`Buffer`: numbers in the shape of the parameter, with the power of the gradient they are.
Buffers of other optimizers can be added::

    @BUFFERS.register("exp_avg_abs")  # a moving average of |gradient|
    def moving_average_of_absolutes(state, name):
        return Buffer(state[name], degree=1, fresh="mean")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from fxgrow.errors import PlanError
from fxgrow.registry import Registry

State: TypeAlias = Mapping[str, Any]  # what an optimizer keeps for one parameter
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Buffer:
    """A buffer with a number for each weight.

    Attributes:
        values: the numbers, in the shape of the parameter.
        degree: the power of the gradient that they are: with gradients s times as large from the
            start, they would be s**degree times as large.
        fresh: what new weights begin with. ``zero`` for directions; the ``mean`` of the old for
            sizes, because ``step`` stays: an average of squares that is zero after many steps
            would let the first gradient make a step that is many times too long.
        stored: turns such numbers into what the optimizer keeps, where that is something else.
    """

    values: Tensor
    degree: int
    fresh: Literal["zero", "mean"]
    stored: Callable[[Tensor], Tensor] = lambda values: values


BufferRule: TypeAlias = Callable[[State, str], Buffer]
BUFFERS: Registry[BufferRule] = Registry("optimizer's buffer")


def is_counter(value: object) -> bool:
    """Tell what has no number for each weight: steps, products of decays, or nothing at all."""
    if isinstance(value, Tensor):
        return value.ndim == 0
    return value is None or isinstance(value, (bool, int, float))


def shape_of(state: State) -> Shape | None:
    """Return the shape of the parameter that a state is for, or None if it does not tell.

    Raises:
        PlanError: what it tells is incomplete.
    """
    named = (key for key in state if key in BUFFERS and isinstance(state[key], Tensor))
    known = next((key for key in named if not is_counter(state[key])), None)
    return None if known is None else shape_by(state, known)


def shape_by(state: State, name: str) -> Shape:
    """Return the shape of the parameter that one buffer tells, without making its numbers.

    Factors in a file may be those of a far larger matrix.

    Raises:
        PlanError: what belongs to the buffer is missing.
    """
    shapes = {key: value.to("meta") for key, value in state.items() if isinstance(value, Tensor)}
    try:
        return tuple(BUFFERS[name](shapes, name).values.shape)
    except (IndexError, KeyError, RuntimeError) as error:
        raise PlanError(f"{name} lacks what belongs to it", name=name) from error


def _of_degree(degree: int, fresh: Literal["zero", "mean"]) -> BufferRule:
    """Return the rule of buffers that hold their numbers as they are."""
    return lambda state, name: Buffer(state[name], degree, fresh)


# An average of gradients (RMSprop, centered), or the last one (Rprop).
BUFFERS.register("grad_avg", "prev")(_of_degree(1, "zero"))
# An average (Adam, RMSprop, Adadelta, Adafactor), maximum (AMSGrad) or sum (Adagrad) of g².
BUFFERS.register("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance")(
    _of_degree(2, "mean")
)
# The decaying maximum of |g| (Adamax).
BUFFERS.register("exp_inf")(_of_degree(1, "mean"))
# Sizes of steps, which do not depend on the gradient's size (Adadelta, Rprop).
BUFFERS.register("acc_delta", "step_size")(_of_degree(0, "mean"))


@BUFFERS.register("exp_avg")
def first_moment(state: State, name: str) -> Buffer:
    """Adam's and Lion's average of gradients; in Adafactor (which keeps RMS) one of its steps."""
    return Buffer(state[name], 0 if "RMS" in state else 1, "zero")


@BUFFERS.register("momentum_buffer")
def momentum(state: State, name: str) -> Buffer:
    """A sum of gradients (SGD, Muon), or of gradients over their own size (RMSprop)."""
    return Buffer(state[name], 0 if "square_avg" in state else 1, "zero")


@BUFFERS.register("row_var")
def row_factor(state: State, name: str) -> Buffer:
    """The mean of g² over columns, (…, R, 1), in torch's Adafactor."""
    values = _product(state[name], state["col_var"])
    return Buffer(values, 2, "mean", lambda squares: squares.mean(-1, keepdim=True))


@BUFFERS.register("col_var")
def column_factor(state: State, name: str) -> Buffer:
    """The mean of g² over rows, (…, 1, C), in torch's Adafactor."""
    values = _product(state["row_var"], state[name])
    return Buffer(values, 2, "mean", lambda squares: squares.mean(-2, keepdim=True))


@BUFFERS.register("exp_avg_sq_row")
def flat_row_factor(state: State, name: str) -> Buffer:
    """The mean of g² over columns, (…, R), in the Adafactor of transformers."""
    values = _product(state[name].unsqueeze(-1), state["exp_avg_sq_col"].unsqueeze(-2))
    return Buffer(values, 2, "mean", lambda squares: squares.mean(-1))


@BUFFERS.register("exp_avg_sq_col")
def flat_column_factor(state: State, name: str) -> Buffer:
    """The mean of g² over rows, (…, C), in the Adafactor of transformers."""
    values = _product(state["exp_avg_sq_row"].unsqueeze(-1), state[name].unsqueeze(-2))
    return Buffer(values, 2, "mean", lambda squares: squares.mean(-2))


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the squares (…, R, C) that two factors (…, R, 1) and (…, 1, C) stand for.

    Raises:
        PlanError: they are no factors of one matrix.
    """
    if rows.shape[:-2] != columns.shape[:-2] or rows.shape[-1] != 1 or columns.shape[-2] != 1:
        raise PlanError(f"{tuple(rows.shape)} and {tuple(columns.shape)} are factors of no matrix.")
    whole = rows.mean(-2, keepdim=True)
    return rows * (columns / whole.where(whole > 0, 1.0))
