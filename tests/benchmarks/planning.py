"""What planning costs beside following, and how it grows with depth and with the number of groups.

usage: python tests/benchmarks/planning.py [networks [NAME ...] | depth | groups]

``networks`` follows each torchvision classification network and plans it, 2x, hidden groups, and
prints the CPU seconds of both on one thread, their ratio and the number of runs on meta tensors
that planning made; the worst ratio comes last. ``depth`` plans chains of 50 to 1000 residual
blocks, and ``groups`` as many hidden groups of a chain without any, and prints the exponent of a
power law fitted to the seconds. Without arguments, all of it, in some minutes. To measure another
version, let PYTHONPATH name its checkout.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxgrow.labels.propagate import Labeller

try:
    from fxgrow.api.widen import plan
except ImportError:  # as it was before there were rooms
    from fxgrow.api import plan

COUNTS = (50, 100, 200, 400, 700, 1000)
WIDTH = 8


@dataclass(frozen=True)
class Cost:
    """What one plan cost.

    Attributes:
        following, planning: CPU seconds.
        runs: of the network on meta tensors, while planning.
    """

    following: float
    planning: float
    runs: int


def cost(model: nn.Module, inputs: Tensor | None = None, **settings: str) -> Cost:
    """Return what planning a network costs."""
    marks: list[tuple[float, int]] = []
    runs = 0
    begin = Labeller.__init__

    def counted(*args: object, **kwargs: object) -> None:
        nonlocal runs
        runs += 1
        begin(*args, **kwargs)  # type: ignore[arg-type]

    def mark(_: str = "") -> None:
        marks.append((time.process_time(), runs))

    Labeller.__init__ = counted  # type: ignore[method-assign]
    try:
        plan(model, settings.pop("width", "2x"), inputs, progress=mark, **settings)  # type: ignore[arg-type]
    finally:
        Labeller.__init__ = begin  # type: ignore[method-assign]
    mark()
    (start, _), (followed, first), (end, last) = marks
    return Cost(followed - start, end - followed, last - first)


def best(model: nn.Module, inputs: Tensor | None = None, **settings: str) -> Cost:
    """Return the lower of what two plans cost: the first one of a process loads libraries."""
    return min(
        (cost(model, inputs, **settings) for _ in range(2)), key=lambda found: found.planning
    )


def networks(names: Iterable[str]) -> None:
    """Print following, planning, ratio and number of runs for networks, the worst ratio last."""
    from torchvision.models import get_model, list_models

    found: dict[str, Cost] = {}
    for name in names or list_models(module=__import__("torchvision").models):
        try:
            with torch.device("meta"):
                model = get_model(name, weights=None).eval()
        except NotImplementedError:  # its initial values look at values
            model = get_model(name, weights=None).eval()
        found[name] = best(model)
    print(f"{'network':24} {'following':>9} {'planning':>9} {'ratio':>6} {'runs':>5}")
    for name, made in sorted(found.items(), key=lambda item: item[1].planning / item[1].following):
        ratio = made.planning / made.following
        print(f"{name:24} {made.following:9.3f} {made.planning:9.3f} {ratio:6.1f} {made.runs:5}")


class Block(nn.Module):
    """A residual block of two products with norms, of the kind that its stream asks for."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), norm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the branch makes of its input."""
        return x + self.second(functional.gelu(self.norm(self.first(x))))


def residual_chain(count: int, norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Module:
    """Return a chain of residual blocks, each with a hidden group."""
    return nn.Sequential(nn.Linear(4, WIDTH), *(Block(norm) for _ in range(count)), nn.Linear(8, 2))


def plain_chain(count: int) -> nn.Module:
    """Return a chain of layers with a group between each two of them."""
    layers = (part for _ in range(count) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    return nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), *layers, nn.Linear(WIDTH, 2))


CASES: dict[str, tuple[Callable[[int], nn.Module], dict[str, str], tuple[int, ...]]] = {
    "depth, batch norms, 2x": (residual_chain, {}, COUNTS),
    "depth, batch norms, 2x all, default_vt": (
        residual_chain, {"where": "all", "rescaling": "default_vt"}, COUNTS,
    ),
    "depth, layer norms in the branch, 1.5x": (
        lambda count: residual_chain(count, nn.LayerNorm), {"width": "1.5x"}, COUNTS,
    ),
    "groups, 2x": (plain_chain, {}, tuple(2 * count for count in COUNTS)),
    "groups, zeros written, 2x": (
        lambda count: residual_chain(count, nn.Identity), {"pairing": "zero_z"}, COUNTS,
    ),
}  # fmt: skip


def growth(kind: str) -> None:
    """Print the seconds over a count for the cases of one kind, and the fitted exponents."""
    for name, (build, settings, counts) in CASES.items():
        if not name.startswith(kind):
            continue
        with torch.device("meta"):
            models = {count: build(count).eval() for count in counts}
        inputs = torch.empty(2, 4, device="meta")
        cost(models[counts[0]], inputs, **settings)  # loads libraries
        seconds = {count: cost(m, inputs, **settings).planning for count, m in models.items()}
        exponent = np.polyfit(np.log([*seconds]), np.log([*seconds.values()]), 1)[0]
        told = ", ".join(f"{count}: {time:.2f}" for count, time in seconds.items())
        print(f"{name}: exponent {exponent:.2f} ({told})", flush=True)


def main() -> None:
    """Print what the command line asks for."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kind, *names = sys.argv[1:] or [""]
    if kind in ("", "networks"):
        networks(names)
    for other in ("depth", "groups"):
        if kind in ("", other):
            growth(other)


if __name__ == "__main__":
    main()
