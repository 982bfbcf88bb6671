"""From one architecture to a larger one: the weights of the first become weights of the second."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from fxgrow.api.arguments import check_tensors, effort_of, number, whole
from fxgrow.api.left_out import left_new, left_out
from fxgrow.api.report.data import Report
from fxgrow.api.widen import Grown, Progress, silent
from fxgrow.apply.module import apply_to_state_dict, check_source
from fxgrow.channels.scope import follow
from fxgrow.errors import FxgrowError, FxgrowWarning, PlanError, VerificationError, listed
from fxgrow.grow.convert.alignment import align
from fxgrow.grow.convert.planner import Possible, plan_conversion
from fxgrow.modules.architectures import Architecture, larger_relative, relatives
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.recognition import recognise
from fxgrow.modules.standin import stand_in
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.init import Init, find_init, init_name
from fxgrow.plan.inits_by_side import init_for
from fxgrow.plan.pairing import PAIRINGS
from fxgrow.plan.requests import Convert
from fxgrow.plan.schema import Plan
from fxgrow.verification.findings import Effort, Verification
from fxgrow.verification.measure import Task, measure
from fxgrow.wording import worded


@exclusive
def convert(
    model: nn.Module,
    target: nn.Module | str,
    example_inputs: object = None,
    pairing: str = "vv_z_negz",
    init: str | Init = "copy_rows",
    seed: int = 0,
    verify: bool | Effort = True,
    *,
    split_noise: float = 0.1,
    progress: Progress = silent,
) -> Grown:
    """Turn a trained network into a larger one of a given architecture that computes the same.

    Widths, depths and kernels follow from the two architectures; modules that the target has
    beyond the source add nothing at first, or pass on what they get, and can be trained from the
    first step.

    Args:
        model: the source; it is not touched.
        target: a network of the larger architecture, whose weights are ignored, or the name of
            one (``"resnet34"``, ``"timm:resnet50d"``), which is built with the source's arguments
            (``num_classes``) where that is a torchvision model.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for both;
            None infers an input from the first layer.
        pairing: how new channels cancel, as for :func:`fxgrow.widen`.
        init: what fills new weights, likewise.
        seed: of the new weights.
        verify: how thoroughly to measure the result, as for :func:`fxgrow.widen`.
        split_noise: as for :func:`fxgrow.widen`.
        progress: called with the name of each step as it begins.

    Returns:
        The new network, of the target's class, with the plan and the report.

    Raises:
        TraceError: one of the networks cannot be followed as a whole.
        PlanError: it cannot be done exactly; the first thing that stands in the way is named.
        VerificationError: the new network does not compute what the old one does.

    Example:
        >>> import torchvision, fxgrow
        >>> small = torchvision.models.resnet18(num_classes=10).eval()
        >>> grown = fxgrow.convert(small, "resnet34")
        >>> len(grown.model.layer3), grown.report.verification.verdict
        (6, 'preserved')
    """
    larger = _built(target, model) if isinstance(target, str) else target
    made = plan_for_target(
        model, larger, example_inputs, pairing, init, seed, split_noise=split_noise,
        name=target if isinstance(target, str) else "", progress=progress,
    )  # fmt: skip
    return convert_by(
        made, model, larger, example_inputs, init=init, verify=verify, progress=progress
    )


def plan_for_target(
    model: nn.Module,
    target: nn.Module,
    example_inputs: object = None,
    pairing: str = "vv_z_negz",
    init: str | Init = "copy_rows",
    seed: int = 0,
    *,
    split_noise: float = 0.1,
    name: str = "",
    progress: Progress = silent,
) -> Plan:
    """Return the plan that :func:`convert` would carry out; the arguments are the same.

    ``name`` is what the plan calls the target; the default is its class.

    Raises:
        TraceError, PlanError: as for :func:`convert`.
    """
    find_init(init)
    PAIRINGS[pairing]  # what is no name of one is refused before any work
    notes = check_tensors(named_tensors(model))
    request = Convert(
        name or type(target).__name__, pairing, init_name(init), whole("seed", seed),
        number("split_noise", split_noise),
    )  # fmt: skip
    with _with_way_out(model, target):
        alignment = align(model, target)  # takes no run: what is no sibling is told at once
    progress("following the channels of the source")
    source, parts = follow(model, example_inputs)
    progress("following the channels of the target")
    larger, _ = follow(target, example_inputs)
    if len(source) > 1 or source[0].traced.module or larger[0].traced.module:
        raise PlanError(
            f"{type(model).__name__} cannot be followed as a whole, so it cannot be converted.",
            way_out="Widen its parts instead: --module of `fxgrow widen`.",
        )
    taken, offered = (part.traced.input_shapes for part in (source[0], larger[0]))
    if [shape[1:] for shape in taken] != [shape[1:] for shape in offered]:
        shown = ["x".join(map(str, shapes[0][1:])) for shapes in (taken, offered)]
        raise PlanError(
            f"the source takes inputs of {shown[0]}, and the target of {shown[1]}.",
            way_out="Give inputs that both take (--input-shape), or choose another target.",
        )
    progress("planning")
    with _with_way_out(model, target):
        made = plan_conversion(source[0], larger[0], alignment, request)
    idle = (*left_out(made, source), *left_new(made, [*source, *larger]))
    return replace(made, warnings=(*parts, *made.warnings, *idle, *notes))


@contextlib.contextmanager
def _with_way_out(source: nn.Module, target: nn.Module) -> Iterator[None]:
    """Have refusals of a target that name no way out name one."""
    try:
        yield
    except PlanError as error:
        fields = _differing(source, target)
        instead = "`fxgrow widen`, `fxgrow deepen`"
        error.way_out = error.way_out or worded(
            f"The configurations differ in {listed(fields)}: leave those as they are that the code "
            f"computes with, or grow without a target: {instead}."
            if fields
            else "Choose another target (`fxgrow convert SOURCE --list` tells which of those of "
            f"torchvision will do), or grow without one: {instead}."
        )
        raise


def _differing(source: nn.Module, target: nn.Module) -> list[str]:
    """Return the numbers in which the configurations of two networks differ, if they have any."""
    read = (getattr(getattr(model, "config", None), "to_dict", None) for model in (source, target))
    old, new = (dict(to_dict()) if callable(to_dict) else {} for to_dict in read)
    pairs = {name: (old[name], new[name]) for name in old.keys() & new.keys()}
    return [
        f"{name} ({before} → {after})"
        for name, (before, after) in sorted(pairs.items())
        if before != after and all(isinstance(value, (int, float)) for value in (before, after))
    ]


def convert_by(
    made: Plan,
    model: nn.Module,
    target: nn.Module,
    example_inputs: object = None,
    *,
    init: str | Init | None = None,
    verify: bool | Effort = True,
    progress: Progress = silent,
) -> Grown:
    """Carry out a plan of :func:`plan_for_target`, and measure the result.

    Args:
        made: the plan.
        model: the source; it is not touched.
        target: a network of the larger architecture; it is not touched either.
        example_inputs: inputs to measure on; None takes those of the plan.
        init: the callable the plan was made with, if it was one.
        verify: how thoroughly to measure the result, as for :func:`fxgrow.widen`.
        progress: called with the name of each step as it begins.

    Raises:
        PlanError: the plan is for another network.
        VerificationError: the new network does not compute what the old one does.
    """
    check_source(made, model)
    chosen = init_for(made.request.drawing, init)
    progress("making the weights")
    grown = filled(target, made, named_tensors(model), chosen).train(model.training)
    verification = Verification("skipped")
    effort = effort_of(verify)
    if effort != "none":
        progress("verifying")
        verification = measure(
            Task(made, model, grown, example_inputs, chosen, None, effort, progress)
        )
    if verification.verdict == "failed":
        results = (verification.eval, verification.train, verification.drawn)
        found = [result.residual.max_rel for result in results if result is not None]
        raise VerificationError(
            f"the weights fit {type(target).__name__}, but there they compute something else: it "
            f"is off by {max(found):.3g} in float64 (relative to the largest output). The two "
            "architectures differ in something that no weight holds.",
            way_out="Choose a target that computes with the same settings.",
        )
    for text in made.warnings:
        warnings.warn(text, FxgrowWarning, stacklevel=3)
    return Grown(grown, made, Report(made, verification, made.warnings), chosen)


def filled(
    target: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], init: Init | None
) -> nn.Module:
    """Return a copy of a network with the tensors that a plan makes of others.

    Args:
        target: a network of the target's architecture; what is no parameter and no persistent
            buffer is as it is there.
        plan: made by :func:`plan_for_target`.
        tensors: the tensors of the source by name.
        init: what fills new weights.
    """
    grown = apply_to_state_dict(plan, tensors, init)
    return stand_in(target, {name: grown[name] for name in target.state_dict() if name in grown})


def _built(name: str, model: nn.Module) -> nn.Module:
    """Return a network of a named architecture, with the arguments that the source was built with.

    Raises:
        SourceError: there is no such architecture.
    """
    shapes = {n: tuple(tensor.shape) for n, tensor in model.state_dict().items()}
    try:
        source: Architecture | None = recognise(shapes)
    except FxgrowError:
        source = None
    return larger_relative(source, name).build("cpu").eval()


def list_targets(
    model: nn.Module, architecture: Architecture, *, progress: Progress = silent
) -> list[Possible]:
    """Return the larger relatives of a torchvision network, smallest first.

    Args:
        model: the network; only read.
        architecture: what it was built from.
        progress: called with the name of each as it is tried.
    """
    found = []
    size = sum(parameter.numel() for parameter in model.parameters())
    for name in relatives(architecture):
        larger = larger_relative(architecture, name)
        target = larger.build()
        count = sum(parameter.numel() for parameter in target.parameters())
        if count <= size:
            continue
        progress(f"trying {name}")
        try:
            plan_for_target(model, target, name=name)
        except FxgrowError as error:
            found.append(Possible(name, count, error.message))
        else:
            found.append(Possible(name, count))
    return sorted(found, key=lambda possible: possible.parameters)
