"""How far networks that have grown are from the narrow ones in training: many certificates.

Run: python tests/benchmarks/certificates.py [--steps 200] [--results FILE] [--only NETWORK …]

Each of three networks grows to two and three times its width, hidden channels or all, under each of
ten optimizers, in turns before the first and after the 20th step: 120 runs. Where hidden channels
are doubled, there is one more with unchanged rates, of 20 steps. A line per run; what stands in the
file of results is not computed again. At the end: for each network how many runs follow, the worst
of them, and how far unchanged rates depart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_certificate import LOSS, NETWORKS, OPTIMIZERS, case

import fxgrow.training

UNCHANGED = 20  # steps, after which they are far away


def certified(name: str, where: str, width: str, key: str, lr: str, at: int, steps: int) -> Any:
    """Return what one run shows, as a line of the results."""
    model, grown, batches = case(name, width, where=where)
    found = fxgrow.training.certify(
        model, grown, LOSS, batches, optimizer=OPTIMIZERS[key], steps=steps, lr=lr, grown_at=at
    )
    return {
        "worst": found.worst,
        "one_ulp": max(deviation.one_ulp for deviation in found.deviations),
        "follows": found.follows,
        "departs_at": found.departs_at,
    }


def summary(name: str, done: dict[str, Any]) -> str:
    """Return a line about all runs of a network."""
    mine = {key: one for key, one in done.items() if json.loads(key)[0] == name}
    kept = {key: one for key, one in mine.items() if json.loads(key)[4] == "width"}
    free = [one["worst"] for key, one in mine.items() if key not in kept]
    worst = max(kept, key=lambda key: kept[key]["worst"])
    return (
        f"{name}: {sum(one['follows'] for one in kept.values())} of {len(kept)} follow, the worst "
        f"{kept[worst]['worst']:.1e} beside {kept[worst]['one_ulp']:.1e} of one ulp ({worst}); "
        f"unchanged rates depart by {min(free):.1e} to {max(free):.1e}"
    )


def main() -> int:
    """Print each run and a summary; 1 if a run under the rule does not follow."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results", type=Path, default=Path("certificates.jsonl"))
    parser.add_argument("--only", action="append", choices=list(NETWORKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {}
    if options.results.exists():
        done = dict(json.loads(line) for line in options.results.read_text().splitlines())
    names = options.only or list(NETWORKS)
    runs: list[tuple[Any, ...]] = [
        (name, where, width, optimizer, "width", 20 * (index % 2), options.steps)
        for name in names
        for where, width in itertools.product(("hidden", "all"), ("2x", "3x"))
        for index, optimizer in enumerate(OPTIMIZERS)
    ]
    runs += [
        (name, "hidden", "2x", key, "none", 0, UNCHANGED) for name in names for key in OPTIMIZERS
    ]
    for run in runs:
        key = json.dumps(run)
        if key not in done:
            done[key] = certified(*run)
            with options.results.open("a") as file:
                file.write(json.dumps([key, done[key]]) + "\n")
        one = done[key]
        verdict = "follows" if one["follows"] else f"departs at {one['departs_at']}"
        print(f"{key}: {one['worst']:.1e} beside {one['one_ulp']:.1e}, {verdict}", flush=True)
    print(*(summary(name, done) for name in names), sep="\n")
    wanted = [one for key, one in done.items() if json.loads(key)[4] == "width"]
    return int(not all(one["follows"] for one in wanted))


if __name__ == "__main__":
    sys.exit(main())
