"""Build modules without paying for their initial values.

A constructor is run as its author wrote it, except that every parameter becomes a meta tensor the
moment it is registered, so that initialisers have nothing to fill. Everything else a constructor
computes (buffers, relative position indices, anchors, depth schedules) is computed for real:
running the whole constructor under ``torch.device("meta")`` would lose those values, and breaks
constructors that read them back (RegNet's block widths).

A constructor that reads its own parameters, or runs a forward pass to learn its sizes (SSDLite),
cannot be built that way; it is then run once more, plainly, initial values included.

What a file asks to have built is built within a :class:`Limit`: a million layers are a few bytes in
a file.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registering
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from fxgrow.modules.dispatch import DispatchMode

_MIB = 1 << 20
_OFTEN = 0.02  # seconds between two looks at a constructor that is running
_AGAIN = 0.5  # seconds until it is stopped once more, if something has swallowed the first time
_EMPTY = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"})
_INIT_PATCH_LOCK = threading.RLock()  # two overlapping patches would restore each other's wrappers


class ExceededError(Exception):
    """A constructor asks for more than its limit; the text says for what."""


class _Exceeded(BaseException):  # constructors catch what is an Exception
    """Raised where a limit is exceeded, by whatever the constructor was doing."""


@dataclass(frozen=True)
class Limit:
    """How much building a network may take. By default, what the largest published ones do.

    Attributes:
        parts: modules, parameters and buffers.
        elements: of all parameters together.
        bytes: of one tensor that is computed, and by which the process may grow.
        operations: of torch.
        seconds: of the processor.
        known: what it follows from, for messages; "" if from nothing.
    """

    parts: int = 1 << 15
    elements: int = 1 << 40
    bytes: int = 384 * _MIB
    operations: int = 1 << 20
    seconds: float = 6.0
    known: str = ""

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Limit:
        """Return a limit that is generous for the network that some weights are of.

        Args:
            weights: all of its weights, by name.
        """
        elements = sum(tensor.numel() for tensor in weights.values())
        parts = 4096 + 8 * len(weights)
        return cls(
            parts=parts,
            elements=(4 * _MIB) + 8 * elements,
            bytes=384 * _MIB + 8 * sum(tensor.nbytes for tensor in weights.values()),
            operations=32 * parts,
            seconds=5.0 + 0.02 * len(weights) + elements / 2e7,  # where they are all initialised
            known=f"the file holds {len(weights)} tensors of {elements} numbers",
        )


def build_uninitialised(
    construct: Callable[[], object], device: str | torch.device, limit: Limit | None = None
) -> object:
    """Run a constructor and put the module it makes on ``device``, parameters uninitialised.

    On a real device, parameters hold whatever was in memory (the initial values where the
    constructor had to be run plainly), buffers and plain tensor attributes the values that the
    constructor computed. On ``"meta"``, parameters and buffers are meta tensors, and plain tensor
    attributes keep their values. Ties survive. The random state is left as it was, and warnings of
    the constructor are dropped: they are about initial values that nobody will see.

    Args:
        construct: makes the module; called a second time if the first attempt fails.
        device: where the parameters and buffers of the result are.
        limit: what both attempts together may take; None for all that there is.

    Returns:
        What ``construct`` returned, moved if it is an ``nn.Module``.

    Raises:
        ExceededError: it takes more than ``limit``.
    """
    if limit is not None:
        budget = _Budget(limit)
        try:
            return build_uninitialised(lambda: budget.run(construct), device)
        except _Exceeded:
            more = f"; {limit.known}" if limit.known else ""
            raise ExceededError(f"{budget.reason}{more}") from None
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


class _Budget(DispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a constructor takes in one thread, and stops it where that is too much.

    Args:
        limit: how much that is.

    Attributes:
        reason: what there was too much of; "" while there was not.
    """

    def __init__(self, limit: Limit) -> None:
        super().__init__()
        self.reason = ""
        self._limit = limit
        self._parts = self._elements = self._operations = 0
        self._thread = threading.get_ident()
        self._seconds = _processor_time(self._thread)
        self._grown = _resident()

    def run(self, construct: Callable[[], object]) -> object:
        """Return what a constructor makes, or stop it."""
        handles = [
            registering.register_module_module_registration_hook(self._count_part),
            registering.register_module_buffer_registration_hook(self._count_part),
            registering.register_module_parameter_registration_hook(self._count_parameter),
        ]
        try:
            with self:
                watch = _Watchdog(self._thread, self._excess)
                try:
                    try:
                        return construct()
                    finally:
                        watch.end()
                except _Exceeded:
                    watch.end()  # the first call may be what was stopped
                    raise
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._operations += 1
        if func is torch.ops.aten.unbind.int:  # iterating over a tensor makes all of them at once
            self._operations += args[0].shape[args[1] if len(args) > 1 else 0]
        if func is torch.ops.aten.linspace.default:  # a schedule, which becomes a list
            self._operations += args[2]
        if self._operations > self._limit.operations:
            self._stop(f"more than {self._limit.operations} operations")
        size = _filled(func, args, kwargs)
        if size > self._limit.bytes:
            self._stop(f"a tensor of {size // _MIB} MiB on the way")
        result = func(*args, **kwargs)
        if size > _MIB and (reason := self._excess()):
            self._stop(reason)
        return result

    def _count_part(self, module: nn.Module, name: str, part: object) -> None:
        """Count a module or a buffer that is registered."""
        if threading.get_ident() == self._thread:
            self._parts += part is not None
            if self._parts > self._limit.parts:
                self._stop(f"more than {self._limit.parts} layers and tensors")

    def _count_parameter(self, module: nn.Module, name: str, part: nn.Parameter | None) -> None:
        """Count a parameter that is registered."""
        self._count_part(module, name, part)
        if part is None or threading.get_ident() != self._thread or nn.parameter.is_lazy(part):
            return
        self._elements += part.numel()
        if self._elements > self._limit.elements:
            self._stop(f"more than {self._limit.elements} parameters")

    def _excess(self) -> str:
        """Return what has been too much so far, of time and memory; "" if it was not."""
        limit = self._limit
        if _processor_time(self._thread) - self._seconds > limit.seconds:
            self.reason = f"more than {limit.seconds:.3g} s"
        elif _resident() - self._grown > limit.bytes:
            self.reason = f"more than {limit.bytes // _MIB} MiB"
        return self.reason

    def _stop(self, reason: str) -> None:
        self.reason = reason
        raise _Exceeded(reason)


class _Watchdog:
    """Looks at a thread from another one, and raises in it what no other code would.

    Args:
        thread: which one; it is the one that ends the watch.
        excess: tells whether to raise, by a text.
    """

    def __init__(self, thread: int, excess: Callable[[], str]) -> None:
        self._thread = ctypes.c_ulong(thread)
        self._excess = excess
        self._end = threading.Event()
        self._raised = False
        self._watcher = threading.Thread(target=self._look, daemon=True)
        self._watcher.start()

    def end(self) -> None:
        """Return when nothing will be raised any more; raise if anything was."""
        try:
            self._end.set()
            self._watcher.join()
            for _ in range(100):  # what the other thread has raised arrives in here, if not before
                pass
        except _Exceeded:
            pass
        if self._raised:
            raise _Exceeded

    def _look(self) -> None:
        while not self._end.wait(_OFTEN):
            if self._excess():
                self._raised = True
                error = ctypes.py_object(_Exceeded)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, error)
                self._end.wait(_AGAIN)


def _processor_time(thread: int) -> float:
    """Return for how long a thread has been computing, or the time where that is not known."""
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.monotonic()


def _resident() -> int:
    """Return how many bytes of memory the process has, or 0 where that is not known."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        return 0


def _filled(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Return how many bytes of memory an operation is going to fill, or 0 if they are few.

    Its shapes are computed without its values. What is empty or a view fills none.
    """
    schema = func._schema
    is_view = any(returned.alias_info for returned in schema.returns)
    if schema.name in _EMPTY or (is_view and not schema.is_mutable):
        return 0
    leaves = tree_leaves((args, kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    device = kwargs.get("device") or (given[0].device if given else "cpu")
    if torch.device(device).type == "meta":
        return 0
    if schema.is_mutable:
        return max((tensor.nbytes for tensor in given), default=0)
    if 16 * _most_elements(leaves) < _MIB:
        return 0
    try:
        return _bytes_of_result(func, args, kwargs)
    except Exception:  # it depends on values: indices of what is not zero, say
        return 8 * sum(tensor.nbytes for tensor in given)


def _bytes_of_result(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Return how many bytes the result of an operation has, by running it on meta tensors."""
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = {**kwargs, "device": torch.device("meta")}
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    results = tree_leaves(func(*args, **kwargs))
    return sum(result.nbytes for result in results if isinstance(result, Tensor))


def _most_elements(leaves: list[Any]) -> float:
    """Return a bound of the elements that an operation's result can have: any two may multiply."""
    most = 1.0
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            most *= max(leaf.numel(), 1)
        elif isinstance(leaf, (int, float)) and leaf:
            most *= 1 + max(abs(leaf), 1 / abs(leaf))  # a step of 0.1 makes ten times as many
    return most


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

    handle = registering.register_module_parameter_registration_hook(replace)
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
