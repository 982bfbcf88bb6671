"""Which architectures can be widened: a row for each network, hidden groups and all groups.

    python tests/benchmarks/coverage.py [--width 2x] [--max-parameters 3e8] [ARCH …]
    python tests/benchmarks/coverage.py --timm [NAME …]

Each torchvision classification network gets random norms and float64 weights, is widened, and is
compared with the original in eval mode (``max_rel``). The norms are mild, so that a hundred layers
neither explode nor die out: rounding is then small beside the outputs. ``s`` is the time for
tracing, labelling and finding groups. Networks that would have more than ``--max-parameters``
parameters are planned and not compared.

With ``--timm``, the networks are timm's: of each model file, the one with the fewest parameters;
their hidden groups grow, and the pinned groups that touch neither inputs nor outputs are counted
with their reasons.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import timm
import torch
import torchvision
from networks import max_rel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow import api
from fxgrow.analysis import analyse
from fxgrow.architectures import Architecture
from fxgrow.errors import FxgrowError
from fxgrow.inputs import batches_for
from fxgrow.plan.planner import make_plan
from fxgrow.plan.schema import Plan, Request
from fxgrow.trace import trace

HEADER = "| network | where | groups | widened | pinned or refused | max_rel | s |"
OUTPUT = "an output of the network"


def compared(model: nn.Module, image: Tensor, plan: Plan) -> str:
    """Return max_rel in eval mode between a network in float64 and what the plan makes of it."""
    source = {
        key: (shape, "float64" if kind == "float32" else kind)
        for key, (shape, kind) in plan.source.items()
    }
    with torch.no_grad():
        before = model(image)
        after = replace(plan, source=source).apply(model)(image)
    return f"{max_rel(before, after):.1e}"


def mild(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network in float64 whose every part contributes to the output."""
    torch.manual_seed(0)
    model = build().double().eval()
    for parameter in model.parameters():
        if not parameter.any():  # a head that starts at zero would make every output zero
            nn.init.normal_(parameter, 0.0, 0.02)
        elif parameter.abs().max() < 1e-3 and not parameter.var(correction=0):  # a layer scale
            nn.init.uniform_(parameter, 0.1, 0.5)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            nn.init.uniform_(module.running_var, 0.3, 3.0)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
    return model


def rows(name: str, width: str, limit: float) -> Iterator[str]:
    """Yield the rows of one of torchvision's networks."""
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
        told = counted(refused.reason for refused in plan.refused)
        result = f"({plan.parameters[1] / 1e6:.0f} M parameters)"
        if plan.parameters[1] <= limit:
            size = 224 if name.startswith(("vit", "maxvit")) else 299 if "inception" in name else 96
            image = torch.randn(2, 3, size, size, dtype=torch.float64)
            result = compared(mild(lambda: torchvision.models.get_model(name)), image, plan)
        gc.collect()
        yield (
            f"| {name} | {where} | {len(found.groups)} | {len(plan.groups)} | {told} | {result} "
            f"| {seconds:.2f} |"
        )


def counted(reasons: Iterable[str]) -> str:
    """Return reasons with the number of times that each occurs."""
    found = Counter(reason[:120].replace("|", "/") for reason in reasons)
    return "; ".join(f"{count}× {reason}" for reason, count in found.most_common())


def timm_row(name: str, width: str, limit: float) -> str:
    """Return the row of one of timm's networks; whatever goes wrong is told in it."""
    seconds, groups = 0.0, ""
    try:
        model = Architecture(f"timm:{name}").build("meta").eval()
        start = time.perf_counter()
        found = analyse(trace(model))
        seconds = time.perf_counter() - start
        groups = str(len(found.groups))
        plan = make_plan(found, Request(width), lambda _: math.nan)
        pinned = [g.reason for g in found.groups if g.kind == "pinned" and g.reason != OUTPUT]
        told = counted([*pinned, *(refused.reason for refused in plan.refused)])
        result = f"({plan.parameters[1] / 1e6:.0f} M parameters)"
        if plan.parameters[1] <= limit:
            original = mild(lambda: timm.create_model(name))
            (image,) = batches_for(original, plan.inputs, plan.inputs_inferred)[0]
            result = compared(original, image, plan)
        widened = str(len(plan.groups))
    except Exception as error:  # a benchmark goes on
        text = " ".join(str(error).split())[:300].replace("|", "/")
        told, result, widened = f"{type(error).__name__}: {text}", "", "0"
    gc.collect()
    return f"| {name} | hidden | {groups} | {widened} | {told} | {result} | {seconds:.2f} |"


def timm_representatives() -> Iterator[str]:
    """Yield, for each model file of timm, the architecture with the fewest parameters."""
    for file in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=file):
            with contextlib.suppress(FxgrowError):  # one that does not even build
                model = Architecture(f"timm:{name}").build("meta")
                sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        if sizes:
            yield min(sizes, key=lambda name: sizes[name])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", default="2x")
    parser.add_argument("--max-parameters", type=float, default=3e8)
    parser.add_argument("--timm", action="store_true")
    parser.add_argument("architectures", nargs="*")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # about initial values
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    if arguments.timm:
        for name in arguments.architectures or timm_representatives():
            print(timm_row(name, arguments.width, arguments.max_parameters), flush=True)
        return
    for name in arguments.architectures or torchvision.models.list_models(torchvision.models):
        for row in rows(name, arguments.width, arguments.max_parameters):
            print(row, flush=True)


if __name__ == "__main__":
    main()
