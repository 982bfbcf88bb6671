"""Build modules without paying for their initial values.

A constructor is run as its author wrote it, except that every parameter becomes a meta tensor the
moment it is registered, so that initialisers have nothing to fill. Everything else a constructor
computes (buffers, relative position indices, anchors, depth schedules) is computed for real:
running the whole constructor under ``torch.device("meta")`` would lose those values, and breaks
constructors that read them back (RegNet's block widths).

A constructor that reads its own parameters, or runs a forward pass to learn its sizes (SSDLite),
cannot be built that way; it is then run once more, plainly, initial values included.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

_INIT_PATCH_LOCK = threading.RLock()  # two overlapping patches would restore each other's wrappers


def build_uninitialised(construct: Callable[[], object], device: str | torch.device) -> object:
    """Run a constructor and put the module it makes on ``device``, parameters uninitialised.

    On a real device, parameters hold whatever was in memory (the initial values where the
    constructor had to be run plainly), buffers and plain tensor attributes the values that the
    constructor computed. On ``"meta"``, parameters and buffers are meta tensors, and plain tensor
    attributes keep their values. Ties survive. The random state is left as it was, and warnings of
    the constructor are dropped: they are about initial values that nobody will see.

    Args:
        construct: makes the module; called a second time if the first attempt fails.
        device: where the parameters and buffers of the result are.

    Returns:
        What ``construct`` returned, moved if it is an ``nn.Module``.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            with _parameters_on_meta():
                built = construct()
            lost = isinstance(built, nn.Module) and _has_lost_values(built)
        except Exception:  # whatever a constructor does with its parameters may fail on meta
            lost = True
        if lost:
            built = construct()
    if isinstance(built, nn.Module):
        _place_(built, torch.device(device))
    return built


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make every parameter that this thread registers a meta tensor, and initialisers idle."""
    thread = threading.get_ident()
    replacements = WeakIdKeyDictionary()  # a parameter registered twice stays one parameter

    def replace(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        # Subclasses (lazy, quantized, user-made parameters) know more than a shape: not replaced.
        if type(parameter) is not nn.Parameter or threading.get_ident() != thread:
            return None
        if parameter.is_meta:
            return None
        if parameter not in replacements:
            replacements[parameter] = nn.Parameter(
                parameter.detach().to("meta"), requires_grad=parameter.requires_grad
            )
        return replacements[parameter]

    handle = register_module_parameter_registration_hook(replace)
    try:
        with _initialisers_skip_meta():
            yield
    finally:
        handle.remove()


@contextmanager
def _initialisers_skip_meta() -> Iterator[None]:
    """Make ``torch.nn.init`` return meta tensors at once; some look at values and would fail."""
    with _INIT_PATCH_LOCK, ExitStack() as patches:
        for name, initialise in inspect.getmembers(nn.init, inspect.isfunction):
            if name.endswith("_") and not name.startswith("_"):
                patches.enter_context(mock.patch.object(nn.init, name, _skipping(initialise)))
        yield


def _skipping(initialise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(initialise)
    def skip(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if tensor.is_meta else initialise(tensor, *args, **kwargs)

    return skip


def _has_lost_values(module: nn.Module) -> bool:
    """Tell whether something other than a parameter was computed from a meta parameter."""
    buffers = any(buffer.is_meta for buffer in module.buffers())
    attributes = (value for child in module.modules() for value in vars(child).values())
    return buffers or any(isinstance(value, Tensor) and value.is_meta for value in attributes)


def _place_(module: nn.Module, device: torch.device) -> None:
    """Move parameters and buffers to ``device``, one new tensor for each old one."""
    placed = WeakIdKeyDictionary()

    def place(tensor: Tensor) -> Tensor:
        if tensor.device == device or nn.parameter.is_lazy(tensor):
            return tensor
        if tensor not in placed:
            empty = tensor.is_meta or device.type == "meta"
            data = tensor.detach()
            data = torch.empty_like(data, device=device) if empty else data.to(device)
            if isinstance(tensor, nn.Parameter):
                data = nn.Parameter(data, requires_grad=tensor.requires_grad)
            placed[tensor] = data
        result: Tensor = placed[tensor]
        return result

    # setattr and not the private dicts: recurrent layers keep a second list of their weights.
    for child in module.modules():
        own = [*child.named_parameters(recurse=False, remove_duplicate=False)]
        own_buffers = child.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in [*own, *own_buffers]:
            replacement = place(tensor)
            if replacement is not tensor:
                setattr(child, name, replacement)
