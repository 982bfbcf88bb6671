"""How much computing a training takes: floating-point operations, counted by torch.

>>> import torch
>>> from fxgrow.training import FlopLedger
>>> net, ledger = torch.nn.Linear(4, 8), FlopLedger()
>>> ledger.begin(net, torch.randn(2, 4))
>>> ledger.add(samples=100)
>>> ledger.stages[0].flops.forward, ledger.total
(64.0, 12800.0)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxgrow.errors import PlanError, SourceError, UsageError, shown
from fxgrow.modules.calling import arguments_of, call, map_tensors, results_in, tensors_in
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.standin import first_line, stand_in
from fxgrow.training.definition import built
from fxgrow.training.followers import unwrapped
from fxgrow.training.schedule import GrowthSchedule
from fxgrow.training.seed import seed_network

_NONE: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one sample: products and what is summed of them.

    Attributes:
        forward: of computing the outputs.
        backward: of computing the gradients of what can be trained.
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


@exclusive
def flops(model: nn.Module, example_inputs: object) -> Flops:
    """Count the operations of a training step for one sample, by ``torch.utils.flop_counter``.

    A copy runs, on the meta device where it can. What is counted is products (of matrices,
    convolutions, attention); a norm or an activation counts nothing.

    Args:
        model: the network; it is not touched.
        example_inputs: a batch, as for :func:`fxgrow.widen`; its first dim is the samples'.

    Raises:
        PlanError: the network does not run on the inputs.
        UsageError: there is no batch in the inputs.
    """
    inputs = arguments_of(example_inputs)
    tensors = tensors_in(inputs)
    if not tensors or not tensors[0].dim() or not len(tensors[0]):
        raise UsageError("there is no batch to count operations on.", way_out="Give inputs.")
    network, failed = unwrapped(model), ""
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        for replacements, training in itertools.product((None, _NONE), (True, False)):
            copy = stand_in(network, replacements).train(training)
            given = inputs if replacements is not None else _on_meta(inputs)
            try:
                return _counted(copy, given, len(tensors[0]))
            except Exception as error:  # whatever a network does on meta, or with so few samples
                failed = failed or first_line(error)
    raise PlanError(
        f"{type(network).__name__} does not run on the inputs: {failed}.",
        way_out="Give inputs that its forward takes.",
    )


def _on_meta(inputs: Any) -> Any:
    return map_tensors(lambda x: x.to("meta"), inputs)


def _counted(network: nn.Module, inputs: Any, samples: int) -> Flops:
    """Run a network forward and backward, and count."""
    with torch.enable_grad():
        with FlopCounterMode(display=False) as counter:
            results = [x for x in results_in(call(network, inputs)) if x.requires_grad]
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            if results:
                sum(x.abs().sum() for x in results).backward()  # type: ignore[union-attr]
    return Flops(forward / samples, counter.get_total_flops() / samples)


@dataclass(frozen=True)
class Spent:
    """What a stage of a training has taken.

    Attributes:
        flops: for one sample.
        samples: how many were seen.
    """

    flops: Flops
    samples: int = 0

    @property
    def total(self) -> float:
        """The operations of all samples."""
        return self.flops.total * self.samples


class FlopLedger:
    """Counts the floating-point operations of a training, stage by stage.

    Attributes:
        stages: what each took, the present one last.
    """

    def __init__(self) -> None:
        self.stages: list[Spent] = []

    def begin(self, model: nn.Module, example_inputs: object) -> None:
        """Begin a stage: at the start of the training, and whenever the network has grown.

        Raises:
            PlanError, UsageError: as for :func:`flops`.
        """
        self.stages.append(Spent(flops(model, example_inputs)))

    def add(self, samples: int) -> None:
        """Count samples that were trained on.

        Raises:
            UsageError: no stage has begun, or that is no number of samples.
        """
        _check_samples(samples)
        if not self.stages:
            raise UsageError("no stage has begun.", way_out="Call begin(model, inputs) first.")
        last = self.stages[-1]
        self.stages[-1] = replace(last, samples=last.samples + samples)

    @property
    def total(self) -> float:
        """All operations so far."""
        return sum(stage.total for stage in self.stages)

    def __str__(self) -> str:
        """Return a table, a line for each stage."""
        rows = ["stage  forward/sample  backward/sample     samples        FLOPs"]
        for index, stage in enumerate(self.stages):
            one = stage.flops
            rows.append(
                f"{index:5}  {one.forward:14.4g}  {one.backward:15.4g}  {stage.samples:10}  "
                f"{stage.total:11.4g}"
            )
        return "\n".join([*rows, f"total{self.total:57.4g}"])

    def state_dict(self) -> dict[str, Any]:
        """Return what has been counted, in numbers."""
        return {"stages": [asdict(stage) for stage in self.stages]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken.

        Raises:
            SourceError: this is no such state.
        """
        try:
            self.stages = [*_stages(state["stages"])]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SourceError("this is not the state of a FlopLedger.") from error


def _check_samples(samples: object, least: int = 0) -> None:
    """Return if something is a number of samples.

    Raises:
        UsageError: it is not.
    """
    if type(samples) is not int or samples < least:
        raise UsageError(
            f"{shown(repr(samples))} is no number of samples.",
            way_out="Give a whole number: samples=len(batch).",
        )


def _stages(rows: Any) -> Iterator[Spent]:
    for row in rows:
        one, samples = Flops(**{k: float(v) for k, v in row["flops"].items()}), row["samples"]
        if type(samples) is not int or samples < 0 or not 0 <= one.total < math.inf:
            raise ValueError(samples)
        yield Spent(one, samples)


@dataclass(frozen=True)
class Forecast:
    """What a schedule will take.

    Attributes:
        stages: what each will take.
        full: what the same number of samples would take at full size.
    """

    stages: tuple[Spent, ...]
    full: float

    @property
    def total(self) -> float:
        """All operations."""
        return sum(stage.total for stage in self.stages)

    @property
    def part(self) -> float:
        """That, of what it would take at full size."""
        return self.total / self.full


def forecast(
    definition: nn.Module | Callable[[], nn.Module],
    schedule: GrowthSchedule,
    example_inputs: object,
    *,
    samples: int,
) -> Forecast:
    """Return how many operations a schedule will take, before anything is trained.

    Args:
        definition: the network of full size, or what makes it.
        schedule: in absolute widths and numbers of epochs.
        example_inputs: a batch, as for :func:`flops`.
        samples: in each epoch.

    Raises:
        UsageError: when a stage ends depends on a metric, or there are no samples.
        PlanError: as for :func:`fxgrow.training.seed_network` and :func:`flops`.

    Example:
        >>> import torch
        >>> from fxgrow.training import GrowthSchedule, forecast
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)
        ... )
        >>> schedule = GrowthSchedule.geometric(net, epochs=160)
        >>> forecast(net, schedule, torch.randn(8, 4), samples=1000).part < 0.75
        True
    """
    if schedule.epochs is None or schedule.plateau is not None:
        raise UsageError(
            "when a stage of the schedule ends depends on a metric.",
            way_out="Count what is spent instead: fxgrow.training.FlopLedger.",
        )
    _check_samples(samples, 1)
    full = built(definition)
    found = []
    for index, stage in enumerate(schedule.stages):
        network = seed_network(full, schedule, example_inputs, stage=index, check=False)
        found.append(Spent(flops(network, example_inputs), samples * (stage.epochs or 0)))
    whole = flops(full, example_inputs).total * samples * schedule.epochs
    return Forecast(tuple(found), whole)
