"""What a block passes on when some of its layers give zero, found by running its operations.

A new block must return what it gets. No table says which operations keep a zero or a stream: the
operations that a network ran on meta tensors run again on small random numbers. What depends on
weights nobody knows is drawn twice, and what comes out the same both times is known: zero times
anything, a stream plus zero, a ReLU of what came out of a ReLU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from fxgrow.errors import PlanError
from fxgrow.labels.ask import run_on
from fxgrow.labels.operators import operator_name, traits_of
from fxgrow.labels.propagate import propagate
from fxgrow.labels.running import running_modules
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Operation, Tape, Value
from fxgrow.labels.trace import Traced
from fxgrow.modules.calling import tensors_in

_DRAWS = 2
_EXACTLY = 1e-12  # up to the rounding of float64


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        inputs: the floating-point tensors that came in, in order.
        outputs: the tensors that came out, in order.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass
class Recording:
    """A run of a network in one mode.

    Attributes:
        space, tape: its labels and operations; each operation knows the module that ran it.
        calls: every call of the modules that were watched, by name.
    """

    space: LabelSpace
    tape: Tape
    calls: dict[str, list[ModuleCall]]
    _vanishing: dict[tuple[OpOverload, tuple[bool, ...]], bool] = field(default_factory=dict)

    def inside(self, modules: Collection[str]) -> list[Operation]:
        """Return the operations that some modules ran, in order."""
        return [op for op in self.tape.operations if any_inside(op.module, modules)]

    def outside(self, modules: Collection[str]) -> list[Operation]:
        """Return the operations that none of some modules ran, in order."""
        return [op for op in self.tape.operations if not any_inside(op.module, modules)]

    def used_outside(self, modules: Collection[str]) -> set[Value]:
        """Return what operations outside of some modules take, and what the network returns."""
        taken = {value for op in self.outside(modules) for value in op.inputs}
        return taken.union(self.tape.outputs)

    def ends(self, modules: Sequence[str]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
        """Return what came into the first of some modules, and what came out of the last.

        Raises:
            PlanError: one of these two is never called as a whole.
        """
        idle = next((name for name in (modules[0], modules[-1]) if not self.calls.get(name)), None)
        if idle is not None:
            raise PlanError(
                f"{idle} is not called as a whole: the network's code takes its parts, or none.",
                name=idle,
                way_out="Choose a network whose blocks are modules that are called.",
            )
        return self.calls[modules[0]][0].inputs, self.calls[modules[-1]][0].outputs

    def vanishes(self, op: Operation, zeros: Collection[Value]) -> bool:
        """Return whether a product is zero where some of what it takes is, whatever the rest holds.

        It is linear in each, so that ones, no sum of which is zero, can stand for the rest. The
        answer is the same at all sizes, and is asked for once.
        """
        if not op.is_product:
            return False
        key = op.target, tuple(value in zeros for value in op.inputs)
        if key not in self._vanishing:
            numbers = {v.index: _filled(v, 0.0 if v in zeros else 1.0) for v in op.inputs}
            results = run(op, numbers)
            self._vanishing[key] = bool(results) and not any(bool(x.any()) for x in results)
        return self._vanishing[key]


def any_inside(name: str, modules: Collection[str]) -> bool:
    """Return whether a name is that of one of some modules or of something in one."""
    return any(is_inside(name, module) for module in modules)


def is_inside(name: str, module: str) -> bool:
    """Return whether a name is that of a module or of something in it."""
    return name == module or name.startswith(f"{module}.") or not module


def record(traced: Traced, modules: Collection[str], *, training: bool = False) -> Recording:
    """Run a network's own ``forward`` on meta tensors and watch some of its modules.

    Args:
        traced: the network and inputs that it takes.
        modules: names of the modules to watch.
        training: run it in train mode.

    Raises:
        Exception: whatever the network raises.
    """
    stack: list[str] = []
    calls: dict[str, list[ModuleCall]] = {name: [] for name in modules}
    watched = {name: traced.standin.get_submodule(name) for name in calls}
    target = traced.target.train(training)
    try:
        with running_modules(traced.standin, stack):
            space, tape = propagate(
                target,
                traced.standin,
                traced.inputs,
                place=lambda: ("", stack[-1] if stack else ""),
                watch=partial(_watching, watched, calls),
                zeros=traced.zeros,
                decider=traced.decided.replay("train" if training else "eval"),
            )
    finally:
        traced.standin.eval()
    return Recording(space, tape, calls)


@contextlib.contextmanager
def _watching(
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, list[ModuleCall]],
    value: Callable[[Tensor], Value],
) -> Iterator[None]:
    """Append what goes into some modules and comes out of them, at each call."""
    entered: dict[str, tuple[Value, ...]] = {}

    def enter(name: str, _: nn.Module, args: object, kwargs: object) -> None:
        floating = (t for t in tensors_in((args, kwargs)) if t.is_floating_point())
        entered[name] = tuple(map(value, floating))

    def leave(name: str, _: nn.Module, args: object, output: object) -> None:
        del args
        calls[name].append(ModuleCall(entered[name], tuple(map(value, tensors_in(output)))))

    handles: list[Any] = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(leave, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class ConcreteRun:
    """A run of a module's operations on numbers, as far as they are known.

    Attributes:
        known: by index of a value: the number it has, whatever the unknown weights are.
        samples: what came in.
    """

    known: dict[int, Tensor] = field(default_factory=dict)
    samples: dict[int, Tensor] = field(default_factory=dict)

    def is_zero(self, value: Value) -> bool:
        """Return whether a value is known to be zero everywhere."""
        number = self.known.get(value.index)
        return number is not None and not bool(number.any())

    def same_as(self, value: Value, entry: Value, *, flat: bool = False) -> bool:
        """Return whether a value is what came in; flat, whether its entries are, in their order."""
        found, sample = self.known.get(value.index), self.samples[entry.index]
        if found is not None and flat:
            found, sample = found.flatten(), sample.flatten()
        return (
            found is not None
            and found.shape == sample.shape
            and torch.allclose(found, sample, rtol=_EXACTLY, atol=_EXACTLY)
        )


def run_concretely(
    recording: Recording,
    modules: Sequence[str],
    constants: Mapping[str, float | Tensor],
    zeroed: Collection[int] = (),
) -> ConcreteRun:
    """Run what some modules ran one after the other, on numbers.

    Args:
        recording: of the network.
        modules: the modules, which were watched and ran once.
        constants: parameters and buffers that are known: one number for all entries, or a tensor.
        zeroed: operations (indices) whose result is taken to be zero.
    """
    found = ConcreteRun()
    generator = torch.Generator().manual_seed(0)
    entries, _ = recording.ends(modules)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for entry in entries:
            sample = _sample(entry, recording.tape, generator)
            found.samples[entry.index] = found.known[entry.index] = sample
        for op in recording.inside(modules):
            for value in op.inputs:
                if value.parameter in constants:
                    full = torch.as_tensor(constants[value.parameter], dtype=torch.float64)
                    found.known.setdefault(value.index, full.expand(value.shape))
            if op.index in zeroed:
                results: Sequence[Tensor | None] = (_filled(op.outputs[0], 0.0),)
            else:
                results = _results(recording, op, found, generator)
            for value, number in zip(op.outputs, results, strict=False):
                if number is not None and tuple(number.shape) == value.shape:
                    found.known[value.index] = number
    return found


def _sample(value: Value, tape: Tape, generator: torch.Generator) -> Tensor:
    """Return random numbers such as a value may hold: those that a ReLU made are not negative."""
    if value.producer is not None:
        op = tape.operations[value.producer]
        traits = traits_of(op.target)
        if traits.is_movement or traits.is_pointwise:
            drawn: dict[int, Tensor] = {}
            for x in op.inputs:
                drawn[x.index] = (
                    _sample(x, tape, generator) if traits.is_movement else _normal(x, generator)
                )
            result = run(op, drawn)
            place = op.outputs.index(value)
            if place < len(result) and tuple(result[place].shape) == value.shape:
                return result[place]
    return _normal(value, generator)


def _normal(value: Value, generator: torch.Generator) -> Tensor:
    return torch.randn(value.shape, dtype=torch.float64, generator=generator)


def _filled(value: Value, number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64).expand(value.shape)


def _results(
    recording: Recording, op: Operation, found: ConcreteRun, generator: torch.Generator
) -> Sequence[Tensor | None]:
    """Return what is known of an operation's outputs."""
    unknown = [value for value in op.inputs if value.index not in found.known]
    zeros = [value for value in op.inputs if found.is_zero(value)]
    if unknown and not zeros:
        return ()
    if zeros and recording.vanishes(op, zeros):
        return (_filled(op.outputs[0], 0.0),)
    if operator_name(op.target).startswith(("aten.empty", "aten.new_empty")):
        return ()  # what was in memory may be the same twice, and nothing tells that it need not
    seeded = torch.Tag.nondeterministic_seeded in op.target.tags
    draws = []
    for _ in range(_DRAWS if unknown or seeded else 1):
        drawn = {value.index: _normal(value, generator) for value in unknown}
        draws.append(run(op, {**found.known, **drawn}))
    return [_agreed(numbers, seeded) for numbers in zip(*draws, strict=True)]


def _agreed(numbers: Sequence[Tensor], seeded: bool) -> Tensor | None:
    """Return what all draws gave, if they agree; of what is drawn by chance, only zeros are it."""
    first = numbers[0]
    credible = not seeded or (first.is_floating_point() and not bool(first.any()))
    return first if credible and all(torch.equal(first, other) for other in numbers) else None


def run(op: Operation, numbers: Mapping[int, Tensor]) -> list[Tensor]:
    """Return the results of an operation on numbers, in float64; none if it does not take them.

    Args:
        op: the operation.
        numbers: what it takes, by index of the value.
    """
    in_place = traits_of(op.target).is_mutable

    def number(value: Value) -> Tensor:
        return numbers[value.index].clone() if in_place else numbers[value.index]

    def spread(value: Value) -> Tensor:
        return number(value).contiguous()

    # One number that stands for all entries takes no memory; not every kernel reads it so.
    for taken in (number, spread):
        with contextlib.suppress(
            RuntimeError, TypeError, IndexError, KeyError, NotImplementedError
        ):
            return run_on(op, taken)
    return []


def least(candidates: Sequence[Any], works: Callable[[Collection[Any]], bool]) -> list[Any]:
    """Return as few candidates, and as late ones, as still work together.

    Args:
        candidates: in order; all of them together work.
        works: whether some of them do.

    Example:
        >>> least([1, 2, 3, 4], lambda some: 2 in some and 3 in some)
        [2, 3]
    """
    kept = list(candidates)
    for candidate in candidates:
        fewer = [other for other in kept if other != candidate]
        if works(fewer):
            kept = fewer
    return kept


def argument(op: Operation, name: str) -> object:
    """Return an argument of an operation by its name in the operator's schema, or None."""
    place = traits_of(op.target).places.get(name)
    return op.args[place] if place is not None and place < len(op.args) else op.kwargs.get(name)


def norms_among(operations: Iterable[Operation]) -> Iterator[tuple[Operation, str, float]]:
    """Yield the norms that have a weight, with its name and the eps: what alone takes the two."""
    for op in operations:
        weight, eps = argument(op, "weight"), argument(op, "eps")
        if isinstance(weight, Value) and weight.parameter and isinstance(eps, float):
            yield op, weight.parameter, eps
