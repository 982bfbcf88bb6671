"""Run a network at its new sizes, on meta tensors: nothing is assumed about where channels go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxgrow.analysis import Analysis
from fxgrow.apply import set_attributes
from fxgrow.channels import Channels, resolve
from fxgrow.errors import TraceError
from fxgrow.groups import group_of_channel, layer_of
from fxgrow.labels.propagate import Watch, named_tensors, no_watch
from fxgrow.plan.literals import Candidate, Guess, Repair, Repairer, growth_of, guesses
from fxgrow.plan.modules import attribute_edits
from fxgrow.plan.resize import Sizes
from fxgrow.plan.schema import ModuleEdit

_ROUNDS = 8  # of trying attributes; each costs a run on meta tensors


@dataclass(frozen=True)
class Resized:
    """What a run at new sizes tells.

    Attributes:
        channels: the channels at the new sizes.
        modules: the attributes that had to follow.
        flops: floating-point operations of the run.
    """

    channels: Channels
    modules: tuple[ModuleEdit, ...]
    flops: int


def run_resized(analysis: Analysis, sizes: Sizes) -> Resized:
    """Run the stand-in's own forward at new sizes, and put it back as it was.

    Attributes that repeat a tensor's size follow it. If that is not enough, the sizes in the
    network's own code are traced back to attributes; see :mod:`fxgrow.plan.literals`.

    Raises:
        TraceError: the network does not run at these sizes.
    """
    standin = analysis.traced.standin
    edits = tuple(attribute_edits(standin, sizes.shapes, sizes.convolution_groups))
    try:
        return _run(analysis, sizes, edits)
    except TraceError as error:
        return _run_repaired(analysis, sizes, edits, error)


def _run(
    analysis: Analysis, sizes: Sizes, edits: tuple[ModuleEdit, ...], watch: Watch = no_watch
) -> Resized:
    with _resized(analysis.traced.standin, sizes.shapes, edits):
        space, tape = analysis.traced.label_module(watch)
    return Resized(resolve(space), edits, tape.flops)


def _run_repaired(
    analysis: Analysis, sizes: Sizes, follow: tuple[ModuleEdit, ...], error: TraceError
) -> Resized:
    """Find the attributes with which the network runs at its new sizes."""
    channels, calls = analysis.sized_calls
    group_of = group_of_channel(analysis.channels, analysis.groups)
    ratios = [sizes.widths.get(group.name, group.width) / group.width for group in analysis.groups]
    growth = growth_of(
        channels, analysis.channels, [1.0 if g < 0 else ratios[g] for g in group_of[:-1]]
    )
    chosen: dict[Candidate, Guess] = {}
    useless: set[Candidate] = set()
    repairs: Sequence[Repair] = ()
    for _ in range(_ROUNDS):
        edits = (*follow, *(edit for guess in chosen.values() for edit in guess.edits))
        watchers: list[Repairer] = []

        def watch(_: object, watchers: list[Repairer] = watchers) -> Repairer:
            run = calls[min(len(watchers), len(calls) - 1)]
            watchers.append(Repairer(run, growth, lambda: analysis.traced.running))
            return watchers[-1]

        try:
            found = _run(analysis, sizes, edits, watch)
        except TraceError:
            if not any(watcher.repairs for watcher in watchers):
                raise error from None
        else:
            if not any(watcher.repairs for watcher in watchers):
                return found
        repairs = [repair for watcher in watchers for repair in watcher.repairs]
        wrong = {repair.call for repair in repairs}
        useless |= {key for key, guess in chosen.items() if guess.calls <= wrong}
        chosen = {key: guess for key, guess in chosen.items() if key not in useless}
        fresh = guesses(analysis.traced.standin, repairs, useless, chosen)
        if not fresh:
            break
        for key, guess in fresh.items():
            known = chosen.setdefault(key, Guess())
            known.edits += guess.edits
            known.calls |= guess.calls
    first = repairs[0]
    raise TraceError(
        f"the code of {first.module or 'the model'} fixes sizes {list(first.given)} in "
        f"{first.function}, where {list(first.wanted)} are needed",
        name=first.module,
    )


@contextlib.contextmanager
def _resized(
    standin: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    edits: tuple[ModuleEdit, ...],
) -> Iterator[None]:
    """Swap tensors and attributes of a stand-in for a while; ties stay tied."""
    before = named_tensors(standin)
    fresh: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        old = before[name]
        tensor = torch.empty(shape, dtype=old.dtype, device="meta")
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        fresh[id(old)] = tensor
    _swap(standin, {name: fresh[id(t)] for name, t in before.items() if id(t) in fresh})
    set_attributes(standin, edits)
    try:
        yield
    finally:
        _swap(standin, {name: t for name, t in before.items() if id(t) in fresh})
        set_attributes(standin, edits, back=True)


def _swap(standin: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        owner = standin.get_submodule(layer_of(name) if "." in name else "")
        local = name.rpartition(".")[2]
        table = owner._parameters if local in owner._parameters else owner._buffers
        table[local] = tensor  # type: ignore[assignment]
