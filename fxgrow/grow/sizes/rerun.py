"""Run a network at its new sizes, on meta tensors: nothing is assumed about where channels go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from fxgrow.apply.trial import set_attributes
from fxgrow.channels.analysis import Analysis, SizedRun
from fxgrow.channels.channels import Channels, resolve
from fxgrow.channels.groups import group_of_channel, layer_of
from fxgrow.errors import PlanError, TraceError
from fxgrow.grow.sizes.attributes import attribute_edits
from fxgrow.grow.sizes.conventions import head_edits
from fxgrow.grow.sizes.literals import (
    Candidate,
    Growth,
    Guess,
    Repair,
    Repairer,
    growth_of,
    guesses,
)
from fxgrow.grow.sizes.resize import Sizes
from fxgrow.labels.layers import support
from fxgrow.labels.propagate import Watch, no_watch
from fxgrow.labels.sizes import check_sizes
from fxgrow.labels.tape import Tape
from fxgrow.labels.trace import Traced
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import ModuleEdit, SizeEdit

_ROUNDS = 8  # of trying attributes; each costs a run on meta tensors


@dataclass(frozen=True)
class Resized:
    """What a run at new sizes tells.

    Attributes:
        channels: the channels at the new sizes.
        modules: the attributes that had to follow.
        tape: the operations of the run.
        sizes: what has to be rewritten in the network's graph.
    """

    channels: Channels
    modules: tuple[ModuleEdit, ...]
    tape: Tape
    sizes: tuple[SizeEdit, ...] = ()


def run_resized(analysis: Analysis, sizes: Sizes) -> Resized:
    """Run the stand-in's own forward at new sizes, and put it back as it was.

    Attributes that repeat a tensor's size follow it. If that is not enough, the sizes in the
    network's own code are traced back to attributes, and where they come from none they are
    rewritten in its graph; see :mod:`fxgrow.grow.sizes.literals`.

    Raises:
        TraceError: the network does not run at these sizes.
    """
    standin = analysis.traced.standin
    counts = sizes.convolution_groups | sizes.norm_groups
    follow = tuple(attribute_edits(standin, sizes.shapes, counts))
    found = _found(analysis, sizes, follow)
    if found.sizes:  # they were found with the attributes as they are
        return found
    more = tuple(head_edits(standin, analysis.groups, sizes.widths, found.modules))
    if more and not _is_unread(analysis, sizes, found, more):
        more = tuple(edit for edit in more if _is_unread(analysis, sizes, found, (edit,)))
    return replace(found, modules=(*found.modules, *more))


def _is_unread(
    analysis: Analysis, sizes: Sizes, found: Resized, more: tuple[ModuleEdit, ...]
) -> bool:
    """Return whether the network computes the same with some more attributes changed."""
    try:
        again = _run(analysis.traced, sizes, (*found.modules, *more))
    except TraceError:
        return False
    return _computed(again) == _computed(found)


def _computed(run: Resized) -> tuple[list[tuple[int, ...]], list[str]]:
    """Return the shapes of all that a run computed, and what it did with which numbers."""
    values = (value for op in run.tape.operations for value in op.outputs)
    return [value.shape for value in values], [deed for deed, _ in run.channels.noted]


def _found(analysis: Analysis, sizes: Sizes, follow: tuple[ModuleEdit, ...]) -> Resized:
    """Run as it is, else with other attributes, else with another graph."""
    try:
        found = _run(analysis.traced, sizes, follow)
        _check_positions(analysis.tape, found.tape)
        _check_norms(sizes, found.channels)
    except TraceError as error:
        failure = error
    else:
        return found
    try:
        return _with_attributes(analysis, sizes, follow)
    except (TraceError, PlanError) as error:
        failure = error if isinstance(error, TraceError) else failure
    try:
        return _with_graph(analysis, sizes, follow)
    except (TraceError, PlanError):
        raise failure from None


def _run(
    traced: Traced,
    sizes: Sizes,
    edits: tuple[ModuleEdit, ...],
    watch: Watch = no_watch,
    graph: fx.Graph | None = None,
) -> Resized:
    """Run the stand-in's own forward, or a graph of it, at new sizes."""
    with _resized(traced.standin, sizes.shapes, edits):
        space, tape = traced.label_graph(graph, watch) if graph else traced.label(watch)
    return Resized(resolve(space), edits, tape)


def _check_positions(old: Tape, new: Tape) -> None:
    """Return if what holds no channels has the size that it had, step by step.

    A size of -1 in the code may have swallowed new channels: as positions, of which there are now
    more. Runs of different operations are not compared.

    Raises:
        TraceError: some number of positions changed.
    """
    pairs = list(zip(old.operations, new.operations, strict=False))
    same = len(old.operations) == len(new.operations)
    if not same or any(before.target is not after.target for before, after in pairs):
        return
    for before, after in pairs:
        for was, becomes in zip(before.outputs, after.outputs, strict=False):
            covered = set[int]().union(*(support(layer) for layer in was.layers))
            ends = enumerate(zip(was.shape, becomes.shape, strict=False))
            if was.layers and any(a != b and dim not in covered for dim, (a, b) in ends):
                raise TraceError(
                    f"the code of {after.module or 'the model'} makes positions of new channels: "
                    f"{list(was.shape)} becomes {list(becomes.shape)} in {after.name}",
                    name=after.module,
                )


def _check_norms(sizes: Sizes, channels: Channels) -> None:
    """Return if every group norm that should have new groups has them.

    Raises:
        TraceError: the code says another number.
    """
    for weight, count in sizes.norm_groups.items():
        if channels.norm_groups[weight] != count:
            raise TraceError(
                f"the code of {layer_of(weight)} fixes {channels.norm_groups[weight]} groups of a "
                f"group norm, where {count} are needed",
                name=layer_of(weight),
            )


def _growth(analysis: Analysis, sizes: Sizes, run: SizedRun) -> Growth:
    """Return how wide the values of an old run become."""
    group_of = group_of_channel(analysis.channels, analysis.groups)
    ratios = [sizes.widths.get(group.name, group.width) / group.width for group in analysis.groups]
    by_channel = [1.0 if group < 0 else ratios[group] for group in group_of[:-1]]
    return growth_of(run.channels, analysis.channels, by_channel, sizes.norm_groups)


def _with_attributes(analysis: Analysis, sizes: Sizes, follow: tuple[ModuleEdit, ...]) -> Resized:
    """Find the attributes with which the network's own forward runs at its new sizes.

    Raises:
        TraceError: it runs with none; the first size that is fixed is told.
        PlanError: it computes in another order at its new sizes.
    """
    run = analysis.own_forward
    growth = _growth(analysis, sizes, run)
    chosen: dict[Candidate, Guess] = {}
    useless: set[Candidate] = set()
    for _ in range(_ROUNDS):
        edits = (*follow, *(edit for guess in chosen.values() for edit in guess.edits))
        watch = _Repairing(run, growth, analysis.traced)
        try:
            found = _run(analysis.traced, sizes, edits, watch)
        except TraceError:
            if not watch.repairs and chosen:
                break  # it is of the guesses that it does not run, which nobody asked for
            if not watch.repairs:
                raise
        else:
            if not watch.repairs:
                return found
        repairs = watch.repairs
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


def _with_graph(analysis: Analysis, sizes: Sizes, follow: tuple[ModuleEdit, ...]) -> Resized:
    """Rewrite the sizes that the network's code fixes in its graph.

    Raises:
        TraceError: there is no such graph, or a size is not in it.
        PlanError: it computes in another order at its new sizes.
    """
    if isinstance(analysis.opened, TraceError):
        raise analysis.opened
    opened = analysis.opened
    traced = opened.traced
    watch = _Repairing(opened.run, _growth(analysis, sizes, opened.run), traced)
    found = _run(traced, sizes, follow, watch, opened.graph)
    nodes = {node.name: node for node in opened.graph.nodes}
    edits = tuple(
        SizeEdit(repair.node, repair.function, repair.given, repair.wanted, traced.module)
        for repair in watch.repairs
    )
    for edit in edits:
        check_sizes(nodes[edit.node], edit.function, edit.before)
    return replace(found, sizes=edits)


class _Repairing:
    """A watch that repairs the sizes of each run in step with an old one."""

    def __init__(self, run: SizedRun, growth: Growth, traced: Traced) -> None:
        self._runs: list[Repairer] = []
        self._run, self._growth, self._traced = run, growth, traced

    def __call__(self, value: object) -> Repairer:
        """Return what watches the next run."""
        del value
        calls = self._run.calls[min(len(self._runs), len(self._run.calls) - 1)]
        self._runs.append(Repairer(calls, self._growth, self._traced.at))
        return self._runs[-1]

    @property
    def repairs(self) -> list[Repair]:
        """The repairs of all runs."""
        return [repair for run in self._runs for repair in run.repairs]


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
        owner, _, local = name.rpartition(".")
        setattr(standin.get_submodule(owner), local, tensor)
