"""What computing growth from data takes, told beforehand: seconds and memory.

A forward pass of one batch is timed, and so are a product and a decomposition of small matrices;
the rest is arithmetic on the numbers of positions and inputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fxgrow.grow.data.batches import Batch, not_running, size_of
from fxgrow.grow.data.pairs import LayerPair, LinearLayer, shapes_of
from fxgrow.modules.calling import arguments_of, call

MOST_MEMORY = 1 << 30  # bytes of sums held at a time
SPARE_MEMORY = 1 << 24  # bytes of the directions of one group that may not be needed
_SIZE = 192  # of the matrices that are timed
_BACKWARD = 1.5  # what gradients of activations take of the forward pass over the same layers
_ASKED = 8  # runs of what lies between that asking takes, those for gradients counted twice
_REPEATS = 3  # of what is timed, the fastest of which is not of another's doing


@dataclass(frozen=True)
class Effort:
    """What the growth of groups takes.

    Attributes:
        passes: seconds of a forward pass over all batches.
        after: of it, the seconds behind the first reader of each group, by name.
        seconds: of the algebra of each group, by name.
        memory: bytes of the sums of each group, by name.
        before: of the forward pass, the seconds up to the writer of each group, by name.
        blocks: how often what lies between runs to take all that a writer reads, by name.
        share: all samples, as a multiple of those in the first batch.
        between: seconds of running what lies between for each pass, by name, where it is run.
    """

    passes: float
    after: Mapping[str, float]
    seconds: Mapping[str, float]
    memory: Mapping[str, int]
    before: Mapping[str, float] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    share: float = 1.0
    between: Mapping[str, float] = field(default_factory=dict)

    def asked(self, pair: LayerPair, seconds: float) -> Effort:
        """Return the same with what running what lies between takes, if it is run.

        Args:
            pair: the layers around a group, with what lies between told.
            seconds: that asking took, of the first batch.
        """
        if all(reader.slopes is not None for reader in pair.readers):
            return self
        entering, blocks = self.before[pair.group], self.blocks[pair.group]
        each = max(seconds * self.share - entering, 0.0) / _ASKED
        return replace(self, between={**self.between, pair.group: entering + 2 * blocks * each})

    def too_large(self) -> dict[str, str]:
        """Return why groups cannot be computed within :data:`MOST_MEMORY`, by name."""
        return {
            name: f"the sums over the batches would take {size / 1e9:.1f} GB, and are held to "
            f"{MOST_MEMORY / 1e9:.1f} GB (give fewer samples, or leave the group out with exclude)"
            for name, size in self.memory.items()
            if size > MOST_MEMORY
        }

    def parts(self, names: Iterable[str]) -> list[list[str]]:
        """Return names in parts whose sums are held together within :data:`MOST_MEMORY`."""
        found: list[list[str]] = []
        held = 0
        for name in names:
            held += self.memory[name]
            if not found or held > MOST_MEMORY:
                found.append([])
                held = self.memory[name]
            found[-1].append(name)
        return found

    def total(self, names: Sequence[str], runs: int, forwards: int = 0) -> float:
        """Return the seconds that groups take together.

        Args:
            names: of the groups.
            runs: over the batches, with gradients.
            forwards: over the batches, without.
        """
        found = forwards * self.passes + sum(self.seconds[name] for name in names)
        for part in self.parts(names):
            behind = max((self.after[name] for name in part), default=0.0)
            found += runs * (self.passes + _BACKWARD * behind)
        return found + runs * sum(self.between.get(name, 0.0) for name in names)


def measured(
    network: nn.Module,
    pairs: Mapping[str, LayerPair],
    batches: Sequence[Batch],
    run: FirstRun,
    *,
    fits: bool,
) -> Effort:
    """Return what the growth of groups takes, from one forward pass.

    Args:
        network: in eval mode; a copy that may be run.
        pairs: the layers around each group.
        batches: (inputs, targets) each.
        run: of the first batch.
        fits: whether second moments and least-squares fits are needed, beside a correlation.
    """
    share = sum(map(size_of, batches)) / max(size_of(batches[0]), 1)
    seen = {name: math.ceil(count * share) for name, count in run.positions.items()}
    product, decomposition = _rates()
    times, memory, after, before, blocks = {}, {}, {}, {}, {}
    for name, pair in pairs.items():
        first = min((run.ends.get(reader.name, 0.0) for reader in pair.readers), default=0.0)
        after[name] = (run.seconds - first) * share
        before[name] = run.ends.get(pair.writer, run.seconds) * share
        weight = network.get_parameter(f"{pair.writer}.weight")
        blocks[name] = math.ceil((math.prod(weight.shape[1:]) + pair.has_bias) / pair.block)
        products, cubes, held = 0.0, 0.0, 0
        for rows, inputs, outputs in _sums(network, pair, seen, fits=fits):
            least = min(rows, inputs)
            products += 2.0 * rows * (inputs * least + inputs * outputs)
            cubes += float(least) ** 3
            held += 8 * least * (inputs + outputs)
        times[name], memory[name] = products * product + cubes * decomposition, held
    return Effort(run.seconds * share, after, times, memory, before, blocks, share)


def _sums(
    network: nn.Module, pair: LayerPair, seen: Mapping[str, int], *, fits: bool
) -> Iterator[tuple[int, int, int]]:
    """Yield rows, inputs and outputs of each sum of outer products that a pair needs."""
    weight = network.get_parameter(f"{pair.writer}.weight")
    rows, inputs = seen.get(pair.writer, 1), math.prod(weight.shape[1:]) + pair.has_bias
    for reader in pair.readers:
        columns, out = reader.columns.shape[1], reader.column[0]
        if columns > 1 or len(reader.column) == 1:  # by sample: rows of each column, and outputs
            rows = seen.get(reader.name, 1)
            yield rows * columns, inputs, -(-out // columns)
        else:
            yield rows, inputs, math.prod(reader.column)
        if fits:
            read: Tensor = network.get_parameter(f"{reader.name}.weight")
            yield seen.get(reader.name, 1), math.prod(read.shape[1:]) + 1, len(read)


def most_held(network: nn.Module, pair: LayerPair, count: int, *, spare: bool) -> int:
    """Return how many directions of a pair are to be computed, at least one.

    Args:
        network: the network.
        pair: the layers.
        count: how many may be used.
        spare: whether some of these may be dropped, so that weaker ones are to be there. Those are
            held within :data:`SPARE_MEMORY`, and all within :data:`MOST_MEMORY`.
    """
    shapes = shapes_of(network, pair)
    entries = math.prod(shapes.row) + 3 * math.prod(shapes.column)  # as they are, and laid out
    more = SPARE_MEMORY // (8 * entries) if spare else 0
    return max(min(count + more, MOST_MEMORY // (8 * entries)), 1)


@dataclass(frozen=True)
class FirstRun:
    """What a forward pass of the first batch told.

    Attributes:
        positions: so many each layer puts out, over all samples.
        seconds: that it took.
        ends: the seconds after which each layer was first through.
    """

    positions: Mapping[str, int]
    seconds: float
    ends: Mapping[str, float] = field(default_factory=dict)


def first_run(network: nn.Module, batch: Batch) -> FirstRun:
    """Return what a forward pass of the first batch tells.

    Raises:
        PlanError: the network does not run on it.
    """
    positions: dict[str, int] = {}
    ends: dict[str, float] = {}
    handles = []
    begun = 0.0
    for name, layer in network.named_modules():
        if not isinstance(layer, LinearLayer):
            continue
        size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels

        def after(_: nn.Module, __: object, output: Tensor, n: str = name, c: int = size) -> None:
            positions[n] = output.numel() // max(c, 1)
            ends.setdefault(n, time.perf_counter() - begun)

        handles.append(layer.register_forward_hook(after))
    try:
        with torch.no_grad():
            begun = time.perf_counter()
            call(network, arguments_of(batch[0]))
            return FirstRun(positions, time.perf_counter() - begun, ends)
    except Exception as error:  # a user's forward may raise anything
        raise not_running(error) from error
    finally:
        for handle in handles:
            handle.remove()


def _rates() -> tuple[float, float]:
    """Return seconds per operation of a product, and per n³ of a decomposition, in float64."""
    matrix = torch.eye(_SIZE, dtype=torch.float64) + 1.0 / _SIZE
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        product = matrix @ matrix
        between = time.perf_counter()
        torch.linalg.eigh(product)
        times.append((between - begun, time.perf_counter() - between))
    multiplying, decomposing = (min(some) for some in zip(*times, strict=True))
    return multiplying / (2.0 * _SIZE**3), 2 * decomposing / _SIZE**3
