"""The runs that a judgement rests on: each network by itself, on all batches, one after another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxgrow.errors import VerificationError
from fxgrow.modules.calling import Arguments, tensors_in
from fxgrow.modules.expectation import Expectation
from fxgrow.modules.standin import keeping_state, stand_in
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import NormGain
from fxgrow.verification.cases import Case, Drawn, Inputs, Modes, Network
from fxgrow.verification.choices import Choosing, decided_on
from fxgrow.verification.exact import Exact, Weights
from fxgrow.verification.findings import ExactResult, ModeResult, errors_of, ratio_of, rounding_of
from fxgrow.verification.forward import Mode, in_double, lent_copy, outputs_of, shown
from fxgrow.verification.gradients import Gradients, check_gradients
from fxgrow.verification.ran import Job, Outputs, Ran, absorbing, further, keeping_values, tells

Compared: TypeAlias = tuple[Job, ExactResult, float]  # … and what is no more than rounding
_NUDGE = 2e-15  # relative change of weights, to find how much a network magnifies rounding
# Choices are made alike where the numbers that they are made by differ by this much of the largest,
# or, in a network's own dtype, by so many rounding units, and never more than the last.
_SAME, _TIMES_NATIVE, _MOST = 1e-9, 1000.0, 0.05
_TOO_FEW = "Expected more than 1 value per channel"  # what a batch norm asks for in train mode
_TIMES = 100.0  # what so small a change does to the outputs, rounding may do this many times


class Runs:
    """Runs the networks of a case.

    Attributes:
        gradients: what the check of gradients found, after :meth:`given`.
        notes: what is to be said of the runs.
        excused: relative deviations on the given weights that are no more than rounding.
    """

    def __init__(self, case: Case, inputs: Inputs, progress: Callable[[float], object]) -> None:
        self.gradients = Gradients()
        self.notes: list[str] = []
        self.excused: dict[Mode, float] = {}
        self._case, self._inputs, self._progress = case, inputs, progress
        self._exactly = Expectation(exact=True)
        self._done = 0
        self._steps = 4 * sum(len(modes) for _, modes in (*inputs.given, *inputs.drawn))
        self._used: set[str] = set()
        self._modes: Modes = ("eval", "train")

    def given(self, tolerance: float) -> list[tuple[Mode, ModeResult]]:
        """Return what the given weights show, batch by batch and mode by mode.

        Args:
            tolerance: a relative deviation that needs no excuse.

        Raises:
            VerificationError: a network does not run, or returns nothing that can be compared.
        """
        case, (batches, jobs) = self._case, _jobs(self._inputs.given)
        before = self._first(batches, jobs)
        jobs = [job for job in jobs if job in before]
        predicted = self._predicted(None, batches, jobs, before)
        after = self._exact(case.after, case.after.given, batches, jobs, grown=True, like=predicted)
        old, new = before, after
        if case.edits and case.effort == "full":
            alike = (b for b, _ in self._inputs.drawn if _sample(b) == _sample(batches[0]))
            self.gradients = self._check_gradients(min([*alike, batches[0]], key=entries))
        if self._rounds:
            old = self._native(case.before.module, batches, jobs, like=before)
            new = self._native(case.after.module, batches, jobs, grown=True, like=old)
        runs = (before, predicted, after, old, new)
        self._note_parted(after, new)
        before, predicted, after, old, new = self._decided_on(runs)
        if case.effort == "full":
            self._note_constant(before[Job(0, "eval")], batches[0])
        found = []
        for job in jobs:
            own = rounding_of(before[job], old[job])
            grown = rounding_of(predicted[job], new[job])
            result = ModeResult(
                float64=errors_of(before[job], after[job], whole_numbers=True),
                native=errors_of(old[job], new[job]),
                rounding=own,
                grown_rounding=grown if case.predictable else None,
                predicted=errors_of(before[job], predicted[job]),
                residual=errors_of(predicted[job], after[job], whole_numbers=True),
                ratio=ratio_of(grown, own) if case.predictable else None,
            )
            if not result.residual.within(tolerance):
                self._excuse(job.mode, self._magnified(None, batches, job, before))
            found.append((job.mode, result))
        for job, exact, rounding in self._by_chance(None, batches, before, tolerance):
            self._excuse(job.mode, rounding)
            found.append((job.mode, ModeResult.of(exact)))
        return found

    def _excuse(self, mode: Mode, deviation: float) -> None:
        self.excused[mode] = max(deviation, self.excused.get(mode, 0.0))

    def _first(self, batches: Sequence[Arguments], jobs: Sequence[Job]) -> Ran:
        """Return what the old network computes, in the modes in which it runs."""
        case = self._case
        try:
            return self._exact(case.before, case.before.given, batches, jobs)
        except VerificationError as error:
            kept = [job for job in jobs if job[1] == "eval"]
            if len(kept) == len(jobs) or _TOO_FEW in error.message:
                raise
            found = self._exact(case.before, case.before.given, batches, kept)
            self._modes = ("eval",)
            self.notes.append(f"train mode was not judged: {error.reason}")
            return found

    def _decided_on(self, runs: Sequence[Ran]) -> Sequence[Ran]:
        """Return the same with what was chosen by in place of outputs that hold no numbers.

        Raises:
            VerificationError: nothing is left that can be compared.
        """
        empty = [job for job, outputs in runs[0].items() if not any(t.numel() for t in outputs)]
        if not empty:
            return runs
        found = [ran.updated(Ran()) for ran in runs]
        for job in empty:
            numbers = decided_on([run.choices[job] for run in runs])
            for ran, tensors in zip(found, numbers, strict=True):
                ran[job] = tensors
        if not any(tensor.numel() for outputs in found[0].values() for tensor in outputs):
            raise VerificationError(
                f"{type(self._case.before.module).__name__} returns nothing that can be compared.",
                way_out="Give inputs for which it returns tensors, or tuples, lists, mappings or "
                "dataclasses of them.",
            )
        self.notes.append(
            "where nothing is returned with the given weights, what was compared is what that is "
            "decided by"
        )
        return found

    def _note_parted(self, *runs: Ran) -> None:
        """Say how many choices were made for the grown network, where rounding would decide."""
        parted = sum([ran.parted for ran in {id(ran): ran for ran in runs}.values()], Counter())
        if parted:
            told = ", ".join(f"{count} of {name}" for name, count in sorted(parted.items()))
            self.notes.append(
                f"{parted.total()} choices between numbers that only rounding parts ({told}) were "
                "made as in the original network"
            )

    def drawn(self, tolerance: float) -> list[Drawn]:
        """Return what drawn weights show; nothing where the network does not run on any.

        Args:
            tolerance: a relative deviation that needs no excuse.
        """
        case, (batches, jobs) = self._case, _jobs(self._inputs.drawn)
        jobs = [job for job in jobs if job[1] in self._modes]
        for level, weights in enumerate(case.before.drawn if jobs else ()):
            try:
                before = self._exact(case.before, weights, batches, jobs)
            except VerificationError:
                continue  # its code refuses such weights: told below if it refuses all
            if all(map(tells, before.values())):
                results = (
                    *self._compared(level, batches, jobs, before, tolerance),
                    *self._by_chance(level, batches, before, tolerance),
                )
                self._note_unused()
                return [Drawn(job.mode, result, rounding) for job, result, rounding in results]
        if jobs:
            self.notes.append("drawn weights gave no finite output, so they were not judged on")
        return []

    def _by_chance(
        self, level: int | None, batches: Sequence[Arguments], before: Ran, tolerance: float
    ) -> list[Compared]:
        """Return what other masks show, where the old network draws any and runs on them."""
        jobs, old = further([*before], before), self._case.before
        ran = self._exact(old, old.weights(level), batches, jobs, must=False) if jobs else Ran()
        told = [job for job, outputs in ran.items() if tells(outputs)]
        return self._compared(level, batches, told, ran, tolerance) if told else []

    def _compared(
        self,
        level: int | None,
        batches: Sequence[Arguments],
        jobs: Sequence[Job],
        before: Ran,
        tolerance: float,
    ) -> list[Compared]:
        """Return what the grown network shows in float64, where the old one has run."""
        case = self._case
        predicted = self._predicted(level, batches, jobs, before)
        weights = case.after.weights(level)
        after = self._exact(case.after, weights, batches, jobs, grown=True, like=predicted)
        found: list[Compared] = []
        for job in jobs:
            if isinstance(job.chance, int) and before.masks.get(job) != after.masks.get(job):
                continue  # they draw from one sequence, and not as much of it
            result = ExactResult(
                float64=errors_of(before[job], after[job], whole_numbers=True),
                predicted=errors_of(before[job], predicted[job]),
                residual=errors_of(predicted[job], after[job], whole_numbers=True),
            )
            rounding = 0.0
            if not result.residual.within(tolerance):
                rounding = self._magnified(level, batches, job, before)
            found.append((job, result, rounding))
        return found

    def _magnified(
        self, level: int | None, batches: Sequence[Arguments], job: Job, before: Ran
    ) -> float:
        """Return the relative deviation that is no more than rounding, in float64.

        Outputs may be nothing but rounding (a constant less its mean), or magnify it.
        """
        old = self._case.before
        moved = self._exact(old, nudged(old.weights(level)), batches, [job], like=before)
        found = errors_of(before[job], moved[job]).max_rel
        return _TIMES * found if math.isfinite(found) else 0.0

    @property
    def _rounds(self) -> bool:
        """Whether the networks as they are compute something else than in float64."""
        tensors = named_tensors(self._case.after.module).values()
        coarse = any(t.is_floating_point() and t.dtype != torch.float64 for t in tensors)
        return coarse or self._exactly.casts or bool(self._case.notes)

    def _exact(
        self,
        network: Network,
        weights: Weights,
        batches: Sequence[Arguments],
        jobs: Sequence[Job],
        *,
        grown: bool = False,
        norms: Sequence[NormGain] = (),
        like: Ran | None = None,
        must: bool = True,
    ) -> Ran:
        """Return what a network computes in float64, without jobs that fail unless it must run."""
        exact = Exact(network.module, weights)
        if network.finish is not None:
            network.finish(exact.module)
            exact.settle()
        part = exact.module.get_submodule(self._case.part)
        found = Ran()
        for job in jobs:
            exact.reset()
            self._exactly.chance = job.chance
            choosing = Choosing(like.choices[job] if like else (), _SAME)
            try:
                with absorbing(exact.module, norms if job.mode == "train" else ()):
                    outputs = outputs_of(
                        part, in_double(batches[job.batch]), job.mode, self._exactly,
                        choosing=choosing, grown=grown,
                    )  # fmt: skip
            except VerificationError:
                if must:
                    raise
                continue
            found.enter(job, outputs, choosing, self._exactly)
            self._advance()
        if grown:
            self._used |= exact.used
        return found

    def _predicted(
        self,
        level: int | None,
        batches: Sequence[Arguments],
        jobs: Sequence[Job],
        before: Ran,
    ) -> Ran:
        """Return what the grown network must compute."""
        case = self._case
        changed = [job for job in jobs if case.reference or (case.norms and job[1] == "train")]
        if not changed:
            return before
        network = case.reference or case.before
        weights = network.weights(level)
        return before.updated(self._exact(network, weights, batches, changed, norms=case.norms))

    def _native(
        self,
        model: nn.Module,
        batches: Sequence[Arguments],
        jobs: Sequence[Job],
        *,
        grown: bool = False,
        like: Ran | None = None,
    ) -> Ran:
        """Return what a network computes as it is."""
        part = self._copied(model)
        units = (torch.finfo(t.dtype).eps for t in part.parameters() if t.is_floating_point())
        tolerance = min(_TIMES_NATIVE * max(units, default=0.0), _MOST)
        found = Ran()
        for job in jobs:
            choosing = Choosing(like.choices[job] if like else (), max(tolerance, _SAME))
            run = Expectation()
            part = self._copied(model) if self._inputs.writes else part
            with keeping_values(part), keeping_state(part):
                outputs = outputs_of(
                    part, batches[job.batch], job.mode, run, choosing=choosing, grown=grown
                )
            found.enter(job, outputs, choosing, run)
            self._advance()
        return found

    def _copied(self, model: nn.Module) -> nn.Module:
        """Return a copy to run, with parameters of its own where the forward writes into them."""
        copied = stand_in(model, {}) if self._inputs.writes else lent_copy(model)
        return copied.get_submodule(self._case.part)

    def _check_gradients(self, batch: Arguments) -> Gradients:
        case = self._case
        start = len(f"{case.part}.") if case.part else 0
        edits = {name[start:]: edit for name, edit in case.edits.items() if case.is_inside(name)}
        old = case.before.module.get_submodule(case.part)
        found = check_gradients(self._copied(case.after.module), edits, batch, old)
        missing = tuple(f"{case.part}.{n}" if case.part else n for n in found.missing)
        return Gradients(missing, found.notes)

    def _note_constant(self, outputs: Outputs, batch: Arguments) -> None:
        """Say so if the outputs are the same for other inputs."""
        rows = [t for t in outputs if t.is_floating_point() and t.ndim and len(t) > 1]
        if any(bool((t != t[:1]).any()) for t in rows) or not tensors_in(batch):
            return
        case = self._case
        other: Arguments = pytree.tree_map_only(Tensor, _turned, batch)
        try:
            jobs = [Job(0, "eval"), Job(1, "eval")]
            found = self._native(case.before.module, [batch, other], jobs)
        except VerificationError:
            return  # it takes no such inputs
        if errors_of(*(found[job] for job in jobs)).max_abs == 0.0:
            self.notes.append(
                "with the given weights the output does not depend on the input (a head that is "
                "still zero?): only drawn weights tell anything of the rest"
            )

    def _note_unused(self) -> None:
        """Name the grown parameters that no run has asked for."""
        case = self._case
        parameters = dict(case.after.module.named_parameters())
        idle = [
            name
            for name in case.edits
            if name in parameters and case.is_inside(name) and name not in self._used
        ]
        if idle:
            self.notes.append(
                f"{shown(idle)} took no part in what was judged: that they are laid out as the "
                "plan says is all that was checked"
            )

    def _advance(self) -> None:
        self._done += 1
        self._progress(min(1.0, self._done / self._steps))


def _jobs(batches: Sequence[tuple[Arguments, Modes]]) -> tuple[list[Arguments], list[Job]]:
    """Return batches, and what is to be run of them."""
    jobs = [Job(i, mode) for i, (_, modes) in enumerate(batches) for mode in modes]
    return [batch for batch, _ in batches], jobs


def entries(batch: Arguments) -> int:
    """Return how many numbers there are in a batch."""
    return sum(tensor.numel() for tensor in tensors_in(batch))


def _sample(batch: Arguments) -> list[tuple[int, ...]]:
    """Return the shapes of a batch without the number of samples."""
    return [tuple(tensor.shape[1:]) for tensor in tensors_in(batch)]


def nudged(weights: Weights) -> Weights:
    """Return weights that differ in the last digits."""

    def look_up(name: str) -> Tensor:
        found = weights(name)
        return found * (1 + _NUDGE) if found.is_floating_point() and found.ndim > 1 else found

    return look_up


def _turned(tensor: Tensor) -> Tensor:
    """Return other values of the same range."""
    return tensor.flip(tuple(range(tensor.ndim))) + (
        tensor.std() if tensor.is_floating_point() and tensor.numel() > 1 else 0
    )
