"""Analysis and surgery of ResNet-50 against doing nothing clever, as ratios of one run.

    python tests/benchmarks/resnet50_ratios.py

(a) analysis and planning against ``torch.fx.symbolic_trace`` and shape propagation on meta
tensors; (b) surgery without verification against a bare ``copy.deepcopy`` of the widened state.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

from fxgrow.api import widen as api
from fxgrow.channels.analysis import analyse
from fxgrow.labels.trace import trace
from fxgrow.modules.standin import stand_in


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print median times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    model = torchvision.models.get_model(arguments.arch).eval()
    image = torch.empty(2, 3, 224, 224, device="meta")
    plan = api.plan(model, "2x")
    widened = plan.apply(model).state_dict()
    on_meta = stand_in(model)
    works: dict[str, Callable[[], object]] = {
        "symbolic_trace + ShapeProp": lambda: ShapeProp(fx.symbolic_trace(on_meta)).propagate(
            image
        ),
        "analysis": lambda: analyse(trace(model)),
        "analysis and plan": lambda: api.plan(model, "2x"),
        "deepcopy of the widened state": lambda: copy.deepcopy(widened),
        "surgery": lambda: plan.apply(model),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(arguments.repeat):  # in turn, so that drift of the machine cancels
        for name, work in works.items():
            times[name].append(seconds(work))
    median = {name: statistics.median(found) for name, found in times.items()}
    for name, value in median.items():
        print(f"{name:32s} {value:8.3f} s")
    base, copied = median["symbolic_trace + ShapeProp"], median["deepcopy of the widened state"]
    print(f"analysis / (trace + ShapeProp)          {median['analysis'] / base:5.2f}")
    print(f"analysis and plan / (trace + ShapeProp) {median['analysis and plan'] / base:5.2f}")
    print(f"surgery / deepcopy                      {median['surgery'] / copied:5.2f}")


if __name__ == "__main__":
    main()
