"""Where stages are: lists of modules, and runs of blocks that are attributes of a module.

A run is a chain of modules of one class, of which each gets what the one before it gives, as a
recorded run of the network tells, whatever the code looks like that calls them.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

from torch import nn

from fxgrow.errors import PlanError
from fxgrow.grow.identity.concrete_run import Recording, is_inside, record
from fxgrow.grow.identity.stages import LISTS, Stage, child_of, new_blocks, structure
from fxgrow.labels.tape import Operation
from fxgrow.labels.trace import Traced

Chain: TypeAlias = tuple[str, ...]  # names in their container, each of which follows the one before


def around(model: nn.Module, keys: Collection[str]) -> list[str]:
    """Return the modules that tell what stages some names are: those in, beside and around them.

    Args:
        model: the network.
        keys: names that may be those of stages.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for key in keys:
        parts = key.split(".") if key else []
        containers = [key, *(".".join(parts[:length]) for length in range(len(parts)))]
        for name in containers:
            if name in modules:
                found += [name, *(child_of(name, child) for child in modules[name]._modules)]
    return [name for name in dict.fromkeys(found) if modules.get(name) is not None]


def find_stage(traced: Traced, key: str, blocks: str, before: Recording) -> Stage:
    """Return the stage that a key names.

    Args:
        traced: the network.
        key: name of a list of modules, or of one in such a list; else of a block in a run, or of a
            module that holds one run.
        blocks: how many there are to be: ``"+2"``, ``"2x"`` or ``"6"``.
        before: a run of the network in which what :func:`around` names was watched.

    Raises:
        PlanError: there is no such list, module or run, or the number cannot be read.
    """
    modules = dict(traced.standin.named_modules(remove_duplicate=False))
    container, _, local = key.rpartition(".")
    if isinstance(modules.get(key), LISTS) and len(modules[key]._modules) > 0:
        container, names = key, tuple(modules[key]._modules)
        after = len(names) - 1
    elif local and isinstance(modules.get(container), LISTS) and key in modules:
        names = tuple(modules[container]._modules)
        after = names.index(local)
    elif key in modules:
        container, names, after = _find_run(traced, key, before)
    else:
        raise _unknown(traced, key, f"there is no stage {key!r}")
    children = [modules[child_of(container, name)] for name in names]
    alike = [place for place, child in enumerate(children) if type(child) is type(children[after])]
    return Stage(key, container, names, after, new_blocks(blocks, len(alike), key))


def _find_run(traced: Traced, key: str, before: Recording) -> tuple[str, Chain, int]:
    """Return the run that a key names a block of, or that is in it: where, what, after which block.

    Chains with modules of one structure are preferred to those with one block that could follow
    itself (because the first of two projects).

    Raises:
        PlanError: there is none, or more than one.
    """
    model = traced.standin
    container, _, local = key.rpartition(".")
    own: Chain = next((c for c in chains(model, container, before) if local in c), ())
    if _alike(model, container, own):
        return container, own, own.index(local)
    inside = chains(model, key, before)
    found = [chain for chain in inside if _alike(model, key, chain)]
    if not found and own and _repeats(model, key, before):
        return container, own, own.index(local)
    found = found or [c for c in inside if _repeats(model, child_of(key, c[-1]), before)]
    if not found:
        raise _unknown(traced, key, _obstacle(model, key, before))
    if len(found) > 1:
        raise _several(key, found)
    return key, found[0], len(found[0]) - 1


def _several(key: str, found: Sequence[Chain]) -> PlanError:
    """Return the error for a module that holds several runs."""
    ends = " or ".join(child_of(key, chain[-1]) for chain in found)
    return PlanError(
        f"{key or 'the network'} holds {len(found)} runs of blocks.",
        name=key,
        way_out=f"Name the block after which new ones come: {ends}.",
    )


def _repeats(model: nn.Module, name: str, before: Recording) -> bool:
    """Return whether a module that holds others gives what another one like it could take."""
    call = before.calls[name][0]
    taken, given = ([value.shape for value in ends[:1]] for ends in (call.inputs, call.outputs))
    return taken == given and any(True for _ in model.get_submodule(name).children())


def chains(model: nn.Module, container: str, before: Recording) -> list[Chain]:
    """Return the chains of modules of one class among those that a module holds.

    Args:
        model: the network.
        container: the module that holds them.
        before: a run of the network in which they were watched.
    """
    modules = _with_parameters(model, container)
    calls = [(n, call) for n in modules for call in before.calls.get(child_of(container, n), ())]
    givers = {call.outputs[0]: name for name, call in calls if call.outputs}
    links = set()
    for name, call in calls:
        giver = givers.get(call.inputs[0], name) if call.inputs else name
        if giver != name and type(modules[giver]) is type(modules[name]):
            links.add((giver, name))
    return list(_joined(modules, links))


def _joined(names: Iterable[str], links: Collection[tuple[str, str]]) -> Iterator[Chain]:
    """Yield the chains that some links make, where nothing forks and nothing is joined."""
    befores, afters = Counter(b for _, b in links), Counter(a for a, _ in links)
    follower = {a: b for a, b in links if befores[b] == 1 and afters[a] == 1}
    for start in names:
        if start in follower and start not in follower.values():
            chain = [start]
            while chain[-1] in follower:
                chain.append(follower[chain[-1]])
            yield tuple(chain)


def _with_parameters(model: nn.Module, container: str) -> dict[str, nn.Module]:
    """Return those modules of a module that have weights, by their names in it."""
    children = model.get_submodule(container)._modules.items()
    return {n: m for n, m in children if m is not None and any(True for _ in m.parameters())}


def _alike(model: nn.Module, container: str, chain: Chain) -> list[str]:
    """Return those modules of a chain that have the structure of another one in it."""
    found = {name: structure(model.get_submodule(child_of(container, name))) for name in chain}
    counts = Counter(found.values())
    return [name for name in chain if counts[found[name]] > 1]


def _obstacle(model: nn.Module, key: str, before: Recording) -> str:
    """Return why a module is no block in a run, and holds none."""
    container, _, local = key.rpartition(".")
    pairs = [
        (child_of(owner, a), child_of(owner, b))
        for owner in (container, key)
        for a, b in pairwise(_with_parameters(model, owner))
        if (owner == key or local in (a, b)) and _alike(model, owner, (a, b))
    ]
    if not pairs:
        return (
            f"{key} is a {type(model.get_submodule(key)).__name__}, no list of blocks and no block "
            "in one or in a run"
        )
    for name in pairs[0]:
        if len(before.calls[name]) != 1:
            return f"{name} runs {len(before.calls[name])} times in a pass"
    return (
        f"{pairs[0][0]} and {pairs[0][1]} are alike, but no run: what the one gives is not what "
        "the other takes"
    )


def stages(model: nn.Module, before: Recording) -> Iterator[str]:
    """Yield the names of all lists of modules of one class with weights, and of residual runs.

    Args:
        model: the network.
        before: a run of the network in which all modules were watched.
    """
    sums = {op.module for op in before.tape.operations if _is_sum_of_data(op)}
    for name, module in model.named_modules():
        if isinstance(module, LISTS):
            if len(set(map(type, filter(_has_layers, module._modules.values())))) == 1:
                yield name
            continue
        runs = [_alike(model, name, chain) for chain in chains(model, name, before)]
        ends = [child_of(name, alike[-1]) for alike in runs if alike]
        for end in ends:
            if any(is_inside(place, end) for place in sums):
                yield name if name and len(ends) == 1 else end


def _is_sum_of_data(op: Operation) -> bool:
    """Return whether an operation adds what is computed from the input alone."""
    return op.name == "add" and not any(value.is_weight for value in op.inputs)


def _has_layers(module: nn.Module | None) -> bool:
    """Return whether a module holds other modules that have parameters: whether it is a block."""
    return module is not None and any(
        any(True for _ in inner.parameters(recurse=False)) for inner in module.children()
    )


def _unknown(traced: Traced, key: str, problem: str) -> PlanError:
    """Return the error for a key that names no stage."""
    modules = dict(traced.standin.named_modules(remove_duplicate=False))
    known = list(stages(traced.standin, record(traced, modules)))
    near = difflib.get_close_matches(key, [name for name in modules if name], n=3, cutoff=0.4)
    hints = [f"Near it: {', '.join(near)}."] if near and key not in modules else []
    shown = ", ".join(name or "the network itself" for name in known[:8])
    hints += (
        [f"Stages: {shown}{' and others' if len(known) > 8 else ''}."]
        if known
        else ["It has none: a stage is a run of blocks, each of which could follow itself."]
    )
    return PlanError(f"{problem}.", name=key, way_out=" ".join(hints))
