"""What goes along when a network grows in training: optimizers and averages of its weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxgrow.errors import PlanError
from fxgrow.plan.schema import Plan


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network to grow: what ``torch.compile`` has wrapped, or the module itself.

    Raises:
        PlanError: a wrapper holds on to its parameters; how to grow what is in it is told.
    """
    if isinstance(model, nn.Module) and "_orig_mod" in model._modules:
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"a network is a torch.nn.Module, not a {type(model).__name__}.",
            way_out="fxgrow.training.grow_(model, width, inputs, …)",
        )
    kind = type(model).__name__
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise PlanError(
            f"{kind} holds on to the parameters that it was made with.",
            name=kind,
            way_out=f"Grow what is in it on every rank, grow_(wrapped.module, …), then wrap that "
            f"again: wrapped = {kind}(wrapped.module, …). The same seed makes the same weights. "
            "What it has grown through is told of that too: state_dict(wrapped.module).",
        )
    if _is_sharded(model):
        raise PlanError(
            "the network is sharded (FSDP): no process holds its whole tensors.",
            way_out="Grow it before fully_shard: gather its state_dict (torch.distributed."
            "checkpoint.state_dict.get_model_state_dict with full_state_dict=True) into an "
            "unsharded network, grow that, and shard the result.",
        )
    return model


def _is_sharded(model: nn.Module) -> bool:
    """Return whether parameters are sharded over processes."""
    tensors = sys.modules.get("torch.distributed.tensor")  # imported by whatever shards
    sharded = getattr(tensors, "DTensor", None)
    flat = sys.modules.get("torch.distributed.fsdp")
    wrapper = getattr(flat, "FullyShardedDataParallel", None)
    return any(sharded is not None and isinstance(p, sharded) for p in model.parameters()) or any(
        wrapper is not None and isinstance(module, wrapper) for module in model.modules()
    )


def _each(given: object) -> tuple[Any, ...]:
    """Return what was given as one thing or as several: none for None."""
    if given is None:
        return ()
    # A module may be iterated over, as a Sequential can, and is one thing all the same.
    several = isinstance(given, Iterable) and not isinstance(given, nn.Module)
    return tuple(given) if several else (given,)  # type: ignore[arg-type]


def optimizers_of(given: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """Return the optimizers that were given, out of the wrappers of accelerate and Lightning.

    Raises:
        PlanError: something else was given.
    """
    found: list[Optimizer] = []
    for one in _each(given):
        inner: object = one
        while isinstance(getattr(inner, "optimizer", None), Optimizer):
            inner = inner.optimizer  # type: ignore[attr-defined]
        if not isinstance(inner, Optimizer):
            raise PlanError(
                f"an optimizer is a torch.optim.Optimizer, not a {type(one).__name__}.",
                way_out="Give it by name: grow_(model, width, inputs, optimizer=optimizer).",
            )
        if any(inner is other for other in found):
            raise PlanError(
                f"this {type(inner).__name__} was given twice.",
                way_out="Give each optimizer once: optimizer=[…].",
            )
        found.append(inner)
    return tuple(found)


def averaged(given: Iterable[nn.Module] | nn.Module) -> tuple[nn.Module, ...]:
    """Return the copies of the network that average its weights, out of their wrappers.

    Raises:
        PlanError: something else was given.
    """
    found: list[nn.Module] = []
    for one in _each(given):
        if not isinstance(one, nn.Module):
            raise PlanError(
                f"an average of weights is a module like the network, not a {type(one).__name__}.",
                way_out="Give the copy of the network that holds them: averages=[ema].",
            )
        inner: nn.Module = one
        if "n_averaged" in one._buffers and isinstance(one._modules.get("module"), nn.Module):
            inner = one._modules["module"]  # type: ignore[assignment]
        if any(inner is other for other in found):
            raise PlanError(
                f"this average of weights ({type(one).__name__}) was given twice.",
                way_out="Give each once: averages=[ema].",
            )
        found.append(inner)
    return tuple(found)


def grown_averages(
    plan: Plan, averages: Sequence[nn.Module], model: nn.Module
) -> tuple[nn.Module, ...]:
    """Return what averages become, with the same new weights as the network.

    Raises:
        PlanError: one is no copy of the network.
    """
    own = {id(tensor) for tensor in model.parameters()}
    for average in averages:
        if any(id(tensor) in own for tensor in average.parameters()):
            raise PlanError(
                f"an average ({type(average).__name__}) holds the network's own weights.",
                way_out="Give a copy that averages them: averages=[AveragedModel(model)].",
            )
    try:
        return tuple(plan.apply(average, like=model) for average in averages)
    except PlanError as error:
        raise PlanError(
            f"an average is no copy of the network: {error.message}",
            name=error.name,
            way_out="Give copies that have its names and shapes.",
        ) from error


@contextlib.contextmanager
def restored_on_error(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Restore groups and states of optimizers if an error is raised within."""
    held = [
        (
            one,
            dict(one.state),
            [(value, dict(value)) for value in one.state.values() if isinstance(value, dict)],
            [(group, {**group, "params": [*group["params"]]}) for group in one.param_groups],
        )
        for one in optimizers
    ]
    try:
        yield
    except BaseException:
        for one, state, entries, groups in held:
            one.state.clear()
            one.state.update(state)
            for entry, values in entries:
                entry.clear()
                entry.update(values)
            for group, before in groups:
                group.clear()
                group.update(before)
            one.param_groups[:] = [group for group, _ in groups]
        raise


def check_schedulers(given: object, optimizers: Sequence[Optimizer]) -> tuple[LRScheduler, ...]:
    """Return the learning-rate schedulers that were given, out of their wrappers.

    They go on as they are, since optimizers keep their groups.

    Raises:
        PlanError: something else was given, or one drives an optimizer that was not.
    """
    found = []
    for one in _each(given):
        inner = one
        while isinstance(getattr(inner, "scheduler", None), LRScheduler):
            inner = inner.scheduler
        if not isinstance(inner, LRScheduler):
            raise PlanError(
                f"a scheduler is one of torch.optim.lr_scheduler, not a {type(one).__name__}.",
                way_out="Leave it out: it goes on with the optimizer that it drives.",
            )
        driven = optimizers_of(inner.optimizer)[0]
        if not any(driven is optimizer for optimizer in optimizers):
            raise PlanError(
                f"{type(inner).__name__} drives an optimizer that was not given.",
                way_out="Give that too: grow_(…, optimizer=optimizer, scheduler=scheduler).",
            )
        found.append(inner)
    return tuple(found)
