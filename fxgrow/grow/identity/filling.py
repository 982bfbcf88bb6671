"""What the tensors of a new block hold, so that the block is the identity.

A new block is a block widened from nothing: every channel in it is new. ``r2deeper`` gives the
channels that each branch reads last the layout of twins, ``zero_last`` makes the last parameter of
each branch zero. Which layers come last is found by trying: as few as silence the branches, and as
late ones as do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeAlias

from fxgrow.channels.groups import layer_of
from fxgrow.errors import PlanError
from fxgrow.grow.identity.concrete_run import (
    NORMS,
    Recording,
    Rehearsal,
    argument,
    factors_of,
    least,
    rehearse,
)
from fxgrow.grow.identity.net2deeper import net2deeper
from fxgrow.grow.identity.new_block import Filling, NewBlock, of_norms, passes
from fxgrow.grow.identity.twins import lay_out_twins
from fxgrow.labels.tape import Value
from fxgrow.registry import Registry

Method: TypeAlias = Callable[[NewBlock], Filling]
METHODS: Registry[Method] = Registry("method")
METHODS.register("net2deeper")(net2deeper)


@METHODS.register("r2deeper")
def r2deeper(block: NewBlock) -> Filling:
    """The last two layers of each branch are [V; V] and [Z, −Z]: every weight is free.

    A norm that then gets zeros begins with a weight of √eps. Zeros have no variance, so that the
    norm divides by √eps alone: with a weight of one, a first step would be √(1/eps) times too long.
    """
    reads = [found for run in block.runs for found in _products(block, run)]

    def filled(weights: Collection[str]) -> dict[str, float]:
        terms = {term for weight, found in reads if weight in weights for term in found}
        return {**dict.fromkeys(terms, 0.0), **of_norms(block)}

    def silent(recording: Recording, weights: Collection[str]) -> list[int]:
        return [i for i, (w, _) in _indexed_products(block, recording) if w in weights]

    def works(weights: Collection[str]) -> bool:
        constants = filled(weights)
        return all(passes(block, run, constants, silent(run, weights)) for run in block.runs)

    weights = list(dict.fromkeys(weight for weight, _ in reads))
    if not works(weights):
        raise PlanError(obstacle(block, filled(weights), lambda run: silent(run, weights)))
    last = least(weights, works)
    found = Filling(filled(last), zeroed=tuple(layer_of(weight) for weight in last))
    for run in block.runs:
        found.constants |= _gentle(block, run, found.constants, silent(run, last))
    for weight in last:
        problem = lay_out_twins(block, weight, last, found)
        if problem:
            found.constants[weight] = 0.0
            found.notes.append(f"{layer_of(weight)} begins at zero: {problem}")
    return found


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

    def works(zeros: Collection[str]) -> bool:
        constants = {**defaults, **dict.fromkeys(zeros, 0.0)}
        return all(passes(block, run, constants) for run in block.runs)

    if not works(candidates):
        constants = {**defaults, **dict.fromkeys(candidates, 0.0)}
        raise PlanError(obstacle(block, constants, lambda _: ()))
    zeros = least(candidates, works)
    return Filling({**defaults, **dict.fromkeys(zeros, 0.0)}, zeroed=tuple(zeros))


def obstacle(
    block: NewBlock,
    constants: Mapping[str, float],
    silent: Callable[[Recording], Collection[int]],
) -> str:
    """Return why a block is not the identity even though all its layers are silent."""
    for recording in block.runs:
        found = rehearse(recording, block.modules, constants, silent(recording))
        mode = "in train mode, " if recording is not block.runs[0] else ""
        for exit_, entry in block.exits(recording):
            if found.same_as(exit_, entry):
                continue
            if exit_.shape != entry.shape:
                given, taken = ("x".join(map(str, v.shape)) for v in (exit_, entry))
                return f"{mode}it gives {given} where it takes {taken}"
            return mode + _parting(block, recording, found, entry)
    return "it does not give what it gets"


def _parting(block: NewBlock, recording: Recording, found: Rehearsal, entry: Value) -> str:
    """Return where what came in is lost on its way through a block."""
    inside = recording.inside(block.modules)
    sums = [op for op in inside if op.name == "add"]
    kept = [op for op in sums if found.same_as(op.outputs[0], entry)]
    lost = [op for op in sums if op not in kept and any(found.same_as(v, entry) for v in op.inputs)]
    if lost:
        return (
            f"what is added at {lost[0].module or 'the top level'} is not zero, even if all its "
            "layers give zero"
        )
    if not kept:
        takers = [op for op in inside if any(v.index == entry.index for v in op.inputs)]
        layers = [layer_of(name) for op in takers for name in op.parameters]
        follow = f" ({', '.join(dict.fromkeys(layers))} follow it)" if layers else ""
        return f"no shortcut around it gives what came in{follow}"
    last = kept[-1].outputs[0]
    op = next((op for op in inside if any(v.index == last.index for v in op.inputs)), kept[-1])
    where = op.module or "the top level"
    return f"{op.name} at {where} follows the addition and does not keep what it gets"


def _products(block: NewBlock, recording: Recording) -> list[tuple[str, tuple[str, ...]]]:
    return [found for _, found in _indexed_products(block, recording)]


def _indexed_products(
    block: NewBlock, recording: Recording
) -> Iterator[tuple[int, tuple[str, tuple[str, ...]]]]:
    """Yield the operations that read channels with a weight of the block.

    Yields:
        The operation's index, and the weight with what is added to the product.
    """
    roles = zip(block.channels.axes, block.channels.roles, strict=True)
    readers = {axis.tensor for axis, role in roles if role == "reader"}
    for op in recording.inside(block.modules):
        weights = [value for value in op.inputs if value.is_weight and len(value.origins) == 1]
        names = [value.origins[0] for value in weights if not value.is_curved]
        factors = {
            value.origins[0]
            for value in factors_of(op)
            if value.is_weight and len(value.origins) == 1
        }
        reading = next((n for n in names if n in block.parameters and n in readers | factors), "")
        if reading and len(weights) < len(op.inputs):
            yield op.index, (reading, tuple(name for name in names if name != reading))


def _gentle(
    block: NewBlock,
    recording: Recording,
    constants: Mapping[str, float],
    silent: Collection[int],
) -> dict[str, float]:
    """Return the weights of norms that get zeros: √eps, for an input without variance."""
    found = rehearse(recording, block.modules, constants, silent)
    gentle = {}
    for op in recording.inside(block.modules):
        if not any(norm in op.name for norm in NORMS) or not found.is_zero(op.inputs[0]):
            continue
        weight, eps = argument(op, "weight"), argument(op, "eps")
        if isinstance(weight, Value) and weight.parameter and isinstance(eps, float):
            gentle[weight.parameter] = math.sqrt(eps)
    return gentle
