"""What the tensors of a new block hold, so that the block is the identity.

A new block is a block widened from nothing: every channel in it is new. ``r2deeper`` pairs the
channels that each branch reads last, ``zero_last`` makes the last parameter of each branch zero.
Which layers come last is found by trying: as few as make the branches zero, and as late ones as do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from fxgrow.errors import PlanError
from fxgrow.grow.identity.concrete_run import (
    ConcreteRun,
    Recording,
    least,
    norms_among,
    run_concretely,
)
from fxgrow.grow.identity.net2deeper import net2deeper
from fxgrow.grow.identity.new_block import Filling, NewBlock, of_norms, passes
from fxgrow.grow.identity.paired_channels import pair_channels
from fxgrow.labels.tape import Operation, Value
from fxgrow.modules.tensors import layer_of
from fxgrow.registry import Registry

Method: TypeAlias = Callable[[NewBlock], Filling]
METHODS: Registry[Method] = Registry("method")
METHODS.register("net2deeper")(net2deeper)


class _Product(NamedTuple):
    """An operation that reads channels with a weight of a block.

    Attributes:
        operation: its index.
        weight: the weight.
        terms: the parameters that are added.
    """

    operation: int
    weight: str
    terms: tuple[str, ...]


@METHODS.register("r2deeper")
def r2deeper(block: NewBlock) -> Filling:
    """The last two layers of each branch are [V; V] and [Z, −Z]: every weight is free.

    A norm that then gets zeros begins with a weight of √eps. Zeros have no variance, so that the
    norm divides by √eps alone: with a weight of one, a first step would be √(1/eps) times too long.
    """
    products = [list(_products(block, run)) for run in block.runs]
    every = [product for found in products for product in found]

    def filled(weights: Collection[str]) -> dict[str, float]:
        terms = (term for product in every if product.weight in weights for term in product.terms)
        return {**dict.fromkeys(terms, 0.0), **of_norms(block)}

    def zeroed(weights: Collection[str]) -> list[list[int]]:
        return [[p.operation for p in found if p.weight in weights] for found in products]

    def works(weights: Collection[str]) -> bool:
        constants = filled(weights)
        runs = zip(block.runs, zeroed(weights), strict=True)
        return all(passes(block, run, constants, zeros) for run, zeros in runs)

    weights = list(dict.fromkeys(product.weight for product in every))
    if not works(weights):
        raise PlanError(obstacle(block, filled(weights), zeroed(weights)))
    last = least(weights, works)
    filling = Filling(filled(last), zeroed=tuple(map(layer_of, last)))
    for run, zeros in zip(block.runs, zeroed(last), strict=True):
        filling.constants |= _gentle(block, run, filling.constants, zeros)
    _pair_or_zero(block, last, filling)
    return filling


def _pair_or_zero(block: NewBlock, weights: Sequence[str], filling: Filling) -> None:
    """Let the channels that weights read be pairs, or else the weights zero."""
    for weight in weights:
        problem = pair_channels(block, weight, weights, filling)
        if problem:
            filling.constants[weight] = 0.0
            filling.notes.append(f"{layer_of(weight)} begins at zero: {problem}")


@METHODS.register("zero_last")
def zero_last(block: NewBlock) -> Filling:
    """The last parameter of each branch is zero: a norm's weight, a layer or a layer scale."""
    defaults = of_norms(block)
    used = (name for op in block.runs[0].inside(block.modules) for name in op.parameters)
    candidates = [
        name
        for name in dict.fromkeys(used)
        if name in block.parameters and defaults.get(name) != 0.0
    ]

    def filled(zeros: Collection[str]) -> dict[str, float]:
        return {**defaults, **dict.fromkeys(zeros, 0.0)}

    def works(zeros: Collection[str]) -> bool:
        return all(passes(block, run, filled(zeros)) for run in block.runs)

    if not works(candidates):
        raise PlanError(obstacle(block, filled(candidates), [() for _ in block.runs]))
    zeros = least(candidates, works)
    return Filling(filled(zeros), zeroed=tuple(zeros))


def obstacle(
    block: NewBlock, constants: Mapping[str, float], zeroed: Sequence[Collection[int]]
) -> str:
    """Return why a block is not the identity even though all its layers give zero.

    Args:
        block: the block.
        constants: tensors of it that are known.
        zeroed: for each of its runs, the operations that give zero.
    """
    for recording, zeros in zip(block.runs, zeroed, strict=True):
        found = run_concretely(recording, block.modules, constants, zeros)
        mode = "in train mode, " if recording is not block.runs[0] else ""
        for exit_, entry in block.exits(recording):
            if found.same_as(exit_, entry):
                continue
            if exit_.shape != entry.shape:
                given, taken = ("x".join(map(str, v.shape)) for v in (exit_, entry))
                return f"{mode}it gives {given} where it takes {taken}"
            return mode + _parting(recording.inside(block.modules), found, entry)
    return "it does not give what it gets"


def _parting(inside: Sequence[Operation], found: ConcreteRun, entry: Value) -> str:
    """Return where what came in is lost on its way through the operations of a block."""
    last = entry
    for op in inside:
        if op.name == "add" and found.same_as(op.outputs[0], entry):
            last = op.outputs[0]
        elif op.name == "add" and any(found.same_as(value, entry) for value in op.inputs):
            return f"what is added at {_at(op)} is not zero, even if all its layers give zero"
    takers = [op for op in inside if last in op.inputs]
    if last is entry:
        layers = dict.fromkeys(layer_of(name) for op in takers for name in op.parameters)
        follow = f" ({', '.join(layers)} follow it)" if layers else ""
        return f"no shortcut around it gives what came in{follow}"
    if not takers:
        return "it does not give what it gets"
    follower = f"{takers[0].name} at {_at(takers[0])}"
    return f"{follower} follows the addition and does not keep what it gets"


def _at(op: Operation) -> str:
    return op.module or "the top level"


def _products(block: NewBlock, recording: Recording) -> Iterator[_Product]:
    """Yield the operations of a block that read channels with a weight of it, in order."""
    roles = zip(block.channels.axes, block.channels.roles, strict=True)
    readers = {axis.tensor for axis, role in roles if role == "reader"}
    for op in recording.inside(block.modules):
        names = _weights_on_data(op)
        for name, value in names.items():
            # A factor vanishes where all else is zero, unlike a term of the sum.
            others = [other for other in op.inputs if other is not value]
            reads = name in readers or recording.vanishes(op, others)
            if reads and name in block.parameters:
                yield _Product(op.index, name, tuple(other for other in names if other != name))
                break


def _weights_on_data(op: Operation) -> dict[str, Value]:
    """Return what an operation takes of single parameters, by their names; none without data."""
    weights = [value for value in op.inputs if value.is_weight and len(value.origins) == 1]
    if len(weights) == len(op.inputs):  # a computation on the weights themselves
        return {}
    return {value.origins[0]: value for value in weights if not value.is_curved}


def _gentle(
    block: NewBlock, recording: Recording, constants: Mapping[str, float], zeroed: Collection[int]
) -> dict[str, float]:
    """Return the weights of norms that get zeros: √eps, for an input without variance."""
    found = run_concretely(recording, block.modules, constants, zeroed)
    norms = norms_among(recording.inside(block.modules))
    return {weight: math.sqrt(eps) for op, weight, eps in norms if found.is_zero(op.inputs[0])}
