"""Make a trained network deeper: the Python API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from fxgrow.api.arguments import check_tensors, whole
from fxgrow.api.left_out import left_new
from fxgrow.api.widen import Grown, Progress, carry_out, silent
from fxgrow.apply.composition import following, grown_by
from fxgrow.channels.scope import follow
from fxgrow.errors import PlanError, UsageError
from fxgrow.grow.data.calibration import calibrate_, new_norms
from fxgrow.grow.deepen.planner import plan_blocks
from fxgrow.grow.identity.concrete_run import is_inside
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.init import Init, find_init, init_name
from fxgrow.plan.requests import Deepen
from fxgrow.plan.schema import Plan
from fxgrow.verification.findings import Effort


def plan_deepening(
    model: nn.Module,
    blocks: Mapping[str, str],
    example_inputs: object = None,
    method: str = "r2deeper",
    init: str | Init = "copy_rows",
    seed: int = 0,
    *,
    module: str = "",
    after: Plan | None = None,
    progress: Progress = silent,
) -> Plan:
    """Return the plan that :func:`deepen` would carry out; the arguments are the same.

    Raises:
        TraceError: the network cannot be followed.
        PlanError: the request is malformed, or a block cannot be inserted as an identity.
    """
    find_init(init)
    request = Deepen(
        _checked_blocks(blocks),
        method,
        init=init_name(init),
        seed=whole("seed", seed),
        module=module,
    )
    notes = check_tensors(named_tensors(model))
    progress("following the network")
    grown = grown_by(after, model)
    analyses, parts = follow(grown, example_inputs, module)
    progress("planning")
    first = next(iter(request.blocks))
    traced = next(
        (a.traced for a in analyses if is_inside(first, a.traced.module)), analyses[0].traced
    )
    made = plan_blocks(traced, request)
    told = (*parts, *made.warnings, *left_new(made, analyses), *notes)
    return following(after, replace(made, warnings=told))


_NET2DEEPER = 'Leave calibration out, or use method="net2deeper".'


@exclusive
def deepen(
    model: nn.Module,
    blocks: Mapping[str, str],
    example_inputs: object = None,
    method: str = "r2deeper",
    init: str | Init = "copy_rows",
    seed: int = 0,
    strict: bool = False,
    verify: bool | Effort = True,
    *,
    calibration: Iterable[object] | None = None,
    module: str = "",
    after: Plan | None = None,
    progress: Progress = silent,
) -> Grown:
    """Make a trained network deeper without changing what it computes.

    New blocks are copies, in structure, of their neighbours. They return what they get, and their
    weights can be trained from the first step.

    Args:
        model: any module; it is not touched.
        blocks: for each stage, how many blocks there are to be: ``"+2"`` (more), ``"2x"`` or
            ``"6"`` (in all). A stage is a list of modules (``"layer3"``: new ones come at its end)
            or a module in one (``"layer3.1"``: new ones come after it). So is a run of blocks that
            are attributes of a module, each of which gets what the one before gives.
        example_inputs: as for :func:`fxgrow.widen`.
        method: how a new block becomes the identity. ``r2deeper``: the last two layers of each
            branch are [V; V] and [Z, −Z]. ``zero_last``: the last parameter of each branch is zero.
            ``net2deeper``: in a plain chain, a layer that passes on what it gets.
        init: what fills new weights, by the law of the block that is copied; as for
            :func:`fxgrow.widen`.
        seed: of the new weights; each tensor draws from (seed, its name) alone.
        strict: refuse whatever does not preserve the function exactly.
        verify: how thoroughly to measure the result, as for :func:`fxgrow.widen`.
        calibration: for ``net2deeper``, batches of inputs (a tensor, a tuple of arguments or a dict
            each) whose statistics the new batch norms take; without, they begin with mean 0 and
            variance 1. Eval mode is the same with either; train mode is nearer with data.
        module: follow this submodule alone; as for :func:`fxgrow.widen`.
        after: a plan to carry out first; this one is then for what it makes, and contains it.
        progress: called with the name of each step as it begins.

    Returns:
        The grown network, the plan and the report. The network is of the class of ``model``, but a
        module whose code calls the blocks of a run by their names becomes a
        :class:`torch.fx.GraphModule`.

    Raises:
        TraceError: the network cannot be followed.
        PlanError: the request is malformed, or a block cannot be inserted as an identity.
        NotPreservedError: ``strict``, and the plan predicts a change of the output.
        VerificationError: the grown network does not compute what the plan predicts.

    Example:
        >>> import torch, torchvision, fxgrow
        >>> net = torchvision.models.resnet18(num_classes=5).eval()
        >>> grown = fxgrow.deepen(net, {"layer1": "+1"}, torch.randn(2, 3, 32, 32))
        >>> len(grown.model.layer1), grown.report.verification.verdict
        (3, 'preserved')
    """
    made = plan_deepening(
        model, blocks, example_inputs, method, init, seed,
        module=module, after=after, progress=progress,
    )  # fmt: skip
    finish = None
    if calibration is not None:
        if method != "net2deeper":
            raise PlanError(f"{method} has no batch norms to calibrate.", way_out=_NET2DEEPER)
        finish = partial(calibrate_, norms=new_norms(made), batches=list(calibration))
    return carry_out(
        made, model, example_inputs, init=init, strict=strict, verify=verify, finish=finish,
        progress=progress,
    )  # fmt: skip


def _checked_blocks(blocks: Mapping[str, str]) -> dict[str, str]:
    """Return the blocks argument as a plan records it.

    Raises:
        PlanError: it is not a mapping of strings.
    """
    if isinstance(blocks, Mapping) and blocks and all(isinstance(v, str) for v in blocks.values()):
        return {str(key): str(value) for key, value in blocks.items()}
    raise UsageError(
        f"the blocks {blocks!r} cannot be read.",
        way_out='Give a mapping of stages to numbers of blocks: {"layer3": "+2"}.',
    )
