"""Try several growths from one state for some steps, and rank them."""

from __future__ import annotations

import copy
import inspect
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxgrow.api.deepen import deepen
from fxgrow.api.widen import widen
from fxgrow.errors import FxgrowError, PlanError, UsageError, shown
from fxgrow.training.followers import unwrapped
from fxgrow.training.in_place import deepen_, grow_

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]

_REMARK = (
    "Exact copies win short probes: they go on as the network did, while drawn channels first have "
    "to learn. Who is ahead after a few steps need not be so at the end of a training."
)


_GIVEN = {"model", "optimizer", "options", "scheduler", "averages"}  # are the same for all


@dataclass(frozen=True)
class Tried:
    """What became of one candidate.

    Attributes:
        name: of the candidate.
        losses: after the steps, one for each repetition.
        start: the mean loss just after growth.
        behind: by how much the loss is above that of the best candidate, on average over
            repetitions, in which both saw the same batches.
        error: the standard error of that; nan with a single repetition.
        parameters: how many it has.
    """

    name: str
    losses: tuple[float, ...]
    start: float
    behind: float
    error: float
    parameters: int

    @property
    def mean(self) -> float:
        """The mean loss after the steps."""
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """The standard deviation of the loss over repetitions; nan with a single one."""
        return _deviation(self.losses)


@dataclass(frozen=True)
class Ranking:
    """Candidates, the best first.

    Attributes:
        tried: what became of each.
        refused: why some could not be carried out, by name.
        steps: how many steps each took.
    """

    tried: tuple[Tried, ...]
    refused: dict[str, str] = field(default_factory=dict)
    steps: int = 0

    @property
    def best(self) -> str:
        """The name of the best one."""
        return self.tried[0].name

    def __str__(self) -> str:
        """Return a table with a remark on what it is worth."""
        width = max(len("candidate"), *(len(one.name) for one in self.tried))
        rows = [
            f"{'candidate':{width}}  loss after {self.steps:<4}      behind the best  parameters"
        ]
        rows += [
            f"{one.name:{width}}  {one.mean:8.4g} ± {one.spread:<7.2g}  {one.behind:8.4g} ± "
            f"{one.error:<7.2g} {one.parameters:>9}"
            for one in self.tried
        ]
        rows += [f"{name:{width}}  {reason}" for name, reason in self.refused.items()]
        return "\n".join([*rows, _REMARK])


def probe(
    model: nn.Module,
    candidates: Mapping[str, Mapping[str, Any]],
    loss_fn: Loss,
    batches: Iterable[Any],
    steps: int = 64,
    *,
    optimizer: Optimizer | MakeOptimizer,
    example_inputs: object = None,
    held_out: Iterable[Any] | None = None,
    repeats: int = 3,
    seed: int = 0,
) -> Ranking:
    """Continue a network with each of several growths from its present state, and rank them.

    **Exact copies win short probes**: they go on as the network did, while channels that are drawn
    first have to learn. Take it for what it is: a way to see what harms, and whether differences
    are larger than their spread.

    Args:
        model: the network; it is not touched.
        candidates: by name, the options of :func:`fxgrow.training.grow_` (``{"width": "2x",
            "pairing": "replicate", "lr": "none"}``) or, with ``blocks``, of
            :func:`fxgrow.training.deepen_`; an empty mapping leaves the network as it is.
        loss_fn: returns the loss, one number, of a network on a batch.
        batches: to train on, over and over in an order that differs between repetitions.
        steps: of the optimizer.
        optimizer: what trains the network, of which each candidate continues with a copy, or what
            makes a new one from parameters (``functools.partial(torch.optim.SGD, lr=0.1)``).
        example_inputs: as for :func:`fxgrow.widen`.
        held_out: batches to judge on, in eval mode; None for those that were trained on.
        repeats: how often, each with another order of batches and other new weights.
        seed: of both.

    Returns:
        The candidates by their mean loss; ``str()`` of it is a table.

    Raises:
        UsageError: there are no candidates, batches or steps, or one has an unknown option.
        PlanError: none of the growths can be carried out, the optimizer trains another network, or
            no loss is finite.

    Example:
        >>> import functools, torch
        >>> from fxgrow.training import probe
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> ranking = probe(
        ...     net,
        ...     {"drawn": {"width": "2x"}, "random": {"width": "2x", "preset": "random"}},
        ...     lambda net, batch: (net(batch) - batch[:, :2]).square().mean(),
        ...     torch.randn(4, 16, 4),
        ...     steps=4,
        ...     optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        ... )
        >>> sorted(one.name for one in ranking.tried)
        ['drawn', 'random']
    """
    network, given = unwrapped(model), list(batches)
    judged = given if held_out is None else list(held_out)
    counts = type(steps) is int and type(repeats) is int and steps >= 1 and repeats >= 1
    if not candidates or not given or not judged or not counts:
        raise UsageError(
            "a probe takes at least one candidate, batch, step and repetition.",
            way_out="Give candidates={name: options}, batches=[…], steps=64, repeats=3.",
        )
    _check_candidates(candidates)
    _check_optimizer(optimizer, network)
    trial = _Trial(network, loss_fn, given, judged, steps, optimizer, example_inputs)
    ran: dict[str, list[_Ran]] = {}
    refused: dict[str, str] = {}
    for name, options in candidates.items():
        try:
            ran[name] = [trial.run(options, seed + number) for number in range(repeats)]
        except FxgrowError as error:
            refused[name] = str(error)
    if not ran:
        name, reason = next(iter(refused.items()))
        raise PlanError(f"no candidate can be carried out; {name}: {reason}", name=name)
    if not any(math.isfinite(one.end) for each in ran.values() for one in each):
        raise PlanError(
            f"no candidate has a finite loss after {steps} steps.",
            way_out="Look at loss_fn and the batches, or give a smaller learning rate.",
        )
    return Ranking(tuple(_ranked(ran)), refused, steps)


def _check_candidates(candidates: object) -> None:
    """Return if candidates are options of growths, by name.

    Raises:
        UsageError: they are not.
    """
    way_out = 'Give candidates={"wide": {"width": "2x"}, "deep": {"blocks": {"layer1": "+1"}}}.'
    if not isinstance(candidates, Mapping):
        raise UsageError(
            f"candidates are a mapping, not a {type(candidates).__name__}.", way_out=way_out
        )
    for name, options in candidates.items():
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise UsageError(
                f"the candidate {shown(repr(name))} is no name with a mapping of options.",
                way_out=way_out,
            )
        calls = (deepen_, deepen) if "blocks" in options else (grow_, widen)
        known = {key for one in calls for key in inspect.signature(one).parameters}
        for key in options:
            if key not in known - _GIVEN:
                raise UsageError(
                    f"{calls[0].__name__} has no option {shown(repr(key))} for the candidate "
                    f"{shown(name)}.",
                    way_out=way_out,
                )


def _check_optimizer(optimizer: object, network: nn.Module) -> None:
    """Return if an optimizer trains a network, or something makes one.

    Raises:
        UsageError: it is neither.
        PlanError: it trains another network.
    """
    if not isinstance(optimizer, Optimizer):
        if not callable(optimizer):
            raise UsageError(
                f"an optimizer is a torch.optim.Optimizer or makes one, not "
                f"{shown(repr(optimizer))}.",
                way_out="optimizer=functools.partial(torch.optim.Adam, lr=1e-3)",
            )
        return
    own = {id(parameter) for parameter in network.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise PlanError(
            f"this {type(optimizer).__name__} holds no parameter of the network.",
            way_out="Give the optimizer that trains it, or what makes one: "
            "functools.partial(torch.optim.Adam, lr=1e-3).",
        )


@dataclass(frozen=True)
class _Ran:
    """The losses of one candidate in one repetition, and how many parameters it has."""

    start: float
    end: float
    parameters: int


@dataclass(frozen=True)
class _Trial:
    """All that candidates have in common; see :func:`probe`."""

    model: nn.Module
    loss_fn: Loss
    batches: Sequence[Any]
    judged: Sequence[Any]
    steps: int
    optimizer: Optimizer | MakeOptimizer
    example_inputs: object

    def run(self, options: Mapping[str, Any], seed: int) -> _Ran:
        """Grow a copy, train it, and return its losses."""
        network, optimizer = self._copies()
        devices = [p.device for p in network.parameters() if p.device.type == "cuda"]
        with torch.random.fork_rng(devices=sorted({d.index or 0 for d in devices})):
            torch.manual_seed(seed)
            if options:
                held = [] if optimizer is None else [optimizer]
                _grow(network, held, {"seed": seed, **options}, self.example_inputs)
            if optimizer is None:
                optimizer = self.optimizer(network.parameters())  # type: ignore[operator]
            start = self._judge(network)
            order = list(range(len(self.batches)))
            draw = random.Random(seed)
            for step in range(self.steps):
                if step % len(order) == 0:
                    draw.shuffle(order)
                optimizer.zero_grad()
                self.loss_fn(network, self.batches[order[step % len(order)]]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            count = sum(parameter.numel() for parameter in network.parameters())
            return _Ran(start, self._judge(network), count)

    def _copies(self) -> tuple[nn.Module, Optimizer | None]:
        """Return a copy of the network and of what trains it, if that was given."""
        if not isinstance(self.optimizer, Optimizer):
            return copy.deepcopy(self.model), None
        network, optimizer = copy.deepcopy((self.model, self.optimizer))
        return network, optimizer

    def _judge(self, network: nn.Module) -> float:
        """Return the mean loss in eval mode, the network's modes kept."""
        modes = {module: module.training for module in network.modules()}
        network.eval()
        with torch.no_grad():
            losses = [float(self.loss_fn(network, batch)) for batch in self.judged]
        for module, mode in modes.items():
            module.training = mode
        return statistics.fmean(losses)


def _deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of some numbers, nan if it has none."""
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.stdev(values) if finite else math.nan


def _grow(
    network: nn.Module, optimizer: list[Optimizer], options: Mapping[str, Any], inputs: object
) -> None:
    """Grow a copy as a candidate says; its lr rule and all else are passed on."""
    given = {"example_inputs": inputs, "verify": "none", **options}
    (deepen_ if "blocks" in given else grow_)(network, optimizer=optimizer, **given)


def _ranked(ran: Mapping[str, Sequence[_Ran]]) -> list[Tried]:
    """Return what became of each, by the mean loss; what is not a number comes last."""

    def mean(name: str) -> float:
        value = statistics.fmean(one.end for one in ran[name])
        return value if math.isfinite(value) else math.inf

    names = sorted(ran, key=mean)
    best = ran[names[0]]
    found = []
    for name in names:
        gaps = [mine.end - other.end for mine, other in zip(ran[name], best, strict=True)]
        found.append(
            Tried(
                name,
                tuple(one.end for one in ran[name]),
                statistics.fmean(one.start for one in ran[name]),
                statistics.fmean(gaps),
                _deviation(gaps) / math.sqrt(len(gaps)),
                ran[name][0].parameters,
            )
        )
    return found
