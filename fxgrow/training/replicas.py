"""Networks that several processes train alike, in a wrapper that averages their gradients.

The wrapper hooks into the parameters that it was made with, so after a growth it is made anew, as
the same object: whoever holds it goes on.
"""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxgrow.errors import PlanError

_TOLD = (  # arguments that the wrapper keeps under their own names
    "device_ids", "output_device", "dim", "process_group", "find_unused_parameters",
    "gradient_as_bucket_view", "static_graph", "mixed_precision", "batched_grad_copy",
    "skip_all_reduce_unused_params",
)  # fmt: skip
_KEPT = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
    "_backward_pre_hooks", "training",
)  # fmt: skip
_WAY_OUT = (
    "Grow between two calls of train() with fxgrow.training.grow_, on every process, each with a "
    "new Trainer; or train with plain DistributedDataParallel, or on one device."
)


def check_replicas(args: Any) -> None:
    """Return if several processes of a Trainer hold the whole network each.

    Args:
        args: the Trainer's.

    Raises:
        PlanError: it is spread over them.
    """
    count = getattr(args, "world_size", 1)
    if count <= 1:
        return
    for kind in ("fsdp", "deepspeed"):
        told = os.environ.get(f"ACCELERATE_USE_{kind.upper()}", "").lower()
        if getattr(args, kind, None) or told in ("1", "true", "yes"):
            raise PlanError(
                f"the Trainer spreads the network over {count} processes ({kind}), so that none "
                "of them can make it grow.",
                name=kind,
                way_out=_WAY_OUT,
            )


def wrap_anew(network: nn.Module, count: int) -> None:
    """Have the wrapper of a network that has grown average the gradients of its parameters.

    All processes are to call this. What they have is made equal to what the first one has.

    Args:
        network: the network.
        count: how many processes there are.

    Raises:
        PlanError: there are several, and no wrapper is around the network.
    """
    if count <= 1:
        return
    # Its holder is a local variable of what trains.
    found = [
        one
        for one in gc.get_objects()
        if issubclass(type(one), nn.parallel.DistributedDataParallel)
        and one.__dict__.get("_modules", {}).get("module") is network
    ]
    if not found:
        raise PlanError(
            f"nothing averages the gradients of {count} processes that can follow growth: the "
            "network is in no DistributedDataParallel.",
            name=type(network).__name__,
            way_out=_WAY_OUT,
        )
    for wrapper in found:
        _made_anew(wrapper, network)


def _made_anew(wrapper: Any, network: nn.Module) -> None:
    """Make a wrapper what it would be if it had been made of the network as it is now."""
    present = vars(wrapper)
    known: Mapping[str, object] = inspect.signature(type(wrapper).__init__).parameters
    given = {name: present[name] for name in _TOLD if name in known and name in present}
    syncs = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    given[syncs] = getattr(wrapper, syncs)
    if not present.get("bucket_bytes_cap_default", False):
        given["bucket_cap_mb"] = present["bucket_bytes_cap"] / 2**20
    kept = {name: present[name] for name in _KEPT if name in present}
    hooks = [*present.get("_comm_hooks", ())]
    wrapper.__init__(network, **given)
    vars(wrapper).update(kept)
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
