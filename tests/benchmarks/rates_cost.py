"""Print what rates of parts (``lr="variance_transfer"``) cost of a training step of a ResNet-18.

Run it with ``OMP_NUM_THREADS=1 python tests/benchmarks/rates_cost.py``; it takes some minutes. CPU
time of one thread: medians over steps with rates and without them, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torchvision
from torch import nn

import fxgrow
from fxgrow.training import GrowthSchedule
from fxgrow.training.stepping import RATES

BATCH, SIDE = 128, 32


def resnet(stem: str) -> nn.Module:
    """Return a ResNet-18 with a stem for small or for large images."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    if stem == "small":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def grown(stem: str, stages: int) -> nn.Module:
    """Return a ResNet-18 that has grown to its full size in stages, from half of it."""
    definition, inputs = resnet(stem), torch.randn(2, 3, SIDE, SIDE)
    schedule = GrowthSchedule.geometric(
        definition, initial=0.5, epochs=20, example_inputs=inputs, stages=stages
    )
    model = fxgrow.training.seed_network(definition, schedule, inputs, check=False)
    for stage in range(1, stages):
        fxgrow.training.enter_stage_(
            model, schedule, stage, inputs, lr="variance_transfer", preset="vt", verify=False
        )
    return model


def measured(model: nn.Module, make: Any, repetitions: int) -> tuple[float, float]:
    """Return the CPU time in seconds that rates add to a step, and that of a step without them."""
    optimizer = make(model.parameters())
    inputs, targets = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(10, (BATCH,))
    rates = [
        (parameter, RATES[parameter]) for parameter in model.parameters() if parameter in RATES
    ]
    found: dict[bool, list[float]] = {True: [], False: []}
    learning: list[float] = []
    for number in range(2 * repetitions + 2):
        with_rates = bool(number % 2)
        for parameter, rate in rates:
            if with_rates:
                RATES[parameter] = rate
            else:
                RATES.pop(parameter)
        begin = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        ready = time.process_time()
        optimizer.step()
        end = time.process_time()
        if number > 1:  # the first ones make the optimizer's averages
            learning.append(ready - begin)
            found[with_rates].append(end - ready)
    with_them, without = (statistics.median(found[which]) for which in (True, False))
    return with_them - without, statistics.median(learning) + without


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--stem", choices=("large", "small"), action="append")
    given = parser.parse_args()
    torch.set_num_threads(1)
    optimizers: dict[str, Any] = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    }
    print("| stem | growths | optimizer | rates, ms | step, ms | share |")
    print("|---|---|---|---|---|---|")
    for stem in given.stem or ("large", "small"):
        for stages in (2, 5):
            model = grown(stem, stages)
            for name, make in optimizers.items():
                more, step = measured(model, make, given.repetitions)
                row = (stem, stages - 1, name, f"{more * 1e3:.1f}", f"{step * 1e3:.0f}")
                print("|", " | ".join(map(str, row)), f"| {more / step:.1%} |", flush=True)


if __name__ == "__main__":
    main()
