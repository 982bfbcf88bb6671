"""Larger kernels: the Python API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from fxgrow.api.arguments import check_tensors, globs
from fxgrow.api.widen import Grown, Progress, carry_out, silent
from fxgrow.apply.composition import following, grown_by
from fxgrow.channels.scope import follow
from fxgrow.errors import UsageError
from fxgrow.grow.kernels.planner import plan_kernels
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.requests import MorphKernel
from fxgrow.plan.schema import Plan
from fxgrow.verification.findings import Effort


def plan(
    model: nn.Module,
    size: str | Mapping[str, str],
    example_inputs: object = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    module: str = "",
    after: Plan | None = None,
    progress: Progress = silent,
) -> Plan:
    """Return the plan that :func:`morph_kernel` would carry out; the arguments are the same.

    Raises:
        TraceError: the network cannot be followed.
        PlanError: the request is malformed, or nothing that it selects can grow.
    """
    request = MorphKernel(
        size=_checked(size), include=globs(include), exclude=globs(exclude), module=module
    )
    notes = check_tensors(named_tensors(model))
    progress("following the channels")
    analyses, parts = follow(grown_by(after, model), example_inputs, module)
    progress("planning")
    made = plan_kernels(analyses, request)
    return following(after, replace(made, warnings=(*parts, *made.warnings, *notes)))


@exclusive
def morph_kernel(
    model: nn.Module,
    size: str | Mapping[str, str],
    example_inputs: object = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    strict: bool = False,
    verify: bool | Effort = True,
    module: str = "",
    after: Plan | None = None,
    progress: Progress = silent,
) -> Grown:
    """Enlarge the kernels of convolutions without changing what the network computes.

    Zeros are put around the old taps and the padding is enlarged to match (T. Wei et al., Network
    Morphism, ICML 2016). The new taps receive a gradient at the first step. Strides, dilations,
    groups, transposed convolutions and all padding modes are kept.

    Args:
        model: any module; it is not touched.
        size: ``"5"``, ``"5x3"`` (one for each dim), ``"+2"``, or a mapping of globs over names of
            layers to such strings, of which the first match counts.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for
            ``forward``; None infers an input from the first layer.
        include: globs over the names of layers; only these grow.
        exclude: globs likewise; these do not grow.
        strict: as for :func:`fxgrow.widen`; a larger kernel always preserves the function.
        verify: how thoroughly to measure the result, as for :func:`fxgrow.widen`.
        module: follow this submodule alone, as for :func:`fxgrow.widen`.
        after: a plan to carry out first; this one is then for what it makes, and contains it.
        progress: called with the name of each step as it begins.

    Returns:
        The grown network, of the class of ``model``, the plan and the report. Layers whose kernel
        cannot grow so stay as they are; the plan's ``refused`` tells why.

    Raises:
        TraceError: the network cannot be followed.
        PlanError: the request is malformed, or nothing that it selects can grow.
        VerificationError: the grown network does not compute what the old one does.

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU())
        >>> fxgrow.morph_kernel(net, "5", torch.randn(2, 3, 8, 8)).model[0]
        Conv2d(3, 4, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2))
    """
    made = plan(
        model, size, example_inputs, include, exclude, module=module, after=after,
        progress=progress,
    )  # fmt: skip
    return carry_out(made, model, example_inputs, strict=strict, verify=verify, progress=progress)


def _checked(size: str | Mapping[str, str]) -> str | dict[str, str]:
    """Return a size argument as a plan records it.

    Raises:
        PlanError: neither a text nor a mapping of texts.
    """
    texts = {"*": size} if isinstance(size, str) else size
    fits = isinstance(texts, Mapping) and texts and all(isinstance(t, str) for t in texts.values())
    if not fits:
        raise UsageError(f"the kernel size {size!r} cannot be read.", way_out='Give a text: "5".')
    return size if isinstance(size, str) else {str(glob): text for glob, text in size.items()}
