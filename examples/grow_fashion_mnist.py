"""Does it pay to start small? A small ResNet on real images, grown by a schedule while it trains.

    sudo apt install dataset-fashion-mnist
    python examples/grow_fashion_mnist.py

Every arm sees the same images in the same order, ends at the same size (but for ``small``) and has
the same optimizer and cosine. Each result is kept in a file as it comes, so the script can be
stopped and started again. ``--quick`` tries the script in seconds, on patterns that it makes.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from images import (
    SmallResNet,
    by_seed,
    evaluate,
    load,
    mean_std,
    optimizer_for,
    paired,
    parser_for,
    results_of,
    train_epoch,
)

import fxgrow
from fxgrow.training import FlopLedger, GrowthSchedule, enter_stage_, seed_network

ARMS: dict[str, dict[str, Any] | None] = {
    "large": None,  # at full size from the first epoch
    "full method": {"preset": "vt", "lr": "variance_transfer"},  # Yuan et al. 2023
    "variance transfer": {"preset": "vt"},  # without its learning rates
    "pairing alone": {"preset": "r2wider"},
    "net2wider": {"preset": "net2wider"},
    "random": {"preset": "random"},  # new weights are drawn, nothing is preserved
    "small": None,  # never grows
}


def run(
    arm: str,
    seed: int,
    *,
    epochs: int,
    first: int,
    width: int,
    data: str,
    root: str,
    images: int,
    rate: float,
) -> dict[str, Any]:
    """Train one arm from one seed, and return what was measured."""
    warnings.simplefilter("ignore", fxgrow.FxgrowWarning)
    began = time.process_time()
    given = load(data, Path(root) if root else None, images)
    example = given.train[0][:8]
    torch.manual_seed(seed)
    build = partial(SmallResNet, width, channels=given.channels)
    lasting: dict[str, int] = {"epochs": epochs, "first": first}
    if ARMS[arm] is None:  # only the first widths of the schedule matter, if these do
        lasting = {"epochs": 100}
    schedule = GrowthSchedule.geometric(
        build, initial=0.25, rate=0.4, stages=5, example_inputs=example, **lasting
    )
    net = build() if arm == "large" else seed_network(build, schedule, example)
    optimizer, scheduler = optimizer_for(net, epochs, given, rate)
    ledger, generator = FlopLedger(), torch.Generator().manual_seed(seed)
    ledger.begin(net, example)
    options, jumps, growing, stage = ARMS[arm], [], 0.0, 0
    for epoch in range(epochs):
        if options is not None and schedule.stage_at(epoch) != stage:
            stage = schedule.stage_at(epoch)
            before, _ = evaluate(net, *given.test)
            start = time.process_time()
            enter_stage_(
                net, schedule, stage, example,
                optimizer=optimizer, scheduler=scheduler, seed=seed, verify="quick", **options,
            )  # fmt: skip
            growing += time.process_time() - start
            jumps.append(abs(evaluate(net, *given.test)[0] / before - 1))
            ledger.begin(net, example)
        ledger.add(train_epoch(net, optimizer, scheduler, given, generator))
    loss, accuracy = evaluate(net, *given.test)
    return {
        "accuracy": accuracy,
        "loss": loss,
        "flops": ledger.total,
        "seconds": time.process_time() - began,
        "growing": growing,
        "jump": max(jumps, default=0.0),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the arms as a Markdown table."""
    lines = [
        "| arm | accuracy, % | beside large | FLOPs | CPU seconds | of these growing | loss jump |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    large = by_seed(rows, "large", "accuracy")
    whole = [*by_seed(rows, "large", "flops").values()]  # none, if that arm was not run
    for arm in ARMS:
        own = by_seed(rows, arm, "accuracy")
        if own:
            part, seconds, growing, jump = (
                statistics.fmean(by_seed(rows, arm, key).values())
                for key in ("flops", "seconds", "growing", "jump")
            )
            share = f"{100 * part / statistics.fmean(whole):.0f} %" if whole else f"{part:.2e}"
            lines.append(
                f"| {arm} | {mean_std([*own.values()])} | {paired(own, large)} | "
                f"{share} | {seconds:.0f} | {growing:.1f} | {jump:.1e} |"
            )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw accuracy against FLOPs, a point with its spread for each arm."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for arm in ARMS:
        own = [*by_seed(rows, arm, "accuracy").values()]
        if own:
            spent = statistics.fmean(by_seed(rows, arm, "flops").values()) / 1e12
            spread = statistics.stdev(own) if len(own) > 1 else 0.0
            axes.errorbar(spent, statistics.fmean(own), spread, fmt="o", capsize=3, label=arm)
    axes.set_xlabel("floating-point operations of the training, 10¹²")
    axes.set_ylabel("test accuracy, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run what is asked for and print the table."""
    parser = parser_for(
        __doc__.split("\n", 1)[0], ARMS, seeds=5, results="grow_fashion_mnist.jsonl"
    )
    parser.add_argument("--epochs", type=int, default=20, help="in all")
    parser.add_argument("--first", type=int, default=2, help="how many of them are the first stage")
    parser.add_argument("--width", type=int, default=16, help="of the first stage at full size")
    parser.add_argument("--plot", type=Path, help="a file for the picture (needs matplotlib)")
    arms = ("large", "full method", "pairing alone")
    chosen, rows = results_of(parser, run, arms, {"epochs": 9, "first": 1, "width": 8})
    print(table(rows))
    if chosen.plot:
        plot(rows, chosen.plot)


if __name__ == "__main__":
    main()
