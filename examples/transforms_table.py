"""Print what each way of growing a network keeps, allows and needs, measured on the spot.

The rows are methods, the columns those of Table 1 of R2R and some more. Every cell is the result
of growing a small network in float64 and looking at what came out; nothing is taken from a paper.
Ways of widening are tried on a chain of linear layers, ways of deepening on residual blocks, or, if
they are for plain chains, on that chain without modules around its layers.
To add a row, register a function that grows a network:

    @method("mine")
    def mine(network, inputs, amount="+2", **options):
        return fxgrow.widen(network, amount, inputs, **options)
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.api.widen import Grown

WIDTH, HIDDEN, STEPS = 4, 6, 100
TOLERANCE = 1e-10  # of max |difference| / max |output|, in float64
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "sigmoid": nn.Sigmoid,
}


class Block(nn.Module):
    """linear → norm → activation → dropout → linear → norm, beside the identity or alone."""

    def __init__(self, activation: nn.Module, norm: bool, dropout: float, residual: bool) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN) if norm else nn.Identity()
        self.activation, self.dropout = activation, nn.Dropout(dropout)
        self.second = nn.Linear(HIDDEN, WIDTH)
        self.last_norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, WIDTH) to the same shape."""
        y = self.dropout(self.activation(self.norm(self.first(x))))
        y = self.last_norm(self.second(y))
        return x + y if self.residual else self.activation(y)

    def layers(self) -> tuple[nn.Module, ...]:
        """Return what it runs one after the other, if it is no residual block."""
        first = (self.first, self.norm, self.activation, self.dropout)
        return (*first, self.second, self.last_norm, copy.deepcopy(self.activation))


def network(
    activation: str,
    *,
    norm: bool = False,
    dropout: float = 0.0,
    residual: bool = False,
    flat: bool = False,
) -> nn.Module:
    """Return a stem, a stage of two blocks (or of their layers) and a head, always the same."""
    torch.manual_seed(0)
    blocks = [Block(ACTIVATIONS[activation](), norm, dropout, residual) for _ in range(2)]
    layers = [layer for block in blocks for layer in block.layers()]
    stage = nn.Sequential(*(layers if flat else blocks))
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(3, WIDTH))
    model.add_module("stage", stage)
    model.add_module("head", nn.Linear(WIDTH, 2))
    return model.double()


def batch(count: int = 16) -> Tensor:
    """Return inputs (count, 3)."""
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Method:
    """A way of growing, and what the network has to be for it.

    Attributes:
        grow: takes a network, inputs, an amount (optional) and further options of fxgrow.
        widens: whether it adds channels, so that their number may be odd.
        residual: whether it is measured on residual blocks; the default is a plain chain.
        flat: whether the layers of the chain are the modules of one nn.Sequential.
        noisy: whether it takes ``split_noise``.
    """

    grow: Callable[..., Grown]
    widens: bool = True
    residual: bool = False
    flat: bool = False
    noisy: bool = False

    def on(self, model: nn.Module, *amount: str, **options: object) -> Grown | None:
        """Grow a network without fxgrow's own verification; None if it is refused."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fxgrow.FxgrowWarning)
                grown = self.grow(model, batch(), *amount, verify=False, **options)
        except fxgrow.FxgrowError:
            return None
        return None if grown.plan.refused else grown

    def plainly(self, activation: str = "") -> tuple[nn.Module, Grown | None]:
        """Return the network with an activation (the first one allowed), and what it becomes."""
        return _plainly(self, activation or self.activation)

    @property
    def activation(self) -> str:
        """The first activation that it allows."""
        return next(name for name in ACTIVATIONS if _plainly(self, name)[1] is not None)

    def subject(self, **options: float) -> nn.Module:
        """Return a network that it can grow."""
        return _network(self, self.activation, **options)


def _network(way: Method, activation: str, **options: float) -> nn.Module:
    return network(activation, residual=way.residual, flat=way.flat, **options)  # type: ignore[arg-type]


@functools.cache
def _plainly(way: Method, activation: str) -> tuple[nn.Module, Grown | None]:
    model = _network(way, activation)
    return model, way.on(model)


METHODS: dict[str, Method] = {}


def method(name: str, **properties: bool) -> Callable[[Callable[..., Grown]], Callable[..., Grown]]:
    """Return a decorator that registers a function which grows a network as a row."""

    def register(grow: Callable[..., Grown]) -> Callable[..., Grown]:
        METHODS[name] = Method(grow, **properties)
        return grow

    return register


def _widening(name: str, *, noisy: bool = False, **setting: str) -> None:
    @method(name, noisy=noisy)
    def widen(model: nn.Module, inputs: Tensor, amount: str = "+2", **options: object) -> Grown:
        options = {"include": ["stage.*.first"], **setting, **options}
        return fxgrow.widen(model, amount, inputs, **options)  # type: ignore[arg-type]


_widening("`r2wider`", preset="r2wider")
_widening("`vt`", preset="vt")
_widening("`netmorph`", preset="netmorph")
_widening("`zero_z`", pairing="zero_z")
_widening("`net2wider`", preset="net2wider", noisy=True)
_widening("`replicate_random`", pairing="replicate_random", noisy=True)
_widening("`copy_pair`", pairing="copy_pair")
_widening("`random`", preset="random")


def _deepening(name: str, **subject: bool) -> None:
    @method(f"`{name}`", widens=False, **subject)
    def deepen(model: nn.Module, inputs: Tensor, amount: str = "+1", **options: object) -> Grown:
        return fxgrow.deepen(model, {"stage": amount}, inputs, method=name, **options)  # type: ignore[arg-type]


_deepening("r2deeper", residual=True)
_deepening("zero_last", residual=True)
_deepening("net2deeper", flat=True)


def difference(before: nn.Module, after: nn.Module, *, train: bool = False) -> float:
    """Return max |difference| / max |output| of two networks."""
    pair = [copy.deepcopy(model).train(train) for model in (before, after)]
    with torch.no_grad():
        old, new = (model(batch()) for model in pair)
    return float((new - old).abs().max() / old.abs().max())


def kept(model: nn.Module, grown: Grown | None, *, train: bool = False) -> str:
    """Return "yes" if the function is kept, else by how much it is not."""
    if grown is None:
        return "refused"
    off = difference(model, grown.model, train=train)
    return "yes" if off <= TOLERANCE else f"off by {off:.1g}"


class SharedMask(nn.Module):
    """Dropout that draws the same mask for the first channels however many there are."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop half of the entries of (n, channels)."""
        chance = torch.Generator().manual_seed(2)
        keep = torch.rand(x.shape[1], x.shape[0], generator=chance) < 0.5  # channel by channel
        return x * keep.T * 2


def function_kept(way: Method) -> dict[str, str]:
    """Return whether the function is kept in eval mode, with batch statistics, with dropout."""
    normed, dropping = way.subject(norm=True), way.subject(dropout=0.5)
    wider_normed, wider = way.on(normed), way.on(dropping)
    for part in (dropping, wider.model if wider else None):
        for name, module in [*part.named_modules()] if part else ():
            if isinstance(module, nn.Dropout):
                part.set_submodule(name, SharedMask())
    return {
        "eval": kept(*way.plainly()),
        "eval, BatchNorm": kept(normed, wider_normed),
        "train, BatchNorm": kept(normed, wider_normed, train=True),
        "train, dropout": kept(dropping, wider, train=True),
    }


def activations(way: Method) -> str:
    """Return the activations with which it keeps the function."""
    found = [name for name in ACTIVATIONS if kept(*way.plainly(name)) == "yes"]
    return ", ".join(found) or "none"


def old_weights_kept(way: Method) -> str:
    """Return whether every old weight is found where it was, bit for bit."""
    model, grown = way.plainly()
    state = {} if grown is None else grown.model.state_dict()
    same = all(
        torch.equal(state[name][tuple(slice(size) for size in old.shape)], old)
        for name, old in model.state_dict().items()
    )
    return "yes" if same else "no"


def new_channels(way: Method) -> str:
    """Return which numbers of new channels it takes: any, or even ones."""
    if not way.widens:
        return "–"
    model = way.subject()
    return "even" if kept(model, way.on(model, "+3")) == "refused" else "any"


def free_share(way: Method) -> float:
    """Return the share of new weights that are drawn independently of one another.

    Grown with many seeds, the weights span a space; its dimension is the number of free ones.
    """
    model, grown = way.plainly()
    if grown is None:
        return 0.0
    old, new = (sum(p.numel() for p in m.parameters()) for m in (model, grown.model))
    samples = []
    for seed in range(new - old + 2):
        plan = replace(grown.plan, request=replace(grown.plan.request, seed=seed))
        samples.append(torch.cat([p.detach().flatten() for p in plan.apply(model).parameters()]))
    spread = torch.stack(samples[1:]) - samples[0]
    return int(torch.linalg.matrix_rank(spread, rtol=1e-9)) / (new - old)


def twins(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Yield the rows that are there twice: name of the weight, one row, the other."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        rows = weight.detach().flatten(1)
        for i in range(len(rows)):
            for j in range(i):
                if rows[i].any() and torch.equal(rows[i], rows[j]):
                    yield name, j, i


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def apart(optimizer: str, grown: Grown | None) -> float | None:
    """Return the least angle in degrees between twins after training; None without twins."""
    if grown is None or not (pairs := [*twins(grown.model)]):
        return None
    model = copy.deepcopy(grown.model)
    steps, inputs = OPTIMIZERS[optimizer](model.parameters()), batch(64)
    target = torch.stack([inputs.prod(1), inputs.norm(dim=1)], 1)
    for _ in range(STEPS):
        steps.zero_grad()
        nn.functional.mse_loss(model(inputs), target).backward()
        steps.step()
    weights = {name: nn.functional.normalize(w.detach().flatten(1)) for name, w in
               model.named_parameters() if w.ndim > 1}  # fmt: skip
    least = min(float((weights[name][i] - weights[name][j]).norm()) for name, i, j in pairs)
    return math.degrees(2 * math.asin(least / 2))


def parting(way: Method, **options: object) -> str:
    """Return how far twins are apart after training, by each optimizer."""
    smooth, grown = way.plainly("GELU")  # a dead ReLU would keep its twins tied
    if grown is None:
        smooth, grown = way.plainly()
    if options:
        grown = way.on(smooth, **options)
    angles = {name: apart(name, grown) for name in OPTIMIZERS}
    told = [
        f"{name} {'tied' if angle < 1e-6 else f'{angle:.2g}°'}"
        for name, angle in angles.items()
        if angle is not None
    ]
    return ", ".join(told) or "–"


def residual_connections(way: Method) -> str:
    """Return whether a network of residual blocks is kept, whose streams grow if it widens."""
    model = network(way.activation, residual=True)
    stream = {"where": "stream", "include": ["stem"]} if way.widens else {}
    return kept(model, way.on(model, **stream))


def row(way: Method) -> dict[str, str]:
    """Return the cells of a method by column."""
    return {
        **function_kept(way),
        "activations": activations(way),
        "old weights kept": old_weights_kept(way),
        "new channels": new_channels(way),
        "free new weights": f"{free_share(way):.0%}",
        "twins part by": parting(way, **({"split_noise": 0.0} if way.noisy else {})),
        "and with split noise by": parting(way) if way.noisy else "–",
        "residual streams": residual_connections(way),
    }


def table() -> str:
    """Return the table in Markdown."""
    rows = {name: row(way) for name, way in METHODS.items()}
    columns = [*next(iter(rows.values()))]
    lines = [f"| method | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
