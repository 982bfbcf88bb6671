"""What a block passes on when some of its layers give zero, found by running its operations.

A new block must return what it gets. No table says which operations keep a zero or a stream: the
operations that a network ran on meta tensors run again on small random numbers. What depends on
weights nobody knows is drawn twice, and what comes out the same both times is known: zero times
anything, a stream plus zero, a ReLU of what came out of a ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.labels.operators import MOVEMENTS, UNTAGGED, operator_name
from fxgrow.labels.propagate import propagate
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Operation, Tape, Value
from fxgrow.labels.trace import Traced, running_modules
from fxgrow.modules.calling import tensors_in

NORMS = ("batch_norm", "layer_norm", "group_norm", "rms_norm")

# Where the factors of a product stand among its arguments, and the term that is added to it.
_FACTORS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "aten.convolution": ((0, 1), 2),
    "aten.addmm": ((1, 2), 0),
    "aten.baddbmm": ((1, 2), 0),
    "aten.mm": ((0, 1), None),
    "aten.bmm": ((0, 1), None),
}
_DRAWS = 2
_EXACTLY = 1e-12  # up to the rounding of float64
_LOWER = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Passage:
    """One pass through a module.

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
        passages: every pass through the modules that were watched, by name.
    """

    space: LabelSpace
    tape: Tape
    passages: dict[str, list[Passage]]

    def inside(self, modules: Collection[str]) -> list[Operation]:
        """Return the operations that some modules ran, in order."""
        return [op for op in self.tape.operations if any_inside(op.module, modules)]

    def outside(self, modules: Collection[str]) -> list[Operation]:
        """Return the operations that none of some modules ran, in order."""
        return [op for op in self.tape.operations if not any_inside(op.module, modules)]

    def ends(self, modules: Sequence[str]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
        """Return what came into the first of some modules, and what came out of the last."""
        return self.passages[modules[0]][0].inputs, self.passages[modules[-1]][0].outputs


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
    watches: list[_Watch] = []
    watched = {name: traced.standin.get_submodule(name) for name in modules}

    def watch(value: Callable[[Tensor], Value]) -> _Watch:
        watches.append(_Watch(value, watched))
        return watches[-1]

    target = traced.target.train(training)
    try:
        with running_modules(traced.standin, stack):
            space, tape = propagate(
                target,
                traced.standin,
                traced.inputs,
                place=lambda: ("", stack[-1] if stack else ""),
                watch=watch,
                zeros=traced.zeros,
            )
    finally:
        traced.standin.eval()
    return Recording(space, tape, watches[0].passages)


class _Watch:
    """A context in which what goes into some modules and comes out of them is recorded."""

    def __init__(self, value: Callable[[Tensor], Value], modules: Mapping[str, nn.Module]) -> None:
        self.passages: dict[str, list[Passage]] = {name: [] for name in modules}
        self._value = value
        self._modules = modules
        self._entered: dict[str, tuple[Value, ...]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for name, module in self._modules.items():

            def enter(_: nn.Module, args: object, kwargs: object, name: str = name) -> None:
                found = (t for t in tensors_in((args, kwargs)) if t.is_floating_point())
                self._entered[name] = tuple(self._value(tensor) for tensor in found)

            def leave(_: nn.Module, args: object, output: object, name: str = name) -> None:
                del args
                outputs = tuple(self._value(tensor) for tensor in tensors_in(output))
                self.passages[name].append(Passage(self._entered[name], outputs))

            self._handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass
class Rehearsal:
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

    def same_as(self, value: Value, entry: Value) -> bool:
        """Return whether a value is what came in."""
        found = self.known.get(value.index)
        sample = self.samples[entry.index]
        return (
            found is not None
            and found.shape == sample.shape
            and torch.allclose(found, sample, rtol=_EXACTLY, atol=_EXACTLY)
        )


def rehearse(
    recording: Recording,
    modules: Sequence[str],
    constants: Mapping[str, float | Tensor],
    silent: Collection[int] = (),
) -> Rehearsal:
    """Run what some modules ran one after the other, on numbers.

    Args:
        recording: of the network.
        modules: the modules, which were watched and ran once.
        constants: parameters and buffers that are known: one number for all entries, or a tensor.
        silent: operations (indices) whose result is taken to be zero.
    """
    found = Rehearsal()
    generator = torch.Generator().manual_seed(0)
    entries, _ = recording.ends(modules)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for entry in entries:
            sample = _sample(entry, recording.tape, generator)
            found.samples[entry.index] = found.known[entry.index] = sample
        for op in recording.inside(modules):
            for value, number in zip(
                op.outputs, _results(op, found, constants, silent, generator), strict=False
            ):
                if number is not None and tuple(number.shape) == value.shape:
                    found.known[value.index] = number
    return found


def _sample(value: Value, tape: Tape, generator: torch.Generator) -> Tensor:
    """Return random numbers such as a value may hold: those that a ReLU made are not negative."""
    if value.producer is not None:
        op = tape.operations[value.producer]
        name = operator_name(op.target)
        moves = op.target.is_view or name in MOVEMENTS
        if moves or torch.Tag.pointwise in op.target.tags or name in UNTAGGED:
            drawn: dict[int, Tensor] = {}
            for x in op.inputs:
                drawn[x.index] = (
                    _sample(x, tape, generator) if moves else _normal(x.shape, generator)
                )
            result = _run(op, drawn)
            place = [output.index for output in op.outputs].index(value.index)
            if place < len(result) and tuple(result[place].shape) == value.shape:
                return result[place]
    return _normal(value.shape, generator)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), dtype=torch.float64, generator=generator)


def _results(
    op: Operation,
    found: Rehearsal,
    constants: Mapping[str, float | Tensor],
    silent: Collection[int],
    generator: torch.Generator,
) -> Sequence[Tensor | None]:
    """Return what is known of an operation's outputs."""
    if op.index in silent:
        return (torch.zeros(op.outputs[0].shape, dtype=torch.float64),)
    for value in op.inputs:
        if value.parameter in constants:
            full = torch.as_tensor(constants[value.parameter], dtype=torch.float64)
            found.known.setdefault(value.index, full.expand(value.shape))
    unknown = [value for value in op.inputs if value.index not in found.known]
    zeros = [value for value in op.inputs if found.is_zero(value)]
    name = operator_name(op.target)
    if zeros and name in _FACTORS:
        factors, term = _FACTORS[name]
        added = None if term is None else op.args[term]
        if any(found.is_zero(op.args[place]) for place in factors) and (
            added is None or found.is_zero(added)
        ):
            return (torch.zeros(op.outputs[0].shape, dtype=torch.float64),)
    if (unknown and not zeros) or name.startswith(("aten.empty", "aten.new_empty")):
        return ()
    seeded = torch.Tag.nondeterministic_seeded in op.target.tags
    draws = []
    for _ in range(_DRAWS if unknown or seeded else 1):
        drawn = {value.index: _normal(value.shape, generator) for value in unknown}
        draws.append(_run(op, {**found.known, **drawn}))
    return [
        first if all(torch.equal(first, x) for x in others) and _credible(first, seeded) else None
        for first, *others in zip(*draws, strict=True)
    ]


def _credible(number: Tensor, seeded: bool) -> bool:
    """Return whether equal draws tell a number: of what is drawn by chance, only zeros do."""
    return not seeded or (number.is_floating_point() and not bool(number.any()))


def _run(op: Operation, numbers: Mapping[int, Tensor]) -> list[Tensor]:
    """Return the results of an operation on numbers, in float64; none if it does not take them."""

    def number(value: Value) -> Tensor:
        return numbers[value.index].clone()

    kwargs = {key: item for key, item in op.kwargs.items() if key != "device"}
    if kwargs.get("dtype") in _LOWER:
        kwargs["dtype"] = torch.float64
    try:
        return list(tensors_in(op.target(*_with(number, op.args), **_with(number, kwargs))))
    except (RuntimeError, TypeError, IndexError, KeyError, NotImplementedError):
        return []


def _with(number: Callable[[Value], Tensor], tree: Any) -> Any:
    """Return a nest of tuples, lists and dicts with every value replaced by its number."""
    if isinstance(tree, Value):
        return number(tree)
    if type(tree) in (tuple, list):
        return type(tree)([_with(number, item) for item in tree])
    if type(tree) is dict:
        return {key: _with(number, item) for key, item in tree.items()}
    return tree


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


def factors_of(op: Operation) -> list[Value]:
    """Return the values that a convolution or a matrix product multiplies."""
    places, _ = _FACTORS.get(operator_name(op.target), ((), None))
    return [value for place in places if isinstance(value := op.args[place], Value)]


def argument(op: Operation, name: str) -> object:
    """Return an argument of an operation by its name in the operator's schema, or None."""
    for place, declared in enumerate(op.target._schema.arguments):
        if declared.name == name and place < len(op.args):
            return op.args[place]
    return op.kwargs.get(name)
