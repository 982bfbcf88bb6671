"""Which architectures can be widened: a row for each network, hidden groups and all groups.

    python tests/benchmarks/coverage.py [--family video] [--width 2x] [--max-parameters N] [ARCH …]

Each torchvision network of a family gets random norms and float64 weights, is widened, and is
compared with the original in eval mode (``max_rel``). The norms are mild, so that a hundred layers
neither explode nor die out: rounding is then small beside the outputs. ``s`` is the time for
tracing, labelling and finding groups. Networks that would have more than ``--max-parameters``
parameters are planned and not compared.
"""

from __future__ import annotations

import argparse
import gc
import inspect
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
from fxgrow.architectures import Architecture
from fxgrow.errors import FxgrowError
from fxgrow.inputs import batches_for
from fxgrow.labels.tape import tensors_in
from fxgrow.plan.schema import Plan
from fxgrow.scope import follow

FAMILIES = ("classification", "segmentation", "video", "detection", "optical_flow")
HEADER = "| network | where | groups | widened | pinned or refused | max_rel | s |"


def compared(name: str, plan: Plan) -> str:
    """Return max_rel in eval mode between a network in float64 and what the plan makes of it."""
    torch.manual_seed(0)
    model = _built(name)
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
    if plan.submodules:  # a detector, which takes images of any size and makes them its own
        model.transform.min_size, model.transform.max_size = (96,), 96
        for part in (model, getattr(model, "roi_heads", model)):
            part.score_thresh = 0.0  # random weights are sure of nothing
        inputs: tuple[object, ...] = ([torch.rand(3, 96, 96, dtype=torch.float64)],)
    else:
        inputs = batches_for(model, plan.inputs, plan.inputs_inferred)[0]
    with torch.no_grad():
        before = tensors_in(model(*inputs))
        after = tensors_in(replace(plan, source=source).apply(model)(*inputs))
        pairs = [pair for pair in zip(before, after, strict=True) if pair[0].is_floating_point()]
    return f"{max(max_rel(*pair) for pair in pairs if pair[0].numel()):.1e}"


def _built(name: str) -> nn.Module:
    """Return a network in float64 and eval mode, with no weights but random ones."""
    builder = torchvision.models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    arguments = {key: None for key in ("weights", "weights_backbone") if key in known}
    model: nn.Module = builder(**arguments)
    return model.double().eval()


def rows(name: str, width: str, limit: float) -> Iterator[str]:
    """Yield the rows of one network."""
    model: nn.Module = Architecture(f"torchvision:{name}").build("meta").eval()
    start = time.perf_counter()
    groups = sum(len(part.groups) for part in follow(model)[0])
    seconds = time.perf_counter() - start
    for where in ("hidden", "all"):
        try:
            plan = api.plan(model, width, where=where)  # type: ignore[arg-type]
        except FxgrowError as error:
            yield f"| {name} | {where} | {groups} | 0 | {error} | | {seconds:.2f} |"
            continue
        reasons = Counter(refused.reason[:90] for refused in plan.refused)
        told = "; ".join(f"{count}× {reason}" for reason, count in reasons.items())
        if plan.submodules:
            told = f"in {', '.join(part.module for part in plan.submodules)}; {told}"
        small = plan.parameters[1] <= limit
        result = compared(name, plan) if small else f"({plan.parameters[1] / 1e6:.0f} M parameters)"
        gc.collect()
        yield (
            f"| {name} | {where} | {groups} | {len(plan.groups)} | {told} | {result} "
            f"| {seconds:.2f} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="classification")
    parser.add_argument("--width", default="2x")
    parser.add_argument("--max-parameters", type=float, default=3e8)
    parser.add_argument("architectures", nargs="*")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # about initial values
    family = torchvision.models
    if arguments.family != "classification":
        family = getattr(torchvision.models, arguments.family)
    names = arguments.architectures or torchvision.models.list_models(family)
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    for name in names:
        for row in rows(name, arguments.width, arguments.max_parameters):
            print(row, flush=True)


if __name__ == "__main__":
    main()
