"""What a network is judged on: batches that were drawn, and others where it does something else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.errors import VerificationError
from fxgrow.modules.calling import Arguments, map_tensors, tensors_in
from fxgrow.modules.expectation import Expectation
from fxgrow.modules.standin import stand_in
from fxgrow.modules.tensors import named_tensors
from fxgrow.verification.cases import Inputs, Modes
from fxgrow.verification.findings import Effort
from fxgrow.verification.forward import Mode, outputs_of
from fxgrow.verification.operations import Behaviour, Size, behaviour, other_sizes, resized
from fxgrow.verification.runs import entries

_BOTH: Modes = ("eval", "train")
_MOST_SIZES = 4  # that are judged besides
_MOST_TIMES = 9  # how much larger than the others such inputs may be


def judged_inputs(
    before: nn.Module,
    after: nn.Module,
    batches: Sequence[Arguments],
    effort: Effort,
    *,
    draw: bool,
    needs_room: bool = False,
) -> tuple[Inputs, tuple[str, ...]]:
    """Return what two networks are judged on, and what is to be said of it.

    Args:
        before: the old network; only read.
        after: the grown one; only read.
        batches: inputs that both take, in the order of preference.
        effort: ``quick`` takes the smallest, in eval mode.
        draw: there are drawn weights, which all batches but the first are for.
        needs_room: the grown network need not run on all sizes that the old one runs on.
    """
    batches = [batch for batch in batches if entries(batch)]
    if not batches:
        raise VerificationError(
            "the inputs hold no numbers, so that they show nothing.", way_out="Give others."
        )
    if effort == "quick":
        return Inputs([(min(batches, key=entries), ("eval",))]), ()
    probe = _Probe(before, after)
    base = {mode: probe.behaviours(batches[0], mode) for mode in _BOTH}
    problems = {mode: next((b.problem for b in base[mode] if b.problem), "") for mode in _BOTH}
    notes = _notes_on(base, problems)
    if problems["eval"]:
        fit = [batches[0], *(b for b in batches[1:] if _fits(before, b, batches[0]))]
        return _arranged(fit, _BOTH, (), draw=draw, same=False), notes[:1]
    followed = [mode for mode in _BOTH if not problems[mode]]
    same = all(a.equals(b) for a, b in zip(*base.values(), strict=True))
    modes: Modes = ("eval",) if same else _BOTH
    first, *others = batches
    if draw:
        others = [probe.covering(others[0] if others else probe.smaller(first, modes), base)]
    found, more = _differing(probe, first, base, followed, needs_room=needs_room)
    made = _arranged([first, *others], modes, found, draw=draw, same=same)
    return replace(made, writes=any(problems.values()) or probe.writes), notes + more


def _told(problem: str) -> str:
    """Return why a network does not run on shapes alone, as people would say it."""
    return "it looks at values" if "meta" in problem.lower() else problem


def _fits(model: nn.Module, batch: Arguments, known: Arguments) -> bool:
    """Return whether a network takes inputs whose values were drawn, where it takes known ones.

    Boxes may be given that have a height and a width.
    """
    for mode in _BOTH:
        for arguments in (batch, known):
            try:  # on a copy that has not run: a forward may set what it finds unset
                outputs_of(stand_in(model, {}), arguments, mode, Expectation())
            except VerificationError:
                continue
            if arguments is known:
                return False
            break
    return True


def _notes_on(
    base: Mapping[Mode, tuple[Behaviour, Behaviour]], problems: Mapping[Mode, str]
) -> tuple[str, ...]:
    """Return what of the networks could not be looked at."""
    notes = tuple(
        f"whether inputs of other sizes make the network do something else in {mode} mode was not "
        f"looked at, since it does not run on shapes alone ({_told(problem)})"
        for mode, problem in problems.items()
        if problem
    )
    opaque = sorted({kind for both in base.values() for b in both for kind in b.opaque})
    return (
        (*notes, f"what the outputs hold in {', '.join(opaque)} was not compared")
        if opaque
        else notes
    )


def _arranged(
    batches: Sequence[Arguments],
    modes: Modes,
    besides: Sequence[tuple[Arguments, Modes]],
    *,
    draw: bool,
    same: bool,
) -> Inputs:
    """Return batches as inputs for the given and for drawn weights."""
    first, *others = [(batch, modes) for batch in batches]
    if draw:
        others = others or [first]
        known = [_shapes(batch) for batch, _ in others]
        besides = [entry for entry in besides if _shapes(entry[0]) not in known]
        return Inputs([first], [*others, *besides], same)
    return Inputs([first, *others, *besides], (), same)


def _differing(
    probe: _Probe,
    batch: Arguments,
    base: dict[Mode, tuple[Behaviour, Behaviour]],
    modes: Sequence[Mode],
    *,
    needs_room: bool,
) -> tuple[list[tuple[Arguments, Modes]], tuple[str, ...]]:
    """Return inputs of other sizes on which one of the networks does something else."""
    samples = next((t.shape[0] for t in tensors_in(batch)[:1] if t.ndim), 0)
    lost: dict[str, None] = {}
    cut: dict[str, None] = {}
    smallest: dict[Any, tuple[int, Size, Mode]] = {}
    for size, mode in itertools.product(other_sizes(batch), modes):
        changed = resized(batch, size, meta=True)
        found = probe.behaviours(changed, mode)
        factor = None if size.batch is None else (size.batch, samples)
        if found[0].problem:
            continue
        if factor is None and found[0].cuts(base[mode][0], samples) and _keeps(size, batch):
            cut.setdefault(size.told)
            continue
        if found[1].problem and needs_room:
            lost.setdefault(size.told)
            continue
        alike = (new.like(old, size, factor) for new, old in zip(found, base[mode], strict=True))
        if not found[1].problem and all(alike):
            continue
        key = (mode, *(b.operations for b in found), *_ranks(found))
        entry = (entries(changed), size, mode)
        if key not in smallest or entry[0] < smallest[key][0]:
            smallest[key] = entry
    told = [f"larger kernels no longer run on {', '.join(lost)}"] if lost else []
    if cut:
        told.append(
            f"on {', '.join(cut)} a flatten of a fixed size makes other rows than there are "
            "samples, which was not judged"
        )
    judged, notes = _chosen(batch, [*smallest.values()])
    return judged, (*told, *notes)


def _keeps(size: Size, batch: Arguments) -> bool:
    """Return whether what differs in inputs of a size cannot be how many samples there are."""
    tensors = tensors_in(batch)
    samples = tensors[0].shape[0]
    return all(tensors[index].shape[dim] != samples for index, dim in size.sizes)


def _chosen(
    batch: Arguments, differing: Sequence[tuple[int, Size, Mode]]
) -> tuple[list[tuple[Arguments, Modes]], tuple[str, ...]]:
    """Return inputs of the smallest of some sizes, and notes that tell which are judged.

    Args:
        batch: what is resized.
        differing: for each thing that the networks do, how many numbers the inputs have, their size
            and the mode.
    """
    notes = []
    chosen: dict[int, tuple[Size, list[Mode]]] = {}
    for _, size, mode in sorted(differing, key=lambda entry: entry[0]):
        chosen.setdefault(id(size), (size, []))[1].append(mode)
    most = _MOST_TIMES * entries(batch)
    judged: list[tuple[Arguments, Modes]] = []
    left: list[str] = []
    for size, where in chosen.values():
        changed = resized(batch, size, meta=False)
        if len(judged) < _MOST_SIZES and entries(changed) <= most:
            judged.append((changed, tuple(where)))
        else:
            left.append(size.told)
    if judged:
        told = ", ".join(size.told for size, _ in chosen.values() if size.told not in left)
        notes.append(f"judged on {told} too, where the network does something else")
    if left:
        notes.append(f"on {', '.join(left)} the network does something else, which was not judged")
    return judged, tuple(notes)


def _shapes(batch: Arguments) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_in(batch)]


def _ranks(found: Sequence[Behaviour]) -> Iterator[tuple[int, ...]]:
    """Yield how many dims results have: all that shapes tell whatever the size."""
    for behaved in found:
        yield tuple(map(len, behaved.shapes))


class _Probe:
    """Runs two networks on the meta device.

    Attributes:
        writes: whether any run so far wrote into a parameter.
    """

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        self._networks = stand_in(before), stand_in(after)
        self.writes = False

    def behaviours(self, batch: Arguments, mode: Mode) -> tuple[Behaviour, Behaviour]:
        """Return what both networks do on inputs in a mode."""
        arguments: Arguments = map_tensors(_on_meta, batch)
        old, new = (behaviour(network, arguments, mode) for network in self._networks)
        self.writes |= old.writes or new.writes
        return old, new

    def smaller(self, batch: Arguments, modes: Modes) -> Arguments:
        """Return inputs of one sample, if the networks take them, else the same."""
        for size in other_sizes(batch):
            one = resized(batch, size, meta=True)
            fits = size.batch == 1 and entries(one) < entries(batch)
            if fits and not any(b.problem for mode in modes for b in self.behaviours(one, mode)):
                return resized(batch, size, meta=False)
        return batch

    def covering(
        self, batch: Arguments, base: dict[Mode, tuple[Behaviour, Behaviour]]
    ) -> Arguments:
        """Return inputs whose ids are drawn from all rows of the tables that they look up."""
        tensors = named_tensors(self._networks[0])
        rows: dict[int, int] = {}
        for name, origins, *_ in base["eval"][0].operations:
            if name != "aten::embedding" or origins[0] not in tensors:
                continue
            if isinstance(origins[1], tuple) and origins[1][0] == "input":
                index, height = origins[1][1], tensors[origins[0]].shape[0]
                rows[index] = min(height, rows.get(index, height))
        generator = torch.Generator().manual_seed(1)
        places = itertools.count()

        def draw(tensor: Tensor) -> Tensor:
            height = rows.get(next(places))
            if height is None:
                return tensor
            ids = torch.randint(height, tensor.shape, generator=generator, dtype=tensor.dtype)
            return ids.to(tensor.device)

        covered: Arguments = map_tensors(draw, batch)
        return covered


def _on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor without values, unless it holds numbers that a forward may look at."""
    if tensor.is_floating_point():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return tensor.cpu()
