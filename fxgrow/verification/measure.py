"""Measure what a surgery did, in each part of the network that was followed; find its fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxgrow.apply.graph import insert_multipliers
from fxgrow.apply.module import apply_to_module, grow_float64
from fxgrow.channels.analysis import analyse
from fxgrow.channels.scope import check_module, follow
from fxgrow.errors import FxgrowError, PlanError, VerificationError
from fxgrow.grow.kernels.planner import only_kernels
from fxgrow.grow.widen.submodules import plan_parts
from fxgrow.labels.trace import trace
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.inputs import arranged, batches_for
from fxgrow.modules.standin import float64_copy
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import TensorEdit
from fxgrow.plan.init import Init
from fxgrow.plan.pairing import cancels
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import BlockPlan, Scope
from fxgrow.verification.forward import Mode
from fxgrow.verification.judge import (
    Case,
    Judgement,
    ModeResult,
    Verification,
    agree,
    judge,
    notes_on,
)

_WORST_FIRST: tuple[Judgement, ...] = ("failed", "as predicted", "skipped", "preserved")


def measure(
    made: Plan,
    model: nn.Module,
    grown: nn.Module,
    example_inputs: object,
    init: Init,
    finish: Callable[[nn.Module], None] | None = None,
) -> Verification:
    """Return the judgement of a grown network.

    Args:
        made: the plan it was grown by.
        model: the network before.
        grown: the network after.
        example_inputs: inputs to measure on; None takes those of the plan.
        init: what filled the new weights.
        finish: what was done to the grown network besides, in place.
    """
    exact, broken = float64_copy(model)
    exact_grown = grow_float64(made, exact, init)
    if finish is not None:
        finish(exact_grown)
    reference: nn.Module = exact
    if made.after and (made.prediction or made.norms):
        # The prediction is of the last step. Those before it keep the function: that is judged here
        first = replace(made.after[-1], after=made.after[:-1])
        judged = measure(first, model, apply_to_module(first, model), example_inputs, init)
        if judged.verdict != "preserved":
            return judged
        reference = grow_float64(first, exact)
    if made.prediction:
        start = float64_copy(model)[0] if reference is exact else reference
        reference = insert_multipliers(start, made.prediction, both_modes=False)
    asked = made.request
    predictable = not isinstance(asked, Widen) or (not asked.noise and cancels(asked.pairing))
    notes = notes_on(broken)
    if not predictable:
        notes += ("new channels do not cancel: the change was measured, not predicted",)
    case = Case(
        model, grown, exact, exact_grown, reference, made.norms, predictable,
        _last_edits(made, grown), notes, judged_modes(made),
    )  # fmt: skip
    # What a large kernel reads depends on the input's size, and so may whether it runs at all
    whole = any(step.kernels for step in made.steps)
    found = []
    for scope in made.scopes:
        part = _within(case, scope.module)
        runs = part.after if whole else part.before
        inferred = scope.inputs_inferred
        batches = batches_for(runs, scope.inputs, inferred, example_inputs, whole=whole)
        found.append(judge(part, batches))
    return told(made, _combined(found, [scope.module for scope in made.scopes]))


def _last_edits(made: Plan, grown: nn.Module) -> dict[str, TensorEdit]:
    """Return the edits after which tensors have the shapes that they have in the end."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(grown).items()}
    return {
        name: edit
        for step in made.steps
        for name, edit in step.tensors.items()
        if edit.new_shape == shapes.get(name)
    }


def _within(case: Case, module: str) -> Case:
    """Return a case for one submodule of its networks, with names as they are there."""
    return replace(
        case,
        before=case.before.get_submodule(module),
        after=case.after.get_submodule(module),
        exact_before=case.exact_before.get_submodule(module),
        exact_after=case.exact_after.get_submodule(module),
        reference=case.reference.get_submodule(module),
        norms=tuple(
            replace(norm, module=_inside(norm.module, module))
            for norm in case.norms
            if _is_inside(norm.module, module)
        ),
        edits={_inside(n, module): edit for n, edit in case.edits.items() if _is_inside(n, module)},
    )


def judged_modes(made: Plan) -> tuple[Mode, ...]:
    """Return the modes in which a plan tells what the network computes."""
    return ("eval",) if _changed_in_training(made) else ("eval", "train")


def _changed_in_training(made: Plan) -> list[BlockPlan]:
    return [b for step in made.steps for b in step.blocks if b.in_training != "exact"]


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


def _is_inside(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _inside(name: str, module: str) -> str:
    """Return a name in the whole as it is called in a submodule."""
    return name.removeprefix(f"{module}.") if module else name


def _combined(found: Sequence[Verification], modules: Sequence[str]) -> Verification:
    """Return the judgements of the parts of a network as one: the worst verdict and figures."""
    notes = [note for verification in found for note in verification.notes]
    if any(modules):
        names = ", ".join(modules)
        notes.append(f"what was compared is what comes out of {names}, not of the whole network")
    return Verification(
        verdict=min((v.verdict for v in found), key=_WORST_FIRST.index),
        eval=_worst([v.eval for v in found]),
        train=_worst([v.train for v in found]),
        inputs=tuple(text for v in found for text in v.inputs),
        without_gradient=tuple(
            f"{module}.{name}" if module else name
            for v, module in zip(found, modules, strict=True)
            for name in v.without_gradient
        ),
        notes=tuple(dict.fromkeys(notes)),
    )


def _worst(results: Sequence[ModeResult | None]) -> ModeResult | None:
    worst: ModeResult | None = None
    for result in results:
        worst = result if worst is None or result is None else worst.worst(result)
    return worst


def failure(
    made: Plan, model: nn.Module, example_inputs: object, init: Init, found: Verification
) -> VerificationError:
    """Return the error for a failed verification, naming the first group that breaks."""
    if made.after:
        first = replace(made.after[-1], after=made.after[:-1])
        between = apply_to_module(first, model)
        judged = measure(first, model, between, example_inputs, init)
        if judged.verdict == "failed":
            return failure(first, model, example_inputs, init, judged)
        return failure(replace(made, after=()), between, example_inputs, init, found)
    names = [change.name for change in made.groups or made.kernels]
    low, high = 0, len(names)  # the first `low` are good together, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            part = _narrowed(made, model, example_inputs, names[:middle])
            grown = apply_to_module(part, model, init)
            bad = measure(part, model, grown, example_inputs, init).verdict == "failed"
        except PlanError:
            break
        low, high = (low, middle) if bad else (middle, high)
    guilty = names[high - 1] if names else made.changes[0].name
    residual = max(r.residual.max_rel for r in (found.eval, found.train) if r is not None)
    native = max(r.native.max_rel for r in (found.eval, found.train) if r is not None)
    return VerificationError(
        f"the grown network does not compute what was predicted: it is off by {residual:.3g} in "
        f"float64, and as saved it differs from the old one by {native:.3g} (relative to the "
        f"largest output). The first part that breaks is {guilty}.",
        name=guilty,
        way_out=f"Leave it out with --exclude '{guilty}' and please report this.",
    )


def _narrowed(made: Plan, model: nn.Module, example_inputs: object, names: Sequence[str]) -> Plan:
    """Return the same plan for some of its groups or kernels."""
    if not isinstance(made.request, Widen):
        return only_kernels(made, names)
    widths = {group.name: str(group.width[1]) for group in made.groups if group.name in names}
    request = replace(made.request, width=widths, include=tuple(names), exclude=(), where="all")
    tensors = named_tensors(model)
    analyses = [
        analyse(trace(model, _inputs(model, scope, example_inputs), scope.module))
        for scope in made.scopes
    ]
    return plan_parts(analyses, request, lambda name: variance(tensors[name]))


def _inputs(model: nn.Module, scope: Scope, example_inputs: object) -> object:
    """Return the inputs that a part was followed on; None if they were inferred."""
    if example_inputs is not None or scope.inputs_inferred:
        return example_inputs
    part = model.get_submodule(scope.module)
    return arranged(part, [torch.empty(shape, device="meta") for shape in scope.inputs])


def variance(tensor: Tensor) -> float:
    """Return the unbiased variance of a weight, computed in float64; 0 for one element.

    Raises:
        PlanError: the weight is on the meta device.
    """
    if tensor.is_meta:
        raise PlanError(
            "this rescaling asks for the variance of weights that have no values (device meta).",
            way_out="Load weights into the model first, or use default_vt.",
        )
    return float(tensor.detach().double().var()) if tensor.numel() > 1 else 0.0


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
        rounds (1e-10 in float64), else ``failed``.

    Raises:
        VerificationError: one of the networks does not run.
        TraceError: no input could be inferred, or there is no such submodule.
    """
    if example_inputs is None:
        traced = [analysis.traced for analysis in follow(before, None, module)[0]]
        parts = [(t.module, t.input_shapes, t.inferred) for t in traced]
    else:
        if module:
            check_module(before, module)
        parts = [(module, (), False)]
    exact_before, broken = float64_copy(before)
    exact_after, _ = float64_copy(after)
    found = []
    try:
        for name, shapes, inferred in parts:
            old, new, exact_old, exact_new = (
                network.get_submodule(name)
                for network in (before, after, exact_before, exact_after)
            )
            case = Case(old, new, exact_old, exact_new, exact_old, notes=notes_on(broken))
            batches = batches_for(old, shapes, inferred, example_inputs)
            judged = judge(case, batches)
            results = [r for r in (judged.eval, judged.train) if r is not None]
            same = all(agree(result, case) for result in results)
            found.append(replace(judged, verdict="preserved" if same else "failed"))
    except FxgrowError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise VerificationError(f"the networks cannot be compared: {error}.") from error
    return _combined(found, [name for name, _, _ in parts])
