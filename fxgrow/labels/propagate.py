"""Run a network on meta tensors and let the labels flow: one pass for all channels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from fxgrow.errors import TooLargeError
from fxgrow.labels import generic, made, noise, slices
from fxgrow.labels.layers import Layers, support, without_repeats
from fxgrow.labels.operators import constant_of, operator_name, place_of, traits_of
from fxgrow.labels.pieces import note_pieces
from fxgrow.labels.pins import PinKind
from fxgrow.labels.rules import RULES
from fxgrow.labels.space import Fill, LabelSpace
from fxgrow.labels.step import Step
from fxgrow.labels.tape import Operation, Tape, Value
from fxgrow.labels.unread import forget, kept_tensors, unread
from fxgrow.labels.whole import WholeCalls
from fxgrow.labels.writes import written_back
from fxgrow.modules.calling import Arguments, call, map_tensors, results_in, tensors_in
from fxgrow.modules.decisions import Decider
from fxgrow.modules.draws import Chance, law_of, same_chance
from fxgrow.modules.on_meta import OnMeta
from fxgrow.modules.tensors import held_in, lasting_tensors

Place = tuple[str, str]  # fx node, module
# Entries of one tensor: 1 GB in float64. Following needs no memory for values, and comparing does.
MOST_ENTRIES = 2**27
Watch: TypeAlias = Callable[[Callable[[Tensor], Value]], AbstractContextManager[object]]


class Labeller(OnMeta):  # type: ignore[no-untyped-call]
    """A dispatch mode that labels what runs under it and writes it on a tape.

    Args:
        named: parameters and buffers by fully qualified name; tied ones under their first name.
        space: where labels are made and unified.
        place: returns the fx node and the module that are running.
        zeros: names of those that are zeros by definition, and so are new entries of theirs.
        most: entries that a tensor may have.
        decider: answers where the network looks at values.
        chance: what masks with values are made of.
        held: names of constants that modules hold in plain attributes, by their ids.
    """

    def __init__(
        self,
        named: Mapping[str, Tensor],
        space: LabelSpace,
        place: Callable[[], Place] = lambda: ("", ""),
        zeros: Collection[str] = (),
        most: int = MOST_ENTRIES,
        decider: Decider | None = None,
        chance: Chance = "spread",
        held: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(decider, chance)
        self._most, self._held = most, held or {}
        self.space = space
        self._zeros = zeros
        self.tape = Tape()
        self._said: list[tuple[int, int]] = []  # mixers and pins known before each operation
        self._place = place
        self._names = {id(tensor): name for name, tensor in reversed([*named.items()])}
        self._alive: list[object] = [named]  # ids are only unique among the living
        self._values: dict[int, Value] = {}
        self._written: dict[int, tuple[Value, Tensor]] = {}  # into what was one number, by its id
        self._numbers: dict[int, float] = {}  # in constants of one entry, by the id of their twin

    def joined(self, tensor: Tensor, twin: Tensor) -> None:
        """Know the twin of a constant for the same value."""
        self._values[id(twin)] = self.value(tensor)
        if tensor.numel() == 1 and not tensor.is_complex():
            self._numbers[id(twin)] = float(tensor.item())

    def left(self, tensor: Tensor, name: str) -> None:
        """Pin channels that Python reads: nobody sees what it does with them."""
        for layer in self.value(tensor).layers:
            self.space.pin(layer, PinKind.LOOKED_UP, name)

    def value(self, tensor: Tensor) -> Value:
        """Return the recorded value of a tensor; a parameter's axes are labelled on first use."""
        found = self._values.get(id(tensor))
        if found is None:
            name = self._names.get(id(tensor), "")
            layers: Layers = ()
            if name:
                if isinstance(tensor, nn.Parameter):
                    self.space.trained.add(name)
                fill: Fill | None = "copy" if name in self._zeros else None
                shape = tensor.shape
                layers = tuple([
                    self.space.layer(name, dim, shape, fill)
                    for dim, size in enumerate(shape)
                    if size > 1  # a width of one may be broadcast
                ])  # fmt: skip
            held, origins = self._held.get(id(tensor), ""), (name,) if name else ()
            known: dict[str, Any] = {"parameter": name, "origins": origins, "held": held}
            found = self._enter(tensor, layers, is_weight=True, **known)
        return found

    def enter_input(self, tensor: Tensor, layers: Layers = ()) -> None:
        """Announce an input of the network, and the labels that it brings along."""
        self._enter(tensor, layers, is_input=True, held="an input of the network")

    def _enter(self, tensor: Tensor, layers: Layers, **facts: Any) -> Value:
        if layers and not tensor.numel():
            layers = ()  # what has no entries has no channels
        layers = without_repeats(layers)
        values = self.tape.values
        value = Value(len(values), tuple(tensor.shape), tensor.dtype, layers, **facts)
        values.append(value)
        self._values[id(tensor)] = value
        self._alive.append(tensor)
        return value

    def ran(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
        result: object,
    ) -> None:
        """Label what an operation gave, and append it to the tape."""
        node, module = self._place()
        self._said.append((len(self.space.mixers), len(self.space.pins)))
        outputs = (result,) if isinstance(result, Tensor) else tuple(tensors_in(result))
        for output in outputs:  # before anything is made of that size; weights may be larger
            if output.numel() > self._most and _is_larger(output, operands):
                raise _too_large(func, module, output)
        known, value_of = self._values, self.value
        inputs = tuple([known.get(id(tensor)) or value_of(tensor) for tensor in operands])
        for value in inputs:
            if value.positions is not None:
                self._use(value)
        if not operands and not func._schema.is_mutable:  # nothing that could be known of it
            self._enter_made(func, args, kwargs, outputs, (node, module))
            return
        where = self.space.place = place_of(func, node, module)
        traits = traits_of(func)
        step = Step(self.space, func, traits, args, kwargs, operands, outputs, value_of, where)
        layers = self._labels(step, inputs)
        done = generic.alters(step) if layers and layers[0] else ""
        if done:
            self._note(done, inputs, ordered=not traits.is_commutative)
        if traits.name == "aten.cat" and layers[0]:
            note_pieces(self.space, self.tape, inputs, step.argument("dim", 0))
        seen_args, seen_kwargs = map_tensors(value_of, (args, kwargs))
        facts = _facts(step, inputs)
        own = facts | step.own_facts
        index = len(self.tape.operations)
        told = step.positions
        positions = self._made(step, inputs, layers)
        values = tuple([
            self._enter(
                tensor, flow, producer=index, positions=told.get(place), made=positions[place],
                **(facts if place else own),
            )
            for place, (tensor, flow) in enumerate(zip(outputs, layers, strict=True))
        ])  # fmt: skip
        pointwise = traits.is_pointwise and not traits.is_layout
        numbers = generic.numbers_of(step, self._numbers) if pointwise else ()
        if traits.is_mutable:
            self._write_back(step, index)
            self._numbers.pop(id(operands[0]), None)
        self.tape.operations.append(
            Operation(index, func, node, module, seen_args, seen_kwargs, inputs, values, numbers)
        )

    def _enter_made(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: tuple[Tensor, ...],
        place: Place,
    ) -> None:
        """Append what makes tensors of numbers alone, as each batch norm does, to the tape."""
        index = len(self.tape.operations)
        is_uniform = traits_of(func).is_uniform
        drawn = noise.drawn_by(func)
        of_any_width = is_uniform or drawn in ("truth", "uniform")
        values = [
            self._enter(
                x, (), producer=index, is_uniform=is_uniform, drawn=drawn,
                number=constant_of(func, args),
                made=made.numbered(self.space, x.shape) if of_any_width else (),
            )
            for x in outputs
        ]  # fmt: skip
        self.tape.operations.append(Operation(index, func, *place, args, kwargs, (), tuple(values)))

    def _made(
        self, step: Step, inputs: tuple[Value, ...], labels: Sequence[Layers]
    ) -> Sequence[Layers]:
        """Return the numbers of positions of constants in each output."""
        if step.traits.is_factory:
            shapes = [output.shape for output in step.outputs]
            like = inputs[0].made if inputs and inputs[0].shape == shapes[0] else ()
            even = step.traits.is_uniform
            return [made.numbered(self.space, x, like) if even else () for x in shapes]
        if step.traits.name in ("aten.expand", "aten.repeat") and not inputs[0].layers:
            return (made.expanded(self.space, step, inputs[0].made),)
        if not any(value.made for value in inputs):
            return ((),) * len(step.outputs)
        return made.follow(step, [value.made for value in inputs], labels)

    def end(self, model: nn.Module, result: object) -> None:
        """Note what the network returned, and which operations did not lead to it.

        Args:
            model: the network that ran.
            result: what it returned.
        """
        for tensor in results_in(result):
            value = self.value(self.current(tensor))
            self._use(value)
            self.tape.outputs.append(value)
            for layer in value.layers:
                self.space.pin(layer, PinKind.OUTPUT)
        held = [self.current(x) for x in (*tensors_in(result), *kept_tensors(model))]
        kept = [self._values[id(x)] for x in held if id(x) in self._values]
        self.tape.unread = unread(self.tape, kept)
        forget(self.space, self.tape.unread, self._said)

    def _use(self, value: Value) -> None:
        """Pin the channels among which a value that is used tells positions."""
        if value.positions is not None:
            for layer, name in value.positions:
                self.space.pin(layer, PinKind.MIXED, name)

    def _write_back(self, step: Step, index: int) -> None:
        """Let the tensor that a view shows a part of carry what was written into the view."""
        view = step.operands[0] if step.operands else None
        base = None if view is None else self.base_of(view)
        if view is None or base is None:
            return
        known, written = self.value(base), self.value(view)
        if not written.layers:
            if not (known.layers or written.is_weight):  # it holds data from now on
                self._enter(base, (), producer=index, made=known.made)
            return
        last, table = self._written.get(id(base), (known, None))
        if known.is_uniform and not known.layers:
            table = torch.zeros(base.shape, dtype=torch.int32)
        elif last is not known:  # another operation changed it
            table = None
        layers = written_back(
            self.space, base, known.layers, view, written.layers, step.place, table
        )
        if layers is not known.layers:
            known = self._enter(base, layers, producer=index)
        if table is not None:
            self._written[id(base)] = (known, table)

    def _note(self, done: str, inputs: tuple[Value, ...], *, ordered: bool) -> None:
        """Record what is done to the labels of each operand, and which operand they are."""
        labelled = [(place, value) for place, value in enumerate(inputs) if value.layers]
        for place, value in labelled:
            told = f"{done} #{place}" if ordered and len(labelled) > 1 else done
            for layer in self._as_read(value):
                self.space.note(told, layer)

    def _as_read(self, value: Value) -> Layers:
        """Return an operand's labels, those of a grouped convolution's columns in all groups."""
        groups = self.space.convolution_groups.get(value.parameter, 0)
        if groups < 2:
            return value.layers
        columns = self.space.axis(value.parameter, 1, groups * value.shape[1], groups)
        return tuple(columns if support(x) == {1} else x for x in value.layers)

    def _labels(self, step: Step, inputs: tuple[Value, ...]) -> tuple[Layers, ...]:
        if step.traits.is_factory or not any(value.layers for value in inputs):
            return ((),) * len(step.outputs)
        nothing = step.outputs and not any(tensor.numel() for tensor in step.outputs)
        if nothing and not step.traits.is_movement:
            return step.give_up(PinKind.EMPTY)
        if noise.is_shared(step, inputs):
            return ((),) * len(step.outputs)
        noise.pin_drawn(step, inputs)
        rule = RULES.get(step.traits.name)
        if rule is not None and rule.labels is not None:
            return rule.labels(step)
        if step.traits.is_movement:
            try:
                return generic.movement(step)
            except RuntimeError:  # what suits data need not suit integers: view_as_complex
                return step.give_up(PinKind.LAYOUT, str(step.target))
        if step.traits.is_pointwise or noise.is_entrywise(step):
            return generic.pointwise(step)
        return slices.slice_by_slice(step)


_NOWHERE: frozenset[int] = frozenset()


def _facts(step: Step, inputs: tuple[Value, ...]) -> dict[str, Any]:
    """Return what all outputs of an operation have in common, as attributes of their values."""
    traits = step.traits
    weight = noise.is_on_weights(inputs)
    kept = traits.is_movement or (traits.is_pointwise and not law_of(step.target))
    even = [value.is_uniform for value in inputs if value.shape]
    moved = kept and bool(even) and all(even)
    lone = len(inputs) == 1 and bool(step.outputs)
    same = traits.is_movement
    return {
        "is_weight": weight,
        "origins": tuple(dict.fromkeys(n for v in inputs for n in v.origins)) if weight else (),
        "is_view": traits.is_view,
        "is_uniform": traits.is_uniform or moved,
        "number": inputs[0].number if lone and same else constant_of(step.target, step.args),
        "is_padded": traits.is_padding or generic.is_joined_by_constants(step, inputs),
        "drawn": noise.drawn_in(step, inputs),
        "is_masked": noise.is_masked(step, inputs),
        "is_curved": weight and generic.is_curved(step, inputs),
        "repeated": generic.repeated(step, inputs[0]) if lone else _NOWHERE,
        "held": next((x.held for x in inputs if x.held), "") if kept else "",
        "runs": generic.runs(step, inputs[0]) if lone else 1,
    }


def no_watch(value: Callable[[Tensor], Value]) -> AbstractContextManager[object]:
    """Watch nothing."""
    del value
    return nullcontext()


def _is_larger(output: Tensor, operands: Sequence[Tensor]) -> bool:
    """Return whether a tensor has more entries than any that it was made of."""
    return all(output.numel() > operand.numel() for operand in operands)


def _too_large(func: OpOverload, module: str, output: Tensor) -> TooLargeError:
    """Return the refusal of an operation that makes a tensor of too many entries."""
    shape = "x".join(map(str, output.shape))
    return TooLargeError(
        f"on these inputs, {operator_name(func)} at {module or 'the outermost module'} makes a "
        f"tensor of {shape}, too large to be compared.",
        name=module,
        way_out="Give smaller example inputs.",
    )


def propagate(
    run: Callable[..., Any],
    model: nn.Module,
    inputs: Arguments,
    *,
    place: Callable[[], Place] = lambda: ("", ""),
    space: LabelSpace | None = None,
    watch: Watch = no_watch,
    zeros: Collection[str] = (),
    most: int = MOST_ENTRIES,
    decider: Decider | None = None,
    chance: Chance = "spread",
) -> tuple[LabelSpace, Tape]:
    """Run ``run`` on meta tensors and return its labels and its tape.

    Args:
        run: the model itself, or an interpreter of its graph.
        model: owns the parameters and buffers that ``run`` uses; all on the meta device.
        inputs: meta tensors (and whatever else the model takes), positional or by keyword.
        place: returns the fx node and module that are running.
        space: of an earlier run of the same network, to which this one adds.
        watch: given the labeller's ``value``, returns a context for the run: something that sees
            the calls from above (:class:`fxgrow.labels.sizes.Recorder`).
        zeros: names of buffers that no state_dict holds and that are labelled all the same; see
            :func:`zero_buffers`.
        most: entries that a tensor may have.
        decider: answers where the network looks at values; without one, that fails.
        chance: what masks with values are made of.

    Returns:
        The label space (to be resolved with ``roots()``) and the tape of operations.

    Raises:
        TooLargeError: an operation makes a larger tensor.
    """
    space = LabelSpace() if space is None else space
    named = lasting_tensors(model, besides=zeros)
    space.reserve(sum([sum(tensor.shape) for tensor in named.values()]))
    labeller = Labeller(named, space, place, zeros, most, decider, chance, held_in(model))
    with torch.no_grad(), same_chance(chance) as common, labeller, WholeCalls(labeller):
        for tensor in tensors_in(inputs):
            labeller.enter_input(tensor)
        with watch(labeller.value):
            result = call(run, inputs)
    space.join_readers()
    space.place = ""
    masks = any(law_of(op.target) == "mask" for op in labeller.tape.operations)
    labeller.tape.by_chance = common.drew or masks
    labeller.end(model, result)
    return space, labeller.tape
