"""Which parts of a network are followed: the whole, a named submodule, or what can be found.

Some networks cannot be followed as a whole, on inputs that are inferred or at all, but their
backbones and heads can. A part is followed with inputs of its own; what comes out
of it is pinned as the outputs of a network are, so that the rest still fits. Names are those in
the whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from torch import nn

from fxgrow.channels.analysis import Analysis, analyse
from fxgrow.errors import TooLargeError, TraceError
from fxgrow.labels.trace import trace
from fxgrow.modules.collection import uncollected
from fxgrow.modules.tensors import layer_of

_MOST_PARTS = 32  # that are tried before the search is given up


def follow(
    model: nn.Module, example_inputs: object = None, module: str = ""
) -> tuple[tuple[Analysis, ...], tuple[str, ...]]:
    """Follow a network, or the largest parts of it that can be followed.

    Args:
        model: the network; only read.
        example_inputs: arguments of what is followed; None infers them. Parts are looked for only
            without, because inputs for the whole say nothing of theirs.
        module: follow this submodule alone; "" for the whole.

    Returns:
        What was found, a part each, and what the user should know.

    Raises:
        TraceError: neither the whole nor a part can be followed, or there is no such submodule.
    """
    if module:
        check_module(model, module)
        return (_analysed(model, example_inputs, module),), ()
    try:
        return (_analysed(model, example_inputs),), ()
    except TooLargeError:
        raise
    except TraceError as error:
        found = _parts(model) if example_inputs is None else ()
        if not found:
            raise _with_choices(error, model) from error
        names = ", ".join(analysis.traced.module for analysis in found)
        note = (
            f"the whole of {type(model).__name__} cannot be followed ({error.reason}); "
            f"followed instead, each on inputs inferred for it: {names}"
        )
        return found, (note,)


def _analysed(model: nn.Module, example_inputs: object = None, module: str = "") -> Analysis:
    """Return what is found in a network or one part of it.

    Raises:
        TraceError: it cannot be followed.
    """
    with uncollected():
        try:
            return analyse(trace(model, example_inputs, module))
        except TraceError as error:
            raise _with_empty_told(error, model) from error


def _with_empty_told(error: TraceError, model: nn.Module) -> TraceError:
    """Return an error that says so where a layer of no channel may be what does not run."""
    empty = [name for name, parameter in model.named_parameters() if not parameter.numel()]
    if not empty:
        return error
    return type(error)(
        f"{error.message} {layer_of(empty[0])} has no channels, and torch runs few layers so: "
        "neither a convolution that writes none nor a batch norm over none.",
        name=error.name,
        way_out="Give it one channel (its columns zero, to compute the same): one grows as any "
        "number.",
    )


def check_module(model: nn.Module, module: str) -> None:
    """Return if a submodule can be followed by itself.

    Raises:
        TraceError: there is no such submodule, it has no ``forward``, or it is a single layer.
    """
    names = dict(model.named_modules())
    if not isinstance(module, str) or module not in names:
        near = difflib.get_close_matches(module, names, n=3, cutoff=0.4)
        way_out = f"Near it: {', '.join(near)}." if near else _offer(model)
        raise TraceError(f"there is no submodule {module!r}.", name=module, way_out=way_out)
    chosen = names[module]
    kind = type(chosen).__name__
    if not _has_forward(chosen):
        raise TraceError(
            f"{module} is a {kind}, which is never run itself.",
            name=module,
            way_out=_offer(chosen, module) or _offer(model),
        )
    if _layer_count(chosen) < 2:
        raise TraceError(
            f"{module} ({kind}) has no channels between layers of its own, so nothing in it can "
            "grow.",
            name=module,
            way_out=f"Name a module around it: {module.rpartition('.')[0] or 'the whole'}.",
        )


def _parts(model: nn.Module) -> tuple[Analysis, ...]:
    """Return the largest parts that can be followed and grow, breadth first."""
    found = []
    waiting = list(_children(model))
    tried = 0
    while waiting and tried < _MOST_PARTS:
        name = waiting.pop(0)
        part = model.get_submodule(name)
        tried += 1
        try:
            analysis = _analysed(model, module=name)
        except TraceError:
            waiting += _children(part, name)
            continue
        if any(group.kind != "pinned" for group in analysis.groups):
            found.append(analysis)
    return tuple(found)


def _children(module: nn.Module, name: str = "") -> Iterator[str]:
    """Yield the submodules that could be followed by themselves, outermost first."""
    for local, child in module.named_children():
        full = f"{name}.{local}" if name else local
        if _layer_count(child) < 2:
            continue
        if _has_forward(child):
            yield full
        else:
            yield from _children(child, full)


def _has_forward(module: nn.Module) -> bool:
    """Return whether a module can be called: a list of modules cannot."""
    return type(module).forward is not nn.Module.forward


def _layer_count(module: nn.Module) -> int:
    """Return the number of submodules with weights: it takes two to write and read a channel."""
    return sum(
        any(parameter.ndim > 1 for parameter in inner.parameters(recurse=False))
        for inner in module.modules()
    )


def _offer(module: nn.Module, name: str = "") -> str:
    """Return the way out that names submodules to choose from, or ""."""
    names = list(_children(module, name))
    shown = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
    return f"Submodules that can be named: {shown}." if names else ""


def _with_choices(error: TraceError, model: nn.Module) -> TraceError:
    """Return an error that names the submodules that could be followed instead."""
    names = list(_children(model))
    if not names:
        return error
    shown = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
    offer = f"Or name a submodule with inputs of its own (--module): {shown}."
    way_out = f"{error.way_out} {offer}".strip()
    return type(error)(error.message, name=error.name, way_out=way_out)
