"""Plan larger kernels: sizes, edits, and a run at the new sizes.

Where the taps go is the matter of :mod:`fxgrow.grow.kernels.taps`, which layers may grow that of
:mod:`fxgrow.grow.kernels.convolutions`.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch.nn.modules.conv import _ConvNd

from fxgrow.apply.trial import tried
from fxgrow.channels.analysis import Analysis
from fxgrow.errors import PlanError
from fxgrow.grow.kernels.convolutions import convolutions, input_sizes, settings_of, sharing_weight
from fxgrow.grow.kernels.taps import Convolution, Enlarged, check_size, enlarged, new_kernel, told
from fxgrow.grow.widen.submodules import merged
from fxgrow.labels.tape import Tape
from fxgrow.modules.tensors import aliases_of, named_tensors
from fxgrow.plan.edits import AxisEdit, ModuleEdit, Run, RunKind, TensorEdit
from fxgrow.plan.fingerprint import fingerprint
from fxgrow.plan.requests import MorphKernel
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import KernelPlan, Refusal, Scope
from fxgrow.version import __version__


@dataclass(frozen=True)
class _LargerKernel:
    """A layer with its old settings and its new ones."""

    module: _ConvNd
    old: Convolution
    new: Enlarged


def plan_kernels(analyses: Sequence[Analysis], request: MorphKernel) -> Plan:
    """Return the plan for larger kernels.

    Args:
        analyses: of the whole network, or of submodules that have no module in common.
        request: ``size``, ``include`` and ``exclude`` decide; globs are over the names of layers.

    Raises:
        PlanError: the request is malformed, or nothing that it selects can grow.
    """
    owners = {name: analysis for analysis in analyses for name in convolutions(analysis)}
    sizes = _selected(owners, request)
    found: dict[str, dict[str, _LargerKernel]] = {a.traced.module: {} for a in analyses}
    refused = []
    for name, size in sizes.items():
        growths = _growths(owners[name], name, size)
        if isinstance(growths, str):
            refused.append(Refusal(name, growths))
        else:
            known = found[owners[name].traced.module]
            known |= {layer: new for layer, new in growths.items() if layer not in known}
    grown = [(analysis, found[analysis.traced.module]) for analysis in analyses]
    plans = [_plan_of(analysis, request, growths) for analysis, growths in grown if growths]
    if not plans:
        why = f"{refused[0].name}: {refused[0].reason}" if refused else "they are that large"
        raise PlanError(
            f"none of the {len(sizes)} selected kernels can grow; {why}.",
            name=refused[0].name if refused else "",
        )
    return replace(merged(plans), request=request, refused=tuple(refused))


def _selected(names: Iterable[str], request: MorphKernel) -> dict[str, str]:
    """Return the size asked for of each layer that a request selects.

    Raises:
        PlanError: a size cannot be read, a glob matches no layer, or no layer is left.
    """
    names = tuple(names)
    globs = request.size if isinstance(request.size, dict) else {"*": request.size}
    for size in globs.values():
        check_size(size)
    for glob in (*request.include, *request.exclude, *globs):
        _check_glob(glob, names)

    def is_meant(name: str) -> bool:
        included = any(fnmatchcase(name, glob) for glob in request.include or ("*",))
        return included and not any(fnmatchcase(name, glob) for glob in request.exclude)

    sizes = {
        name: next((size for glob, size in globs.items() if fnmatchcase(name, glob)), "")
        for name in names
        if is_meant(name)
    }
    sizes = {name: size for name, size in sizes.items() if size}
    if not sizes:
        raise PlanError(
            f"no layer is left: the request selects none of the {len(names)} with a kernel.",
            way_out="See include, exclude and the globs of the sizes.",
        )
    return sizes


def _check_glob(glob: str, names: Sequence[str]) -> None:
    if any(fnmatchcase(name, glob) for name in names):
        return
    near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
    raise PlanError(
        f"the glob {glob!r} matches no layer with a kernel.",
        name=glob,
        way_out=f"Near it: {', '.join(near)}." if near else "The network has no convolution.",
    )


def _growths(analysis: Analysis, name: str, size: str) -> dict[str, _LargerKernel] | str:
    """Return the growth of a layer and of those that share its weight; none if they are that large.

    Or why the kernel cannot grow so.
    """
    layers = sharing_weight(analysis, name)
    if isinstance(layers, str):
        return layers
    kernel = new_kernel(size, settings_of(next(iter(layers.values()))).kernel)
    if isinstance(kernel, str):
        return kernel
    found = {}
    for layer, module in layers.items():
        old = settings_of(module)
        if kernel == old.kernel:
            return {}
        new = enlarged(old, kernel)
        if isinstance(new, str):
            return new
        found[layer] = _LargerKernel(module, old, new)
        problem = _input_problem(analysis, layer, found[layer])
        if problem:
            return problem
    if len({growth.new.before for growth in found.values()}) > 1:
        return (
            f"{' and '.join(found)} share the weight, and their paddings put its taps at different "
            "places"
        )
    return found


def _input_problem(analysis: Analysis, layer: str, growth: _LargerKernel) -> str:
    """Return why a layer's inputs are too short for its new padding; "" if they are not."""
    least = growth.new.convolution.least_input
    if max(least) == 1:
        return ""
    for sizes in input_sizes(analysis, layer, len(least)):
        if any(size < needed for size, needed in zip(sizes, least, strict=True)):
            return (
                f"its {growth.old.padding_mode} padding would take inputs of at least "
                f"{told(least)}, and it gets {told(sizes)}"
            )
    return ""


def _plan_of(
    analysis: Analysis, request: MorphKernel, growths: Mapping[str, _LargerKernel]
) -> Plan:
    """Return the plan for one network, or for a submodule of it.

    Raises:
        PlanError: the network does not run with these kernels as it did.
    """
    traced = analysis.traced
    tensors = named_tensors(traced.standin)
    aliases = aliases_of(tensors)
    edits = {
        aliases.get(f"{name}.weight", f"{name}.weight"): _tensor_edit(growth)
        for name, growth in growths.items()
    }
    parameters = sum(parameter.numel() for parameter in traced.standin.parameters())
    added = sum(math.prod(e.new_shape) - math.prod(e.shape) for e in edits.values())
    plan = Plan(
        request=request,
        tensors={name: edits[name] for name in tensors if name in edits},
        modules=tuple(edit for name, growth in growths.items() for edit in _edits(name, growth)),
        aliases=aliases,
        source=fingerprint(traced.standin, ()),
        scopes=(Scope.of(traced),),
        parameters=(parameters, parameters + added),
        flops=(0, 0),
        fxgrow=__version__,
        kernels=tuple(_kernel_plan(name, growth) for name, growth in growths.items()),
    )
    batch = traced.input_shapes[0][0] if traced.inferred else 1
    after = _run_enlarged(analysis, plan)
    return replace(plan, flops=(analysis.tape.flops // batch, after.flops // batch))


def _tensor_edit(growth: _LargerKernel) -> TensorEdit:
    """Return the edit of a weight: zeros around the old taps, along each dim that grows."""
    old, new = growth.old.kernel, growth.new.convolution.kernel
    shape = tuple(growth.module.weight.shape)
    axes = tuple(
        AxisEdit(dim, "kernel", 1, tuple(_runs(before, has, gets)))
        for dim, (before, has, gets) in enumerate(
            zip(growth.new.before, old, new, strict=True), start=2
        )
        if has != gets
    )
    new_shape = (*shape[:2], *new)
    return TensorEdit(shape, new_shape, axes=axes, fan_in=math.prod(new_shape[1:]))


def _runs(before: int, old: int, new: int) -> Iterator[Run]:
    """Yield what the taps of one dim hold."""
    kinds: tuple[tuple[RunKind, int], ...] = (
        ("zero", before), ("old", old), ("zero", new - old - before),
    )  # fmt: skip
    for kind, length in kinds:
        if length:
            yield Run(kind, 0, length)


def _edits(name: str, growth: _LargerKernel) -> Iterator[ModuleEdit]:
    """Yield the attributes that follow the kernel; the last is what ``F.pad`` is given."""
    old, new = growth.old, growth.new.convolution
    for attribute, before, after in (
        ("kernel_size", old.kernel, new.kernel),
        ("padding", old.padding, new.padding),
        ("output_padding", old.output_padding, new.output_padding),
        ("_reversed_padding_repeated_twice", _reversed(old), _reversed(new)),
    ):
        if before != after:
            yield ModuleEdit(name, attribute, before, after)


def _reversed(convolution: Convolution) -> tuple[int, ...]:
    return tuple(size for sides in reversed(convolution.sides) for size in sides)


def _kernel_plan(name: str, growth: _LargerKernel) -> KernelPlan:
    """Return what a report tells of a layer."""
    old, new = growth.old, growth.new.convolution
    notes = []
    if new.output_padding != old.output_padding:
        was, becomes = told(old.output_padding), told(new.output_padding)
        notes.append(f"its output_padding of {was} becomes {becomes}")
    if max(new.least_input) > 1:
        notes.append(
            f"its {new.padding_mode} padding takes inputs of at least {told(new.least_input)}"
        )
    if any(left != right for left, right in new.sides):
        notes.append("padded once more on the right, which may copy the input")
    return KernelPlan(
        name, old.kernel, new.kernel, (old.padding, new.padding), "exact", "; ".join(notes)
    )


def only_kernels(plan: Plan, layers: Sequence[str]) -> Plan:
    """Return the same plan for some of its layers; each edit is for one layer or shared weight."""
    weights = {plan.aliases.get(f"{layer}.weight", f"{layer}.weight") for layer in layers}
    return replace(
        plan,
        kernels=tuple(kernel for kernel in plan.kernels if kernel.name in layers),
        tensors={name: edit for name, edit in plan.tensors.items() if name in weights},
        modules=tuple(edit for edit in plan.modules if edit.module in layers),
    )


def _run_enlarged(analysis: Analysis, plan: Plan) -> Tape:
    """Return the operations of a run on meta tensors with the new kernels.

    Raises:
        TraceError: the network does not run.
        PlanError: a convolution gives another number of outputs: code around it reads its kernel.
    """
    traced = analysis.traced
    shapes = {name: edit.new_shape for name, edit in plan.tensors.items()}
    grown = tried(traced.standin, shapes, plan.modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the plan tells what padding='same' copies
        tape = replace(traced, standin=grown).label()[1]
    for before, after in zip(_outputs(analysis.tape), _outputs(tape), strict=False):
        if before != after:
            raise PlanError(
                f"with its new kernel, {after[0]} gives outputs of {told(after[1])} instead of "
                f"{told(before[1])}.",
                name=after[0],
                way_out=f"Leave it out with --exclude '{after[0]}'.",
            )
    return tape


def _outputs(tape: Tape) -> list[tuple[str, tuple[int, ...]]]:
    """Return the shapes of what convolutions give, and of what the network returns."""
    found = [(o.module, o.outputs[0].shape) for o in tape.operations if o.name == "convolution"]
    return found + [("the network", value.shape) for value in tape.outputs]
