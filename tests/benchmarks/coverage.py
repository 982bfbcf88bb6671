"""Which architectures can be widened: a row for each network, hidden groups and all groups.

    python tests/benchmarks/coverage.py [--width 2x] [--max-parameters 3e8] [ARCH …]

Each torchvision classification network gets random norms and float64 weights, is widened, and is
compared with the original in eval mode (``max_rel``). The norms are mild, so that a hundred layers
neither explode nor die out: rounding is then small beside the outputs. ``s`` is the time for
tracing, labelling and finding groups. Networks that would have more than ``--max-parameters``
parameters are planned and not compared.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torchvision
from networks import max_rel
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow import api
from fxgrow.analysis import analyse
from fxgrow.architectures import Architecture
from fxgrow.errors import FxgrowError
from fxgrow.plan.schema import Plan
from fxgrow.trace import trace

HEADER = "| network | where | groups | widened | pinned or refused | max_rel | s |"


def compared(name: str, plan: Plan) -> str:
    """Return max_rel in eval mode between a network in float64 and what the plan makes of it."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).double().eval()
    for parameter in model.parameters():
        if not parameter.any():  # a head that starts at zero would make every output zero
            nn.init.normal_(parameter, 0.0, 0.02)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_var, 0.3, 3.0)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    source = {
        key: (shape, "float64" if kind == "float32" else kind)
        for key, (shape, kind) in plan.source.items()
    }
    size = 224 if name.startswith(("vit", "maxvit")) else 299 if "inception" in name else 96
    image = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        before = model(image)
        after = replace(plan, source=source).apply(model)(image)
    return f"{max_rel(before, after):.1e}"


def rows(name: str, width: str, limit: float) -> Iterator[str]:
    """Yield the rows of one network."""
    model: nn.Module = Architecture(f"torchvision:{name}").build("meta").eval()
    start = time.perf_counter()
    found = analyse(trace(model))
    seconds = time.perf_counter() - start
    for where in ("hidden", "all"):
        try:
            plan = api.plan(model, width, where=where)  # type: ignore[arg-type]
        except FxgrowError as error:
            yield f"| {name} | {where} | {len(found.groups)} | 0 | {error} | | {seconds:.2f} |"
            continue
        reasons = Counter(refused.reason[:90] for refused in plan.refused)
        told = "; ".join(f"{count}× {reason}" for reason, count in reasons.items())
        small = plan.parameters[1] <= limit
        result = compared(name, plan) if small else f"({plan.parameters[1] / 1e6:.0f} M parameters)"
        gc.collect()
        yield (
            f"| {name} | {where} | {len(found.groups)} | {len(plan.groups)} | {told} | {result} "
            f"| {seconds:.2f} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", default="2x")
    parser.add_argument("--max-parameters", type=float, default=3e8)
    parser.add_argument("architectures", nargs="*")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # about initial values
    names = arguments.architectures or torchvision.models.list_models(torchvision.models)
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    for name in names:
        for row in rows(name, arguments.width, arguments.max_parameters):
            print(row, flush=True)


if __name__ == "__main__":
    main()
