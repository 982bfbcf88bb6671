"""R2R's two tests on real images: convergence, and faster training.

    sudo apt install dataset-fashion-mnist
    python examples/r2r_growth.py

Convergence: a small network is trained, grows in mid-training, and is trained on to where it ends;
a network of the large size, trained from scratch for as many epochs after the growth, is what to
compare it with. Faster training: the floating-point operations, the small network's included, until
the accuracy is what the large network from scratch ends with (less ``--margin``). Arms widen (to
twice the width), deepen (from two blocks in each stage to three) or pad with random weights.

Source: R2WiderR and R2DeeperR, the sections on convergence and on faster training.
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
from fxgrow.training import FlopLedger, deepen_, grow_

WIDER: dict[str, dict[str, Any]] = {
    "R2WiderR": {"preset": "r2wider"},
    "Net2WiderNet": {"preset": "net2wider"},
    "NetMorph": {"preset": "netmorph"},
    "random padding": {"preset": "random"},
}
DEEPER: dict[str, dict[str, Any]] = {
    "R2DeeperR": {"method": "r2deeper"},
    "zero last": {"method": "zero_last"},
}
ARMS = ("scratch, wide", *WIDER, "scratch, deep", *DEEPER, "scratch, small")


def run(
    arm: str, seed: int, *, before: int, after: int, width: int, data: str, root: str, images: int,
    rate: float,
) -> dict[str, Any]:  # fmt: skip
    """Train one arm from one seed, and return what was measured."""
    warnings.simplefilter("ignore", fxgrow.FxgrowWarning)
    began = time.process_time()
    given = load(data, Path(root) if root else None, images)
    example = given.train[0][:8]
    torch.manual_seed(seed)
    build = partial(SmallResNet, channels=given.channels)
    large = {"scratch, wide": (2 * width, 1), "scratch, deep": (width, 3)}
    net = build(*large.get(arm, (width, 2 if arm in DEEPER else 1)))
    grows = arm in WIDER or arm in DEEPER
    epochs = before + after if grows or arm == "scratch, small" else after
    optimizer, scheduler = optimizer_for(net, epochs, given, rate)
    ledger, generator = FlopLedger(), torch.Generator().manual_seed(seed)
    ledger.begin(net, example)
    curve, jump = [], 0.0
    for epoch in range(epochs):
        if grows and epoch == before:
            loss, _ = evaluate(net, *given.test)
            if arm in WIDER:
                grow_(
                    net, "2x", example,
                    where="all", optimizer=optimizer, scheduler=scheduler, seed=seed, **WIDER[arm],
                )  # fmt: skip
            else:
                blocks = {f"stage{index}": "+1" for index in (1, 2, 3)}
                deepen_(
                    net, blocks, example,
                    optimizer=optimizer, scheduler=scheduler, seed=seed, **DEEPER[arm],
                )  # fmt: skip
            jump = abs(evaluate(net, *given.test)[0] / loss - 1)
            ledger.begin(net, example)
        ledger.add(train_epoch(net, optimizer, scheduler, given, generator))
        curve.append((ledger.total, evaluate(net, *given.test)[1]))
    return {
        "accuracy": curve[-1][1],
        "flops": ledger.total,
        "curve": curve,
        "jump": jump,
        "seconds": time.process_time() - began,
    }


def spent_until(row: dict[str, Any], accuracy: float) -> float | None:
    """Return how many operations it took to an accuracy, None if it was never reached."""
    return next((flops for flops, reached in row["curve"] if reached >= accuracy), None)


def table(rows: Sequence[dict[str, Any]], margin: float) -> str:
    """Return both tests as a Markdown table."""
    lines = [
        "| arm | accuracy, % | beside scratch | FLOPs | to scratch's accuracy | loss jump |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        target = "scratch, deep" if arm in DEEPER or arm == "scratch, deep" else "scratch, wide"
        goals = by_seed(rows, target, "accuracy")
        whole = by_seed(rows, target, "flops")
        if not own:
            continue
        shares = [row["flops"] / whole[row["seed"]] for row in own if row["seed"] in whole]
        times = [
            spent / whole[row["seed"]]
            for row in own
            if row["seed"] in goals
            and (spent := spent_until(row, goals[row["seed"]] - margin)) is not None
        ]
        reached = f"{100 * statistics.fmean(times):.0f} %" if times else "never" if goals else "–"
        share = (
            f"{100 * statistics.fmean(shares):.0f} %"
            if shares
            else f"{statistics.fmean(row['flops'] for row in own):.2e}"
        )
        if times and len(times) < len(own):
            reached += f" ({len(times)} of {len(own)})"
        accuracy = by_seed(rows, arm, "accuracy")
        jump = statistics.fmean(row["jump"] for row in own)
        lines.append(
            f"| {arm} | {mean_std([*accuracy.values()])} | {paired(accuracy, goals)} | "
            f"{share} | {reached} | {jump:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and print the table."""
    parser = parser_for(__doc__.split("\n", 1)[0], ARMS, seeds=3, results="r2r_growth.jsonl")
    parser.add_argument("--before", type=int, default=8, help="epochs before the growth")
    parser.add_argument("--after", type=int, default=12, help="epochs after it")
    parser.add_argument("--width", type=int, default=8, help="of the first stage before growth")
    parser.add_argument("--margin", type=float, default=0.25, help="of accuracy, in per cent")
    arms = ("scratch, wide", "R2WiderR", "scratch, deep", "R2DeeperR")
    chosen, rows = results_of(parser, run, arms, {"before": 2, "after": 2, "width": 4})
    print(table(rows, chosen.margin))


if __name__ == "__main__":
    main()
