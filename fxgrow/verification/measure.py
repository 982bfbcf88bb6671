"""Measure what a surgery did, in each part of the network that was followed; find its fault."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow.apply.graph import insert_multipliers
from fxgrow.apply.module import apply_to_module
from fxgrow.channels.scope import check_module, follow
from fxgrow.errors import FxgrowError, VerificationError
from fxgrow.modules.calling import Arguments, tensors_in
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.inputs import batches_for, inputs_in_training
from fxgrow.modules.standin import stand_in
from fxgrow.modules.tensors import layer_of, named_tensors
from fxgrow.plan.edits import TensorEdit
from fxgrow.plan.init import Init
from fxgrow.plan.pairing import cancels
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import BlockPlan, Scope
from fxgrow.verification import weights
from fxgrow.verification.attributes import check_attributes, check_flags
from fxgrow.verification.cases import Case, Network
from fxgrow.verification.constants import exact_constants
from fxgrow.verification.findings import (
    Effort,
    ExactResult,
    Judgement,
    ModeResult,
    Verification,
)
from fxgrow.verification.forward import Mode, NoLongerRuns, lent_copy, shown, told_of_first
from fxgrow.verification.judge import agree, judge
from fxgrow.verification.layout import check_layout
from fxgrow.verification.rounding import MOST, told_rounding
from fxgrow.verification.sizes import judged_inputs

UNRUN = "the second network does not run where the first does"  # how a note begins
_WORST_FIRST: tuple[Judgement, ...] = (
    "failed", "changed", "as predicted", "skipped", "preserved",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is to be measured, and how.

    Attributes:
        plan: what the network was grown by.
        model: the network before; never changed.
        grown: the network after.
        example_inputs: inputs to measure on; None takes those of the plan.
        init: what filled the new weights; None takes what the plan names.
        finish: what was done to the grown network besides, in place.
        effort: how thoroughly.
        progress: told of the step, with what is done of it.
    """

    plan: Plan
    model: nn.Module
    grown: nn.Module
    example_inputs: object = None
    init: Init | None = None
    finish: Callable[[nn.Module], object] | None = None
    effort: Effort = "full"
    progress: Callable[[str], object] = field(default=lambda step: None)


def measure(task: Task) -> Verification:
    """Return the judgement of a grown network.

    Raises:
        VerificationError: a network does not run, or a tensor or an attribute is not as the plan
            has it.
    """
    made = task.plan
    check_attributes(made, task.grown)
    check_flags(made, task.model, task.grown)
    _check_layout(task)
    if made.after and (made.prediction or made.norms):
        # The prediction is of the last step. Those before it keep the function: that is judged here
        first = replace(made.after[-1], after=made.after[:-1])
        between = apply_to_module(first, task.model)
        judged = measure(replace(task, plan=first, grown=between, finish=None))
        if judged.verdict != "preserved":
            return judged
    case = _case(task)
    # What a large kernel reads depends on the input's size, and so may whether it runs at all
    whole = any(step.kernels for step in made.steps)
    found, parts = [], _parts(task)
    for index, scope in enumerate(parts):
        case = replace(case, part=scope.module)
        runs = (case.after if whole else case.before).module.get_submodule(scope.module)
        given = task.example_inputs if scope in made.scopes else None
        batches = batches_for(runs, scope.inputs, scope.inputs_inferred, given, whole=whole)
        if given is None:
            batches = _unprompted(runs, scope, batches)
        old, new = (n.module.get_submodule(scope.module) for n in (case.before, case.after))
        inputs, notes = judged_inputs(old, new, batches, task.effort, draw=True, needs_room=whole)
        told_of = _Countdown(task.progress, index, len(parts))
        judged = judge(replace(case, notes=case.notes + notes), inputs, told_of)
        if (ratio := _ratio(judged)) > MOST:
            note = told_rounding(made, case, inputs.given[0][0], ratio)
            judged = replace(judged, notes=(*judged.notes, note))
        found.append(judged)
    combined = _combined(found, [scope.module for scope in parts])
    return told(made, _outside(made, parts, combined))


def _check_layout(task: Task) -> None:
    """Return if all tensors are as the plan lays them out.

    Raises:
        VerificationError: one is not; it and the first part that it belongs to are named.
    """
    made, before, after = task.plan, named_tensors(task.model), named_tensors(task.grown)
    try:
        check_layout(made, before, after, free=_finished(task))
    except VerificationError as error:
        layer = layer_of(error.name)
        groups = (group for step in made.steps for group in step.groups)
        guilty = next((g.name for g in groups if layer in (*g.writers, *g.readers)), error.name)
        raise VerificationError(
            f"{error.message} The first part that breaks is {guilty}.",
            name=guilty,
            way_out=way_out_of(made, guilty),
        ) from error


def way_out_of(made: Plan, guilty: str) -> str:
    """Return what to do about a part of a plan that breaks: not every verb leaves parts out."""
    if not hasattr(made.request, "exclude"):
        return "Please report this."
    return f"Leave it out with --exclude '{guilty}' and please report this."


def _finished(task: Task) -> set[str]:
    """Return the names of tensors that were given the statistics of data after the surgery."""
    if task.finish is None:
        return set()
    norms = (name for name, m in task.grown.named_modules() if isinstance(m, _BatchNorm))
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{norm}.{kind}" for norm in norms for kind in kinds}


def _unprompted(model: nn.Module, scope: Scope, batches: list[Arguments]) -> list[Arguments]:
    """Return batches of which not all have the sizes that a plan tells: it may be anybody's."""
    shapes = _inferred_shapes(model)
    if not shapes or shapes == scope.inputs:
        return batches
    return [batches[0], batches_for(model, shapes, True)[0]]


def _inferred_shapes(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of inputs that a network takes in both modes, or () if none are found."""
    arguments = inputs_in_training(stand_in(model), lambda: None, ())
    return tuple(tuple(tensor.shape) for tensor in tensors_in(arguments))


def _ratio(found: Verification) -> float:
    """Return how many times the old network's rounding the grown one's is, at most."""
    results = (found.eval, found.train)
    return max((r.ratio for r in results if r is not None and r.ratio is not None), default=0.0)


def _case(task: Task) -> Case:
    """Return the networks of a task, to be judged as wholes."""
    made, model = task.plan, task.model
    tensors = named_tensors(model)
    written = named_tensors(task.grown) | exact_constants(model, task.grown)
    own = weights.own(model)
    drawn = (weights.drawn(model), weights.drawn(model, constant_only=True))
    before = Network(model, own, drawn)
    after = Network(
        task.grown,
        weights.grown(made, own, tensors, task.init, written, lift=True),
        tuple(weights.grown(made, w, tensors, task.init, written, lift=False) for w in drawn),
        task.finish,
    )
    foretold = predictable(made)
    notes = _notes_on(weights.not_finite(model))
    if not foretold:
        notes += ("new channels do not cancel: the change was measured, not predicted",)
    return Case(
        before, after, _reference(task, before), norms=made.norms, predictable=foretold,
        edits=_last_edits(made, task.grown), notes=notes, judged=judged_modes(made),
        effort=task.effort,
    )  # fmt: skip


def _notes_on(broken: Sequence[str]) -> tuple[str, ...]:
    """Return what to say of tensors with entries that are not finite."""
    if not broken:
        return ()
    return (f"{shown(broken)}: NaN or infinite entries were taken as 0 in the float64 check",)


def predictable(made: Plan) -> bool:
    """Return whether a plan says what becomes of the function."""
    return all(
        not isinstance(step.request, Widen)
        or (not step.request.noise and all(cancels(group.pairing) for group in step.groups))
        for step in made.steps
    )


def _reference(task: Task, before: Network) -> Network | None:
    """Return what the grown network must equal, where that is not the old one."""
    made = task.plan
    if not made.prediction and not (made.after and made.norms):
        return None
    network = replace(before, module=lent_copy(task.model))
    if made.after:
        first = replace(made.after[-1], after=made.after[:-1])
        between = apply_to_module(first, task.model)
        names, written = named_tensors(task.model), named_tensors(between)
        given, *drawn = (
            weights.grown(first, w, names, None, written, lift=False)
            for w in (before.given, *before.drawn)
        )
        network = Network(between, given, tuple(drawn))
    if not made.prediction:
        return network
    known = named_tensors(network.module)
    module = insert_multipliers(network.module, made.prediction, both_modes=False)
    given, *drawn = (weights.besides(w, known, module) for w in (network.given, *network.drawn))
    return Network(module, given, tuple(drawn))


def _parts(task: Task) -> list[Scope]:
    """Return what is compared: what was followed, and the whole wherever it runs."""
    made = task.plan
    parts = list(made.scopes)
    if all(scope.module for scope in parts) and (shapes := _inferred_shapes(task.model)):
        parts.append(Scope("", shapes, True, parts[0].tracer))
    return parts


def _outside(made: Plan, parts: Sequence[Scope], found: Verification) -> Verification:
    """Return a judgement that fails where the plan changes what was not compared."""
    inside = [f"{scope.module}." if scope.module else "" for scope in parts]
    changed = [
        name
        for step in made.steps
        for name in step.tensors
        if not any(name.startswith(prefix) for prefix in inside)
    ]
    if not changed:
        return found
    note = f"{shown(changed)} changed, outside of what was compared"
    return replace(found, verdict="failed", notes=(*found.notes, note))


class _Countdown:
    """Tells how much of a judgement is done, and how long the rest will take."""

    def __init__(self, progress: Callable[[str], object], part: int, parts: int) -> None:
        self._progress, self._part, self._parts = progress, part, parts
        self._since = time.monotonic()

    def __call__(self, done: float) -> None:
        """Tell the fraction that is done of this part."""
        spent = time.monotonic() - self._since
        left = spent * (1 - done) / done * (self._parts - self._part)
        whole = (self._part + done) / self._parts
        text = f"verifying, {whole:.0%}"
        self._progress(f"{text}, about {left:.0f} s left" if done < 1 else text)


def _last_edits(made: Plan, grown: nn.Module) -> dict[str, TensorEdit]:
    """Return the edits after which tensors have the shapes that they have in the end."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(grown).items()}
    return {
        name: edit
        for step in made.steps
        for name, edit in step.tensors.items()
        if edit.new_shape == shapes.get(name)
    }


def judged_modes(made: Plan) -> tuple[Mode, ...]:
    """Return the modes in which a plan tells what the network computes."""
    return ("eval",) if _changed_in_training(made) else ("eval", "train")


def _changed_in_training(made: Plan) -> list[BlockPlan]:
    changed = (step for step in made.steps if step.rearrangements or step.names)
    return [b for step in changed for b in step.blocks if b.in_training != "exact"]


def told(made: Plan, found: Verification) -> Verification:
    """Return a judgement that says where train mode was measured and not judged."""
    changed = _changed_in_training(made)
    if not changed or found.train is None:
        return found
    note = (
        f"train mode was measured and not judged: a new batch norm ({changed[0].name}) normalises "
        f"there, and the outputs differ by {found.train.float64.max_rel:.3g} of the largest"
    )
    return replace(found, notes=(*found.notes, note))


def _combined(found: Sequence[Verification], modules: Sequence[str]) -> Verification:
    """Return the judgements of the parts of a network as one: the worst verdict and figures."""
    notes = [note for verification in found for note in verification.notes]
    drawn = [v.drawn for v in found if v.drawn is not None]
    if all(modules):
        names = ", ".join(modules)
        notes.append(f"what was compared is what comes out of {names}, not of the whole network")
    return Verification(
        verdict=min((v.verdict for v in found), key=_WORST_FIRST.index),
        eval=_worst([v.eval for v in found]),
        train=_worst([v.train for v in found]),
        drawn=functools.reduce(ExactResult.worst, drawn) if drawn else None,
        effort=found[0].effort,
        inputs=tuple(text for v in found for text in v.inputs),
        without_gradient=tuple(dict.fromkeys(n for v in found for n in v.without_gradient)),
        notes=tuple(dict.fromkeys(notes)),
    )


def _worst(results: Sequence[ModeResult | None]) -> ModeResult | None:
    worst: ModeResult | None = None
    for result in results:
        worst = result if worst is None or result is None else worst.worst(result)
    return worst


@exclusive
def verify(
    before: nn.Module, after: nn.Module, example_inputs: object = None, module: str = ""
) -> Verification:
    """Compare what two networks compute, in float64 and as they are, in eval and train mode.

    Args:
        before: the old network; not changed.
        after: the new network; not changed.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; None infers
            an input from ``before``, or one for each of its largest parts that can be followed, if
            the whole cannot.
        module: compare this submodule alone; the inputs are then its.

    Returns:
        The measurements. ``verdict`` is ``preserved`` if they agree within what their own dtype
        rounds (1e-10 in float64), else ``failed``, also where the second does not run.

    Raises:
        VerificationError: the first network does not run, or nothing can be compared.
        TraceError: no input could be inferred, or there is no such submodule.
    """
    if example_inputs is None:
        traced = [analysis.traced for analysis in follow(before, None, module)[0]]
        parts = [(t.module, t.input_shapes, t.inferred) for t in traced]
    else:
        if module:
            check_module(before, module)
        parts = [(module, (), False)]
    networks = Network(before, weights.own(before)), Network(after, weights.own(after))
    broken, found = weights.not_finite(before), []
    try:
        for name, shapes, inferred in parts:
            old, new = (network.get_submodule(name) for network in (before, after))
            batches = batches_for(old, shapes, inferred, example_inputs)
            inputs, notes = judged_inputs(old, new, batches, "full", draw=False)
            case = Case(*networks, part=name, notes=(*_notes_on(broken), *notes))
            try:
                judged = judge(case, inputs)
            except NoLongerRuns as error:
                told = tuple("x".join(map(str, t.shape)) for t in tensors_in(batches[0]))
                note = f"{UNRUN}: {error.cause}"
                found.append(Verification("failed", effort="full", inputs=told, notes=(note,)))
                continue
            except VerificationError as error:
                raise told_of_first(old, batches[0], error) from error
            results = [r for r in (judged.eval, judged.train) if r is not None]
            same = all(agree(result, after) for result in results)
            found.append(replace(judged, verdict="preserved" if same else "failed"))
    except FxgrowError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise VerificationError(f"the networks cannot be compared: {error}.") from error
    return _combined(found, [name for name, _, _ in parts])
